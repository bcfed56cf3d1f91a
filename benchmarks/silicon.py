"""Measured TTFT and TPOT of whole serving systems (`silicon_calibration.csv`), and what the roofline says of the same runs.

Rows are means over closed loops of `concurrency` clients against vLLM, SGLang or TensorRT-LLM on H100 and H200; predicted by
playing the same loop in virtual time. Who measured decides how the loop was driven and how the engine was told to batch, and the
public scripts of those who did say both:

inferencex  InferenceX (SemiAnalysis), benchmarks/70b_fp8_h100_slurm.sh, 70b_fp8_h200_slurm.sh and 70b_fp8_h200_trt_slurm.sh: ten
            requests a client, lengths between 0.8 of the nominal ones and these, KV in 8 bits, as many rows as clients; steps of
            8,192 tokens with vLLM and of one whole request with TensorRT-LLM, which holds prompts of 1,024 back for 20 steps
sweep       aiconfigurator, eval/benchmarks/genai_perf_runner.py: lengths all alike, ten requests a client after a warm-up
planned     the same by the settings that aiconfigurator writes for a deployment, whose generator allows steps of the prompt's
            length and 1,500 tokens, and lets SGLang mix prompts with decode rows. Its client knows 100 different prompts unless
            told otherwise, and vLLM keeps prefixes unless told otherwise: there the warm-up leaves nothing to prefill

Not in those scripts, and inferred from the rows: that steps of the sweep hold one prompt and all decode rows (isl + concurrency
tokens), and that TensorRT-LLM ran the 8B model of the sweep with one row less than there were clients (of eight, one waits for a
whole request, whatever its length).

Left out by what they are: rows with prefill and decode apart, and deployments behind Dynamo's router, which do not say over
how many workers their clients are spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from baton.placement.efficiency import Efficiency
from baton.placement.hardware import Accelerator, find_accelerator
from baton.placement.model_shape import ModelShape, find_model
from baton.placement.roofline import kv_capacity, roofline_cost
from closed_loop import Engine, Load, closed_loop
from kernel_tables import read_csv
from log_fit import Array

DEVICES = {"h100_sxm": "H100", "h200_sxm": "H200"}
MODELS = {"Llama-3.1-8B-Instruct-FP8": "Llama-3.1-8B"}
RESERVE_BYTES = 1e9  # of a device's memory, for activations
REQUESTS = 1280  # of a simulated run at most, where that leaves ROUNDS[0] of each client
ROUNDS = (4, 10)
MEMORY = {"sglang": 0.8, "trtllm": 0.9, "vllm": 0.9}  # share of a device's memory for weights and KV
KEPT_ROOM = {"sglang": 0.7, "trtllm": 1.0, "vllm": 0.5}  # share of an output for which there must be room when it starts


@dataclass(frozen=True, slots=True)
class Row:
    """One measured run. Times in seconds; `source` is one of the three above."""

    source: str
    backend: str
    model: ModelShape
    device: Accelerator
    dtype: str
    isl: int
    osl: int
    concurrency: int
    tensor_parallel: int
    ttft: float
    tpot: float

    @property
    def system(self) -> tuple[str, str]:
        """Who ran what: runs that share an engine's version and settings."""
        return self.backend, self.source

    @property
    def group(self) -> tuple[str, str, str, str]:
        return *self.system, self.model.name, self.device.name


def read_rows(data: Path) -> list[Row]:
    """Colocated runs, each measurement once: the same run may appear under two model labels."""
    found: dict[tuple[str, ...], Row] = {}
    for raw in read_csv(data / "aiconfigurator/silicon_calibration.csv"):
        source = _source(raw)
        if source is None:
            continue
        key = tuple(raw[k] for k in ("system", "backend", "mode", "isl", "osl", "silicon_ttft_ms", "silicon_tpot_ms"))
        name = raw["model_path"].rsplit("/", 1)[-1]
        found[key] = Row(
            source,
            raw["backend"],
            find_model(MODELS.get(name, name)),
            find_accelerator(DEVICES[raw["system"]]),
            "fp8" if raw["precision"] == "fp8" else "bfloat16",
            int(raw["isl"]),
            int(raw["osl"]),
            int(raw["batch_size"]),
            int(raw["tp_size"]),
            float(raw["silicon_ttft_ms"]) * 1e-3,
            float(raw["silicon_tpot_ms"]) * 1e-3,
        )
    return list(found.values())


