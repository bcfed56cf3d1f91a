"""The 16 published cases of DistServe's simulator, simulated by Baton with other settings and no other code.

What that simulator (`simdistserve` of LLMServe/DistServe) does, and the setting here that does the same:

time model    `placement.distserve`, its own constants; of a pipeline, the host's 2 ms and 0.1 us per token of context precede the
              first stage alone: `overhead`, `token_overhead`
prefill       all waiting prompts whole, up to as many tokens as its memory holds: `max_step_tokens`
decode        at most 50,000 tokens of context a step; what does not fit takes turns: `max_context`
colocated     a step prefills if any prompt waits, else decodes, never both: `phases_apart` (backend "vllm", vLLM's times)
pipelines     a stage takes what is ready, however many steps are under way: `eager_pipeline`
links         KV moves in no time, memory is not limited
TPOT          it runs as many decode steps as a request has tokens, and divides by them: requests ask for one token more here
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from baton.core.slo import Slo
from baton.core.view import Role
from baton.placement.distserve import HOST_SECONDS, HOST_TOKEN_SECONDS, read_distserve
from baton.simulator.setup import ClusterSetup, PoolSetup
from baton.simulator.simulate import simulate
from baton.simulator.workload.planned import PlannedRequest

MODEL = "facebook/opt-13b"
MAX_CONTEXT = 50_000
FIGURES = ("attain_both_pct", "p90_ttft", "p90_tpot")
UNLIMITED = 1 << 22


@dataclass(frozen=True, slots=True)
class Case:
    """One published case. prefill and decode: TP and PP; decode is (0, 0) where one worker does both.

    reference  its figures, by the column's name: per cent and ms
    latencies  (TTFT, TPOT) in ms of every request
    """

    name: str
    backend: str
    prefill: tuple[int, int]
    decode: tuple[int, int]
    rate: float
    slo: Slo
    reference: dict[str, float]
    latencies: tuple[tuple[float, float], ...]

    @property
    def label(self) -> str:
        prefill = f"TP{self.prefill[0]} PP{self.prefill[1]}"
        return f"{self.backend} {prefill}" + (f" + TP{self.decode[0]} PP{self.decode[1]}" if self.decode[0] else "")


@dataclass(frozen=True, slots=True)
class Compared:
    """A case and our figures for it; worst: the largest relative difference of any request's TTFT, and of its TPOT."""

    case: Case
    figures: dict[str, float]
    worst: tuple[float, float]

    @property
    def points(self) -> float:
        """Difference in attainment, in points."""
        return self.figures["attain_both_pct"] - self.case.reference["attain_both_pct"]

    def relative(self, figure: str) -> float:
        return self.figures[figure] / self.case.reference[figure] - 1

    @property
    def within(self) -> bool:
        """Attainment within 3 points, P90 TTFT and TPOT within 5%."""
        return abs(self.points) <= 3 and all(abs(self.relative(figure)) <= 0.05 for figure in FIGURES[1:])


def read_cases(data: Path) -> list[Case]:
    """In the order of the file. `data` is the folder of `derived` and `distserve`."""
    latencies: dict[str, list[tuple[float, float]]] = {}
    for row in _rows(data / "derived" / "simdistserve_golden_requests.csv"):
        latencies.setdefault(row["case"], []).append((float(row["ttft_ms"]), float(row["tpot_ms"])))
    return [
        Case(
            row["case"],
            row["backend"],
            (int(row["tp_prefill"]), int(row["pp_prefill"])),
            (int(row["tp_decode"]), int(row["pp_decode"])),
            float(row["rate_req_s"]),
            Slo(float(row["ttft_slo_ms"]) / 1e3, float(row["tpot_slo_ms"]) / 1e3),
            {key: float(value) for key, value in row.items() if key.startswith(("attain", "p5", "p9"))},
            tuple(latencies[row["case"]]),
        )
        for row in _rows(data / "derived" / "simdistserve_golden_summary.csv")
    ]


