"""`baton plan`: which placement of a model on given hardware has the best goodput, why, and the topology that deploys it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from ..core.errors import InvalidRequest, TopologyError
from ..core.slo import Slo
from ..deploy.settings import check_cluster_name, dump_topology, parse_topology, prepare_ray_environment
from ..placement.cluster import Shape, parse_cluster
from ..placement.demand import Demand, Lengths, demand_of
from ..placement.deployment import topology_of
from ..placement.executors import RayCluster, executor
from ..placement.explain import Explanation, explain
from ..placement.goodput import GoodputOptions
from ..placement.hardware import Accelerator
from ..placement.model_shape import find_model
from ..placement.objective import OBJECTIVES, objective
from ..placement.problem import Problem, SearchOptions, SearchResult
from ..placement.profile import Profile, read_profile
from ..placement.report import nearest_text, plan_page, print_plan, summary_lines, tried
from ..placement.roofline import roofline_cost
from ..placement.search import OnProgress, Progress, search
from ..placement.space import CostMaker, Need, Price
from ..simulator.workload.lengths import LENGTH_FORMS, IndependentLengths, parse_length
from ..simulator.workload.published import WORKLOADS
from ..simulator.workload.traces import FORMATS, TraceOptions, guess_format, read_trace
from . import screen
from .files import write_all

NUM_DRAWN = 4096
"""Requests drawn from a length distribution: the mix that is planned for."""
TOPOLOGY_FILE, PAGE_FILE = "topology.yaml", "plan.html"
_QUICK = SearchOptions(num_requests=100, goodput=GoodputOptions((0,), 0.05))
_LIVE = SearchOptions(goodput=GoodputOptions((0, 1, 2, 3, 4), 0.02))
_LIVE_QUICK = SearchOptions(num_requests=100, goodput=GoodputOptions((0, 1, 2), 0.03))
"""Differences are looked for: more seeds and finer steps than for a plan."""
_SLO = {"ttft", "tpot", "attainment"}
_WITH_LIVE = _SLO | {"from_live", "min_gain", "goal", "requests", "out", "workers", "ray", "quick"}
_HARDWARE, _LOAD, _GOAL, _RESULT = "Hardware", "Load", "Objectives", "Report"


@dataclass(frozen=True, slots=True)
class _Load:
    """What the options say of the workload. None where nothing was said."""

    trace: Path | None
    trace_format: str | None
    input_tokens: str | None
    output_tokens: str | None
    lengths: str | None
    max_input_tokens: int | None
    max_output_tokens: int | None
    burstiness: float
    seed: int


def plan(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="A model folder, or the name of a well-known model.", show_default=False)
    ] = None,
    from_live: Annotated[
        str | None,
        typer.Option(
            metavar="CLUSTER",
            help="Re-plan this running cluster instead, from what it has observed. Exit code 3 when a change is worth it.",
            show_default=False,
        ),
    ] = None,
    min_gain: Annotated[
        float, typer.Option(min=0.0, help="With --from-live: the gain of goodput below which nothing is changed.")
    ] = 0.1,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND or KIND:COUNT, such as A100-80GB:32; once per kind.", show_default=False, rich_help_panel=_HARDWARE
        ),
    ] = None,
    ttft: Annotated[float, typer.Option(min=1e-6, help="Seconds to the first token.", rich_help_panel=_GOAL)] = Slo().ttft,
    tpot: Annotated[float, typer.Option(min=1e-6, help="Seconds per token after it.", rich_help_panel=_GOAL)] = Slo().tpot,
    attainment: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of requests that must meet both.", rich_help_panel=_GOAL)
    ] = Slo().attainment,
    goal: Annotated[str, typer.Option("--objective", help=f"{', '.join(OBJECTIVES)}.", rich_help_panel=_GOAL)] = OBJECTIVES[0],
    rate: Annotated[
        float | None, typer.Option(help="Requests/s to carry. (default: what the hardware can)", rich_help_panel=_GOAL)
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes there are.", rich_help_panel=_HARDWARE)] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="(default: as usual for the kind)", rich_help_panel=_HARDWARE)] = None,
    node_link: Annotated[
        float | None, typer.Option(help="Bytes/s between the GPUs of a node, all together.", rich_help_panel=_HARDWARE)
    ] = None,
    network: Annotated[
        float | None, typer.Option(help="Bytes/s between a node and all others.", rich_help_panel=_HARDWARE)
    ] = None,
    profile: Annotated[
        list[Path] | None, typer.Option(help="Step times from `baton profile`. (default: a roofline)", rich_help_panel=_HARDWARE)
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and KV.", rich_help_panel=_HARDWARE)] = "bfloat16",
    trace: Annotated[Path | None, typer.Option(help="Take the lengths from this file.", rich_help_panel=_LOAD)] = None,
    trace_format: Annotated[
        str | None, typer.Option("--format", help=f"{' or '.join(FORMATS)}. (default: by its ending)", rich_help_panel=_LOAD)
    ] = None,
    input_tokens: Annotated[str | None, typer.Option(help=f"Tokens per prompt: {LENGTH_FORMS}.", rich_help_panel=_LOAD)] = None,
    output_tokens: Annotated[str | None, typer.Option(help="Tokens per answer, likewise.", rich_help_panel=_LOAD)] = None,
    lengths: Annotated[
        str | None, typer.Option(help=f"Published lengths instead: {' or '.join(WORKLOADS)}.", rich_help_panel=_LOAD)
    ] = None,
    max_input_tokens: Annotated[int | None, typer.Option(min=1, help="Cut longer prompts.", rich_help_panel=_LOAD)] = None,
    max_output_tokens: Annotated[int | None, typer.Option(min=1, help="Cut longer answers.", rich_help_panel=_LOAD)] = None,
    burstiness: Annotated[
        float, typer.Option(help="Coefficient of variation of the gaps; 1 is Poisson.", rich_help_panel=_LOAD)
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and lengths.", rich_help_panel=_LOAD)] = 0,
    requests: Annotated[int, typer.Option(min=20, help="Counted requests of one simulation.", rich_help_panel=_RESULT)] = 300,
    out: Annotated[
        Path | None, typer.Option(help=f"Write {TOPOLOGY_FILE} and {PAGE_FILE} into this folder.", rich_help_panel=_RESULT)
    ] = None,
    name: Annotated[str, typer.Option(help="Of the planned cluster.", rich_help_panel=_RESULT)] = "planned",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. (default: one per core)", rich_help_panel=_RESULT)
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Simulate on the Ray cluster instead.", rich_help_panel=_RESULT)] = False,
    quick: Annotated[bool, typer.Option("--quick", help="100 requests a simulation, one seed.", rich_help_panel=_RESULT)] = False,
) -> None:
    """Search tensor and pipeline parallelism, replicas and kinds of GPU of a prefill and a decode pool, and of the pool that does
    both, for the best goodput: the rate at which so many requests meet the objectives, in simulations of the real scheduler.
    """
    console = screen.out()
    with screen.exits_on_error():
        _check_target(out)
        num_workers = workers or len(os.sched_getaffinity(0))
        if ray:
            prepare_ray_environment()
        if from_live is not None:
            from .replan import Wish, plan_from_live  # only here, as `check_topology` below: both take their time to import

            given = _given(context)
            _refuse(given - _WITH_LIVE)
            slo = Slo(ttft, tpot, attainment)
            thorough = _LIVE_QUICK if quick else replace(_LIVE, num_requests=requests)
            wish = Wish(from_live, slo, given & _SLO, goal, min_gain, thorough, num_workers, ray, out)
            raise typer.Exit(plan_from_live(console, wish, _bar(screen.err())))
        if model is None or not gpu:
            raise InvalidRequest("--model and --gpu say what to plan for; or give --from-live and a running cluster", "model")
        check_cluster_name(name)
        shape = find_model(model)
        cluster = parse_cluster(gpu, Shape(nodes, gpus_per_node, node_link, network))
        load = _Load(
            trace, trace_format, input_tokens, output_tokens, lengths, max_input_tokens, max_output_tokens, burstiness, seed
        )
        demand, longest = _demand(load)
        need = Need(shape, dtype, _max_len(longest, shape.max_model_len))
        problem = Problem(need, cluster, demand, Slo(ttft, tpot, attainment), objective(goal, cluster, rate))
        cost = _cost_maker(problem, [read_profile(path) for path in profile or ()])
        options = _QUICK if quick else SearchOptions(requests, GoodputOptions((seed, seed + 1, seed + 2)))
        with executor(num_workers, ray) as runner, _bar(screen.err()) as tell:
            if isinstance(runner, RayCluster):  # as wide as the cluster: more is tried before it is known to be in vain
                options = replace(options, wave=max(options.wave, runner.width))
            result = search(problem, cost, options, runner, tell)
            explanation = explain(result, options, runner)
        if explanation is None:
            _say_none(result)
            raise typer.Exit(screen.FAILED)
        print_plan(console, result, explanation)
        if out is not None:
            _write(console, out, result, explanation, name, model)


def _given(context: typer.Context) -> set[str]:
    """The options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _refuse(names: set[str]) -> None:
    if names:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
        raise InvalidRequest(f"{options}: the running cluster says this; leave it away, or leave --from-live away", min(names))