def _source(raw: Mapping[str, str]) -> str | None:
    """Who measured it; None for what is left out."""
    if raw["mode"] != "agg" or int(raw["pp_size"] or 1) != 1 or "dynamo_version" in raw["silicon_data_source"]:
        return None
    if "/aic-auto-gap-analysis/" not in raw["silicon_data_source"]:
        return "inferencex"
    return "planned" if int(raw["isl"]) % 1000 == 0 else "sweep"


@dataclass(frozen=True, slots=True)
class Host:
    """What tells one serving system from another.

    weights, prefill   factors of what the fitted kernel shares say of streaming weights, and of large products
    step, row, layer   seconds of `Efficiency`
    reduce             factor of an all-reduce
    request            seconds of a request outside its steps
    """

    weights: float = 1.0
    prefill: float = 1.0
    step: float = 1e-3
    row: float = 2e-5
    layer: float = 5e-6
    reduce: float = 1.0
    request: float = 0.01

    def apply(self, base: Efficiency) -> Efficiency:
        return replace(
            base,
            gemm_bytes=base.gemm_bytes / self.weights,
            gemm_flops=base.gemm_flops / self.prefill,
            gemm_flops_8=base.gemm_flops_8 / self.prefill,
            step=self.step,
            row=self.row,
            layer=self.layer,
            reduce_bytes=base.reduce_bytes / self.reduce,
            reduce_launch=base.reduce_launch * self.reduce,
        )


START = tuple(getattr(Host(), field.name) for field in fields(Host))


def predict(rows: Sequence[Row], host: Host, efficiencies: Mapping[str, Efficiency]) -> Array:
    """[TTFT of every row, then TPOT of every row]."""
    made = [_predict(row, host, efficiencies) for row in rows]
    return np.array([ttft for ttft, _ in made] + [tpot for _, tpot in made])


def measured(rows: Sequence[Row]) -> Array:
    """In the order of `predict`."""
    return np.array([row.ttft for row in rows] + [row.tpot for row in rows])


def load_of(row: Row) -> Load:
    """How the loop was driven."""
    rounds = max(ROUNDS[0], min(ROUNDS[1], REQUESTS // row.concurrency))
    return Load(
        row.concurrency,
        row.isl,
        row.osl,
        rounds,
        shortest=0.8 if row.source == "inferencex" else 1.0,
        cached=row.system == ("vllm", "planned"),
    )


def _predict(row: Row, host: Host, efficiencies: Mapping[str, Efficiency]) -> tuple[float, float]:
    kv_8 = row.source == "inferencex" or (row.backend == "trtllm" and row.dtype == "fp8")
    split = (row.model, row.device, row.tensor_parallel, 1, row.dtype, "fp8" if kv_8 else "bfloat16")
    cost = roofline_cost(*split, host.apply(efficiencies[row.device.family]))
    room = kv_capacity(*split, share=MEMORY[row.backend], reserve_bytes=RESERVE_BYTES)
    engine = Engine(cost, room, request=host.request, reserve=KEPT_ROOM[row.backend])
    return closed_loop(_settings(row, engine), load_of(row))


def _settings(row: Row, engine: Engine) -> Engine:
    """How the engine was told to batch."""
    match row.backend, row.source:
        case "vllm", "inferencex":
            return replace(engine, chunk=8192, max_seqs=row.concurrency)
        case "trtllm", "inferencex":
            short = row.isl == row.osl == 1024
            longest = row.isl + row.osl + (20 if short else 200)
            held = 20 if short and row.tensor_parallel < 8 else 0
            return replace(engine, chunk=longest, whole=True, gather_steps=held, gather=0.9)
        case "sglang", "sweep":
            return replace(engine, chunk=8192, prefill_first=True)
        case "trtllm", "sweep":
            rows = row.concurrency - (row.model.name == "Llama-3.1-8B")
            return replace(engine, chunk=row.isl + row.concurrency, whole=True, max_seqs=rows)
        case "vllm", "sweep":
            return replace(engine, chunk=row.isl + row.concurrency)
        case _:
            return replace(engine, chunk=row.isl + 1500)
