"""The cost of images, audio and video is learned by their number, within bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.token_ratio import MediaTokens

COUNTS = st.dictionaries(st.sampled_from(["image", "audio", "video"]), st.integers(0, 50))


@pytest.mark.parametrize("true", [30, 400, 1000, 5000])
def test_it_comes_to_the_true_cost(true):
    media = MediaTokens()
    for _ in range(30):
        media.observe({"image": 2}, 2 * true)
    assert media.tokens({"image": 2}) == pytest.approx(2 * true, rel=0.05)
    assert media.tokens({"audio": 1}) == MediaTokens().tokens({"audio": 1})


def test_nothing_costs_nothing_and_teaches_nothing():
    media = MediaTokens()
    media.observe({}, 100)
    assert (media.tokens({}), media.tokens({"image": 1})) == (0, 1000)


@given(st.lists(st.tuples(COUNTS, st.integers(-(10**9), 10**12)), max_size=30), COUNTS)
def test_whatever_is_reported_an_estimate_stays_within_bounds(observations, counts):
    media = MediaTokens()
    for observed, tokens in observations:
        media.observe(observed, tokens)
    for kind, count in counts.items():
        assert count <= media.tokens({kind: count}) <= count * 1_000_000
