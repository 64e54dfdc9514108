"""Links, first contacts and leases of KV transfers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.disaggregation import KvTransfer
from moe_scheduling.signals import Target
from moe_tools.simulator.transfers import TransferPlan, Transfers

A, B, C, D = (Target(name) for name in "abcd")
# 1 ms a token.
LINK = KvTransfer(token_bytes=1e3, bytes_per_s=1e6, fixed_s=0.5, handshake_s=2.0)


def make(**values):
    return Transfers(TransferPlan(link=LINK, **values))


def test_the_first_contact_of_two_processes_takes_a_handshake():
    transfers = make()
    lease = transfers.hold("r", A, 1, 0.0)
    assert transfers.begin(lease, B, 1, 100, 0.0) == pytest.approx(0.5 + 2.0 + 0.1)
    assert transfers.begin(lease, B, 1, 100, 10.0) == pytest.approx(10.0 + 0.5 + 0.1)
    # Another process of the decode engine is met anew.
    assert transfers.begin(lease, B, 2, 100, 20.0) == pytest.approx(20.0 + 0.5 + 2.0 + 0.1)


def test_a_link_serves_its_transfers_one_after_the_other():
    transfers = make()
    one, other = transfers.hold("r", A, 1, 0.0), transfers.hold("s", C, 1, 0.0)
    for lease, sink in ((one, B), (one, D), (other, B), (other, D)):
        transfers.begin(lease, sink, 1, 1, 0.0)
    first_s = transfers.begin(one, B, 1, 4000, 10.0)
    assert first_s == pytest.approx(14.5)
    assert transfers.begin(one, D, 1, 1000, 10.0) == pytest.approx(first_s + 1.0)
    assert transfers.begin(other, B, 1, 1000, 10.0) == pytest.approx(first_s + 1.0)


def test_a_claimed_lease_lasts_and_ends_after_the_decode_engine_is_gone():
    transfers = make(lease_s=30.0)
    lease = transfers.hold("r", A, 1, 0.0)
    assert lease.expires_s == 30.0
    assert transfers.give_up("r", 5.0) is None
    transfers.claim("r")
    assert lease.expires_s == math.inf
    assert transfers.give_up("r", 50.0).expires_s == 80.0
    transfers.claim("unknown")
    assert transfers.give_up("unknown", 0.0) is None


def test_a_failure_of_an_unknown_engine_is_seen_late():
    transfers = make(failure_s=0.1, unknown_s=5.0)
    lease = transfers.hold("r", A, 1, 0.0)
    assert transfers.fails_s(A, 1, B, 1) == 5.0
    transfers.begin(lease, B, 1, 1, 0.0)
    assert transfers.fails_s(A, 1, B, 1) == 0.1


TRANSFER = st.tuples(st.sampled_from([A, C]), st.sampled_from([B, D]), st.integers(0, 5000), st.floats(0, 10))


@given(st.lists(TRANSFER))
def test_no_link_carries_more_than_its_rate(rows):
    transfers, now_s, sent = make(), 0.0, {}
    for number, (source, sink, tokens, gap_s) in enumerate(rows):
        now_s += gap_s
        ends_s = transfers.begin(transfers.hold(str(number), source, 1, now_s), sink, 1, tokens, now_s)
        assert ends_s >= now_s + LINK.fixed_s + tokens / 1000 - 1e-6
        for link in ((source, "out"), (sink, "in")):
            sent[link] = sent.get(link, 0) + tokens
            assert ends_s >= sent[link] / 1000 - 1e-6
