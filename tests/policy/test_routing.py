"""Routing policies: who is picked, what a route looks like, and that ties spread."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from baton.core.request import Request, SamplingParams, WorkerRef
from baton.core.view import ClusterView, Role, Route, Split, Whole, WorkerLoad, WorkerView
from baton.policy.routing import ROUTING
from hypothesis import given
from hypothesis import strategies as st

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
REQUEST = Request("r", (1,) * 64, SamplingParams(), 0.0)


def worker(name: str, assigned: int = 0, pending: int = 0, context: int = 0, blocks: int = 100) -> WorkerView:
    load = WorkerLoad(total_blocks=blocks, free_blocks=blocks)
    return WorkerView(WorkerRef(name, 1), ROLES[name[0]], 16, load, assigned, pending, context)


def view(*workers: WorkerView, sequence_number: int = 0, draw: float = 0.0) -> ClusterView:
    pools = {role: tuple(w for w in workers if w.role is role) for role in Role}
    return ClusterView(
        0.0, pools[Role.PREFILL], pools[Role.DECODE], pools[Role.MIXED], sequence_number=sequence_number, draw=draw
    )


def names(route: Route | None) -> tuple[str, ...]:
    match route:
        case Split(prefill, decode):
            return prefill.worker_id, decode.worker_id
        case Whole(whole):
            return (whole.worker_id,)
    return ()


def test_round_robin_takes_turns() -> None:
    pools = view(worker("p0"), worker("p1"), worker("d0"), worker("d1"), worker("d2"))
    routes = [names(ROUTING["round_robin"](REQUEST, replace(pools, sequence_number=number))) for number in range(6)]
    assert Counter(prefill for prefill, _ in routes) == {"p0": 3, "p1": 3}
    assert Counter(decode for _, decode in routes) == {"d0": 2, "d1": 2, "d2": 2}


def test_random_follows_the_draw() -> None:
    pools = view(worker("p0"), worker("p1", pending=10**6), worker("d0"))
    chosen = [names(ROUTING["random"](REQUEST, replace(pools, draw=draw)))[0] for draw in (0.0, 0.49, 0.5, 0.999)]
    assert chosen == ["p0", "p0", "p1", "p1"]


def test_least_loaded_weighs_tokens_not_requests() -> None:
    route = ROUTING["least_loaded"](
        REQUEST,
        view(
            worker("p0", assigned=1, pending=8000, context=8000),
            worker("p1", assigned=9, pending=900, context=900),
            worker("d0", assigned=1, context=1000),
            worker("d1", assigned=9, context=900),
        ),
    )
    assert names(route) == ("p1", "d1")


def test_least_loaded_prefill_prefers_who_holds_less_for_a_full_decode_pool() -> None:
    route = ROUTING["least_loaded"](REQUEST, view(worker("p0", context=500), worker("p1"), worker("d0")))
    assert names(route)[0] == "p1"


def test_least_loaded_decode_weighs_by_the_size_of_the_pool() -> None:
    big, small = worker("d0", context=800, blocks=400), worker("d1", context=400, blocks=100)
    assert names(ROUTING["least_loaded"](REQUEST, view(worker("p0"), big, small)))[1] == "d0"


def test_join_shortest_queue_counts_requests() -> None:
    pools = view(
        worker("p0", assigned=2), worker("p1", assigned=1, pending=10**6), worker("d0", assigned=5), worker("d1", assigned=4)
    )
    assert names(ROUTING["join_shortest_queue"](REQUEST, pools)) == ("p1", "d1")


@pytest.mark.parametrize("policy", ["least_loaded", "join_shortest_queue", "random"])
def test_ties_spread_over_all(policy: str) -> None:
    pools = view(*[worker(f"{role}{index}") for role in "pd" for index in range(4)])
    routes = [names(ROUTING[policy](REQUEST, replace(pools, draw=draw / 100))) for draw in range(100)]
    for side in (0, 1):
        assert set(Counter(route[side] for route in routes).values()) == {25}


@pytest.mark.parametrize("policy", sorted(ROUTING))
@pytest.mark.parametrize(
    ("pools", "expected"),
    [("", ()), ("p", ("p0",)), ("d", ("d0",)), ("m", ("m0",)), ("pd", ("p0", "d0"))],
)
def test_routes_for_every_set_of_pools(policy: str, pools: str, expected: tuple[str, ...]) -> None:
    assert names(ROUTING[policy](REQUEST, view(*[worker(f"{role}0") for role in pools]))) == expected


@pytest.mark.parametrize("policy", sorted(ROUTING))
def test_split_or_mixed_is_decided_by_token_work(policy: str) -> None:
    busy, idle = 5000, 10
    split = [worker("p0", pending=busy, context=busy), worker("d0", context=100)]
    assert names(ROUTING[policy](REQUEST, view(*split, worker("m0", pending=idle, context=idle)))) == ("m0",)
    split = [worker("p0", pending=idle, context=idle), worker("d0", context=100)]
    assert names(ROUTING[policy](REQUEST, view(*split, worker("m0", pending=busy, context=busy)))) == ("p0", "d0")
    assert names(ROUTING[policy](REQUEST, view(worker("p0"), worker("d0"), worker("m0")))) == ("p0", "d0")


def test_an_empty_pool_is_replaced_by_all_survivors() -> None:
    pools = view(worker("m0", pending=1000, context=1000), worker("d0"))
    assert names(ROUTING["least_loaded"](REQUEST, pools)) == ("d0",)


LOADED = st.builds(
    lambda name, assigned, pending, context: worker(name, assigned, pending, context),
    st.sampled_from([f"{role}{index}" for role in "pdm" for index in range(3)]),
    st.integers(0, 9),
    st.integers(0, 9999),
    st.integers(0, 9999),
)


@given(
    st.sampled_from(sorted(ROUTING)),
    st.lists(LOADED, unique_by=lambda w: w.ref),
    st.integers(0, 10**9),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_every_route_is_made_of_offered_workers(policy: str, workers: list[WorkerView], number: int, draw: float) -> None:
    offered = view(*workers, sequence_number=number, draw=draw)
    route = ROUTING[policy](REQUEST, offered)
    assert (route is None) == (not workers)
    if isinstance(route, Split):
        assert route.prefill in [w.ref for w in offered.prefill]
        assert route.decode in [w.ref for w in offered.decode]
    elif route is not None:
        assert route.worker in [w.ref for w in workers]
    assert ROUTING[policy](REQUEST, offered) == route  # a function of what it was given
