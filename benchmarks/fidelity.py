"""How near the simulator and the search come to what others published: the tables of docs/fidelity.md.

    .venv/bin/python benchmarks/fidelity.py [--quick] [--data ../shared/data] [--only simdistserve --only splitwise ...]

closed_forms   prefill of equal prompts against the formulas of queueing theory (`closed_forms.py`)
simdistserve   16 cases of DistServe's simulator, by configuration alone (`simdistserve.py`)
splitwise      prefill and decode machines for code and for conversation, by Splitwise's measurements (`splitwise_split.py`)
distserve      the placements of DistServe's paper, and the order of the systems that it compares (`paper_placements.py`)
pairs          the same placements among those that the paper's search chooses from (`paper_pairs.py`)

The last line is JSON: the largest difference from a formula; the share of cases within 3 points and 5%, and the largest
differences; the share of prefill machines in the best splits; the goodput of the paper's placements over that of the best
found, and over that of colocated vLLM.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import closed_forms
import paper_pairs
import paper_placements
import simdistserve
import splitwise_split
from baton.placement.goodput import GoodputOptions

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MODEL = "llama2-70b"
QUICK_CASES = ("c01", "c06", "c09", "c10", "c23")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five cases, five machines of one kind, OPT-13B, fewer requests")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the published figures")
    parser.add_argument("--only", action="append", choices=tuple(SECTIONS), help="this section; may be repeated")
    arguments = parser.parse_args()
    sections = arguments.only or list(SECTIONS)
    if sections != ["closed_forms"] and not (arguments.data / "derived").is_dir():
        raise SystemExit(f"{arguments.data} holds no folder derived; give the folder of the published figures")
    figures: dict[str, float] = {}
    for name in sections:
        print(f"\n## {name}\n", flush=True)
        figures |= SECTIONS[name](arguments.data, arguments.quick)
    print(json.dumps(figures))


def run_closed_forms(data: Path, quick: bool) -> dict[str, float]:
    count, loads = (20_000, closed_forms.LOADS[:2]) if quick else (100_000, closed_forms.LOADS)
    compared = [closed_forms.compare(system, load, count) for system in closed_forms.SYSTEMS for load in loads]
    print(closed_forms.table(compared), flush=True)
    return {"closed_forms_largest": round(max(abs(each.relative) for each in compared), 4)}


def run_simdistserve(data: Path, quick: bool) -> dict[str, float]:
    cases = [case for case in simdistserve.read_cases(data) if not quick or case.name in QUICK_CASES]
    compared = [simdistserve.compare(case, data) for case in cases]
    print(simdistserve.table(compared), flush=True)
    return {
        "simdistserve_within": sum(each.within for each in compared) / len(compared),
        "simdistserve_points": round(max(abs(each.points) for each in compared), 2),
        "simdistserve_p90_ttft": round(max(abs(each.relative("p90_ttft")) for each in compared), 4),
        "simdistserve_p90_tpot": round(max(abs(each.relative("p90_tpot")) for each in compared), 4),
    }


def run_splitwise(data: Path, quick: bool) -> dict[str, float]:
    machines, num_requests = (5, 150) if quick else (8, 400)
    options = GoodputOptions((0,), 0.08) if quick else GoodputOptions((0, 1), 0.04)
    kinds = ["h100-80gb"] if quick else ["h100-80gb", "a100-80gb"]
    figures: dict[str, float] = {}
    splits = [f"{prefill}P{machines - prefill}D" for prefill in range(1, machines)]
    print(f"| machines | traffic | TTFT, TPOT | {' | '.join(splits)} | best |\n|---|---|---|{'---|' * machines}", flush=True)
    for hardware in kinds:
        kind = splitwise_split.machine(data, MODEL, hardware)
        for traffic, demand in (("code", splitwise_split.code()), ("conversation", splitwise_split.conversation(data))):
            slo = splitwise_split.objectives(data, MODEL, demand)
            found = splitwise_split.splits(kind, machines, demand, slo, num_requests, options)
            best = splitwise_split.best(found)
            cells = " | ".join(f"{split.goodput.mean:.1f}" for split in found)
            print(f"| {kind.name} | {traffic} | {slo.ttft:.2f} s, {slo.tpot * 1e3:.0f} ms | {cells} | {best.name} |", flush=True)
            figures.setdefault(f"splitwise_{traffic}_prefill_share", best.prefill / machines)
    return figures


def run_distserve(data: Path, quick: bool) -> dict[str, float]:
    return paper_placements.report(data, quick)


def run_pairs(data: Path, quick: bool) -> dict[str, float]:
    return paper_pairs.report(data, quick)


SECTIONS: dict[str, Callable[[Path, bool], dict[str, float]]] = {
    "closed_forms": run_closed_forms,
    "simdistserve": run_simdistserve,
    "splitwise": run_splitwise,
    "distserve": run_distserve,
    "pairs": run_pairs,
}

if __name__ == "__main__":
    main()
