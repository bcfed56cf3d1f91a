"""`baton simulate`: run a topology in virtual time against a workload or a trace, and say what would become of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from ..bench.report import Settings
from ..core.errors import InvalidRequest
from ..core.topology import Topology
from ..core.view import Role
from ..deploy.settings import load_topology
from ..placement.model_shape import ModelShape, find_model
from ..placement.profile import read_profile
from ..placement.topology_setup import PoolCost, costs_of, fabric_of, num_devices, setup_of
from ..simulator.records import RequestOutcome
from ..simulator.report import OutcomeTally, SimulationReport, make_report
from ..simulator.setup import ClusterSetup
from ..simulator.simulate import simulate as run_simulation
from ..simulator.timeline import Timeline
from ..simulator.workload.arrivals import GammaArrivals
from ..simulator.workload.lengths import LENGTH_FORMS, IndependentLengths, parse_length
from ..simulator.workload.planned import PlannedRequest
from ..simulator.workload.published import WORKLOADS
from ..simulator.workload.synthetic import synthetic_workload
from ..simulator.workload.traces import FORMATS, TraceOptions, guess_format, read_trace, repeat_trace, stream_trace
from . import screen
from .simulate_report import LiveCount, Sample, print_report, write_figures, write_page

DEFAULT_NUM_REQUESTS = 1000
DEFAULT_INPUT, DEFAULT_OUTPUT = "512", "128"
MAX_KEPT = 20_000
"""Requests that a page of plots shows; of more, every second, fourth, ... one."""

_LOAD, _TRACE, _RESULT = "Load", "Trace", "Report"


@dataclass(frozen=True, slots=True)
class _Load:
    """What the options say of the workload. None where nothing was said."""

    rate: float | None
    burstiness: float | None
    input_tokens: str | None
    output_tokens: str | None
    lengths: str | None
    requests: int | None
    duration: float | None
    trace: Path | None
    trace_format: str | None
    speed: float | None
    repeat: int | None
    max_input_tokens: int | None
    max_output_tokens: int | None
    seed: int


def simulate(
    topology_file: Annotated[Path, typer.Argument(metavar="TOPOLOGY", help="The YAML file that `baton up` takes.")],
    profile: Annotated[
        list[Path] | None,
        typer.Option(help="Step times from `baton profile`; may be given once per kind of worker. (default: a roofline)"),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second. (default: 1)", rich_help_panel=_LOAD)] = None,
    burstiness: Annotated[
        float | None,
        typer.Option(help="Coefficient of variation of the gaps: 1 is Poisson, 0 a metronome.", rich_help_panel=_LOAD),
    ] = None,
    input_tokens: Annotated[
        str | None,
        typer.Option(help=f"Tokens per prompt: {LENGTH_FORMS}. (default: {DEFAULT_INPUT})", rich_help_panel=_LOAD),
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option(help=f"Tokens per answer, likewise. (default: {DEFAULT_OUTPUT})", rich_help_panel=_LOAD)
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help=f"Published lengths instead: {' or '.join(WORKLOADS)}.", rich_help_panel=_LOAD)
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"End after so many. (default: {DEFAULT_NUM_REQUESTS} without --duration and --trace)",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Offer for so many seconds.", rich_help_panel=_LOAD)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals, lengths and the router's draws.", rich_help_panel=_LOAD)] = 0,
    trace: Annotated[Path | None, typer.Option(help="Replay this file.", rich_help_panel=_TRACE)] = None,
    trace_format: Annotated[
        str | None,
        typer.Option("--format", help=f"{' or '.join(FORMATS)}. (default: by the file's ending)", rich_help_panel=_TRACE),
    ] = None,
    speed: Annotated[
        float | None, typer.Option(help="Replay so many times as fast. (default: 1)", rich_help_panel=_TRACE)
    ] = None,
    repeat: Annotated[
        int | None, typer.Option(min=1, help="Replay it so many times in a row. (default: 1)", rich_help_panel=_TRACE)
    ] = None,
    max_input_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut longer prompts of the trace.", rich_help_panel=_TRACE)
    ] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut longer answers of the trace.", rich_help_panel=_TRACE)
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Write every step and request here, for ui.perfetto.dev.", rich_help_panel=_RESULT)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures here, as JSON.", rich_help_panel=_RESULT)] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots here.", rich_help_panel=_RESULT)] = None,
) -> None:
    """Simulate the cluster that TOPOLOGY describes: its own routing, scheduling and copying, in virtual time.

    Attainment and goodput count all offered requests: those that fail or are shed are misses.
    """
    console = screen.out()
    with screen.exits_on_error():
        load = _Load(
            rate, burstiness, input_tokens, output_tokens, lengths, requests, duration,
            trace, trace_format, speed, repeat, max_input_tokens, max_output_tokens, seed,
        )  # fmt: skip
        topology = load_topology(topology_file)
        shape = find_model(topology.model.path)
        profiles = [read_profile(path) for path in profile or ()]
        costs = costs_of(topology, shape, profiles)
        setup = setup_of(topology, shape, costs, fabric_of(topology, profiles), seed)
        workload = _workload(load)
        for name, path in (("timeline", timeline), ("out", out), ("html", html)):
            _check_writable(name, path)
        drawn = Timeline() if timeline is not None else None
        console.print(_title(topology, shape, costs), soft_wrap=True)
        report, kept = _run(setup, workload, load.requests, drawn, num_devices(topology))
        print_report(console, report)
        _warn_of_long(report, setup)
        if timeline is not None and drawn is not None:
            drawn.write(timeline)
        settings: Settings = {"topology": str(topology_file), "workload": _describe(load), "seed": seed}
        if out is not None:
            write_figures(out, report, settings)
        if html is not None:
            write_page(html, report, kept, f"{topology.cluster} in simulation", settings)
    for path in (timeline, out, html):
        if path is not None:
            console.print(f"wrote {path}", soft_wrap=True)
    if not report.num_finished:
        raise typer.Exit(screen.FAILED)


def _run(
    setup: ClusterSetup,
    workload: Iterator[PlannedRequest],
    num_planned: int | None,
    timeline: Timeline | None,
    devices: int,
) -> tuple[SimulationReport, list[RequestOutcome]]:
    """The figures, and a fair sample of the outcomes. Memory stays flat however long the workload is."""
    tally, sample = OutcomeTally(setup.slo), Sample(MAX_KEPT)
    with LiveCount(screen.err(), num_planned) as count:

        def sink(outcome: RequestOutcome) -> None:
            tally.add(outcome)
            sample.add(outcome)
            count.update(outcome)

        served = _refuse_long(workload, min(pool.max_model_len for pool in setup.pools), sink)
        result = run_simulation(setup, served, sink=sink, timeline=timeline)
    report = make_report(setup, tally, result.duration, result.workers, result.links, devices)
    return report, sorted(sample.kept, key=lambda outcome: outcome.index)


def _refuse_long(
    workload: Iterator[PlannedRequest], limit: int, refuse: Callable[[RequestOutcome], None]
) -> Iterator[PlannedRequest]:
    """What the API lets through: prompt and answer together must fit the model. The others end as they arrive."""
    for planned in workload:
        if planned.input_tokens + planned.output_tokens <= limit:
            yield planned
        else:
            ask = planned.index, planned.tenant, planned.at, planned.input_tokens, planned.output_tokens
            refuse(RequestOutcome(*ask, end=planned.at, error=InvalidRequest.code))


def _workload(load: _Load) -> Iterator[PlannedRequest]:
    """Nothing is read or drawn before the arguments are known to be right, but the first line of a trace is."""
    made = ("rate", "burstiness", "input_tokens", "output_tokens", "lengths")
    replayed = ("trace_format", "speed", "repeat", "max_input_tokens", "max_output_tokens")
    wrong, why = (made, "exclude each other") if load.trace else (replayed, "belong together: there is no trace")
    for name in wrong:
        if getattr(load, name) is not None:
            option = "format" if name == "trace_format" else name.replace("_", "-")
            raise InvalidRequest(f"--{option} and --trace {why}", option)
    if load.trace is not None:
        return _replayed(load, load.trace)
    if load.lengths is None:
        inputs = parse_length(load.input_tokens or DEFAULT_INPUT, "input-tokens")
        lengths = IndependentLengths(inputs, parse_length(load.output_tokens or DEFAULT_OUTPUT, "output-tokens"))
    elif load.input_tokens or load.output_tokens:
        raise InvalidRequest("--lengths excludes --input-tokens and --output-tokens", "lengths")
    elif load.lengths in WORKLOADS:
        lengths = WORKLOADS[load.lengths]
    else:
        raise InvalidRequest(f"--lengths: {load.lengths!r} is not known; allowed are {', '.join(WORKLOADS)}", "lengths")
    arrivals = GammaArrivals(1.0 if load.rate is None else load.rate, 1.0 if load.burstiness is None else load.burstiness)
    requests = load.requests or (DEFAULT_NUM_REQUESTS if load.duration is None else None)
    return synthetic_workload(arrivals, lengths, num_requests=requests, duration=load.duration, seed=load.seed)


def _replayed(load: _Load, trace: Path) -> Iterator[PlannedRequest]:
    speed = 1.0 if load.speed is None else load.speed
    if not 0 < speed < math.inf:
        raise InvalidRequest(f"--speed: {speed}; it must be a number above 0", "speed")
    trace_format = load.trace_format or guess_format(trace)
    options = TraceOptions(1 / speed, load.requests, load.duration, load.max_input_tokens, load.max_output_tokens)
    if load.repeat is not None:
        return repeat_trace(read_trace(trace, trace_format, options), load.repeat)
    requests = stream_trace(trace, trace_format, options)
    return chain((next(requests),), requests)  # the first is read now: a file that is no trace is refused before anything runs


def _describe(load: _Load) -> str:
    if load.trace is not None:
        speed = f", {load.speed:g} times as fast" if load.speed is not None else ""
        return f"{load.trace}{speed}" + (f", {load.repeat} times in a row" if load.repeat is not None else "")
    burstiness = 1.0 if load.burstiness is None else load.burstiness
    kind = "Poisson" if burstiness == 1 else f"gaps with CV {burstiness:g}"
    lengths = load.lengths or f"{load.input_tokens or DEFAULT_INPUT} tokens in, {load.output_tokens or DEFAULT_OUTPUT} out"
    return f"{kind}, {1.0 if load.rate is None else load.rate:g} requests/s, {lengths}"


def _title(topology: Topology, shape: ModelShape, costs: dict[Role, PoolCost]) -> str:
    pools = ", ".join(f"{pool.replicas} {pool.role} ({costs[pool.role].source})" for pool in topology.pools)
    return f"[bold]{topology.cluster}[/] with {shape.name}: {pools}"


def _warn_of_long(report: SimulationReport, setup: ClusterSetup) -> None:
    num_refused = dict(report.errors).get(InvalidRequest.code, 0)
    if num_refused:
        limit = min(pool.max_model_len for pool in setup.pools)
        screen.err().print(
            f"{num_refused} of {report.num_offered} requests are longer than the model's {limit} tokens and were refused, as the "
            "service would; shorten them with --input-tokens and --output-tokens, or --max-input-tokens and --max-output-tokens",
            style="yellow",
            soft_wrap=True,
        )


def _check_writable(name: str, path: Path | None) -> None:
    """Before the work, not after it. Makes nothing."""
    if path is None:
        return
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir():
        raise InvalidRequest(
            f"--{name}: {path} cannot be written: {path if path.is_dir() else folder} is no place for a file", name
        )
