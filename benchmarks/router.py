"""What the router costs: the real router process on one core, with workers that compute nothing, beside a bare grpc.aio server.

    .venv/bin/python benchmarks/router.py [--quick] [--memory 100000]

Fake workers (one prefill, one decode) and clients share the other core and are never the bottleneck: their share of it
is printed. The echo is a grpc.aio server on the router's core, at other moments of the same run, with nothing behind it: it
answers the same requests over the same connections with as many messages of the same size, serialised beforehand.

requests_per_s       64 tokens in, 16 out, one a step; 128 requests at once, as many as the router can serve
messages_fraction    128 tokens out, 64 streams: messages a second at the clients, divided by those of the echo
coalesced_tok_s      256 streams whose clients take 0.2 s over every message, 900 tokens out, as many as the router can take
added_ttft_ms_p50    one request at a time: p50 of (request sent to first token received - time in the fake worker) minus
                     p50 of (request sent to first message received) at the echo. Both are printed
two_routers_requests_per_cpu_s_ratio
                     two routers on one port, each with as many requests as `requests_per_s` gives one: requests per second of
                     their CPU time together, divided by those of one router in turns of the same run. Two routers serve
                     1.7 times one's rate, given the cores, if the ratio is 0.85 or more. The second router has a third core
                     where there is one; where there are two, it shares that of workers and clients (on one core with the
                     first, two processes that take turns would be measured instead). The claim about the clock itself
                     needs four cores or more, so `two_routers_speedup`, their rate divided by one's, stays below what their
                     `two_routers_cores` (CPU seconds a second) leave room for

`..._cpu...` count the router's CPU seconds instead of the clock's: on a busy machine they say more.
--memory N also watches the router's memory over N requests (memory_bytes_per_request: growth after the first tenth).
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics

from router_clients import Outcome, cpu_seconds
from router_rig import Rig, running

SHORT, SHORT_STREAMS = 16, 128
LONG, LONG_STREAMS = 128, 64
LAGGING, LAGGING_TOKENS, LAG = 256, 900, 0.2


def main() -> None:
    arguments = _arguments()
    figures: dict[str, float] = {}
    with running() as rig:
        turns, seconds = (1, 1.5) if arguments.quick else (3, 3.0)
        rig.measure(tokens=SHORT, streams=SHORT_STREAMS, seconds=0.5)  # warm up
        rig.measure(echo=True, tokens=SHORT, streams=SHORT_STREAMS, seconds=0.5)
        figures |= _first_token(rig, 200 if arguments.quick else 1000)
        figures |= _requests(rig, turns, seconds)
        figures |= _messages(rig, turns, seconds)
        if arguments.memory:
            figures |= _memory(rig, arguments.memory)
    with running(decode=2) as rig:
        figures |= _coalesced(rig, seconds + 1)
    with running() as one, running(routers=2) as two:
        figures |= _two_routers(one, two, turns, seconds)
    print(json.dumps(figures))


def _first_token(rig: Rig, count: int) -> dict[str, float]:
    """One request at a time on an idle router; in turns with the echo."""
    through, bare = [], []
    for _ in range(4):
        through += rig.measure(tokens=2, streams=1, num_requests=count // 4).first
        bare += rig.measure(echo=True, tokens=2, streams=1, num_requests=count // 4).first
    ttft, round_trip = 1000 * statistics.median(through), 1000 * statistics.median(bare)
    print(f"first token: {ttft:.3f} ms through the router without the worker's own time, {round_trip:.3f} ms from the echo (p50)")
    return {"added_ttft_ms_p50": round(ttft - round_trip, 3), "echo_first_ms_p50": round(round_trip, 3)}


def _requests(rig: Rig, turns: int, seconds: float) -> dict[str, float]:
    runs, echoes = _in_turn(rig, turns, tokens=SHORT, streams=SHORT_STREAMS, seconds=seconds, step=0.002)
    return {
        "requests_per_s": _median([run.num_requests / run.seconds for run in runs]),
        "requests_per_cpu_s": _median([run.num_requests / run.cpu[0] for run in runs]),
        "echo_requests_per_s": _median([run.num_requests / run.seconds for run in echoes]),
        "messages_per_short_request": _median([run.num_messages / run.num_requests for run in runs], 2),
    }


def _messages(rig: Rig, turns: int, seconds: float) -> dict[str, float]:
    runs, echoes = _in_turn(rig, turns, tokens=LONG, streams=LONG_STREAMS, seconds=seconds, window=LONG_STREAMS)
    rates = [run.num_messages / run.seconds for run in runs]
    bare = [run.num_messages / run.seconds for run in echoes]
    cpu = [(run.cpu[0] / run.num_messages, echo.cpu[0] / echo.num_messages) for run, echo in zip(runs, echoes, strict=True)]
    return {
        "messages_fraction": _median([rate / echo for rate, echo in zip(rates, bare, strict=True)], 3),
        "messages_fraction_cpu": _median([echo / run for run, echo in cpu], 3),
        "messages_per_s": _median(rates),
        "echo_messages_per_s": _median(bare),
        "tokens_per_message": _median([run.num_tokens / run.num_messages for run in runs], 3),
    }


def _coalesced(rig: Rig, seconds: float) -> dict[str, float]:
    run = rig.measure(tokens=LAGGING_TOKENS, streams=LAGGING, seconds=seconds, settle=1.0, window=150 * LAGGING, lag=LAG)
    _print("lagging clients", run)
    return {
        "coalesced_tok_s": round(run.num_tokens / run.seconds),
        "coalesced_tok_cpu_s": round(run.num_tokens / run.cpu[0]),
        "coalesced_tokens_per_message": round(run.num_tokens / run.num_messages, 1),
    }


def _two_routers(one: Rig, two: Rig, turns: int, seconds: float) -> dict[str, float]:
    """The same load per router on one router and on two, one after the other."""
    alone, both = [], []
    for rig in (one, two):  # warm up
        rig.measure(tokens=SHORT, streams=SHORT_STREAMS, seconds=0.5)
    for _ in range(turns):
        alone.append(one.measure(tokens=SHORT, streams=SHORT_STREAMS, seconds=seconds, step=0.002))
        _print("one router", alone[-1])
        before = [cpu_seconds(pid) for pid in two.router_pids]
        both.append(two.measure(tokens=SHORT, streams=2 * SHORT_STREAMS, seconds=seconds, step=0.002))
        shares = [cpu_seconds(pid) - cpu for pid, cpu in zip(two.router_pids, before, strict=True)]
        _print("two routers", both[-1])
        if min(shares) < 0.1 * sum(shares):
            raise SystemExit("the kernel gave nearly all connections to one of the two routers: nothing was measured")
    per_cpu = [[run.num_requests / run.cpu[0] for run in runs] for runs in (alone, both)]
    per_clock = [[run.num_requests / run.seconds for run in runs] for runs in (alone, both)]
    return {
        "two_routers_requests_per_cpu_s": _median(per_cpu[1]),
        "two_routers_requests_per_cpu_s_ratio": _median([pair / single for single, pair in zip(*per_cpu, strict=True)], 3),
        "two_routers_speedup": _median([pair / single for single, pair in zip(*per_clock, strict=True)], 3),
        "two_routers_cores": _median([run.cpu[0] / run.seconds for run in both], 2),
    }


def _memory(rig: Rig, num_requests: int) -> dict[str, float]:
    sizes = []
    for _ in range(10):
        rig.measure(tokens=SHORT, streams=SHORT_STREAMS, num_requests=num_requests // 10, step=0.002)
        sizes.append(rig.router_memory())
        print(f"memory after {len(sizes) * num_requests // 10} requests: {sizes[-1] / 2**20:.1f} MiB", flush=True)
    return {"memory_bytes_per_request": round((sizes[-1] - sizes[0]) / (0.9 * num_requests), 1)}


def _in_turn(rig: Rig, turns: int, step: float = 0.0, window: int = 0, **fields: object) -> tuple[list[Outcome], list[Outcome]]:
    """The same load on the echo and on the router, one after the other."""
    runs, echoes = [], []
    for _ in range(turns):
        echoes.append(rig.measure(echo=True, **fields))
        _print("echo", echoes[-1])
        runs.append(rig.measure(step=step, window=window, **fields))
        _print("router", runs[-1])
    return runs, echoes


def _print(name: str, run: Outcome) -> None:
    share = [f"{who} {100 * cpu / run.seconds:.0f}%" for who, cpu in zip(("server", "fakes", "clients"), run.cpu, strict=True)]
    print(
        f"{name}: {run.num_requests / run.seconds:.0f} requests/s, {run.num_messages / run.seconds:.0f} messages/s of "
        f"{run.num_bytes / run.num_messages:.0f} bytes, {run.num_tokens / run.seconds:.0f} tokens/s; server "
        f"{1e6 * run.cpu[0] / run.num_messages:.1f} us a message, {1e6 * run.cpu[0] / max(1, run.num_requests):.0f} us a "
        f"request; CPU: {', '.join(share)}",
        flush=True,
    )


def _median(values: list[float], digits: int = 0) -> float:
    return round(statistics.median(values), digits)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter turns, one of each")
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="also watch the router's memory over N requests")
    return parser.parse_args()


if __name__ == "__main__":
    main()
