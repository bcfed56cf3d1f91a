"""`baton bench`: offer a load to a running server, show what becomes of it, and write it down."""

from __future__ import annotations

import asyncio
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from ..bench.console import LiveProgress, print_summary
from ..bench.driver import Target, run_load, warm_up
from ..bench.grpc_target import GrpcTarget, ask_model
from ..bench.http_target import HttpTarget, ask_models
from ..bench.metrics import summarise
from ..bench.prompts import PromptSource
from ..bench.records import LoadResult
from ..bench.report import Settings, write_html, write_json
from ..core.errors import InvalidRequest
from ..core.slo import Slo
from ..simulator.workload.lengths import LENGTH_FORMS, parse_length
from ..simulator.workload.planned import PlannedRequest
from ..simulator.workload.synthetic import poisson_workload
from ..simulator.workload.traces import FORMATS, TraceOptions, guess_format, read_trace
from . import screen

DEFAULT_VOCAB_SIZE = 1000
DEFAULT_NUM_REQUESTS = 100
_SERVER, _LOAD, _TRACE, _REPORT = "Server", "Load", "Trace", "Report"


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Which server, and how to speak to it."""

    url: str | None
    grpc: str | None
    model: str | None
    api_key: str | None
    vocab_size: int | None
    seed: int
    text: bool
    ignore_eos: bool
    usage: bool
    workers: int | None


@dataclass(frozen=True, slots=True)
class _Connection:
    """A server to drive; `num_workers` and `max_model_len` where they are known."""

    target: Target
    num_workers: int | None
    max_model_len: int | None


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How the load is applied."""

    concurrency: int | None
    request_timeout: float
    warmup: int


def bench(
    url: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible server: http://host:port, with or without /v1.", rich_help_panel=_SERVER),
    ] = None,
    grpc: Annotated[str | None, typer.Option(help="A Baton router: host:port.", rich_help_panel=_SERVER)] = None,
    model: Annotated[
        str | None, typer.Option(help="Model name; the server's first one by default.", rich_help_panel=_SERVER)
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.", rich_help_panel=_SERVER)] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=16,
            help=f"Prompt token ids stay below it. (default: the router's, else {DEFAULT_VOCAB_SIZE})",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Send prompts as text, for servers that take no token ids.", rich_help_panel=_SERVER)
    ] = False,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            help="Ask for exactly the planned number of tokens (fields ignore_eos, min_tokens).", rich_help_panel=_SERVER
        ),
    ] = True,
    usage: Annotated[
        bool, typer.Option(help="Ask the server for token counts (field stream_options).", rich_help_panel=_SERVER)
    ] = True,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Workers behind the server, for goodput per worker; Baton says it itself.", rich_help_panel=_SERVER
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second (Poisson), or inf. (default: 1; inf with --concurrency)", rich_help_panel=_LOAD),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"End after so many. (default: {DEFAULT_NUM_REQUESTS} without --duration)", rich_help_panel=_LOAD
        ),
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Offer for so many seconds.", rich_help_panel=_LOAD)] = None,
    input_len: Annotated[str, typer.Option(help=f"Tokens per prompt: {LENGTH_FORMS}.", rich_help_panel=_LOAD)] = "512",
    output_len: Annotated[str, typer.Option(help="Tokens per answer, likewise.", rich_help_panel=_LOAD)] = "128",
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: at most so many requests at once.", rich_help_panel=_LOAD)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals, lengths and prompts.", rich_help_panel=_LOAD)] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before the run that do not count.", rich_help_panel=_LOAD)] = 1,
    request_timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds after which a request is given up.", rich_help_panel=_LOAD)
    ] = 600.0,
    trace: Annotated[Path | None, typer.Option(help="Replay this file.", rich_help_panel=_TRACE)] = None,
    trace_format: Annotated[
        str | None,
        typer.Option("--format", help=f"{' or '.join(FORMATS)}. (default: by the file's ending)", rich_help_panel=_TRACE),
    ] = None,
    time_scale: Annotated[
        float, typer.Option(help="Multiplies the trace's times: 0.5 is twice as fast.", rich_help_panel=_TRACE)
    ] = 1.0,
    max_input_len: Annotated[
        int | None, typer.Option(min=1, help="Cut longer prompts of the trace.", rich_help_panel=_TRACE)
    ] = None,
    max_output_len: Annotated[
        int | None, typer.Option(min=1, help="Cut longer answers of the trace.", rich_help_panel=_TRACE)
    ] = None,
    slo_ttft: Annotated[
        float, typer.Option(min=0.0, help="Objective for the time to first token, seconds.", rich_help_panel=_REPORT)
    ] = Slo().ttft,
    slo_tpot: Annotated[
        float, typer.Option(min=0.0, help="Objective for the time per output token, seconds.", rich_help_panel=_REPORT)
    ] = Slo().tpot,
    slo_attainment: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of all offered requests that should meet both.", rich_help_panel=_REPORT),
    ] = Slo().attainment,
    out: Annotated[
        Path | None, typer.Option(help="Write figures and every request's raw times here, as JSON.", rich_help_panel=_REPORT)
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots here.", rich_help_panel=_REPORT)] = None,
) -> None:
    """Drive a server with an open-loop Poisson load, a closed loop, or a trace, and measure it against objectives.

    Attainment and goodput count all offered requests: those that fail, are shed or never end are misses.
    Ctrl-C ends the run early and still reports.
    """
    console = screen.out()
    with screen.exits_on_error():
        if trace is None:
            if trace_format is not None or time_scale != 1.0 or max_input_len or max_output_len:
                raise InvalidRequest("--format, --time-scale, --max-input-len and --max-output-len belong to --trace")
            workload = _synthetic(rate, requests, duration, input_len, output_len, concurrency, seed)
        else:
            if rate is not None:
                raise InvalidRequest(
                    "--rate and --trace exclude each other: a trace brings its times; change them with --time-scale"
                )
            limits = TraceOptions(time_scale, requests, duration, max_input_len, max_output_len)
            workload = read_trace(trace, trace_format or guess_format(trace), limits)
        server = ServerOptions(url, grpc, model, api_key, vocab_size, seed, text, ignore_eos, usage, workers)
        result, num_workers = uvloop.run(_drive(console, server, RunOptions(concurrency, request_timeout, warmup), workload))
    slo = Slo(slo_ttft, slo_tpot, slo_attainment)
    settings: Settings = {
        "workload": str(trace) if trace else f"Poisson, {rate or (math.inf if concurrency else 1.0):g} requests/s",
        "input length": input_len if trace is None else max_input_len,
        "output length": output_len if trace is None else max_output_len,
        "time scale": time_scale if trace else None,
        "concurrency": concurrency,
        "seed": seed,
        "ignore EOS": ignore_eos,
        "warm-up requests": warmup,
    }
    summary = summarise(result, slo, num_workers)
    print_summary(console, summary, slo)
    if out is not None:
        write_json(out, result, summary, slo, settings)
    if html is not None:
        write_html(html, result, summary, slo, settings)
    for path in filter(None, (out, html)):
        console.print(f"wrote {path}")
    if result.interrupted:
        raise typer.Exit(128 + signal.SIGINT)
    if not summary.num_finished:
        raise typer.Exit(1)


