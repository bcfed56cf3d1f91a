"""Which ports are free on this host, and how those that several routers share are kept for them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import psutil

from ..core.errors import Unavailable
from ..core.topology import Topology
from .schema import split_host_port


def free_port(host: str) -> int:
    """A port that nobody listens on at this moment."""
    with socket.create_server((host, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def why_taken(host: str, port: int) -> str:
    """ "" when a server could listen on host:port, else why not."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        return f"{host} is no address of this machine ({error.strerror})"
    try:
        with socket.create_server((host, port), family=family):
            return ""
    except PermissionError:
        return f"listening on port {port} needs more rights than this user has"
    except OSError as error:
        owner = _owner(port)
        return f"port {port} on {host} is taken{owner}" if owner else f"cannot listen on {host}:{port}: {error.strerror}"


def why_silent(host: str, port: int, patience: float = 5.0) -> str:
    """ "" when somebody listens on host:port, else why not."""
    try:
        socket.create_connection((host, port), patience).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return ""


@contextmanager
def shared_router_ports(topology: Topology, elsewhere: bool = False) -> Iterator[Topology]:
    """`topology` with ports that all of its routers can listen on; while inside nobody else can take them on this host.

    One router alone finds its ports itself. `elsewhere`: the routers may run on other hosts, so a port that is given is
    not looked at. Raises Unavailable when a port is taken.
    """
    router = topology.router
    if router.replicas == 1:
        yield topology
        return
    with ExitStack() as kept:

        def keep(key: str, address: str) -> str:
            if elsewhere and split_host_port(address)[1] != 0:
                return address
            return kept.enter_context(_kept(key, address))

        router = replace(router, grpc=keep("router.grpc", router.grpc), http=keep("router.http", router.http))
        yield replace(topology, router=router)


@contextmanager
def _kept(key: str, address: str) -> Iterator[str]:
    """The address with a port. A socket that is bound and does not listen keeps it: it gets no connections, and only
    sockets of this user that are willing to share (SO_REUSEPORT) can be bound beside it."""
    host, port = split_host_port(address)
    reason = why_taken(host, port)  # a bound socket alone would not notice others that are willing to share
    if reason:
        raise Unavailable(f"{key}: {reason}")
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            _bind(keeper, host, port)
        except OSError as error:
            raise Unavailable(f"{key}: cannot keep {address} for several routers: {error.strerror}") from error
        yield f"{address.rpartition(':')[0]}:{keeper.getsockname()[1]}"


def _bind(keeper: socket.socket, host: str, port: int) -> None:
    """Keep the port from everybody; where old connections linger on it, at least from those that take no port of others."""
    try:
        keeper.bind((host, port))
    except OSError:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind((host, port))


def _owner(port: int) -> str:
    """ " by process N (name)" where that can be found out."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.pid and connection.laddr[1:2] == (port,):
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        return ""
    return ""
