"""Fit what `placement/efficiency.py` says of devices, and say how wrong it is on rows that were not used.

    python benchmarks/fit_efficiency.py --data DIR [--quick]

DIR is the folder of `aiconfigurator`, `vidur`, `frontier`, `splitwise` and `distserve`. First single kernels: products,
attention, all-reduce, the rest of a layer; each fitted on 70% of the shapes. Then kernels and whole steps that nobody fitted.
Then whole serving systems, by three-fold cross-validation over runs. Tables are Markdown, as in docs/fidelity.md. The last line
is JSON: `silicon_ttft_error` and `silicon_tpot_error` are mean absolute relative errors on held-out runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path

import kernel_tables as tables
import numpy as np
from baton.placement.efficiency import Efficiency, efficiency_of
from kernel_tables import Fit, Table, fit_table
from log_fit import Array, fit
from silicon import START, Host, Row, measured, predict, read_rows
from whole_steps import whole_steps

FOLDS = 3
LAYERS = {
    "a100": (
        ("A100-80GB", "vidur/compute/a100/meta-llama/Llama-2-7b-hf"),
        ("A100-80GB", "vidur/compute/a100/meta-llama/Llama-2-70b-hf"),
        ("A100-80GB", "vidur/compute/a100/meta-llama/Meta-Llama-3-8B"),
    ),
    "h100": (
        ("H100", "vidur/compute/h100/meta-llama/Llama-2-7b-hf"),
        ("H100", "vidur/compute/h100/meta-llama/Llama-2-70b-hf"),
    ),
    "a40": (("A40", "vidur/compute/a40/meta-llama/Llama-2-7b-hf"),),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the measurements")
    parser.add_argument("--quick", action="store_true", help="fewer rows, two folds")
    arguments = parser.parse_args()
    if not (arguments.data / "aiconfigurator").is_dir():
        raise SystemExit(f"{arguments.data} holds no folder aiconfigurator; give the folder of the measurements")
    most = 1500 if arguments.quick else 6000
    fits = kernel_fits(arguments.data, most)
    efficiencies = {family: kernel_efficiency(fits, family) for family in ("a100", "h100", "a40")}
    figures = {"kernel_test_error": round(float(np.mean([f.test_error for f in fits])), 4)}
    figures |= held_out(arguments.data, efficiencies)
    figures |= silicon(arguments.data, efficiencies, arguments.quick)
    print(json.dumps(figures))


# ---- single kernels -----------------------------------------------------------------------------


def kernel_fits(data: Path, most: int) -> list[Fit]:
    """All of them, printed as a table."""
    fits = []
    for family in ("a100", "h100"):
        fits += [
            fit_table("gemm", family, tables.gemm_table(data, family, "bfloat16"), tables.gemm_formula, (0.7, 0.7, 5e-6), most),
            fit_table("prefill attention", family, tables.prefill_table(data, family), tables.prefill_formula, (0.5, 1e-5), most),
            fit_table("decode attention", family, tables.decode_table(data, family), tables.decode_formula, (0.7, 1e-5), most),
            fit_table("all-reduce", family, tables.reduce_table(data, family), tables.reduce_formula, (0.6, 5e-6, 5e-7), most),
        ]
    fp8 = tables.gemm_table(data, "h100", "fp8")
    fits.append(fit_table("gemm fp8", "h100", fp8, tables.gemm_formula, (0.6, 0.6, 5e-6), most))
    a40 = tables.mlp_table(data, LAYERS["a40"])
    fits.append(fit_table("gemm", "a40", a40, tables.gemm_formula, (0.7, 0.7, 5e-6), most))
    for family, folders in LAYERS.items():
        fits.append(
            fit_table("rest of a layer", family, tables.layer_table(data, folders), tables.layer_formula, (10.0, 1e-5), most)
        )
    print("| kernel | family | rows | fitted on | held out | (median) | parameters |\n|---|---|---|---|---|---|---|")
    for f in fits:
        numbers = " ".join(f"{p:.3g}" for p in f.parameters)
        errors = f"{f.train_error:.1%} | {f.test_error:.1%} | {f.test_median:.1%}"
        print(f"| {f.kernel} | {f.family} | {f.rows} | {errors} | {numbers} |")
    return fits


def kernel_efficiency(fits: Sequence[Fit], family: str) -> Efficiency:
    """What the kernels say of a family; what was not measured of it stays as it is in the table."""
    known = {f.kernel: f.parameters for f in fits if f.family == family}
    base = efficiency_of(family)
    found: dict[str, float] = {}
    names = {
        "gemm": ("gemm_flops", "gemm_bytes", "gemm_launch"),
        "gemm fp8": ("gemm_flops_8",),
        "prefill attention": ("attention_flops",),
        "decode attention": ("attention_bytes", "attention_launch"),
        "all-reduce": ("reduce_bytes", "reduce_launch", "reduce_rank"),
        "rest of a layer": ("layer_passes",),
    }
    for kernel, keys in names.items():
        if kernel in known:
            found |= dict(zip(keys, known[kernel], strict=False))
    return replace(base, **found)


def held_out(data: Path, efficiencies: Mapping[str, Efficiency]) -> dict[str, float]:
    """The fitted shares on other people's measurements of other software, none of it used in a fit."""
    reached = efficiencies["a100"]
    products = np.array([reached.gemm_flops, reached.gemm_bytes, reached.gemm_launch])
    vidur = tables.mlp_table(data, LAYERS["a100"])
    frontier = tables.mlp_table(data, (("A800", "frontier/compute/a800/meta-llama/Llama-2-7b-hf"),))
    prefill, decode = tables.frontier_attention(data)
    cases: list[tuple[str, Table, Array]] = [
        ("vidur_a100_products", vidur, tables.gemm_formula(products, vidur.features)),
        ("frontier_a800_products", frontier, tables.gemm_formula(products, frontier.features)),
        (
            "frontier_a800_prefill",
            prefill,
            tables.prefill_formula(np.array([reached.attention_flops, reached.attention_launch]), prefill.features),
        ),
        (
            "frontier_a800_decode",
            decode,
            tables.decode_formula(np.array([reached.attention_bytes, reached.attention_launch]), decode.features),
        ),
    ]
    errors = {name: np.abs(predicted / table.seconds - 1) for name, table, predicted in cases}
    for step in whole_steps(data, efficiencies):
        name = f"{step.source} {step.kind}".lower().replace(" ", "_").replace("-", "_")
        errors[name] = np.append(errors.get(name, np.empty(0)), abs(step.predicted / step.measured - 1))
    print("\n| never fitted | rows | error | (median) |\n|---|---|---|---|")
    for name, each in errors.items():
        print(f"| {name} | {len(each)} | {each.mean():.1%} | {np.median(each):.1%} |")
    return {f"{name}_error": round(float(each.mean()), 4) for name, each in errors.items()}


