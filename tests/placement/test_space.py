"""What fits where: memory, degrees, nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from baton.core.errors import InvalidRequest
from baton.core.view import Role
from baton.placement.cluster import Shape, parse_cluster
from baton.placement.model_shape import find_model
from baton.placement.space import (
    Affinity,
    Budgets,
    CostMaker,
    Need,
    Placement,
    WorkerKind,
    check_fit,
    copies_that_fit,
    fits,
    mixed_placements,
    split_placement,
    worker_kinds,
)

BUDGETS = Budgets()
NEED = Need(find_model("OPT-66B"), "bfloat16", 2048)


def kinds_of(gpu: str, cost: CostMaker, per_node: int = 8, need: Need = NEED) -> dict[tuple[int, int], WorkerKind]:
    kinds, _ = worker_kinds(parse_cluster([gpu], Shape(per_node=per_node)), need, BUDGETS, cost)
    return {(kind.tp, kind.pp): kind for kind in kinds}


def test_memory_rules_out_what_cannot_hold_the_model(cost: CostMaker) -> None:
    cluster = parse_cluster(["A100-80GB:32"])
    kinds, unfit = worker_kinds(cluster, NEED, BUDGETS, cost)
    assert {(kind.tp, kind.pp) for kind in kinds} == {(1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)}
    assert [(way.tp, way.pp) for way in unfit] == [(1, 1)]
    assert "weights leave no room for KV" in unfit[0].reason
    assert all(kind.kv_tokens >= 2048 for kind in kinds)


def test_a_worker_larger_than_a_node_only_where_the_model_needs_it(cost: CostMaker) -> None:
    assert max(tp * pp for tp, pp in kinds_of("A100-80GB:32", cost, per_node=2)) == 4  # the least is 2
    huge = replace(find_model("OPT-66B"), num_layers=512, name="OPT-500B")
    sizes = {tp * pp for tp, pp in kinds_of("A100-80GB:64", cost, need=Need(huge, "bfloat16", 2048))}
    assert sizes == {16, 32}


def test_what_was_not_measured_is_left_out(cost: CostMaker) -> None:
    kinds, unfit = worker_kinds(
        parse_cluster(["A100-80GB:8"]), NEED, BUDGETS, lambda device, tp, pp: cost(device, tp, pp) if pp == 1 else None
    )
    assert {kind.pp for kind in kinds} == {1}
    assert "its step times were not measured" in {way.reason for way in unfit}


def test_nothing_fits_is_said_with_the_nearest(cost: CostMaker) -> None:
    cluster = parse_cluster(["T4:4"], Shape(per_node=4))
    kinds, unfit = worker_kinds(cluster, NEED, BUDGETS, cost)
    with pytest.raises(InvalidRequest, match=r"OPT-66B .* does not fit on 4 T4 on 1 node; the widest way tried, T4 TP.*weights"):
        check_fit(kinds, unfit, cluster, NEED)


def test_baselines_are_colocated_and_chunked(cost: CostMaker) -> None:
    kinds = kinds_of("A100-80GB:8", cost)
    placements = list(mixed_placements(kinds.values(), BUDGETS))
    assert {placement.family for placement in placements} == {"colocated", "chunked"}
    assert {placement.pools[0].max_step_tokens for placement in placements} == {512, 8192}
    assert len(placements) == 2 * len(kinds)


def place(kinds: dict[tuple[int, int], WorkerKind], affinity: Affinity, *parts: tuple[int, int, int]) -> Placement:
    (tp, pp, first), (other_tp, other_pp, second) = parts
    return split_placement(kinds[tp, pp], kinds[other_tp, other_pp], (first, second), affinity, BUDGETS)


def test_segments_of_a_stage_share_a_node(cost: CostMaker) -> None:
    cluster = parse_cluster(["A100-80GB:16"], Shape(per_node=4))
    kinds = kinds_of("A100-80GB:16", cost, per_node=4)
    assert fits(place(kinds, Affinity.NODE, (2, 1, 1), (2, 1, 1)), cluster)
    assert fits(place(kinds, Affinity.NODE, (2, 2, 1), (2, 2, 1)), cluster)  # one stage of both on each of two nodes
    assert not fits(place(kinds, Affinity.NODE, (4, 1, 1), (4, 1, 1)), cluster)
    assert fits(place(kinds, Affinity.ANY, (4, 1, 1), (4, 1, 1)), cluster)
    assert not fits(place(kinds, Affinity.NODE, (2, 2, 1), (4, 1, 1)), cluster)  # no stages in common
    assert not fits(place(kinds, Affinity.ANY, (4, 1, 3), (4, 1, 2)), cluster)  # 20 GPUs


def test_copies(cost: CostMaker) -> None:
    cluster = parse_cluster(["A100-80GB:16"], Shape(per_node=4))
    kinds = kinds_of("A100-80GB:16", cost, per_node=4)
    assert copies_that_fit(place(kinds, Affinity.NODE, (2, 1, 1), (2, 1, 1)), cluster) == 4
    assert copies_that_fit(place(kinds, Affinity.NODE, (2, 2, 1), (2, 2, 1)), cluster) == 2
    assert copies_that_fit(place(kinds, Affinity.ANY, (4, 1, 2), (4, 1, 1)), cluster) == 1
    large = place(kinds, Affinity.ANY, (2, 1, 1), (2, 1, 1)).times(3)
    assert [(pool.role, pool.replicas) for pool in large.pools] == [(Role.PREFILL, 3), (Role.DECODE, 3)]
    assert large.num_devices == 12
