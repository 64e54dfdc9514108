"""The part of its time that each engine spends on prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.prefill_share import MEMORY_S, MOST, PrefillShares


def test_a_prefill_share_is_the_part_of_the_recent_seconds():
    shares = PrefillShares()
    assert shares.share("a", 0.0) == 0.0
    for number in range(1000):
        shares.add("a", 0.03, number * 0.1)
    assert shares.share("a", 100.0) == pytest.approx(0.3, rel=0.02)
    assert shares.share("a", 100.0 + 5 * MEMORY_S) < 0.01
    shares.forget("a")
    shares.forget("a")
    assert shares.share("a", 100.0) == 0.0


@given(st.lists(st.tuples(st.floats(), st.floats())), st.floats(allow_nan=False, allow_infinity=False))
def test_a_prefill_share_stays_in_its_range(additions, now_s):
    shares = PrefillShares()
    for prefill_s, at_s in additions:
        shares.add("a", prefill_s, at_s)
    assert 0.0 <= shares.share("a", now_s) <= MOST


def test_the_shares_at_a_time_are_those_of_each_server():
    shares = PrefillShares()
    shares.add("a", 1.0, 0.0)
    shares.add("b", 2.0, 5.0)
    at_once = shares.at(6.0)
    assert dict(at_once) == {server: shares.share(server, 6.0) for server in ("a", "b")}
    assert len(at_once) == 2
    assert "c" not in at_once
