"""How much load each system carries within the objectives: attainment at a row of request rates, as JSON and one picture.

    .venv/bin/python benchmarks/goodput.py --out FOLDER [--quick] [--rates 0.5 1 1.5 ...] [--baton 1p1d --baton mixed]
        [--model DIR] [--peer LABEL=URL --start LABEL=COMMAND --stop LABEL=COMMAND] ...
    .venv/bin/python benchmarks/goodput.py --out FOLDER --plot-only

Every system has the machine to itself for a turn of all rates, Poisson arrivals, 512 tokens in and 128 out, prompts that nobody
has seen; the same arrivals and prompts for all systems of a turn. Attainment is the share of **all offered** requests that met
both objectives; goodput at a rate is attainment x rate; a system's goodput is the largest rate tried at which, and at every
smaller rate tried, attainment (the median over turns) reached its target. Once a system has fallen under --give-up at a rate,
larger ones are not tried, and the picture says so; so it does of systems and rates that failed.

FOLDER/goodput.json grows by every point at once: another call with the same FOLDER adds systems, rates and turns to it, and
refuses to mix other lengths, objectives or models. FOLDER/goodput.png and goodput.svg are the picture. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from baton.core.errors import BatonError
from clusters import SLO
from curve import Curve, Point, Setting, read_curve, write_curve
from curve_plot import draw
from loads import Lengths, fresh_seed, poisson, warm
from systems import System, add_system_options, chosen_systems, model_folder, vocab_size

RATES, QUICK_RATES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0), (0.5, 1.5)
DEFAULT_SYSTEMS = ("1p1d", "mixed")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rates, 8 requests each")
    parser.add_argument("--rates", type=float, nargs="+", help="requests per second (default: 0.5 to 5 by 0.5)")
    parser.add_argument(
        "--duration", type=float, default=60.0, help="seconds of arrivals at each rate, on the mean (default: 60)"
    )
    parser.add_argument("--turns", type=int, default=1, help="of every system (default: 1)")
    parser.add_argument(
        "--give-up", type=float, default=0.05, help="attainment under which larger rates are not tried (default: 0.05)"
    )
    parser.add_argument("--seed", type=int, help="of prompts and arrivals (default: a new one)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON and the picture")
    parser.add_argument("--plot-only", action="store_true", help="draw what FOLDER/goodput.json holds")
    add_system_options(parser, DEFAULT_SYSTEMS)
    arguments = parser.parse_args()
    path = arguments.out / "goodput.json"
    if arguments.plot_only:
        curve = read_curve(path)
    else:
        lengths = Lengths()
        setting = Setting(
            model_folder(arguments).name, lengths.input, lengths.output, SLO.ttft, SLO.tpot, SLO.attainment, _machine()
        )
        curve = read_curve(path) if path.exists() else Curve(setting)
        if (difference := curve.setting.difference(setting)) is not None:
            parser.error(f"{path} was measured with other settings ({difference}): give another --out")
        systems = chosen_systems(parser, arguments, DEFAULT_SYSTEMS)
        rates = sorted(arguments.rates or (QUICK_RATES if arguments.quick else RATES))
        seed, vocabulary = fresh_seed(arguments.seed), vocab_size(arguments)
        print(f"{lengths} tokens, rates {', '.join(f'{rate:g}' for rate in rates)}, seed {seed}", flush=True)
        for turn in range(arguments.turns):
            for system in systems:
                turn_seed = seed + 1000 * turn
                await _turn(curve, path, system, rates, arguments, turn_seed, vocabulary)
    draw(curve, arguments.out / "goodput")
    print(f"wrote {path}, {arguments.out / 'goodput.png'} and .svg")
    print(json.dumps({f"goodput_{label.lower().replace(' ', '_')}": round(curve.goodput(label), 3) for label in curve.labels}))


async def _turn(
    curve: Curve, path: Path, system: System, rates: list[float], arguments: argparse.Namespace, seed: int, vocabulary: int
) -> None:
    """All rates on one system, the smallest first. What goes wrong becomes a note, and the next system has its turn."""
    curve.notes = [note for note in curve.notes if not note.startswith(f"{system.title}: ")]
    lengths = Lengths(curve.setting.input_tokens, curve.setting.output_tokens)
    rate = rates[0]
    try:
        async with system.up() as endpoint:
            await warm(endpoint.target(seed, vocabulary), lengths)
            for number, rate in enumerate(rates, start=1):
                num_requests = 8 if arguments.quick else max(20, round(rate * arguments.duration))
                target = endpoint.target(seed + number, vocabulary)
                measured = await poisson(target, rate, num_requests, lengths, seed + number, SLO)
                point = Point.of(system.title, rate, measured, datetime.now(UTC).isoformat(timespec="seconds"))
                curve.points.append(point)
                write_curve(path, curve)
                print(point, flush=True)
                if point.attainment < arguments.give_up and number < len(rates):
                    reason = f"attainment {point.attainment:.0%} at {rate:g}/s already"
                    curve.notes.append(f"{system.title}: rates above {rate:g}/s not tried ({reason})")
                    break
    except BatonError as error:
        curve.notes.append(f"{system.title}: failed from {rate:g}/s on: {str(error).splitlines()[0]}")
        print(curve.notes[-1], flush=True)
    write_curve(path, curve)


def _machine() -> str:
    """Which processor, and how much of it is ours."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{len(os.sched_getaffinity(0))} cores of {model}"


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except BatonError as error:
        raise SystemExit(str(error)) from error
