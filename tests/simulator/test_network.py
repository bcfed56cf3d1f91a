"""Fair shares of links: against closed forms, and properties that hold for every set of transfers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
from baton.core.errors import InternalError
from baton.simulator.network import Network
from baton.simulator.setup import NetworkSetup
from hypothesis import given
from hypothesis import strategies as st

BANDWIDTH, NODE_BANDWIDTH = 100.0, 400.0
SETUP = NetworkSetup(bandwidth=BANDWIDTH, node_bandwidth=NODE_BANDWIDTH)


@dataclass(frozen=True)
class Start:
    at: float
    source: int
    target: int
    num_bytes: int


starts = st.lists(
    st.builds(
        Start,
        at=st.integers(0, 40).map(lambda tenths: tenths / 10),
        source=st.integers(0, 3),
        target=st.integers(0, 3),
        num_bytes=st.integers(0, 500),
    ),
    min_size=1,
    max_size=25,
)


def run(network: Network, planned: list[Start], numbers: list[int] | None = None) -> dict[int, float]:
    """Start everything at its time; when each one arrived."""
    numbers = numbers or list(range(len(planned)))
    arrivals: dict[int, float] = {}
    for number, start in sorted(zip(numbers, planned, strict=True), key=lambda pair: pair[1].at):
        while network.next_done() <= start.at:
            now = network.next_done()
            arrivals |= dict.fromkeys(network.take_done(now), now)
        network.start(start.at, number, start.source, start.target, start.num_bytes)
    while (now := network.next_done()) < math.inf:
        taken = network.take_done(now)
        assert taken, "next_done named a time at which nothing arrived"
        arrivals |= dict.fromkeys(taken, now)
    return arrivals


def test_one_transfer_takes_its_bytes_over_the_bandwidth_and_the_latency() -> None:
    network = Network(NetworkSetup(bandwidth=BANDWIDTH, latency=0.25))
    network.start(1.0, 7, 0, 1, 150)
    assert network.next_done() == 1.0 + 1.5 + 0.25
    assert network.take_done(2.7499) == []
    assert network.take_done(2.75) == [7]
    assert network.next_done() == math.inf


@pytest.mark.parametrize("num_transfers", [2, 3, 7, 50])
def test_equal_transfers_from_one_node_share_its_link_out(num_transfers: int) -> None:
    network = Network(SETUP)
    for number in range(num_transfers):
        network.start(0.0, number, 0, 1 + number, 60)
    assert network.next_done() == pytest.approx(num_transfers * 60 / BANDWIDTH)
    assert network.take_done(network.next_done()) == list(range(num_transfers)), "in order of their numbers"


def test_who_starts_earlier_leaves_its_share_to_the_others() -> None:
    # 0: alone for 1 s (100 bytes), then at half rate; 1 ends 1 s after 0 gave its half back.
    arrivals = run(Network(SETUP), [Start(0.0, 0, 1, 200), Start(1.0, 0, 2, 200)])
    assert arrivals == {0: pytest.approx(3.0), 1: pytest.approx(4.0)}


def test_bandwidth_that_a_bottleneck_leaves_goes_to_who_can_use_it() -> None:
    # Three into node 9 get a third each; the fourth, which shares a link out with one of them, gets two thirds.
    planned = [Start(0.0, 0, 9, 100), Start(0.0, 1, 9, 100), Start(0.0, 2, 9, 100), Start(0.0, 2, 8, 100)]
    assert run(Network(SETUP), planned) == {
        0: pytest.approx(3.0), 1: pytest.approx(3.0), 2: pytest.approx(3.0), 3: pytest.approx(1.5),
    }  # fmt: skip


def test_both_directions_of_a_node_and_its_internal_link_are_independent() -> None:
    planned = [Start(0.0, 0, 1, 100), Start(0.0, 1, 0, 100), Start(0.0, 0, 0, 400), Start(0.0, 1, 1, 800)]
    assert run(Network(SETUP), planned) == {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0}


def test_without_a_limit_bytes_take_no_time_but_count() -> None:
    network = Network(NetworkSetup(latency=0.5))
    network.start(1.0, 0, 0, 1, 1e12)
    network.start(1.0, 1, 2, 2, 5.0)
    assert network.next_done() == 1.5
    assert network.take_done(1.5) == [0, 1]
    assert {use.name: use.bytes for use in network.use()} == {"node 0 out": 1e12, "node 1 in": 1e12, "node 2 internal": 5.0}


def test_what_ends_between_two_calls_frees_its_bandwidth_at_that_moment() -> None:
    network = Network(SETUP)
    network.start(0.0, 0, 0, 1, 50)
    network.start(0.0, 1, 0, 2, 100)
    assert network.take_done(10.0) == [0, 1]
    (out,) = (use for use in network.use() if use.name == "node 0 out")
    assert (out.busy, out.bytes, out.peak_backlog) == (1.5, 150.0, 150.0)


def test_a_cancelled_transfer_counts_what_had_left_and_frees_the_rest() -> None:
    network = Network(SETUP)
    network.start(0.0, 0, 0, 1, 1000)
    network.start(0.0, 1, 0, 2, 100)
    network.cancel(1.0, 0)
    assert network.next_done() == pytest.approx(1.5)
    assert network.take_done(2.0) == [1]
    moved = {use.name: use.bytes for use in network.use()}
    assert moved == {"node 0 out": pytest.approx(150), "node 1 in": pytest.approx(50), "node 2 in": 100}
    network.cancel(2.0, 1)  # has arrived: nothing happens
    network.cancel(2.0, 99)


def test_a_transfer_cancelled_in_its_latency_never_arrives() -> None:
    network = Network(NetworkSetup(bandwidth=BANDWIDTH, latency=1.0))
    network.start(0.0, 0, 0, 1, 100)
    network.cancel(1.5, 0)
    assert network.next_done() == math.inf
    assert network.take_done(9.0) == []


def test_a_caller_that_breaks_the_rules_is_told() -> None:
    network = Network(SETUP)
    network.start(1.0, 0, 0, 1, 10)
    with pytest.raises(InternalError, match="started twice"):
        network.start(1.0, 0, 0, 1, 10)
    with pytest.raises(InternalError, match=r"time goes back from 1\.0 to 0\.5"):
        network.take_done(0.5)
    for num_bytes in (-1.0, math.nan, math.inf):
        with pytest.raises(InternalError, match="0 or more"):
            network.start(1.0, 1, 0, 1, num_bytes)


def rates(network: Network) -> dict[int, float]:
    return {number: moving.rate for number, moving in network._moving.items()}


@given(starts)
def test_rates_are_max_min_fair(planned: list[Start]) -> None:
    """No link over its rate, and every transfer crosses a full link on which nobody has more: the definition itself,
    which also says that no bandwidth lies idle that somebody could use."""
    network = Network(SETUP)
    for number, start in enumerate(planned):
        network.start(0.0, number, start.source, start.target, start.num_bytes)
        for link in network._links.values():
            assert sum(moving.rate for moving in link.moving.values()) <= link.capacity * (1 + 1e-9)
        for moving in network._moving.values():
            assert any(
                math.isclose(sum(other.rate for other in link.moving.values()), link.capacity)
                and moving.rate >= max(other.rate for other in link.moving.values()) * (1 - 1e-9)
                for link in moving.links
            )


@given(starts)
def test_every_byte_arrives_once_and_no_link_is_faster_than_it_is(planned: list[Start]) -> None:
    network = Network(SETUP)
    arrivals = run(network, planned)
    assert sorted(arrivals) == list(range(len(planned)))
    for number, start in enumerate(planned):
        capacity = NODE_BANDWIDTH if start.source == start.target else BANDWIDTH
        assert arrivals[number] - start.at >= start.num_bytes / capacity * (1 - 1e-9)
    for use in network.use():
        node, direction = int(use.name.split()[1]), use.name.split()[2]
        ends = {"out": lambda s: (s.source, s.source != s.target), "in": lambda s: (s.target, s.source != s.target)}
        crosses = ends.get(direction, lambda s: (s.source, s.source == s.target))
        assert use.bytes == sum(s.num_bytes for s in planned if crosses(s) == (node, True)), "exactly what was asked for"
        capacity = NODE_BANDWIDTH if direction == "internal" else BANDWIDTH
        assert use.bytes <= use.busy * capacity * (1 + 1e-9)
        assert use.peak_backlog <= use.bytes


@given(starts, st.randoms(use_true_random=False))
def test_numbers_and_the_order_of_calls_do_not_matter(planned: list[Start], random) -> None:
    numbers = random.sample(range(1000), len(planned))
    order = random.sample(range(len(planned)), len(planned))
    first = run(Network(SETUP), planned)
    other = run(Network(SETUP), [planned[place] for place in order], [numbers[place] for place in order])
    assert {place: other[numbers[place]] for place in first} == pytest.approx(first, rel=1e-9, abs=1e-9)


@given(starts, st.integers(0, 60).map(lambda tenths: tenths / 10))
def test_looking_in_between_changes_nothing(planned: list[Start], look: float) -> None:
    quiet, watched = Network(SETUP), Network(SETUP)
    expected = run(quiet, planned)
    for number, start in sorted(enumerate(planned), key=lambda pair: pair[1].at):
        watched.start(start.at, number, start.source, start.target, start.num_bytes)
        watched.use()
    end = max(expected.values())
    taken = watched.take_done(max(look, 4.0)) + watched.take_done(max(end, look, 4.0) + 1e-6)
    assert sorted(taken) == sorted(expected)
    assert all(expected[earlier] <= expected[later] + 1e-9 for earlier, later in pairwise(taken))
