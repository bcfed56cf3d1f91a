"""Measured times of single kernels (aiconfigurator, vidur, frontier), and the shares of a device's peaks that explain them.

Each `Fit` is one kind of kernel on one family of devices: a formula of `placement/roofline.py` with its shares as parameters,
fitted on some of the shapes and judged on the others.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from baton.placement.hardware import Accelerator, find_accelerator
from log_fit import Array, fit, mean_error, median_error

Columns = Mapping[str, Array]
TEST_SHARE = 0.3
AIC = {"A100-80GB": "a100_sxm", "H100": "h100_sxm", "H200": "h200_sxm"}  # folders of aiconfigurator
FAMILIES = {"a100": ("A100-80GB",), "h100": ("H100", "H200")}


@dataclass(frozen=True, slots=True)
class Fit:
    """Parameters of one kernel, and its errors where it was fitted and where it was not."""

    kernel: str
    family: str
    parameters: tuple[float, ...]
    rows: int
    train_error: float
    test_error: float
    test_median: float


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one kernel: what its time depends on, seconds, and which shape each row belongs to."""

    features: Columns
    seconds: Array
    shapes: Array

    def rows(self, keep: Array) -> Table:
        return Table({name: values[keep] for name, values in self.features.items()}, self.seconds[keep], self.shapes[keep])


Formula = Callable[[Array, Columns], Array]


def fit_table(kernel: str, family: str, table: Table, formula: Formula, start: Sequence[float], most: int) -> Fit:
    """Fit on 70% of the shapes, judge on the others."""
    draw = np.random.default_rng(0)
    names = np.unique(table.shapes)
    test_names = draw.permutation(names)[: max(1, int(TEST_SHARE * len(names)))]
    in_test = np.isin(table.shapes, test_names)
    train, test = table.rows(~in_test), table.rows(in_test)
    if len(train.seconds) > most:
        train = train.rows(draw.permutation(len(train.seconds))[:most])
    parameters = fit(lambda p: formula(p, train.features), train.seconds, start)
    predicted = formula(parameters, test.features)
    return Fit(
        kernel,
        family,
        tuple(float(p) for p in parameters),
        len(table.seconds),
        mean_error(formula(parameters, train.features), train.seconds),
        mean_error(predicted, test.seconds),
        median_error(predicted, test.seconds),
    )


# ---- products -----------------------------------------------------------------------------------


def gemm_formula(p: Array, f: Columns) -> Array:
    """(flops, bytes, launch): the longer of FLOPs and bytes, and a launch."""
    compute = 2 * f["m"] * f["n"] * f["k"] / (f["flops"] * p[0])
    moved = (f["n"] * f["k"] + f["m"] * f["k"]) * f["weight_bytes"] + 2 * f["m"] * f["n"]
    return p[2] + np.maximum(compute, moved / (f["bandwidth"] * p[1]))


def gemm_table(data: Path, family: str, dtype: str) -> Table:
    """Products that a transformer's layers are made of: 1 to 16,384 tokens, sides of 512 at least."""
    parts = []
    for name in FAMILIES[family]:
        device, raw = find_accelerator(name), _parquet(data, name, "gemm_perf")
        keep = np.array([kind == dtype for kind in raw["gemm_dtype"]])
        m, n, k = (np.asarray(raw[key], dtype=float) for key in "mnk")
        keep &= (m <= 16384) & (n >= 512) & (k >= 512) & (n <= 60000) & (np.asarray(raw["latency"]) > 0)
        size = np.full(len(m), 2.0 if dtype == "bfloat16" else 1.0)
        features = _device_columns(device, len(m), "fp8" if dtype.startswith("fp8") else dtype)
        features |= {"m": m, "n": n, "k": k, "weight_bytes": size}
        parts.append(Table(features, np.asarray(raw["latency"]) * 1e-3, n * 1e6 + k).rows(keep))
    return _joined(parts)


# ---- attention ----------------------------------------------------------------------------------


def prefill_formula(p: Array, f: Columns) -> Array:
    """(flops, launch)."""
    return p[1] + np.maximum(f["pair_flops"] / (f["flops"] * p[0]), f["bytes"] / (f["bandwidth"] * 0.8))


