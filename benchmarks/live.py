"""Simulated against served: profile this machine, predict, then serve the same requests and compare.

    .venv/bin/python benchmarks/live.py --out FOLDER [--quick] [--stage profile calibrate predict serve report] [--repeats 3]
        [--systems 1p1d mixed] [--duration 40] [--data FOLDER]

profile   `baton profile` of the 110M Llama, one file per system: FOLDER/profile-SYSTEM.yaml
calibrate two loads of their own on each system, and what steps cost beside a router and a client on the same cores, by what its
          workers remember of them (live_calibration.py): FOLDER/calibration.json
predict   the simulator's outcomes of every load with both: FOLDER/predictions.json, which names their hashes
serve     each load on a fresh cluster of its system, through HTTP, `--repeats` times in turn: FOLDER/served.json, raw times of
          every request in FOLDER/requests.csv. Refused when one of them is not what the predictions were made with
report    the two side by side: FOLDER/live.md

Loads: five Poisson rates around what the prediction says the system can carry (its goodput times 0.6 to 1.3), 512 tokens in and
128 out, and a stretch of the Azure conversation trace (--data, skipped where it is absent) replayed at 0.45 of it, lengths cut
to 1,500 and 300 tokens. The simulator sees the very requests that are served, arrival by arrival. Attainment, TTFT and TPOT are
defined alike at both: the client's clock, all offered requests, failures as misses.

Within is: attainment 5 points; P50 and P90 of TTFT and TPOT 15% or, where that is more, the spread of the live repeats (largest
less smallest); goodput (the rate at which attainment falls under its target, interpolated) 10%. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from baton.bench.driver import run_load
from baton.core.errors import BatonError, InvalidRequest, Unavailable
from baton.core.observed import ObservedStep
from baton.core.topology import Topology
from baton.core.view import Role
from baton.deploy.cluster import running_cluster
from baton.deploy.observe import Observation, observe
from baton.placement.model_shape import find_model
from baton.placement.profile import read_profile
from baton.placement.topology_setup import PoolCost, costs_of, fabric_of, setup_of
from baton.simulator.simulate import simulate
from baton.simulator.workload.lengths import Length
from baton.simulator.workload.planned import PlannedRequest
from baton.simulator.workload.synthetic import poisson_workload
from baton.simulator.workload.traces import TraceOptions, read_trace
from clusters import SLO, random_model
from live_calibration import Calibration, InService, calibrate
from live_compare import Figures, Load, Prediction, compare, figures_of, goodput_of, markdown, verdict
from loads import Lengths, warm
from systems import TOPOLOGIES, Endpoint, System, vocab_size

STAGES = ("profile", "calibrate", "predict", "serve", "report")
SHARES = (0.6, 0.8, 1.0, 1.15, 1.3)  # of the predicted goodput
TRACE_SHARE = 0.45  # of it: the trace's prompts are twice as long on the mean
SEED, CALIBRATION_SEED = 11, 12
CALIBRATION_SHARES = (0.6, 1.0)  # of the goodput that the profile alone promises
TRACE = "azure2023/AzureLLMInferenceTrace_conv.csv"
CALIBRATION = "calibration.json"
MAX_RESIDUAL = 0.05  # of a kind of step, in the median: on an idle machine 0.5 to 4%
TRACE_SKIPPED = 600  # requests at the head of the trace, where it has hardly begun
MAX_INPUT, MAX_OUTPUT = 1500, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is kept")
    parser.add_argument("--quick", action="store_true", help="two rates of 8 s, one repeat, a short profile")
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=STAGES, help="(default: all, in their order)")
    parser.add_argument("--systems", choices=sorted(TOPOLOGIES), nargs="+", default=sorted(TOPOLOGIES))
    parser.add_argument("--repeats", type=int, help="live runs of every load (default: 3, quick 1)")
    parser.add_argument("--duration", type=float, help="seconds of arrivals of a load (default: 40, quick 8)")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data", help="folder of traces")
    parser.add_argument("--model", type=Path, help="model folder (default: the 110M Llama with random weights)")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (1 if arguments.quick else 3)
    arguments.duration = arguments.duration or (8.0 if arguments.quick else 40.0)
    arguments.model = (arguments.model or random_model()).resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    topologies = {name: TOPOLOGIES[name](arguments.model) for name in arguments.systems}
    if "profile" in arguments.stage:
        (arguments.out / CALIBRATION).unlink(missing_ok=True)
        for name, topology in topologies.items():
            measure_profile(arguments, name, topology)
    if "calibrate" in arguments.stage:
        asyncio.run(calibrate_all(arguments, topologies))
    if "predict" in arguments.stage:
        predict_all(arguments, topologies)
    if "serve" in arguments.stage:
        asyncio.run(serve_all(arguments, topologies))
    if "report" in arguments.stage:
        report(arguments.out)


def measure_profile(arguments: argparse.Namespace, name: str, topology: Topology) -> None:
    """In a process of its own, whose threads and memory go with it."""
    pool = topology.pools[-1]
    command = [str(Path(sys.executable).with_name("baton")), "profile", str(arguments.model), "--out"]
    command += [str(_profile_path(arguments.out, name)), "--threads", str(pool.threads)]
    command += ["--max-step-tokens", str(pool.max_step_tokens), "--block-size", str(pool.block_size)]
    command += ["--quick"] if arguments.quick else []
    subprocess.run(command, check=True)
    for kind, residual in read_profile(_profile_path(arguments.out, name)).costs[0].residuals.items():
        if residual.median > MAX_RESIDUAL and not arguments.quick:
            raise Unavailable(f"the fit of {kind} steps leaves {residual.median:.1%}: something disturbed the profile; run again")


async def calibrate_all(arguments: argparse.Namespace, topologies: dict[str, Topology]) -> None:
    """Serve loads of their own on each system and ask its workers what their steps took."""
    document = {}
    for name, topology in topologies.items():
        alone = read_profile(_profile_path(arguments.out, name)).costs[0].cost
        goodput = _predicted_goodput(arguments, name, topology)
        steps: dict[str, list[ObservedStep]] = {}
        ways: list[float] = []
        for share in CALIBRATION_SHARES:
            observed, way = await _observed(arguments, topology, Load(name, "calibration", share * goodput))
            ways.append(way)
            for worker in observed.workers:
                steps.setdefault(str(worker.role), []).extend(worker.steps)
        found = Calibration({role: calibrate(alone, seen) for role, seen in steps.items()}, statistics.fmean(ways))
        print(f"{name} in service: {found}", flush=True)
        document[name] = asdict(found)
    (arguments.out / CALIBRATION).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


async def _observed(arguments: argparse.Namespace, topology: Topology, load: Load) -> tuple[Observation, float]:
    """What a cluster remembers of a load, and how much later the client had a first token than the router, in the median."""
    with tempfile.TemporaryDirectory(prefix="baton-benchmark-") as scratch:
        async with running_cluster(topology, Path(scratch)) as cluster:
            status = await cluster.wait_ready()
            endpoint, vocabulary = Endpoint(f"http://{status.http}", topology.model.served_name), vocab_size(arguments)
            target = endpoint.target(CALIBRATION_SEED, vocabulary)
            result = await run_load(target, _workload(arguments, load, CALIBRATION_SEED))
            observed = await observe(cluster.controller)
    served = (result.records, observed.requests)
    client, router = (statistics.median(each.ttft for each in requests if each.ttft is not None) for requests in served)
    return observed, max(0.0, client - router)


def predict_all(arguments: argparse.Namespace, topologies: dict[str, Topology]) -> None:
    """What the simulator says, before anything is served."""
    predictions = []
    for name, topology in topologies.items():
        goodput = _predicted_goodput(arguments, name, topology)
        shares = (0.6, 1.0) if arguments.quick else SHARES
        loads = [Load(name, f"poisson-{share:g}", round(share * goodput, 3)) for share in shares]
        if (arguments.data / TRACE).exists():
            loads.append(Load(name, "azure", round(TRACE_SHARE * goodput, 3)))
        for load in loads:
            figures = _simulated(arguments, name, topology, _workload(arguments, load))
            predictions.append(Prediction(load, figures))
            print(f"predicted {load}: {figures}", flush=True)
    document = {
        "made_with": {path.name: _hash(path) for path in _basis(arguments.out, topologies)},
        "duration": arguments.duration,
        "predictions": [asdict(prediction) for prediction in predictions],
    }
    (arguments.out / "predictions.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


async def serve_all(arguments: argparse.Namespace, topologies: dict[str, Topology]) -> None:
    """Systems take turns, and all loads of a system follow each other on one cluster; prompts are new every time."""
    document = json.loads((arguments.out / "predictions.json").read_text(encoding="utf-8"))
    for file, expected in document["made_with"].items():
        if _hash(arguments.out / file) != expected:
            raise InvalidRequest(f"{arguments.out / file} is not what the predictions were made with: predict again")
    if document["duration"] != arguments.duration:
        raise InvalidRequest(f"the predictions are of loads of {document['duration']} s: give --duration {document['duration']}")
    loads = [Load(**prediction["load"]) for prediction in document["predictions"]]
    served: list[dict[str, object]] = []
    with (arguments.out / "requests.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("system", "load", "repeat", "index", "offered", "first", "last", "tokens", "end", "error"))
        for repeat in range(arguments.repeats):
            for name, topology in topologies.items():
                async with System(name, topology).up() as endpoint:
                    vocabulary = vocab_size(arguments)
                    await warm(endpoint.target(repeat, vocabulary), Lengths())
                    for number, load in enumerate(load for load in loads if load.system == name):
                        target = endpoint.target(1000 * (repeat + 1) + number, vocabulary)
                        result = await run_load(target, _workload(arguments, load))
                        figures = figures_of(result.records, SLO)
                        served.append({"load": asdict(load), "repeat": repeat, "figures": asdict(figures)})
                        print(f"served {load}, repeat {repeat}: {figures}", flush=True)
                        for record in result.records:
                            first, last = (record.chunk_times[0], record.chunk_times[-1]) if record.chunk_times else ("", "")
                            moments = (_digits(moment) for moment in (record.offered, first, last))
                            ended = record.num_tokens, _digits(record.end), record.error
                            writer.writerow((name, load.name, repeat, record.index, *moments, *ended))
                        file.flush()
                (arguments.out / "served.json").write_text(json.dumps(served, indent=1) + "\n", encoding="utf-8")


def report(out: Path) -> None:
    """FOLDER/live.md, and the last line."""
    document = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    predictions = [Prediction(Load(**each["load"]), Figures(**each["figures"])) for each in document["predictions"]]
    served: dict[Load, list[Figures]] = {}
    for each in json.loads((out / "served.json").read_text(encoding="utf-8")):
        served.setdefault(Load(**each["load"]), []).append(Figures(**each["figures"]))
    comparisons = [compare(prediction, served[prediction.load]) for prediction in predictions if prediction.load in served]
    goodputs = goodput_of(comparisons, SLO.attainment)
    text = markdown(comparisons, goodputs)
    (out / "live.md").write_text(text, encoding="utf-8")
    print(text)
    print(json.dumps(verdict(comparisons, goodputs)))


# ---- inside -------------------------------------------------------------------------------------


def _workload(arguments: argparse.Namespace, load: Load, seed: int = SEED) -> tuple[PlannedRequest, ...]:
    if load.name == "azure":
        whole = read_trace(arguments.data / TRACE, "azure", TraceOptions(1.0, TRACE_SKIPPED + 2000, None, MAX_INPUT, MAX_OUTPUT))
        return _stretch(whole[TRACE_SKIPPED:], load.rate, arguments.duration)
    inputs, outputs = (Length("fixed", count, count) for count in (Lengths().input, Lengths().output))
    num_requests = max(8, round(load.rate * arguments.duration))
    return poisson_workload(load.rate, inputs, outputs, num_requests=num_requests, seed=seed)


def _stretch(trace: Sequence[PlannedRequest], rate: float, duration: float) -> tuple[PlannedRequest, ...]:
    """The head of a trace, as many requests as `rate` gives in `duration`, at that mean rate."""
    chosen = trace[: max(8, round(rate * duration))]
    first, last = chosen[0].at, chosen[-1].at
    scale = duration / (last - first)
    return tuple(
        PlannedRequest(index, (each.at - first) * scale, each.input_tokens, max(2, each.output_tokens))
        for index, each in enumerate(chosen)
    )


def _predicted_goodput(arguments: argparse.Namespace, name: str, topology: Topology) -> float:
    """By doubling, then halving, with the Poisson load of the run; to 3%."""

    def met(rate: float) -> bool:
        figures = _simulated(arguments, name, topology, _workload(arguments, Load(name, "poisson", rate)))
        return figures.attainment >= SLO.attainment

    low, high = 0.05, 0.1
    while met(high):
        low, high = high, 2 * high
    while high / low > 1.03:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if met(middle) else (low, middle)
    return low


def _simulated(arguments: argparse.Namespace, name: str, topology: Topology, workload: Sequence[PlannedRequest]) -> Figures:
    shape = find_model(str(arguments.model))
    profiles = [read_profile(_profile_path(arguments.out, name))]
    costs, calibration = costs_of(topology, shape, profiles), _calibration(arguments.out, name)
    for role, fitted in calibration.pools.items():
        costs[Role(role)] = PoolCost(fitted.cost(profiles[0].costs[0].cost), "measured in service", fitted.overhead)
    setup = setup_of(topology, shape, costs, fabric_of(topology, profiles))
    outcomes = simulate(setup, workload).outcomes
    return figures_of([replace(outcome, arrival=outcome.arrival - calibration.client) for outcome in outcomes], SLO)


def _profile_path(out: Path, name: str) -> Path:
    return out / f"profile-{name}.yaml"


def _calibration(out: Path, name: str) -> Calibration:
    """Nothing is added before there is one."""
    path = out / CALIBRATION
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = document.get(name, {"pools": {}, "client": 0.0})
    return Calibration({role: InService(**fitted) for role, fitted in found["pools"].items()}, found["client"])


def _basis(out: Path, names: Iterable[str]) -> list[Path]:
    """All that predictions rest on."""
    return [*(_profile_path(out, name) for name in names), *(path for path in (out / CALIBRATION,) if path.exists())]


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digits(seconds: float | str | None) -> str:
    return "" if seconds is None or seconds == "" else f"{seconds:.4f}"


if __name__ == "__main__":
    try:
        main()
    except BatonError as error:
        raise SystemExit(str(error)) from error
