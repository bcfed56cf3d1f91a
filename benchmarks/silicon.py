"""Measured TTFT and TPOT of whole serving systems (`silicon_calibration.csv`), and what the roofline says of the same runs.

Rows are closed loops of `concurrency` clients against vLLM, SGLang or TensorRT-LLM on H100 and H200; predicted by playing the
same loop in virtual time. An engine differs from another by how it batches and by what its host costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from baton.placement.efficiency import Efficiency
from baton.placement.hardware import Accelerator, find_accelerator
from baton.placement.model_shape import ModelShape, find_model
from baton.placement.roofline import kv_capacity, roofline_cost
from closed_loop import Engine, closed_loop
from kernel_tables import read_csv
from log_fit import Array

DEVICES = {"h100_sxm": "H100", "h200_sxm": "H200"}
MODELS = {"Llama-3.1-8B-Instruct-FP8": "Llama-3.1-8B"}
RESERVE_BYTES = 1e9  # of a device's memory, for activations


@dataclass(frozen=True, slots=True)
class System:
    """How a serving system batches, and how it was driven: chosen once for all of its runs, not by cross-validation.

    reserve   share of a request's output for which room must be left when it starts
    memory    share of a device's memory for weights and KV
    requests  of a run, but at least three of each client and at most twelve; all clients begin at once
    spread    of output lengths: breaks up batches that would begin and end together for ever
    kv_8      KV is kept in 8 bits where weights are
    """

    prefill_first: bool
    reserve: float
    memory: float
    requests: int
    spread: float = 0.0
    kv_8: bool = False

    def waves(self, concurrency: int) -> int:
        return max(3, min(12, round(self.requests / concurrency)))


SYSTEMS = {
    "sglang": System(prefill_first=True, reserve=0.7, memory=0.8, requests=256),
    "trtllm": System(prefill_first=False, reserve=1.0, memory=0.9, requests=1024, spread=0.2, kv_8=True),
    "vllm": System(prefill_first=False, reserve=0.5, memory=0.9, requests=1024, spread=0.2),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One measured run. Times in seconds."""

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
    def group(self) -> tuple[str, str, str]:
        return self.backend, self.model.name, self.device.name


def read_rows(data: Path) -> list[Row]:
    """Colocated runs, each measurement once: the same run may appear under two model labels."""
    found: dict[tuple[str, ...], Row] = {}
    for raw in read_csv(data / "aiconfigurator/silicon_calibration.csv"):
        if raw["mode"] != "agg" or int(raw["pp_size"] or 1) != 1:
            continue
        key = tuple(raw[k] for k in ("system", "backend", "mode", "isl", "osl", "silicon_ttft_ms", "silicon_tpot_ms"))
        name = raw["model_path"].rsplit("/", 1)[-1]
        found[key] = Row(
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


@dataclass(frozen=True, slots=True)
class Host:
    """What tells one serving system from another.

    kernels      factor of what the fitted kernel shares say of a product, and of attention
    step, row, layer  seconds of `Efficiency`
    prefill      factor of a prompt's products: kernels of large batches and what surrounds them
    request      seconds of a request outside its steps
    """

    weights: float = 1.0
    prefill: float = 1.0
    step: float = 1e-3
    row: float = 2e-5
    layer: float = 5e-6
    reduce: float = 1.0
    request: float = 0.02

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


FIELDS = ("weights", "prefill", "step", "row", "layer", "reduce", "request")
START = tuple(getattr(Host(), name) for name in FIELDS)


def predict(rows: Sequence[Row], host: Host, efficiencies: Mapping[str, Efficiency]) -> Array:
    """[TTFT of every row, then TPOT of every row]."""
    made = [_predict(row, host, efficiencies) for row in rows]
    return np.array([ttft for ttft, _ in made] + [tpot for _, tpot in made])


def measured(rows: Sequence[Row]) -> Array:
    """In the order of `predict`."""
    return np.array([row.ttft for row in rows] + [row.tpot for row in rows])


def _predict(row: Row, host: Host, efficiencies: Mapping[str, Efficiency]) -> tuple[float, float]:
    system = SYSTEMS[row.backend]
    kv_dtype = "fp8" if row.dtype == "fp8" and system.kv_8 else "bfloat16"
    split = (row.model, row.device, row.tensor_parallel, 1, row.dtype, kv_dtype)
    cost = roofline_cost(*split, host.apply(efficiencies[row.device.family]))
    room = kv_capacity(*split, share=system.memory, reserve_bytes=RESERVE_BYTES)
    engine = Engine(
        cost,
        room,
        prefill_first=system.prefill_first,
        request=host.request,
        reserve=system.reserve,
        spread=system.spread,
    )
    return closed_loop(engine, row.concurrency, row.isl, row.osl, system.waves(row.concurrency))
