"""Ports: which are free, and how those that several routers share are kept for them."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
from baton.core.errors import Unavailable
from baton.core.topology import ModelSpec, PoolSpec, RouterSpec, Topology
from baton.core.view import Role
from baton.deploy.ports import free_port, shared_router_ports, why_taken
from baton.deploy.schema import split_host_port

ANY = RouterSpec(grpc="127.0.0.1:0", http="127.0.0.1:0", replicas=2)


def topology(router: RouterSpec) -> Topology:
    return Topology("ports", ModelSpec("/models/m"), (PoolSpec(Role.MIXED),), router=router)


def sharing(address: str) -> socket.socket:
    """A socket that listens there as one of several routers does."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(split_host_port(address))
    listener.listen()
    return listener


def test_one_router_finds_its_ports_itself() -> None:
    alone = topology(replace(ANY, replicas=1))
    with shared_router_ports(alone) as settled:
        assert settled is alone


def test_free_ports_are_chosen_once_and_kept_for_those_that_share() -> None:
    with shared_router_ports(topology(ANY)) as settled:
        addresses = (settled.router.grpc, settled.router.http)
        assert len({split_host_port(address) for address in addresses}) == 2
        assert replace(settled.router, grpc=ANY.grpc, http=ANY.http) == ANY
        for address in addresses:
            host, port = split_host_port(address)
            assert port != 0
            assert why_taken(host, port) != ""  # for everybody else, though nobody listens yet
            with sharing(address) as first, sharing(address) as second:
                listeners = {first.fileno(): first, second.fileno(): second}
                met = set()
                while len(met) < 2:  # and the kernel deals connections out to those that listen, never to the keeper
                    with socket.create_connection((host, port), 5) as client:
                        met |= {number for number, listener in listeners.items() if _accepted(listener, client)}
    assert [why_taken(*split_host_port(address)) for address in addresses] == ["", ""]


def test_a_port_that_is_given_is_kept_or_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(Unavailable, match=r"router\.http: port .* is taken"),
            shared_router_ports(topology(replace(ANY, http=address))),
        ):
            pass
        with shared_router_ports(topology(replace(ANY, http=address)), elsewhere=True) as settled:
            assert settled.router.http == address  # another host may have it free
            assert not settled.router.grpc.endswith(":0")
    given = f"127.0.0.1:{free_port('127.0.0.1')}"
    with shared_router_ports(topology(replace(ANY, grpc=given))) as settled:
        assert settled.router.grpc == given
        with pytest.raises(Unavailable, match=r"router\.grpc"), shared_router_ports(topology(replace(ANY, grpc=given))):
            pass  # a second cluster must not share them


def test_connections_of_an_earlier_cluster_may_linger() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with socket.create_connection(server.getsockname()) as client:
            server.accept()[0].close()  # first, so that the port is left in TIME_WAIT
            assert client.recv(1) == b""
    with shared_router_ports(topology(replace(ANY, grpc=address))) as settled:
        assert settled.router.grpc == address


def _accepted(listener: socket.socket, client: socket.socket) -> bool:
    listener.setblocking(False)
    try:
        connection, peer = listener.accept()
    except BlockingIOError:
        return False
    connection.close()
    return peer == client.getsockname()
