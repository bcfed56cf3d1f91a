"""The controller as a detached Ray actor: Ray starts it again when it dies, and it finds its members again.

Imported only where Ray is wanted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import ray
from pydantic import TypeAdapter
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..core.errors import Unavailable
from .controller import Controller
from .controller_server import serving
from .launcher import MemberSpec
from .ray_launcher import NAMESPACE, RayLauncher
from .supervisor import Backoff

_RETRY = 1.0  # seconds between tries to listen on the port that the members know

_SPECS = TypeAdapter(tuple[MemberSpec, ...])


@dataclass(frozen=True, slots=True)
class ControllerActorConfig:
    """What a controller needs to begin, also for the second time: its port is fixed, so that members find it again.

    specs_json  the members, as JSON
    """

    cluster: str
    address: str
    specs_json: str
    log_path: str
    announce_node_ip: bool
    backoff: Backoff


class ControllerActor:
    """Runs the controller in a thread with an event loop of its own, from the constructor on, so that a restart by
    Ray needs nobody's call."""

    def __init__(self, config: ControllerActorConfig) -> None:
        self._config = config
        self._serving = threading.Event()
        self._error = ""
        self._reborn = ray.get_runtime_context().was_current_actor_reconstructed
        self._log()
        threading.Thread(target=self._run, name="controller", daemon=True).start()

    def started(self) -> str:
        """Wait until the controller serves; returns "" or why it does not."""
        self._serving.wait()
        return self._error

    def pid(self) -> int:
        return os.getpid()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Unavailable as error:
            self._error = str(error)
            self._serving.set()
        except BaseException:
            logging.getLogger("baton.controller").exception("the controller failed")
            os._exit(1)  # Ray starts it again

    async def _serve(self) -> None:
        config = self._config
        launcher = RayLauncher(config.cluster, config.announce_node_ip)
        controller = Controller(config.cluster, _SPECS.validate_json(config.specs_json), launcher, config.backoff)
        while True:
            try:
                async with serving(controller, config.address):
                    self._serving.set()
                    await controller.stopped()
                break
            except Unavailable as error:
                if not self._reborn:
                    raise
                logging.getLogger("baton.controller").warning("%s; trying again", error)
                await asyncio.sleep(_RETRY)
        await launcher.close()

    def _log(self) -> None:
        Path(self._config.log_path).parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(self._config.log_path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("baton")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def refuse_second(cluster: str) -> None:
    """Raise Unavailable when the cluster is running on this Ray."""
    try:
        ray.get_actor(controller_name(cluster), namespace=NAMESPACE)
    except ValueError:
        return
    raise Unavailable(f"cluster {cluster} is already running on this Ray cluster; end it with `baton down {cluster}`")


async def start_controller(config: ControllerActorConfig) -> ray.actor.ActorHandle:
    """Start the cluster's controller on this node. Raises Unavailable when it cannot serve."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor_class = ray.remote(ControllerActor)
    actor = actor_class.options(
        name=controller_name(config.cluster),
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        max_concurrency=4,
        num_cpus=0,
        scheduling_strategy=here,
    ).remote(config)
    problem = await actor.started.remote()
    if problem:
        ray.kill(actor, no_restart=True)
        raise Unavailable(problem)
    return actor


def controller_name(cluster: str) -> str:
    return f"{cluster}/controller"


def dump_specs(specs: tuple[MemberSpec, ...]) -> str:
    """Specs as JSON, for `ControllerActorConfig`."""
    return _SPECS.dump_json(specs).decode()
