"""The pairs that DistServe's own search chooses from: what each condition changes."""

from __future__ import annotations

from pathlib import Path

import paper_pairs
import pytest
from baton.placement.hardware import find_accelerator
from paper_placements import cost_maker, problem_of, read_papers

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

pytestmark = pytest.mark.skipif(
    not (DATA / "derived").is_dir(), reason="the published figures are not beside this checkout (shared/data)"
)


def test_stages_that_pay_for_themselves_cost_a_step_more_than_their_share() -> None:
    paper = read_papers(DATA)[0]
    published = cost_maker(DATA, "distserve", paper.model)
    paying = paper_pairs._with_stages(published, problem_of(paper))
    device = find_accelerator("A100-80GB")
    alone, split = published(device, 1, 1), paying(device, 1, 4)
    assert alone is not None
    assert split is not None
    assert paying(device, 1, 1) == alone
    whole, stage = alone.cost.decode_seconds(32, 32 * 800, 1), split.cost.decode_seconds(32, 32 * 800, 1)
    # The host's 2 ms and what is launched are not divided by four; streaming weights and reading KV are.
    assert whole / 4 + 1.5e-3 < stage < whole / 4 + 5e-3


def test_a_condition_changes_what_it_says() -> None:
    paper = read_papers(DATA)[0]
    problem = problem_of(paper)
    pairs = {condition: list(paper_pairs.pairs_of(paper, problem, DATA, condition)) for condition in paper_pairs.CONDITIONS}
    degrees = {
        condition: [tuple((pool.kind.tp, pool.kind.pp) for pool in pair.pools) for pair in each]
        for condition, each in pairs.items()
    }
    assert all((paper.prefill, paper.decode) in each for each in degrees.values())
    assert all(pair.num_devices <= paper_pairs.NODE for each in pairs.values() for pair in each)
    assert (
        {pair.pools[0].max_num_seqs for pair in pairs["alone"]} == {1} != {pair.pools[0].max_num_seqs for pair in pairs["stages"]}
    )
    for limited, unlimited in zip(pairs["alone"], pairs["unlimited"], strict=True):
        assert unlimited.pools[1].kind.num_blocks == paper_pairs.PLENTY * limited.pools[1].kind.num_blocks