def prefill_table(data: Path, family: str) -> Table:
    """Whole prompts in bfloat16."""
    parts = []
    for name in FAMILIES[family]:
        device, raw = find_accelerator(name), _parquet(data, name, "context_attention_perf")
        batch, isl, heads, kv_heads, dim = (
            np.asarray(raw[key], dtype=float) for key in ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim")
        )
        kv_heads = np.where(kv_heads == 0, heads, kv_heads)
        keep = _plain(raw) & (isl >= 64) & (np.asarray(raw["step"], dtype=float) == 0)
        features = _device_columns(device, len(isl), "bfloat16")
        features["pair_flops"] = 4 * heads * dim * batch * isl * (isl + 1) / 2
        features["bytes"] = 2 * batch * isl * dim * (2 * heads + 2 * kv_heads)
        shapes = heads * 1e6 + kv_heads * 1e3 + dim + batch * 1e9
        parts.append(Table(features, np.asarray(raw["latency"]) * 1e-3, shapes).rows(keep))
    return _joined(parts)


def decode_formula(p: Array, f: Columns) -> Array:
    """(bytes, launch)."""
    return p[1] + f["bytes"] / (f["bandwidth"] * p[0])


def decode_table(data: Path, family: str) -> Table:
    """One token a row in bfloat16."""
    parts = []
    for name in FAMILIES[family]:
        device, raw = find_accelerator(name), _parquet(data, name, "generation_attention_perf")
        batch, isl, step, heads, kv_heads, dim = (
            np.asarray(raw[key], dtype=float)
            for key in ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim")
        )
        kv_heads = np.where(kv_heads == 0, heads, kv_heads)
        context = isl + step
        keep = _plain(raw) & (context >= 64) & (context <= 32768)
        features = _device_columns(device, len(isl), "bfloat16")
        features["bytes"] = 2 * batch * context * kv_heads * dim * 2
        shapes = heads * 1e6 + kv_heads * 1e3 + dim + batch * 1e9
        parts.append(Table(features, np.asarray(raw["latency"]) * 1e-3, shapes).rows(keep))
    return _joined(parts)


# ---- all-reduce ---------------------------------------------------------------------------------


def reduce_formula(p: Array, f: Columns) -> Array:
    """(share of the link, seconds, seconds per rank)."""
    moved = 2 * (f["ranks"] - 1) / f["ranks"] * f["bytes"]
    return p[1] + p[2] * f["ranks"] + moved / (f["link"] * p[0])


def reduce_table(data: Path, family: str) -> Table:
    """As engines call it: the custom one in a graph where there is one for the size, NCCL beyond."""
    parts = []
    for name in FAMILIES[family]:
        device = find_accelerator(name)
        for file, kind in (("custom_allreduce_perf", "graph"), ("nccl_perf", "")):
            raw = _parquet(data, name, file)
            ranks, size = (np.asarray(raw[key], dtype=float) for key in ("num_gpus", "message_size"))
            size = size * 2  # elements of 16 bits
            backend = raw.get("kernel_source", [""] * len(size)) if kind else raw["op_name"]
            wanted = np.array([(kind in str(b)) if kind else str(b) == "all_reduce" for b in backend])
            types = raw.get("allreduce_dtype", raw.get("nccl_dtype"))
            wanted &= np.array([str(t) in ("bfloat16", "half", "float16") for t in types])
            wanted &= np.isin(ranks, (2, 4, 8)) & (size >= 4096) & (size <= (4 << 20 if kind else 256 << 20))
            if not kind:
                wanted &= size > 4 << 20
            features = {"ranks": ranks, "bytes": size, "link": np.full(len(size), device.link)}
            parts.append(Table(features, np.asarray(raw["latency"]) * 1e-3, size).rows(wanted))
    return _joined(parts)


# ---- the rest of a layer ------------------------------------------------------------------------

_OTHERS = ("input_layernorm", "attn_rope", "post_attention_layernorm", "mlp_act", "add")
_PRODUCTS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")


def layer_formula(p: Array, f: Columns) -> Array:
    """(passes over the hidden state, seconds): norms, rotary positions, activation, residuals."""
    return p[1] + p[0] * f["hidden_bytes"] / (f["bandwidth"] * 0.8)


def layer_table(data: Path, folders: Sequence[tuple[str, str]]) -> Table:
    """What vidur or frontier measured of a layer beside its products; folders as (device, path)."""
    parts = []
    for name, folder in folders:
        rows = read_csv(data / folder / "mlp.csv")
        seconds = sum(_times(rows, part) for part in _OTHERS) + _times(rows, "add")
        tokens, width = _numbers(rows, "num_tokens"), _numbers(rows, "n_embd")
        features = _device_columns(find_accelerator(name), len(rows), "bfloat16") | {"hidden_bytes": 2 * tokens * width}
        parts.append(Table(features, seconds, tokens))
    return _joined(parts)


