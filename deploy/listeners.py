"""The addresses a router listens on: those its clients know, and where several share these, its own beside them.

The kernel deals the connections to a shared port out among the routers that listen on it (SO_REUSEPORT). Whoever means
one particular router, such as its peers and whoever reads its metrics, goes to the router's own addresses.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import grpc

from ..core.errors import TopologyError
from ..core.topology import RouterConfig

BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Listeners:
    """What a router has bound. Addresses are host:port, as others reach them.

    http                      listening sockets of the HTTP face
    own_grpc, own_http        nobody else listens there
    shared_grpc, shared_http  where clients find any of several routers; "" when there is one
    """

    http: tuple[socket.socket, ...]
    own_grpc: str
    own_http: str
    shared_grpc: str = ""
    shared_http: str = ""


def bind(server: grpc.aio.Server, config: RouterConfig) -> Listeners:
    """Bind `server`, which must have been built for shared ports where there are several routers, and listen for HTTP.

    Raises TopologyError when an address cannot be bound.
    """
    router, host = config.topology.router, config.bind_host
    alone = router.replicas == 1
    grpc_address = _bind_grpc(server, router.grpc, alone)
    own_grpc = grpc_address if alone else _bind_grpc(server, f"{host}:0", alone=True)
    http = [_bind_http(router.http, alone)]
    if not alone:
        http.append(_bind_http(f"{host}:0", alone=True))
    shared = ("", "") if alone else (_announced(grpc_address, host), _announced(_address_of(http[0]), host))
    return Listeners(tuple(http), _announced(own_grpc, host), _announced(_address_of(http[-1]), host), *shared)


def _bind_grpc(server: grpc.aio.Server, address: str, alone: bool) -> str:
    """Bind; the address with the real port."""
    host, _ = _split(address, "router.grpc", alone)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise TopologyError(f"router.grpc: {address} cannot be bound, is the port taken? ({error})") from error
    return f"{host}:{port}"


def _bind_http(address: str, alone: bool) -> socket.socket:
    """Bind and listen."""
    host, port = _split(address, "router.http", alone)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if not alone:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host.strip("[]"), port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise TopologyError(f"router.http: {address} cannot be bound: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def _split(address: str, key: str, alone: bool) -> tuple[str, int]:
    host, separator, port = address.rpartition(":")
    if not (separator and host and port.isdigit() and int(port) < 1 << 16):
        raise TopologyError(f"{key}: {address!r} is not host:port")
    if not alone and int(port) == 0:
        raise TopologyError(f"{key}: {address} lets every router choose a port of its own; several routers need a given one")
    return host, int(port)


def _address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _announced(address: str, bind_host: str) -> str:
    """The address under which others reach a socket: a wildcard is no destination."""
    host, _, port = address.rpartition(":")
    return f"{bind_host}:{port}" if host in ("0.0.0.0", "[::]") else address
