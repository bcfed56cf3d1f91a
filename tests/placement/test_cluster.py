"""Hardware from the words of a command line; what is wrong is named with what is allowed."""

from __future__ import annotations

import pytest
from baton.core.errors import InvalidRequest
from baton.placement.cluster import Shape, narrower, parse_cluster


def test_counts_nodes_and_links() -> None:
    cluster = parse_cluster(["A100-80GB:12", "h100:8"], Shape(per_node=4))
    first, second = cluster.supplies
    assert (first.accelerator.name, first.count, first.num_nodes) == ("A100-80GB", 12, 3)
    assert (second.accelerator.name, second.count, second.num_nodes) == ("H100", 8, 2)
    assert cluster.num_devices == 20
    assert first.fabric.network == first.accelerator.network * 4
    assert narrower(first.fabric, second.fabric).network == first.fabric.network


def test_a_kind_without_a_count_fills_the_nodes() -> None:
    assert parse_cluster(["H100"], Shape(nodes=4)).supplies[0].count == 32
    assert parse_cluster(["H100:12"], Shape(nodes=3)).supplies[0].per_node == 4


def test_links_are_inputs() -> None:
    cluster = parse_cluster(["H100:16"], Shape(network=3e9, node_link=1e11))
    assert (cluster.supplies[0].fabric.network, cluster.supplies[0].fabric.node_link) == (3e9, 1e11)
    assert cluster.with_link(network=7.0).supplies[0].fabric.network == 7.0
    assert cluster.with_link(node_link=7.0).supplies[0].fabric.network == 3e9


@pytest.mark.parametrize(
    ("kinds", "shape", "words"),
    [
        ([], Shape(), "no kind of GPU"),
        (["H9000:8"], Shape(), "--gpu: accelerator 'H9000' is not known; use one of"),
        (["H100:none"], Shape(), "'none' is no count"),
        (["H100:0"], Shape(), "'0' is no count"),
        (["H100:8", "h100:8"], Shape(), "H100 is given twice"),
        (["H100:20"], Shape(nodes=2, per_node=8), "do not fit on 2 nodes of 8; at most 16"),
        (["H100:8"], Shape(nodes=0), "--nodes: 0"),
        (["H100:8"], Shape(network=-1.0), "--network: -1.0"),
    ],
)
def test_bad_words_are_named(kinds: list[str], shape: Shape, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_cluster(kinds, shape)
