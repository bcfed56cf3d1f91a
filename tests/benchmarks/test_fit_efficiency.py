"""The fit of efficiencies: its formulas are those of the roofline, and its data are read as their manifest says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from baton.placement.efficiency import EFFICIENCIES, efficiency_of
from baton.placement.hardware import find_accelerator
from baton.placement.model_shape import MODELS, Linear
from baton.placement.roofline import roofline_cost

pytest.importorskip("pyarrow", reason="pyarrow is not installed: the dev extra has it")

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not (DATA / "aiconfigurator").is_dir(), reason="the measurements are not beside this checkout (shared/data/aiconfigurator)"
)


def test_a_product_is_fitted_with_the_formula_that_prices_it():
    from kernel_tables import gemm_formula

    reached, device = efficiency_of("h100"), find_accelerator("H100")
    cost = roofline_cost(MODELS["Llama-3.1-8B"], device)
    parameters = np.array([reached.gemm_flops, reached.gemm_bytes, 0.0])
    for tokens in (1, 64, 4096):
        side = {"m": tokens, "n": 6144, "k": 4096, "flops": device.flops_16, "bandwidth": device.bandwidth, "weight_bytes": 2.0}
        fitted = gemm_formula(parameters, {name: np.array([float(value)]) for name, value in side.items()})
        assert cost._product(Linear(4096, 6144), tokens) == pytest.approx(float(fitted[0]), rel=1e-9)


@needs_data
def test_the_committed_shares_explain_products_that_nobody_fitted():
    from kernel_tables import gemm_formula, mlp_table
    from log_fit import mean_error

    reached = EFFICIENCIES["a100"]
    table = mlp_table(DATA, (("A100-80GB", "vidur/compute/a100/meta-llama/Llama-2-70b-hf"),))
    predicted = gemm_formula(np.array([reached.gemm_flops, reached.gemm_bytes, reached.gemm_launch]), table.features)
    assert mean_error(predicted, table.seconds) < 0.15


@needs_data
def test_every_run_is_read_once():
    from silicon import read_rows

    rows = read_rows(DATA)
    assert len(rows) == 385
    assert len({(row.group, row.isl, row.osl, row.ttft, row.tpot) for row in rows}) == 385
    assert {row.backend for row in rows} == {"vllm", "sglang", "trtllm"}
    assert {row.source for row in rows} == {"inferencex", "sweep", "planned"}
    assert all(0.01 < row.ttft < 400 and 0.002 < row.tpot < 0.25 for row in rows)


@needs_data
def test_runs_are_predicted_from_the_committed_shares():
    from silicon import Host, measured, predict, read_rows

    rows = [row for row in read_rows(DATA) if row.system == ("vllm", "inferencex") and row.concurrency <= 16]
    assert len(rows) > 20
    errors = np.abs(predict(rows, Host(step=2e-3, row=6.7e-5, reduce=0.5), EFFICIENCIES) / measured(rows) - 1)
    assert float(np.median(errors[: len(rows)])) < 0.2
    assert float(np.median(errors[len(rows) :])) < 0.1
