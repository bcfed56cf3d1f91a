"""A plan to look at: a table on the terminal, and one HTML file that opens anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..core.slo import Slo
from .deployment import Deployment, deployment_of
from .explain import Explanation, binding, why_lost
from .plots import figures, p90, seconds
from .problem import NearSlo, Problem, SearchResult, Status, Verdict, score_interval

_CLEARLY_MORE = 1.05
NUM_ROWS = 8
"""Searched placements in a table; the best of each family comes whatever its place."""


@dataclass(frozen=True, slots=True)
class Row:
    """One placement as the tables print it."""

    place: str
    placement: str
    num_devices: int
    goodput: str
    score: str
    ttft: str
    tpot: str
    binds: str
    tie: bool
    best: bool


def rows(result: SearchResult, limit: int = NUM_ROWS) -> list[Row]:
    """The searched placements in order of score, and the best of each family that would not be among them."""
    families: set[str] = set()
    found = []
    for place, verdict in enumerate(result.searched, start=1):
        first = verdict.placement.family not in families
        families.add(verdict.placement.family)
        if place <= limit or first:
            found.append(_row(result, verdict, place))
    return found


def short_name(problem: Problem, verdict: Verdict) -> str:
    """Without the kind of device where there is but one."""
    return _without_kind(problem, verdict.placement.name)


def _without_kind(problem: Problem, name: str) -> str:
    supplies = problem.cluster.supplies
    return name.replace(f"{supplies[0].accelerator.name} ", "") if len(supplies) == 1 else name


def summary_lines(result: SearchResult, explanation: Explanation) -> list[tuple[str, str]]:
    """What a reader wants to know beside the table, as names and texts."""
    best, deployment = result.best, explanation.deployment
    assert best is not None  # there is an explanation
    lines = [("best", best.placement.name), ("binds", binding(best))]
    if result.ties:
        others = ", ".join(verdict.placement.name for verdict in result.ties[:3])
        more = f" and {len(result.ties) - 3} more" if len(result.ties) > 3 else ""
        lines.append(("ties", f"within the interval of the best: {others}{more}"))
    deploy = f"{_clusters(deployment)}{deployment.cluster_placement.name}: {deployment.num_devices} GPUs"
    deploy += f", {deployment.rate:.3g} requests/s"
    if not deployment.suffices:
        deploy += f" of the {deployment.wanted:.3g} that are wanted: the hardware given carries no more"
    lines.append(("deploy", deploy))
    if explanation.deployed_attainment:
        low, high = min(explanation.deployed_attainment), max(explanation.deployed_attainment)
        lines.append(("at that rate", f"{low:.1%} to {high:.1%} of the requests of the whole cluster meet the objectives"))
    fuller = fullest(result, deployment)
    if fuller is not None:
        verdict, other = fuller
        lines.append(
            (
                "more in all",
                f"{_clusters(other)}{other.cluster_placement.name}: {other.num_devices} GPUs, {other.rate:.3g} requests/s, "
                f"{1 - verdict.score / best.score:.0%} behind by {result.problem.objective.unit}",
            )
        )
    spare = ", ".join(f"{count} {name}" for name, count in deployment.spare if count)
    if spare:
        lines.append(("left over", spare))
    if explanation.link is not None:
        lines.append(("link", str(explanation.link)))
    lines.append(("tried", tried(result)))
    return lines


def _clusters(deployment: Deployment) -> str:
    return f"{deployment.num_clusters} clusters, each " if deployment.num_clusters > 1 else ""


def fullest(result: SearchResult, deployment: Deployment) -> tuple[Verdict, Deployment] | None:
    """The searched placement that carries most on the whole hardware, when that is clearly more than the best one does there:
    the best by unit of cost may leave devices idle. None when a rate was asked for, which the best one carries."""
    if deployment.wanted is not None:
        return None
    others = [(verdict, deployment_of(result.problem, verdict)) for verdict in result.searched if verdict.score > 0]
    verdict, other = max(others, key=lambda pair: pair[1].rate)
    return (verdict, other) if other.rate > _CLEARLY_MORE * deployment.rate else None


def tried(result: SearchResult) -> str:
    """How many placements were looked at, and how closely."""
    counts = {status: sum(verdict.status is status for verdict in result.verdicts) for status in Status}
    return (
        f"{len(result.verdicts)} placements: {counts[Status.SEARCHED]} searched, {counts[Status.BEATEN]} beaten at the rate of "
        f"the best, {counts[Status.PROMISED_LESS]} promised less, {counts[Status.BOUNDED]} bounded; {len(result.unfit)} kinds of "
        f"worker do not fit; {result.num_simulations} simulations"
    )


def nearest_text(nearest: NearSlo, slo: Slo) -> str:
    """What to ask for instead of `slo`."""
    if nearest.scale <= 1:
        return "requests alone would meet the objectives, but not what a cluster adds to them: relax both a little"
    parts = [
        f"{name} {seconds(near)} ({f'{near / asked:.3g} times what was asked for' if near > asked else 'as asked for'})"
        for name, near, asked in (("TTFT", nearest.slo.ttft, slo.ttft), ("TPOT", nearest.slo.tpot, slo.tpot))
    ]
    return (
        f"the nearest that can be reached, by {nearest.placement.name} with one request at a time, is {' and '.join(parts)}; "
        "under load, allow a little more"
    )


def print_plan(console: Console, result: SearchResult, explanation: Explanation) -> None:
    """The ranked table and what there is to say about it."""
    unit = result.problem.objective.unit
    table = Table(show_edge=False, pad_edge=False, title=_title(result.problem), title_justify="left")
    table.add_column("")
    table.add_column("placement", overflow="fold")
    for name in ("GPUs", "requests/s", unit, "P90 TTFT", "P90 TPOT"):
        table.add_column(name, justify="right", no_wrap=name != unit)
    for row in rows(result):
        style = "bold green" if row.best else None
        cells = (row.place, escape(row.placement), str(row.num_devices), row.goodput, row.score, row.ttft, row.tpot)
        table.add_row(*cells, style=style)
    console.print(table)
    rest = Table(show_header=False, box=None, pad_edge=False)
    rest.add_column()
    rest.add_column(overflow="fold")
    for name, text in summary_lines(result, explanation):
        rest.add_row(name, escape(text))
    console.print(rest)


def plan_page(result: SearchResult, explanation: Explanation, topology: str) -> str:
    """The page. `topology` is the YAML that it shows."""
    # Only here: a plan that is refused should say so at once.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["seconds"] = seconds
    best = result.best
    assert best is not None
    return environment.get_template("plan.html.j2").render(
        problem=result.problem,
        title=_title(result.problem),
        unit=result.problem.objective.unit,
        best=best,
        rows=rows(result, 2 * NUM_ROWS),
        lines=summary_lines(result, explanation),
        figures=[(figure, Markup(figure.svg)) for figure in figures(result, explanation)],
        heat=_heat(result),
        losses=[(verdict.placement.name, why_lost(result, verdict)) for verdict in result.verdicts if verdict is not best][:40],
        num_losses=len(result.verdicts) - 1,
        unfit=result.unfit,
        topology=topology,
    )


def _title(problem: Problem) -> str:
    slo, model = problem.slo, problem.need.model.name
    goal = f"TTFT {seconds(slo.ttft)}, TPOT {seconds(slo.tpot)} for {slo.attainment:.0%}"
    return f"{model} on {problem.cluster}: {goal}"


def _row(result: SearchResult, verdict: Verdict, place: int) -> Row:
    goodput, objective = verdict.goodput, result.problem.objective
    assert goodput is not None  # it was searched
    low, high = score_interval(objective, verdict)
    several = goodput.high > goodput.low
    ttft, tpot = p90(verdict, "TTFT"), p90(verdict, "TPOT")
    return Row(
        place=str(place),
        placement=short_name(result.problem, verdict),
        num_devices=verdict.placement.num_devices,
        goodput=f"{verdict.rate:.3g}" + (f" ({goodput.low:.3g}-{goodput.high:.3g})" if several else ""),
        score=f"{verdict.score:.3g}" + (f" ({low:.3g}-{high:.3g})" if several and high > low else ""),
        ttft="" if ttft is None else seconds(ttft),
        tpot="" if tpot is None else seconds(tpot),
        binds=binding(verdict) if verdict.observation else why_lost(result, verdict),
        tie=verdict in result.ties,
        best=verdict is result.best,
    )


@dataclass(frozen=True, slots=True)
class Heat:
    """A cell of the heat map: `share` of the best score, `how` it is known."""

    text: str
    share: float
    how: str


def _heat(result: SearchResult) -> tuple[Sequence[str], Sequence[tuple[str, Sequence[Heat | None]]]]:
    """Columns (decode kinds) and rows (prefill kind, cells)."""
    most = max((cell.score for cell in result.cells), default=0.0) or 1.0
    cells = {(cell.prefill, cell.decode): Heat(f"{cell.score:.3g}", cell.score / most, cell.status) for cell in result.cells}
    columns = list(dict.fromkeys(cell.decode for cell in result.cells))
    names = list(dict.fromkeys(cell.prefill for cell in result.cells))
    problem = result.problem
    rows = [(_without_kind(problem, f"{name} ").strip(), [cells.get((name, column)) for column in columns]) for name in names]
    return [_without_kind(problem, f"{column} ").strip() for column in columns], rows
