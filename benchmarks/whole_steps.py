"""Whole steps that others measured, and what the roofline prior says of them: nothing here is used in a fit.

splitwise   Llama-2-70B on machines of A100 and H100 with Splitwise's software (`splitwise/perf_model.csv`; medians of repeated
            runs): prompts alone, and decode steps, which went on to `token_size` tokens beside prompts of `prompt_size`
distserve   OPT-13B and OPT-66B on A100 with DistServe's engine: its published fit, at mean and longest prompts and 1 to 96 rows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from baton.core.shape import StepShape
from baton.placement.distserve import read_distserve
from baton.placement.efficiency import Efficiency
from baton.placement.hardware import find_accelerator
from baton.placement.model_shape import find_model
from baton.placement.roofline import RooflineCost, roofline_cost
from kernel_tables import read_csv

DEVICES = {"a100-80gb": "A100-80GB", "h100-80gb": "H100"}
DISTSERVE = (("OPT-13B", (1, 2, 4)), ("OPT-66B", (2, 4)))
PROMPTS, ROWS, CONTEXT = (756, 2048), (1, 32, 64, 96), 856  # ShareGPT's mean, the longest; a context of mean length


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds that a step took, and that the prior says; kind is "prefill" or "decode"."""

    source: str
    kind: str
    measured: float
    predicted: float


def whole_steps(data: Path, efficiencies: Mapping[str, Efficiency]) -> list[Step]:
    """All of them."""
    return [*_splitwise(data, efficiencies), *_distserve(data, efficiencies)]


def _splitwise(data: Path, efficiencies: Mapping[str, Efficiency]) -> Iterator[Step]:
    runs: dict[tuple[str, int, int, int, int], list[tuple[float, float]]] = {}
    for row in read_csv(data / "splitwise/perf_model.csv"):
        if row["model"] == "llama2-70b" and row["hardware"] in DEVICES:
            sizes = (int(row[key]) for key in ("tensor_parallel", "prompt_size", "batch_size", "token_size"))
            runs.setdefault((row["hardware"], *sizes), []).append((float(row["prompt_time"]), float(row["token_time"])))
    for (hardware, tp, prompt, rows, tokens), times in runs.items():
        device = find_accelerator(DEVICES[hardware])
        cost = roofline_cost(find_model("Llama-2-70B"), device, tp, efficiency=efficiencies[device.family])
        yield Step(f"splitwise {device.name}", "prefill", median(t for t, _ in times) * 1e-3, _prefill(cost, prompt, rows))
        decode = cost.decode_seconds(rows, rows * (prompt + tokens // 2), 1)
        yield Step(f"splitwise {device.name}", "decode", median(t for _, t in times) * 1e-3, decode)


def _distserve(data: Path, efficiencies: Mapping[str, Efficiency]) -> Iterator[Step]:
    device = find_accelerator("A100-80GB")
    for model, degrees in DISTSERVE:
        for tp in degrees:
            theirs = read_distserve(data / "distserve/profiler-a100-80g.distserve.json", f"facebook/{model.lower()}", tp)
            ours = roofline_cost(find_model(model), device, tp, efficiency=efficiencies[device.family])
            for prompt in PROMPTS:
                shape = _prompt_shape(prompt, 1)
                yield Step("distserve A100-80GB", "prefill", theirs.seconds(shape), ours.seconds(shape))
            for rows in ROWS:
                steps = theirs.decode_seconds(rows, rows * CONTEXT, 1), ours.decode_seconds(rows, rows * CONTEXT, 1)
                yield Step("distserve A100-80GB", "decode", *steps)


def _prefill(cost: RooflineCost, prompt: int, rows: int) -> float:
    return cost.seconds(_prompt_shape(prompt, rows))


def _prompt_shape(prompt: int, rows: int) -> StepShape:
    return StepShape(rows, rows * prompt, rows * prompt * (prompt + 1) // 2, rows * prompt, sampled=rows)