# ---- whole systems ------------------------------------------------------------------------------


def silicon(data: Path, efficiencies: Mapping[str, Efficiency], quick: bool) -> dict[str, float]:
    """Each serving system's host by cross-validation; then all rows together, for the table."""
    rows = read_rows(data)
    if quick:
        rows = [row for row in rows if row.concurrency <= 64][::6]
    folds = 2 if quick else FOLDS
    predicted: dict[int, tuple[float, float]] = {}
    hosts: dict[str, Host] = {}
    order = np.random.default_rng(0).permutation(len(rows))
    for system in sorted({row.system for row in rows}):
        mine = [int(i) for i in order if rows[i].system == system]
        hosts[" ".join(system)] = fit_host([rows[i] for i in mine], efficiencies, START)
        for fold in range(folds):
            test = mine[fold::folds]
            train = [rows[i] for i in mine if i not in test]
            host = fit_host(train, efficiencies, START)
            made = predict([rows[i] for i in test], host, efficiencies)
            for place, i in enumerate(test):
                predicted[i] = float(made[place]), float(made[len(test) + place])
    _print_silicon(rows, predicted, hosts)
    ttft = np.array([predicted[i][0] / row.ttft - 1 for i, row in enumerate(rows)])
    tpot = np.array([predicted[i][1] / row.tpot - 1 for i, row in enumerate(rows)])
    return {
        "silicon_rows": len(rows),
        "silicon_ttft_error": round(float(np.abs(ttft).mean()), 4),
        "silicon_ttft_median": round(float(np.median(np.abs(ttft))), 4),
        "silicon_tpot_error": round(float(np.abs(tpot).mean()), 4),
        "silicon_tpot_median": round(float(np.median(np.abs(tpot))), 4),
    }


def fit_host(rows: Sequence[Row], efficiencies: Mapping[str, Efficiency], start: Sequence[float]) -> Host:
    """The host that explains these runs best."""
    found = fit(lambda p: predict(rows, Host(*p), efficiencies), measured(rows), start, iterations=4)
    return Host(*(float(value) for value in found))


def _print_silicon(rows: Sequence[Row], predicted: Mapping[int, tuple[float, float]], hosts: Mapping[str, Host]) -> None:
    print("\n| whole systems, held out | runs | TTFT | (median) | TPOT | (median) |\n|---|---|---|---|---|---|")
    for group in [*sorted({row.group for row in rows}), ()]:
        chosen = [i for i, row in enumerate(rows) if row.group[: len(group)] == group]
        errors = np.abs([(predicted[i][0] / rows[i].ttft - 1, predicted[i][1] / rows[i].tpot - 1) for i in chosen])
        mean, median = errors.mean(axis=0), np.median(errors, axis=0)
        cells = " | ".join(f"{mean[k]:.1%} | {median[k]:.1%}" for k in (0, 1))
        print(f"| {' '.join(group) or 'all'} | {len(chosen)} | {cells} |")
    names = [field.name for field in fields(Host)]
    print(f"\n| hosts, fitted to all runs | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for system, host in hosts.items():
        print(f"| {system} | {' | '.join(f'{value:.3g}' for value in astuple(host))} |")


if __name__ == "__main__":
    main()