def _demand(load: _Load) -> tuple[Demand, int]:
    """The mix, and the tokens of the longest request."""
    pairs = _trace_lengths(load, load.trace) if load.trace is not None else _drawn_lengths(load)
    return demand_of(pairs, load.burstiness), max((prompt + output for prompt, output in pairs), default=0)


def _trace_lengths(load: _Load, trace: Path) -> list[Lengths]:
    for option in ("input_tokens", "output_tokens", "lengths"):
        if getattr(load, option) is not None:
            raise InvalidRequest(f"--{option.replace('_', '-')} and --trace exclude each other", option)
    limits = TraceOptions(max_input_tokens=load.max_input_tokens, max_output_tokens=load.max_output_tokens)
    planned = read_trace(trace, load.trace_format or guess_format(trace), limits)
    return [(request.input_tokens, request.output_tokens) for request in planned]


def _drawn_lengths(load: _Load) -> list[Lengths]:
    if load.trace_format is not None:
        raise InvalidRequest("--format belongs to --trace", "format")
    if load.lengths is not None:
        if load.input_tokens or load.output_tokens:
            raise InvalidRequest("--lengths excludes --input-tokens and --output-tokens", "lengths")
        if load.lengths not in WORKLOADS:
            raise InvalidRequest(f"--lengths: {load.lengths!r} is not known; allowed are {', '.join(WORKLOADS)}", "lengths")
        drawn = WORKLOADS[load.lengths]
    elif load.input_tokens and load.output_tokens:
        drawn = IndependentLengths(
            parse_length(load.input_tokens, "input-tokens"), parse_length(load.output_tokens, "output-tokens")
        )
    else:
        raise InvalidRequest("no workload: give --trace, --lengths, or both --input-tokens and --output-tokens", "trace")
    inputs, outputs = Random(f"{load.seed}/input"), Random(f"{load.seed}/output")
    pairs = [drawn.draw(inputs, outputs) for _ in range(NUM_DRAWN)]
    most = (load.max_input_tokens or 1 << 30, load.max_output_tokens or 1 << 30)
    return [(min(prompt, most[0]), min(output, most[1])) for prompt, output in pairs]


