"""Members as detached Ray actors: Ray places and starts the processes, and tells when one has died.

Imported only where Ray is wanted. Ray's word alone is not proof of death (it calls a stopped process dead while it
still exists), so every end is confirmed by the process's own pidfd, on the host where it runs.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ..core.errors import InternalError, Unavailable
from .launcher import Exit, MemberHandle, MemberSpec
from .process import WatchedProcess, kill_and_confirm, start_ticks

NAMESPACE = "baton"
START_PATIENCE = 60.0  # seconds for Ray to give us a process
KILL_PATIENCE = 10.0
PLACE_PATIENCE = 30.0

_T = TypeVar("_T")
_BOOK = b"baton"  # namespace of the book in Ray's key-value store: what an earlier controller started


@dataclass(frozen=True, slots=True)
class Place:
    """Where one member's process runs. pid and started (clock ticks since boot) name it on its host."""

    actor: str
    pid: int
    started: int
    node_id: str
    ip: str


class MemberActor:
    """What runs inside Ray: one process for one member."""

    def describe(self) -> tuple[int, int, str, str]:
        """pid, start time, node id and address of this process."""
        context = ray.get_runtime_context()
        return os.getpid(), start_ticks(os.getpid()), context.get_node_id(), ray.util.get_node_ip_address()

    def run(self, module: str, config_json: str, log_path: str) -> int:
        """Run the member in this process's main thread, where signals reach it, until it ends."""
        os.makedirs(os.path.dirname(log_path), exist_ok=True)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        status: int = importlib.import_module(module).run(config_json)
        return status

    def ended(self) -> None:
        """Answers only when `run` has returned: an actor runs one method at a time."""


class RayHandle:
    """One running member. `end` resolves when `run` returned or the process died."""

    def __init__(self, spec: MemberSpec, actor: ray.actor.ActorHandle, place: Place, end: ray.ObjectRef) -> None:
        self.member_id = spec.member_id
        self.actor = actor
        self.place = place
        self._exit = asyncio.ensure_future(self._watch(end))

    @property
    def pid(self) -> int:
        return self.place.pid

    @property
    def ended(self) -> bool:
        return self._exit.done()

    async def exited(self) -> Exit:
        return await asyncio.shield(self._exit)

    def let_go(self) -> None:
        self._exit.cancel()

    async def _watch(self, end: ray.ObjectRef) -> Exit:
        try:
            status = await end
            reason = "ended" if status is None else f"ended with exit status {status}"
        except RayTaskError as error:
            reason = f"ended with {str(error).strip().splitlines()[-1]}"
        except RayActorError as error:
            reason = f"ended: {_brief(error)}"
        except RayError as error:
            reason = f"Ray lost it: {_brief(error)}"
        return Exit(reason, await kill_actor(self.actor, self.place))


class RayLauncher:
    """Starts one named detached actor per member, in the cluster's placement group."""

    def __init__(self, cluster: str, announce_node_ip: bool) -> None:
        """`announce_node_ip`: members listen on their node's address instead of the loopback's."""
        self._cluster = cluster
        self._announce_node_ip = announce_node_ip
        self._lives = 0
        self._handles: list[RayHandle] = []
        self._actor = ray.remote(MemberActor)

    async def start(self, spec: MemberSpec) -> RayHandle:
        self._lives += 1
        # A life of its own in the name: Ray frees a dead actor's name only after a while.
        name = f"{self._cluster}/{spec.member_id}/{os.getpid()}-{self._lives}"
        actor = None
        try:
            actor = self._actor.options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=0,
                max_concurrency=1,
                num_cpus=spec.num_cpus if spec.bundle is not None else 0,
                num_gpus=spec.num_gpus if spec.bundle is not None else 0,
                scheduling_strategy=self._strategy(spec),
            ).remote()
            described: tuple[int, int, str, str] = await asyncio.wait_for(_result(actor.describe.remote()), START_PATIENCE)
        except (RayError, TimeoutError, ValueError) as error:
            _kill_quietly(actor)
            raise Unavailable(f"Ray gave {spec.member_id} no process: {_brief(error)}") from error
        except asyncio.CancelledError:
            _kill_quietly(actor)
            raise
        place = Place(name, *described)
        _write_book(self._cluster, spec.member_id, place)
        end = actor.run.remote(spec.module, self._config(spec, place.ip), spec.log_path)
        return self._keep(RayHandle(spec, actor, place, end))

    async def attach(self, spec: MemberSpec) -> RayHandle | None:
        place = _read_book(self._cluster, spec.member_id)
        if place is None:
            return None
        try:
            actor = ray.get_actor(place.actor, namespace=NAMESPACE)
        except ValueError:  # no such actor; its process may still be there, cut off or stopped
            await confirm_gone(place)
            return None
        return self._keep(RayHandle(spec, actor, place, actor.ended.remote()))

    async def terminate(self, handle: MemberHandle) -> None:
        own = self._own(handle)
        await _on_node(own.place, "terminate")

    async def kill(self, handle: MemberHandle) -> bool:
        own = self._own(handle)
        return await kill_actor(own.actor, own.place)

    async def close(self) -> None:
        for handle in self._handles:
            if not handle.ended:
                handle.let_go()

    def _keep(self, handle: RayHandle) -> RayHandle:
        self._handles = [old for old in self._handles if not old.ended]
        self._handles.append(handle)
        return handle

    def _strategy(self, spec: MemberSpec) -> PlacementGroupSchedulingStrategy | str:
        if spec.bundle is None:
            return "DEFAULT"
        group = ray.util.get_placement_group(group_name(self._cluster))
        return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=spec.bundle)

    def _config(self, spec: MemberSpec, ip: str) -> str:
        if not self._announce_node_ip:
            return spec.config_json
        return json.dumps(json.loads(spec.config_json) | {"bind_host": ip})

    def _own(self, handle: MemberHandle) -> RayHandle:
        if not isinstance(handle, RayHandle):
            raise InternalError(f"this launcher did not start {handle!r}")
        return handle


