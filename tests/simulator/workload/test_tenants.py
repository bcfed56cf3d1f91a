"""A mix of tenants."""

from __future__ import annotations

import pytest
from baton.core.errors import InvalidRequest
from baton.simulator.workload.arrivals import PoissonArrivals
from baton.simulator.workload.lengths import IndependentLengths, parse_length
from baton.simulator.workload.tenants import Tenant, tenant_workload


def lengths(inputs: str, outputs: str) -> IndependentLengths:
    return IndependentLengths(parse_length(inputs, "x"), parse_length(outputs, "x"))


CHAT = Tenant("chat", lengths("uniform:10,99", "uniform:1,50"), share=3.0, priority=1)
BATCH = Tenant("batch", lengths("uniform:1000,2000", "7"))


def test_everybody_has_their_share_their_lengths_and_their_priority() -> None:
    requests = list(tenant_workload((CHAT, BATCH), PoissonArrivals(5.0), num_requests=4000, seed=1))
    assert [request.index for request in requests] == list(range(4000))
    assert {request.tenant: request.priority for request in requests} == {"chat": 1, "batch": 0}
    chats = [request for request in requests if request.tenant == "chat"]
    assert len(chats) == pytest.approx(3000, rel=0.05)
    assert all(10 <= request.input_tokens <= 99 for request in chats)
    assert all(request.input_tokens >= 1000 and request.output_tokens == 7 for request in requests if request.tenant == "batch")


def test_what_one_tenant_asks_for_does_not_depend_on_the_others_nor_on_the_rate() -> None:
    def asked(*tenants: Tenant, rate: float = 5.0) -> list[tuple[int, int]]:
        workload = tenant_workload(tenants, PoissonArrivals(rate), num_requests=400, seed=1)
        return [(request.input_tokens, request.output_tokens) for request in workload if request.tenant == "chat"][:60]

    assert asked(CHAT, BATCH) == asked(CHAT) == asked(CHAT, BATCH, rate=50.0)


@pytest.mark.parametrize(
    ("tenants", "said"),
    [
        ((), "one at least"),
        ((CHAT, CHAT), "name of its own"),
        ((CHAT, Tenant("free", CHAT.lengths, share=0.0)), "tenant 'free': share 0.0"),
        ((Tenant("all", CHAT.lengths, share=float("inf")),), "tenant 'all': share inf"),
    ],
)
def test_tenants_that_cannot_be_are_refused(tenants: tuple[Tenant, ...], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        tenant_workload(tenants, PoissonArrivals(1.0), num_requests=5)


def test_a_mix_without_an_end_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no end"):
        tenant_workload((CHAT,), PoissonArrivals(1.0))
