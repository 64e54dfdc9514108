"""WeightedRoundRobin by weight: exact over a round, smooth within it, and without a memory of who was away."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.weighted_round_robin import WeightedRoundRobin


def turns(shares: WeightedRoundRobin, present: list[str], count: int) -> list[str]:
    """Who gets so many requests."""
    got = []
    for _ in range(count):
        got.append(shares.order(present)[0])
        shares.take(present)
    return got


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": 100, "b": 0}, "aaaa"),
        ({"a": 1, "b": 1}, "abab"),
        ({"a": 3, "b": 1}, "aabaaaba"),
        ({"a": 90, "b": 10}, "aaaaabaaaaaaaaabaaaa"),
        ({"a": 5, "b": 1, "c": 1}, "aabacaa"),
    ],
)
def test_the_order_of_turns_is_smooth(weights, expected):
    assert "".join(turns(WeightedRoundRobin(weights), list(weights), len(expected))) == expected


WEIGHTS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 20)).filter(lambda found: sum(found.values()))


@given(WEIGHTS)
def test_each_gets_exactly_its_weight_in_a_round(weights):
    shares, names = WeightedRoundRobin(weights), list(weights)
    for _ in range(3):
        assert Counter(turns(shares, names, sum(weights.values()))) == Counter(weights)


@given(WEIGHTS)
def test_no_prefix_of_the_turns_is_off_by_more_than_the_groups(weights):
    names, total = list(weights), sum(weights.values())
    got: Counter[str] = Counter()
    for number, name in enumerate(turns(WeightedRoundRobin(weights), names, total), start=1):
        got[name] += 1
        assert all(abs(got[name] - number * weights[name] / total) <= len(names) for name in names)


def test_a_group_without_an_engine_cedes_its_share_and_does_not_save_it_up():
    shares = WeightedRoundRobin({"stable": 50, "canary": 50})
    assert set(turns(shares, ["stable"], 101)) == {"stable"}
    assert Counter(turns(shares, ["stable", "canary"], 100)) == {"stable": 50, "canary": 50}


def test_asking_for_the_order_changes_nothing():
    shares = WeightedRoundRobin({"a": 1, "b": 1})
    assert shares.order(["a", "b"]) == shares.order(["a", "b"]) == ["a", "b"]


def test_nobody_present_or_known_gets_nothing():
    shares = WeightedRoundRobin({"a": 1, "b": 0})
    for present in ([], ["b"], ["unknown"]):
        assert shares.order(present) == []
        shares.take(present)
    assert (shares.weight("a"), shares.weight("b"), shares.weight("unknown")) == (1, 0, 0)
    assert turns(shares, ["a", "b"], 2) == ["a", "a"]
