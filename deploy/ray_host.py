"""The home of a cluster on Ray: a local Ray of our own that ends with us, or a running one that we leave as it was.

Imported only where Ray is wanted.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import grpc
import ray

from ..core.errors import Unavailable
from ..core.topology import Topology
from ..proto import worker_pb2 as pb
from ..proto import worker_pb2_grpc as rpc
from .members import member_specs
from .ports import free_port, shared_router_ports, why_silent
from .process import WatchedProcess
from .ray_controller import ControllerActorConfig, dump_specs, refuse_second, start_controller
from .ray_launcher import NAMESPACE, place_cluster, remove_cluster
from .schema import split_host_port
from .supervisor import Backoff

_OBJECT_STORE_BYTES = 80 << 20  # nothing goes through it; Ray wants at least 75 MiB
_SHUTDOWN_PATIENCE = 15.0
_FOLDER, _LOCK = "baton-ray-", "in-use"


@asynccontextmanager
async def local_ray_cluster(topology: Topology, logs: Path, backoff: Backoff) -> AsyncIterator[str]:
    """A cluster on a Ray of our own; yields the controller's address. On leaving, nothing of either is left."""
    with shared_router_ports(topology) as topology, ray_folder() as folder:
        _start_ray(topology, folder)
        try:
            address, pid = await start_on_ray(topology, logs, backoff, "127.0.0.1")
            try:
                yield address
            finally:
                await stop_on_ray(topology.cluster, address)
                await wait_gone(pid)
        finally:
            ray.shutdown()


@contextmanager
def ray_folder(parent: Path = Path("/tmp")) -> Iterator[str]:
    """A folder for the files of a Ray of our own, gone on leaving. Removes those that killed processes left in `parent`.

    A lock that ends with its process tells which folders are in use. `parent` is short, since Ray puts sockets, whose
    paths are limited, into the folder.
    """
    for stale in parent.glob(f"{_FOLDER}*/{_LOCK}"):
        with suppress(OSError), _locked(stale, os.O_RDWR):  # in use, or somebody else's
            shutil.rmtree(stale.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=parent))
    try:
        with _locked(folder / _LOCK, os.O_RDWR | os.O_CREAT):
            yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[None]:
    """Hold the file's lock. Raises BlockingIOError when another process does."""
    lock = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def connect(address: str) -> None:
    """Connect to a running Ray. Raises Unavailable when there is none at `address`."""
    with suppress(ValueError):  # `auto`
        silent = why_silent(*split_host_port(address))  # Ray itself would try for minutes, and warn of it all the time
        if silent:
            raise Unavailable(f"no Ray cluster at {address} (ray.address): {silent}")
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise Unavailable(f"no Ray cluster at {address!r} (ray.address): {error}") from error
    _silence_ray()


def disconnect() -> None:
    """Let go of Ray; what runs there goes on."""
    ray.shutdown()


async def start_on_ray(topology: Topology, logs: Path, backoff: Backoff, host: str | None = None) -> tuple[str, int]:
    """Start the controller, and with it the members, on the Ray that this process is connected to.

    `host` is the address everything listens on; None takes each node's own. Returns the controller's address and pid.
    """
    refuse_second(topology.cluster)
    bind = host or ray.util.get_node_ip_address()
    address = f"{bind}:{free_port(bind)}"
    specs = member_specs(topology, address, logs)
    await place_cluster(topology.cluster, specs, topology.ray_placement)
    config = ControllerActorConfig(
        cluster=topology.cluster,
        address=address,
        specs_json=dump_specs(specs),
        log_path=str(logs / "controller.log"),
        announce_node_ip=host is None,
        backoff=backoff,
    )
    try:
        actor = await start_controller(config)
        return address, int(await actor.pid.remote())
    except BaseException:
        remove_cluster(topology.cluster)
        raise


async def stop_on_ray(cluster: str, address: str) -> list[str]:
    """End every member and the controller, and give back the placement group. Returns what had to be killed.

    `address` is the controller's, "" when it is not known.
    """
    try:
        if not address:
            return remove_cluster(cluster)
        async with grpc.aio.insecure_channel(address) as channel:
            await rpc.ControllerStub(channel).Shutdown(pb.ShutdownRequest(), timeout=_SHUTDOWN_PATIENCE)
    except grpc.aio.AioRpcError:
        pass  # no controller, or none that answers: what is left is killed below
    return remove_cluster(cluster)


async def wait_gone(pid: int) -> None:
    """Wait until a process of this host is gone, though not for ever."""
    try:
        process = WatchedProcess(pid)
    except ProcessLookupError:
        return
    try:
        await asyncio.to_thread(process.wait, _SHUTDOWN_PATIENCE)
    finally:
        process.close()


def _start_ray(topology: Topology, folder: str) -> None:
    on_cpu = not any(pool.on_gpu for pool in topology.pools)
    num_cpus = sum(pool.replicas * (1 if pool.on_gpu else pool.threads) for pool in topology.pools)
    # Ray replaces the SIGTERM handler; and must start in a thread that lives on, since its processes die with it.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=0 if on_cpu else None,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
            namespace=NAMESPACE,
            _temp_dir=folder,
        )
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        ray.shutdown()
        raise Unavailable(f"cannot start a local Ray: {error}; try launcher: subprocess") from error
    finally:
        signal.signal(signal.SIGTERM, handler)
    _silence_ray()


def _silence_ray() -> None:
    """Keep Ray from printing on our terminal that an actor died: the controller knows, and says so in its own words.

    Ray has no switch for it. This ends the thread that prints, as `ray.shutdown` itself does.
    """
    worker = ray._private.worker.global_worker
    worker.threads_stopped.set()
    worker.gcs_error_subscriber.close()