def compare(case: Case, data: Path) -> Compared:
    """Simulate a case with the settings above."""
    result = simulate(cluster_of(case, data), workload_of(case, data))
    ours = [((outcome.ttft or math.inf) * 1e3, (outcome.tpot or math.inf) * 1e3) for outcome in result.outcomes]
    met = sum(outcome.meets(case.slo) for outcome in result.outcomes)
    figures = {"attain_both_pct": 100 * met / len(ours)}
    for column, name in enumerate(("ttft", "tpot")):
        values = sorted(pair[column] for pair in ours)
        figures |= {f"p{percent}_{name}": _percentile(values, percent / 100) for percent in (50, 90, 99)}
    worst = [max(abs(mine[i] / theirs[i] - 1) for mine, theirs in zip(ours, case.latencies, strict=True)) for i in (0, 1)]
    return Compared(case, figures, (worst[0], worst[1]))


def cluster_of(case: Case, data: Path) -> ClusterSetup:
    """The case's placement with the settings of that simulator."""
    if case.backend == "vllm":
        return ClusterSetup((_pool(Role.MIXED, case.backend, case.prefill, data),), slo=case.slo)
    prefill, decode = (_pool(*pool, data) for pool in _split(case))
    return ClusterSetup((prefill, replace(decode, max_step_tokens=prefill.max_step_tokens)), slo=case.slo)


def workload_of(case: Case, data: Path) -> list[PlannedRequest]:
    rows = _rows(data / "derived" / "simdistserve_golden_workload.csv")
    return [
        PlannedRequest(
            int(row["req_id"]),
            float(row["arrival_s_at_1rps"]) / case.rate,
            int(row["prompt_len"]),
            int(row["output_len"]) + 1,
        )
        for row in rows
    ]


def table(compared: Sequence[Compared]) -> str:
    """In Markdown: ours / theirs (difference)."""
    lines = [
        "| case | placement | req/s | attainment, % | P90 TTFT, ms | P90 TPOT, ms | worst request: TTFT, TPOT |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in compared:
        cells = [f"{_pair(each, FIGURES[0])} ({each.points:+.1f})"]
        cells += [f"{_pair(each, figure)} ({each.relative(figure):+.1%})" for figure in FIGURES[1:]]
        cells.append(f"{each.worst[0]:.1%}, {each.worst[1]:.1%}")
        lines.append(f"| {each.case.name} | {each.case.label} | {each.case.rate:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _split(case: Case) -> tuple[tuple[Role, str, tuple[int, int]], ...]:
    return (Role.PREFILL, case.backend, case.prefill), (Role.DECODE, case.backend, case.decode)


def _pool(role: Role, backend: str, degrees: tuple[int, int], data: Path) -> PoolSetup:
    tp, pp = degrees
    cost = read_distserve(data / "distserve" / f"profiler-a100-80g.{backend}.json", MODEL, tp, pp)
    host, host_token = (HOST_SECONDS, HOST_TOKEN_SECONDS) if pp > 1 else (0.0, 0.0)
    return PoolSetup(
        role,
        replace(cost, host=0.0, host_token=0.0) if pp > 1 else cost,
        num_blocks=UNLIMITED,
        max_step_tokens=_max_num_tokens(data, degrees),
        max_num_seqs=UNLIMITED,
        max_context=MAX_CONTEXT,
        phases_apart=True,
        eager_pipeline=True,
        overhead=host,
        token_overhead=host_token,
    )


def _max_num_tokens(data: Path, degrees: tuple[int, int]) -> int:
    """What that simulator believes to fit in memory."""
    rows = _rows(data / "distserve" / "max_num_tokens.csv")
    return next(
        int(row["max_num_tokens"]) for row in rows if row["model"] == MODEL and (int(row["tp"]), int(row["pp"])) == degrees
    )


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Straight lines between the ranks, as in pandas."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _pair(each: Compared, figure: str) -> str:
    return f"{each.figures[figure]:.1f} / {each.case.reference[figure]:.1f}"