# ---- placement ----------------------------------------------------------------------------------


def group_name(cluster: str) -> str:
    return f"baton:{cluster}"


async def place_cluster(cluster: str, specs: tuple[MemberSpec, ...], strategy: str) -> None:
    """Reserve what the members need, all of it or nothing. Raises Unavailable when the Ray cluster has not got it."""
    bundles = [_resources(spec) for spec in specs if spec.bundle is not None]
    if not bundles:
        return
    group = placement_group(bundles, strategy=strategy.upper(), name=group_name(cluster), lifetime="detached")
    try:
        await asyncio.wait_for(_result(group.ready()), PLACE_PATIENCE)
    except TimeoutError:
        remove_placement_group(group)
        have = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        raise Unavailable(
            f"Ray cannot place {len(bundles)} workers ({strategy}): they need {_sum(bundles)}, free in the Ray cluster: {have}"
        ) from None


def remove_cluster(cluster: str) -> list[str]:
    """Kill what is left of a cluster's actors and its placement group; returns the names of the killed actors."""
    names = [
        entry["name"]
        for entry in ray.util.list_named_actors(all_namespaces=True)
        if entry["namespace"] == NAMESPACE and entry["name"].startswith(f"{cluster}/")
    ]
    for name in sorted(names, key=lambda name: not name.endswith("/controller")):  # the one that restarts others first
        try:
            _kill_quietly(ray.get_actor(name, namespace=NAMESPACE))
        except ValueError:
            continue
    with suppress(ValueError):  # there is none
        remove_placement_group(ray.util.get_placement_group(group_name(cluster)))
    for key in _internal_kv_list(f"{cluster}/", namespace=_BOOK):
        _internal_kv_del(key, namespace=_BOOK)
    return names


def _resources(spec: MemberSpec) -> dict[str, float]:
    return {name: amount for name, amount in (("CPU", spec.num_cpus), ("GPU", spec.num_gpus)) if amount}


def _sum(bundles: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(bundle.get(name, 0) for bundle in bundles) for name in ("CPU", "GPU")}


# ---- death --------------------------------------------------------------------------------------


async def kill_actor(actor: ray.actor.ActorHandle, place: Place) -> bool:
    """End the actor's process and make sure; True when it is certainly gone."""
    _kill_quietly(actor)
    return await confirm_gone(place)


async def confirm_gone(place: Place) -> bool:
    """SIGKILL the process, on whichever host it is, and wait for its end."""
    return bool(await _on_node(place, "kill"))


async def _on_node(place: Place, action: str) -> bool:
    if place.node_id == ray.get_runtime_context().get_node_id():
        return await asyncio.to_thread(_act, action, place.pid, place.started)
    task = ray.remote(_act).options(
        num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    )
    try:
        return bool(await asyncio.wait_for(_result(task.remote(action, place.pid, place.started)), 2 * KILL_PATIENCE))
    except (RayError, TimeoutError):
        return False  # the node is gone or cut off: nobody can tell


def _act(action: str, pid: int, started: int) -> bool:
    if action == "kill":
        return kill_and_confirm(pid, started, KILL_PATIENCE)
    try:
        process = WatchedProcess(pid, started)
    except ProcessLookupError:
        return True
    process.signal(signal.SIGTERM)
    process.close()
    return False


def _kill_quietly(actor: ray.actor.ActorHandle | None) -> None:
    if actor is None:
        return
    try:
        ray.kill(actor, no_restart=True)
    except (RayError, ValueError):
        return  # it is gone


# ---- the book -----------------------------------------------------------------------------------


def _write_book(cluster: str, member_id: str, place: Place) -> None:
    fields = [place.actor, place.pid, place.started, place.node_id, place.ip]
    _internal_kv_put(f"{cluster}/{member_id}", json.dumps(fields), overwrite=True, namespace=_BOOK)


def _read_book(cluster: str, member_id: str) -> Place | None:
    entry = _internal_kv_get(f"{cluster}/{member_id}", namespace=_BOOK)
    return Place(*json.loads(entry)) if entry else None


async def _result(ref: ray.ObjectRef[_T]) -> _T:
    result: _T = await ref
    return result


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-2:])[:300] if lines else type(error).__name__