def _synthetic(
    rate: float | None,
    requests: int | None,
    duration: float | None,
    input_len: str,
    output_len: str,
    concurrency: int | None,
    seed: int,
) -> tuple[PlannedRequest, ...]:
    if rate is None:
        rate = math.inf if concurrency else 1.0
    if requests is None and duration is None:
        requests = DEFAULT_NUM_REQUESTS
    inputs, outputs = parse_length(input_len, "input-len"), parse_length(output_len, "output-len")
    return poisson_workload(rate, inputs, outputs, num_requests=requests, duration=duration, seed=seed)


async def _drive(
    console: Console, server: ServerOptions, options: RunOptions, workload: tuple[PlannedRequest, ...]
) -> tuple[LoadResult, int | None]:
    connection = await _connect(server)
    target = connection.target
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        console.print(f"{target.name}: {len(workload)} requests")
        warning = _too_long(workload, connection.max_model_len)
        if warning:
            console.print(warning, style="yellow")
        await warm_up(target, workload[0], options.warmup, options.request_timeout)
        loop.add_signal_handler(signal.SIGINT, stop.set)
        with LiveProgress(console, len(workload)) as live:
            result = await run_load(
                target,
                workload,
                live.update,
                concurrency=options.concurrency,
                request_timeout=options.request_timeout,
                stop=stop,
            )
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        await target.close()
    return result, connection.num_workers


async def _connect(server: ServerOptions) -> _Connection:
    if (server.url is None) == (server.grpc is None):
        raise InvalidRequest("give either --url http://host:port or --grpc host:port")
    if server.grpc is not None:
        if server.text or server.api_key or not server.usage:
            raise InvalidRequest("--text, --api-key and --no-usage belong to --url")
        served = await ask_model(server.grpc)
        prompts = PromptSource(server.seed, server.vocab_size or served.vocab_size)
        baton = GrpcTarget(server.grpc, server.model or served.name, prompts, ignore_eos=server.ignore_eos)
        return _Connection(baton, server.workers or served.num_workers, served.max_model_len)
    url = server.url or ""
    other = HttpTarget(
        url,
        server.model or next(iter(await ask_models(url, server.api_key)), ""),
        PromptSource(server.seed, server.vocab_size or DEFAULT_VOCAB_SIZE),
        token_ids=not server.text,
        ignore_eos=server.ignore_eos,
        usage=server.usage,
        api_key=server.api_key,
    )
    return _Connection(other, server.workers, None)


def _too_long(workload: tuple[PlannedRequest, ...], max_model_len: int | None) -> str | None:
    """A warning when the model cannot take some of the requests."""
    if max_model_len is None:
        return None
    count = sum(planned.input_tokens + planned.output_tokens > max_model_len for planned in workload)
    if not count:
        return None
    return (
        f"{count} of {len(workload)} requests are longer than the model's {max_model_len} tokens and will be refused; "
        "shorten them with --input-len and --output-len, or --max-input-len and --max-output-len"
    )