def mlp_table(data: Path, folders: Sequence[tuple[str, str]]) -> Table:
    """The products of a layer that vidur or frontier measured, one row each."""
    parts = []
    for name, folder in folders:
        rows = read_csv(data / folder / "mlp.csv")
        tokens, width, inner, heads, kv_heads, ranks = (
            _numbers(rows, key)
            for key in ("num_tokens", "n_embd", "n_expanded_embd", "n_head", "n_kv_head", "num_tensor_parallel_workers")
        )
        dim = width / heads
        gate = np.array([2.0 if row["use_gated_mlp"] == "True" else 1.0 for row in rows])
        sides = {
            "attn_pre_proj": (width, (heads + 2 * np.maximum(kv_heads, ranks)) * dim / ranks),
            "attn_post_proj": (width / ranks, width),
            "mlp_up_proj": (width, gate * inner / ranks),
            "mlp_down_proj": (inner / ranks, width),
        }
        for part in _PRODUCTS:
            k, n = sides[part]
            features = _device_columns(find_accelerator(name), len(rows), "bfloat16")
            features |= {"m": tokens, "n": n, "k": k, "weight_bytes": np.full(len(rows), 2.0)}
            seconds = _times(rows, part)
            parts.append(Table(features, seconds, n * 1e6 + k).rows(seconds > 0))
    return _joined(parts)


def frontier_attention(data: Path) -> tuple[Table, Table]:
    """Prefill of whole prompts, and decode, of Llama-2-7B on A800 as frontier measured it."""
    rows = read_csv(data / "frontier/compute/a800/meta-llama/Llama-2-7b-hf/attention.csv")
    batch, chunk, context, ranks = (
        _numbers(rows, key) for key in ("batch_size", "prefill_chunk_size", "kv_cache_size", "num_tensor_parallel_workers")
    )
    heads, kv_heads = _numbers(rows, "n_q_head") / ranks, _numbers(rows, "n_kv_head") / ranks
    dim = _numbers(rows, "n_embd") / _numbers(rows, "n_q_head")
    is_prefill = np.array([row["is_prefill"] == "True" for row in rows])
    features = _device_columns(find_accelerator("A800"), len(rows), "bfloat16")
    prefill = dict(features)
    prefill["pair_flops"] = 4 * heads * dim * batch * (chunk * context + chunk * (chunk + 1) / 2)
    prefill["bytes"] = 2 * batch * dim * (2 * heads * chunk + 2 * kv_heads * (chunk + context))
    decode = features | {"bytes": 2 * batch * context * kv_heads * dim * 2}
    times = _times(rows, "attn_prefill"), _times(rows, "attn_decode")
    return (
        Table(prefill, times[0], batch).rows(is_prefill & (times[0] > 0) & (chunk >= 64)),
        Table(decode, times[1], batch).rows(~is_prefill & (times[1] > 0) & (context >= 64)),
    )


# ---- reading ------------------------------------------------------------------------------------


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _parquet(data: Path, device: str, name: str) -> dict[str, list]:
    files = sorted((data / "aiconfigurator/data" / AIC[device]).rglob(f"{name}.parquet"))
    return parquet.read_table(files[-1]).to_pydict()


def _plain(raw: Mapping[str, Sequence]) -> Array:
    """Rows of full attention in 16 bits."""
    window = np.asarray(raw["window_size"]) if "window_size" in raw else np.zeros(len(raw["latency"]))
    types = np.array([str(kind) in ("bfloat16", "float16") for kind in raw["kv_cache_dtype"]])
    return types & (window == 0) & (np.asarray(raw["latency"]) > 0)


def _device_columns(device: Accelerator, rows: int, dtype: str) -> dict[str, Array]:
    return {"flops": np.full(rows, device.flops(dtype)), "bandwidth": np.full(rows, device.bandwidth)}


def _times(rows: Sequence[Mapping[str, str]], part: str) -> Array:
    """Seconds."""
    return np.array([float(row.get(f"time_stats.{part}.median") or 0.0) for row in rows]) * 1e-3


def _numbers(rows: Sequence[Mapping[str, str]], key: str) -> Array:
    return np.array([float(row[key]) for row in rows])


def _joined(parts: Sequence[Table]) -> Table:
    return Table(
        {name: np.concatenate([part.features[name] for part in parts]) for name in parts[0].features},
        np.concatenate([part.seconds for part in parts]),
        np.concatenate([part.shapes for part in parts]),
    )