def _max_len(longest: int, limit: int) -> int:
    """What the topology will allow: the longest request, rounded up."""
    if longest > limit:
        raise InvalidRequest(
            f"the longest request has {longest} tokens and the model takes {limit}; cut with --max-input-tokens and "
            "--max-output-tokens",
            "trace",
        )
    return min(limit, -(-longest // 256) * 256)


def _cost_maker(problem: Problem, profiles: list[Profile]) -> CostMaker:
    """Measured step times where a profile is of the device (then what it lacks is not considered), else the roofline's."""
    shape, names = problem.need.model, [supply.accelerator.name for supply in problem.cluster.supplies]
    for measured in profiles:
        measured.check_model(shape)
        if measured.accelerator not in names:
            raise InvalidRequest(
                f"--profile: measured on {measured.accelerator}; the GPUs to plan with are {', '.join(names)}", "profile"
            )
    by_name = {measured.accelerator: measured for measured in profiles}

    def cost(device: Accelerator, tp: int, pp: int) -> Price | None:
        measured = by_name.get(device.name)
        if measured is None:
            return Price(roofline_cost(shape, device, tp, pp, problem.need.dtype, problem.need.dtype))
        if not measured.measured(tp, pp):
            return None
        return Price(measured.cost(shape, tp, pp), measured.host_overhead)

    return cost


@contextmanager
def _bar(console: Console) -> Iterator[OnProgress]:
    """A line that changes, on a terminal only."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(
        *columns, TextColumn("{task.fields[best]}"), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("starting", total=None, best="")

        def tell(progress: Progress) -> None:
            bar.update(task, description=progress.round, completed=progress.done, total=progress.total, best=progress.best)

        yield tell


def _say_none(result: SearchResult) -> None:
    slo = result.problem.slo
    asked = f"TTFT {slo.ttft:g} s and TPOT {slo.tpot:g} s for {slo.attainment:.0%} of the requests"
    if result.problem.objective.rate is not None and any(v.goodput and v.goodput.mean > 0 for v in result.verdicts):
        asked += f" at {result.problem.objective.rate:g} requests/s"
    screen.complain(f"no placement on {result.problem.cluster} reaches {asked}")
    if result.nearest is not None:
        screen.err().print(nearest_text(result.nearest, slo), soft_wrap=True)
    screen.err().print(tried(result), soft_wrap=True)


def _check_target(out: Path | None) -> None:
    """Before the search: a folder that cannot be written to is known at once."""
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise InvalidRequest(f"--out: {out} is a file; needed: a folder, new or not", "out")
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise InvalidRequest(f"--out: {parent} cannot be written to; choose another folder", "out")


def _write(console: Console, out: Path, result: SearchResult, explanation: Explanation, name: str, model: str) -> None:
    """Both files, or neither: the page shows the topology."""
    folder = Path(model).expanduser()
    path = str(folder.resolve()) if folder.is_dir() else model
    text = topology_text(result, explanation, name, path, out)
    write_all({out / TOPOLOGY_FILE: text, out / PAGE_FILE: plan_page(result, explanation, text)})
    for file in (TOPOLOGY_FILE, PAGE_FILE):
        console.print(f"wrote {out / file}", soft_wrap=True)


def topology_text(result: SearchResult, explanation: Explanation, name: str, model_path: str, folder: Path) -> str:
    """The topology with what was found out as comments; also with what `baton up` would still refuse of it."""
    from ..deploy.checks import check_topology

    text = dump_topology(topology_of(result.problem, explanation.deployment, name, model_path))
    comments = [f"{key}: {value}" for key, value in summary_lines(result, explanation)]
    if explanation.deployment.num_clusters > 1:
        comments.append(
            f"start {explanation.deployment.num_clusters} of these, each on its own nodes, and share the load among them"
        )
    if not Path(model_path).is_dir():
        comments.append("model.path: put the model's folder or hub id there")
    try:
        check_topology(parse_topology(text, TOPOLOGY_FILE, folder))
    except TopologyError as error:
        refused = [line.partition(": ")[2] for line in str(error).splitlines() if "is not supported yet" in line]
        comments += [f"not yet deployable: {line}" for line in refused]
    return "".join(f"# {line}\n" for line in ["Planned by `baton plan`.", *comments]) + text
