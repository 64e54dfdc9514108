"""Smooth weighted round robin: exact over a round, smooth within it, without a memory of absent groups."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.weighted_round_robin import WeightedRoundRobin


def turns(groups: WeightedRoundRobin, present: list[str], count: int) -> list[str]:
    """The groups that get the next requests."""
    got = []
    for _ in range(count):
        got.append(groups.order(present)[0])
        groups.take(present)
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
    groups, names = WeightedRoundRobin(weights), list(weights)
    for _ in range(3):
        assert Counter(turns(groups, names, sum(weights.values()))) == Counter(weights)


@given(WEIGHTS)
def test_no_prefix_of_the_turns_is_off_by_more_than_the_groups(weights):
    names, total = list(weights), sum(weights.values())
    got: Counter[str] = Counter()
    for number, name in enumerate(turns(WeightedRoundRobin(weights), names, total), start=1):
        got[name] += 1
        assert all(abs(got[name] - number * weights[name] / total) <= len(names) for name in names)


def test_a_group_without_an_engine_cedes_its_share_and_does_not_save_it_up():
    groups = WeightedRoundRobin({"stable": 50, "canary": 50})
    assert set(turns(groups, ["stable"], 101)) == {"stable"}
    assert Counter(turns(groups, ["stable", "canary"], 100)) == {"stable": 50, "canary": 50}


def test_asking_for_the_order_changes_nothing():
    groups = WeightedRoundRobin({"a": 1, "b": 1})
    assert groups.order(["a", "b"]) == groups.order(["a", "b"]) == ["a", "b"]


def test_nobody_present_or_known_gets_nothing():
    groups = WeightedRoundRobin({"a": 1, "b": 0})
    for present in ([], ["b"], ["unknown"]):
        assert groups.order(present) == []
        groups.take(present)
    assert (groups.weight("a"), groups.weight("b"), groups.weight("unknown")) == (1, 0, 0)
    assert turns(groups, ["a", "b"], 2) == ["a", "a"]
