"""What a load can be put on: a Baton cluster that is started for its turn, or another server, known by its URL.

Every system has the machine to itself while its turn lasts: Baton's are started and ended here, others by the commands given
with --start and --stop (without them the server is taken to run, and its idling shares the cores with everybody's turns). All
are driven through the same HTTP client with the same prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from baton.bench.http_target import HttpTarget, ask_models
from baton.bench.prompts import PromptSource
from baton.core.errors import TopologyError, Unavailable
from baton.core.topology import Topology
from baton.deploy.settings import read_topology_file
from baton.engine.model_config import load_config
from clusters import one_mixed, one_prefill_one_decode, random_model, serving

TOPOLOGIES: Mapping[str, Callable[[Path], Topology]] = {
    "1p1d": lambda model: one_prefill_one_decode(model=model),
    "mixed": one_mixed,
}
START_PATIENCE = 300.0  # seconds from the end of --start to the server's first answer


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that answers. `grpc` is "" unless it is Baton."""

    url: str
    model: str
    grpc: str = ""

    def target(self, seed: int, vocab_size: int) -> HttpTarget:
        """The client for one load; prompts depend on nothing but `seed` and the model's vocabulary."""
        return HttpTarget(self.url, self.model, PromptSource(seed, vocab_size))


@dataclass(frozen=True, slots=True)
class System:
    """A Baton topology, or (`topology` None) a server at `url` with the commands that start and stop it, if any."""

    label: str
    topology: Topology | None = None
    url: str = ""
    model: str = ""
    start: str = ""
    stop: str = ""

    @property
    def title(self) -> str:
        """For a picture in which several products stand side by side."""
        return self.label if self.topology is None else f"Baton {self.label}"

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Endpoint]:
        """Running and answering. Raises Unavailable when it does not come up."""
        if self.topology is not None:
            async with serving(self.topology) as cluster:
                yield Endpoint(f"http://{cluster.http}", self.topology.model.served_name, cluster.grpc)
            return
        try:
            if self.start:
                await _shell(self.label, self.start)
            models = await _answer(self.url, START_PATIENCE if self.start else 0.0)
            yield Endpoint(self.url, self.model or models[0])
        finally:
            if self.stop:
                await _shell(self.label, self.stop)


def add_system_options(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """--model, --baton, --peer, --peer-model, --start, --stop; `default` are the Baton systems without --baton."""
    group = parser.add_argument_group("systems")
    group.add_argument("--model", type=Path, help="model folder that Baton serves (default: the 110M Llama with random weights)")
    group.add_argument(
        "--baton",
        action="append",
        metavar="1p1d|mixed|LABEL=FILE",
        help=f"a topology of Baton, as named or from a YAML file (default: {', '.join(default)}); none: --baton ''",
    )
    group.add_argument("--peer", action="append", default=[], metavar="LABEL=URL", help="an OpenAI-compatible server")
    group.add_argument(
        "--peer-model", action="append", default=[], metavar="LABEL=NAME", help="its name there (default: the first)"
    )
    group.add_argument("--start", action="append", default=[], metavar="LABEL=COMMAND", help="starts the peer before each turn")
    group.add_argument("--stop", action="append", default=[], metavar="LABEL=COMMAND", help="stops it after each turn")


def chosen_systems(parser: argparse.ArgumentParser, arguments: argparse.Namespace, default: Sequence[str]) -> list[System]:
    """The systems of the command line, Baton's first; complains through `parser`."""
    model = model_folder(arguments)
    systems = [_baton(parser, text, model) for text in (default if arguments.baton is None else arguments.baton) if text]
    peers = _by_label(parser, "peer", arguments.peer)
    extras = {
        name: _by_label(parser, name, getattr(arguments, name.replace("-", "_"))) for name in ("peer-model", "start", "stop")
    }
    for name, given in extras.items():
        if unknown := sorted(set(given) - set(peers)):
            parser.error(f"--{name} {unknown[0]}=...: there is no --peer {unknown[0]}=URL")
    for label, url in peers.items():
        systems.append(System(label, None, url, *(extras[name].get(label, "") for name in ("peer-model", "start", "stop"))))
    labels = [system.label for system in systems]
    if len(set(labels)) != len(labels):
        parser.error(f"two systems have the same label: {', '.join(labels)}")
    if not systems:
        parser.error("nothing to measure: give --baton or --peer")
    return systems


def model_folder(arguments: argparse.Namespace) -> Path:
    return (arguments.model or random_model()).resolve()


def vocab_size(arguments: argparse.Namespace) -> int:
    """Of the model that all systems serve: prompts are drawn from it."""
    return load_config(model_folder(arguments)).vocab_size


def _baton(parser: argparse.ArgumentParser, text: str, model: Path) -> System:
    label, found, file = text.partition("=")
    if found:
        try:
            return System(label, read_topology_file(Path(file)).topology)
        except TopologyError as error:
            parser.error(f"--baton {text}: {error}")
    if label not in TOPOLOGIES:
        parser.error(f"--baton {text}: neither {' nor '.join(TOPOLOGIES)} nor LABEL=FILE")
    return System(label, TOPOLOGIES[label](model))


def _by_label(parser: argparse.ArgumentParser, option: str, texts: Sequence[str]) -> dict[str, str]:
    values = {}
    for text in texts:
        label, found, value = text.partition("=")
        if not found or not label or not value:
            parser.error(f"--{option} {text}: give LABEL=VALUE")
        values[label] = value
    return values


async def _shell(label: str, command: str) -> None:
    """Run a command of the user's. It may leave a server in the background, which must not hold a pipe of ours."""
    process = await asyncio.create_subprocess_shell(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    if status := await process.wait():
        raise Unavailable(f"{label}: `{command}` ended with status {status}")


async def _answer(url: str, patience: float) -> list[str]:
    """The models of the server at `url`, once it answers."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience
    while True:
        try:
            if models := await ask_models(url):
                return models
            raise Unavailable(f"the server at {url} serves no model")
        except Unavailable:
            if loop.time() >= deadline:
                raise
        await asyncio.sleep(0.5)
