"""A sequence that cannot go on under its grammar: its request ends with the reason, nothing of it stays, others go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from baton.core.view import Role
from baton.proto import worker_pb2 as pb
from baton.tests.worker.test_handoff_live import at_rest, hand_over
from llguidance import LLMatcher

Spec = Callable[..., pb.SequenceSpec]


@pytest.mark.parametrize("where", [Role.PREFILL, Role.DECODE])
async def test_the_attempt_fails_for_good_and_leaves_nothing(rig: Any, make_spec: Spec, where: Role) -> None:
    prefill, decode = await rig.start(Role.PREFILL), await rig.start(Role.DECODE)
    links = {Role.PREFILL: prefill, Role.DECODE: decode}
    broken, other = make_spec("r", 40), make_spec("other", 40)
    # With the first the prefill worker cannot begin; with the second the decode worker cannot end, for want of a stop token.
    broken.sampling.grammar = (
        'start: "a" ((' if where is Role.PREFILL else json.dumps({"grammars": [{"lark_grammar": "start: /a/"}]})
    )
    broken.sampling.ClearField("stop_token_ids")
    await hand_over(prefill, decode, broken)
    await hand_over(prefill, decode, other)
    failed = (await links[where].expect("failed")).failed
    assert failed.attempt == broken.attempt
    assert not failed.retriable
    assert ("cannot be compiled" if where is Role.PREFILL else "no stop token can end it") in failed.reason
    await decode.finished("other")
    for link in links.values():
        await link.send(abort=pb.AbortAttempt(attempt=broken.attempt))
        await link.until(at_rest)
    for member in rig.members.values():
        assert not member.engine.executor._sampler._constraints._states


async def test_both_workers_of_a_handoff_follow_the_grammar(rig: Any, make_spec: Spec) -> None:
    prefill, decode = await rig.start(Role.PREFILL), await rig.start(Role.DECODE)
    spec = make_spec("r", 40, max_tokens=60, temperature=0.9)
    spec.sampling.grammar = LLMatcher.grammar_from_regex("(ab){5}")
    spec.sampling.stop_token_ids[:] = [1]
    await hand_over(prefill, decode, spec)
    await decode.finished("r")
    tokens = prefill.tokens_of("r") + decode.tokens_of("r")
    matcher = rig.members["decode-1"].engine.grammars.matcher(spec.sampling.grammar)
    assert matcher.consume_tokens(tokens[:-1])
    assert matcher.is_accepting()
    assert tokens[-1] == 1
    for link in (prefill, decode):
        await link.until(at_rest)
