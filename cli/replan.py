"""`baton plan --from-live`: ask a running cluster what it saw, and say whether and how to divide its hardware otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..bench.report import seconds
from ..core.errors import Unavailable
from ..core.observed import ObservedStep
from ..core.slo import Slo
from ..core.topology import PoolSpec, Topology
from ..core.view import Role
from ..deploy.settings import dump_topology
from ..placement.executors import executor
from ..placement.hysteresis import Gain
from ..placement.model_shape import find_model
from ..placement.problem import SearchOptions
from ..placement.replan import Replan, Rival, Seen, replan
from ..placement.search import OnProgress
from .clusters import find_cluster
from .files import write_all

TOPOLOGY_FILE = "topology.yaml"
CHANGE = 3
"""Exit code: a change is worth it. Keeping what runs is success."""
_LETTERS = {Role.PREFILL: "P", Role.DECODE: "D", Role.MIXED: "M"}


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for: of `slo` the fields `given`, the others as the running topology has them."""

    cluster: str
    slo: Slo
    given: Set[str]
    goal: str
    minimal: float
    options: SearchOptions
    workers: int
    ray: bool
    out: Path | None


def plan_from_live(console: Console, wish: Wish, bar: AbstractContextManager[OnProgress]) -> int:
    """Search, compare, print, write; the exit code. Raises what `observe` and `replan` do."""
    from ..deploy.observe import observe  # gRPC takes its time to import, and a plan for new hardware has no use for it

    record = find_cluster(wish.cluster)
    if not record.controller:
        raise Unavailable(f"cluster {record.cluster} is still starting: ask again when `baton status` says ready")
    observation = asyncio.run(observe(record.controller))
    topology = replace(observation.topology, slo=_slo(observation.topology.slo, wish))
    steps: dict[Role, list[ObservedStep]] = {}
    for worker in observation.workers:
        steps.setdefault(worker.role, []).extend(worker.steps)
    model = find_model(topology.model.path)
    with executor(wish.workers, wish.ray) as runner, bar as tell:
        found = replan(
            Seen(topology, observation.requests, steps),
            model,
            wish.options,
            runner,
            goal=wish.goal,
            minimal=wish.minimal,
            on_progress=tell,
        )
    _print(console, topology, found)
    if not found.change or found.alternative is None:
        return 0
    text = topology_text(found, found.alternative)
    if wish.out is None:
        console.print(text, markup=False, soft_wrap=True)
    else:
        write_all({wish.out / TOPOLOGY_FILE: text})
        console.print(f"wrote {wish.out / TOPOLOGY_FILE}", markup=False, soft_wrap=True)
    return CHANGE


def verdict_of(found: Replan) -> str:
    """The answer in a sentence."""
    if found.doubts:
        return f"keep what runs: the simulation does not reproduce it, so nothing better is believed either ({found.doubts})"
    if found.alternative is None or found.gain is None:
        also = "" if found.now.goodput > 0 else ", but neither does what runs"
        return f"keep what runs: no other division of its hardware was found that reaches the objectives{also}"
    if found.change:
        expected = f"expected goodput {found.now.goodput:.3g} -> {found.alternative.goodput:.3g} requests/s"
        return f"change to {division(found.alternative.topology)}: {expected} ({found.gain})"
    return f"keep what runs: the best alternative gains {found.gain}, {_why_not(found.gain, found.minimal)}"


def division(topology: Topology) -> str:
    """`P: 2 x H100 TP2, D: 1 x H100 TP4`."""
    return ", ".join(f"{_LETTERS[pool.role]}: {pool.replicas} x {_worker(pool)}" for pool in topology.pools)


def topology_text(found: Replan, chosen: Rival) -> str:
    """The YAML to deploy, with where it comes from."""
    seen = found.workload
    comments = (
        "Planned by `baton plan --from-live`.",
        f"{verdict_of(found)}",
        f"from {seen.num_requests} requests in {seen.seconds:.0f} s: {seen.rate:.3g} per second, "
        f"{seen.demand.mean_input:.0f} tokens in and {seen.demand.mean_output:.0f} out on average",
    )
    return "".join(f"# {line}\n" for line in comments) + dump_topology(chosen.topology)


def _slo(running: Slo, wish: Wish) -> Slo:
    return replace(running, **{name: getattr(wish.slo, name) for name in wish.given})


def _why_not(gain: Gain, minimal: float) -> str:
    if gain.mean <= 0:
        return "which is none"
    if gain.mean <= gain.uncertainty:
        return "within the uncertainty"
    return f"less than the {minimal:.0%} that a change must bring"


def _worker(pool: PoolSpec) -> str:
    pipeline = f" PP{pool.pipeline_parallel}" if pool.pipeline_parallel > 1 else ""
    threads = f" with {pool.threads} threads" if pool.accelerator == "cpu" and pool.threads > 1 else ""
    return f"{pool.accelerator} TP{pool.tensor_parallel}{pipeline}{threads}"


def _print(console: Console, topology: Topology, found: Replan) -> None:
    seen, report = found.workload, found.simulated.report
    cached = f", {seen.cached:.0%} of the prompts' tokens from prefix caches" if seen.cached >= 0.005 else ""
    console.print(
        f"[bold]{escape(topology.cluster)}[/] served {seen.num_requests} requests in {seconds(seen.seconds)}, the last one "
        f"{seconds(seen.since_last)} ago: {seen.rate:.3g} per second (gaps with CV {seen.demand.burstiness:.2g}), "
        f"{seen.demand.mean_input:.0f} tokens in and {seen.demand.mean_output:.0f} out on average{cached}",
        soft_wrap=True,
    )
    console.print(f"step times were fitted to what its workers remember, {found.now.error:.1%} off in the median", style="dim")
    table = _table("at that rate", "observed", "simulated", "objective")
    table.add_row("attainment", f"{seen.attainment:.1%}", f"{report.attainment:.1%}", f"{report.slo.attainment:.0%}")
    for name, observed, spread, limit in (
        ("median TTFT", seen.ttft, report.ttft, report.slo.ttft),
        ("median TPOT", seen.tpot, report.tpot, report.slo.tpot),
    ):
        table.add_row(name, _time(observed), _time(None if spread is None else spread.p50), seconds(limit))
    console.print(table)
    rivals = _table("goodput of its hardware", "requests/s", "by seed")
    rivals.add_row(f"now: {division(topology)}", *_goodput(found.now.goodputs))
    if found.alternative is not None:
        rivals.add_row(f"best other: {division(found.alternative.topology)}", *_goodput(found.alternative.goodputs))
    console.print(rivals)
    console.print(verdict_of(found), style="bold" if found.change else None, markup=False, soft_wrap=True)


def _table(first: str, *others: str) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _time(value: float | None) -> str:
    return "" if value is None else seconds(value)


def _goodput(goodputs: Sequence[float]) -> tuple[str, str]:
    return f"{sum(goodputs) / len(goodputs):.3g}", f"{min(goodputs):.3g} to {max(goodputs):.3g}"
