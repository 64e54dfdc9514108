"""Tokens of a text without a tokenizer."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.token_ratio import TokenRatio


def test_it_starts_at_four_bytes_a_token():
    assert [TokenRatio().tokens(n_bytes) for n_bytes in (0, 1, 4, 5, 4000)] == [0, 1, 1, 2, 1000]


@pytest.mark.parametrize("bytes_per_token", [1.5, 2.9, 4.0, 7.0])
def test_it_learns_the_ratio_of_the_traffic(bytes_per_token):
    ratio = TokenRatio()
    for _ in range(200):
        ratio.observe(int(1000 * bytes_per_token), 1000)
    assert ratio.bytes_per_token == pytest.approx(bytes_per_token, rel=1e-3)
    assert ratio.tokens(int(8000 * bytes_per_token)) == pytest.approx(8000, rel=1e-3)


def test_a_long_prompt_says_more_than_a_short_one():
    short, long = TokenRatio(), TokenRatio()
    short.observe(10, 10)
    long.observe(4000, 4000)
    assert 4.0 > short.bytes_per_token > 3.9 > long.bytes_per_token


@pytest.mark.parametrize(
    ("n_bytes", "n_tokens"),
    [(0, 10), (10, 0), (-5, 10), (10, -5), (math.nan, 10), (10, math.nan), (math.inf, 10), (10, math.inf)],
)
def test_what_cannot_be_changes_nothing(n_bytes, n_tokens):
    ratio = TokenRatio()
    ratio.observe(n_bytes, n_tokens)
    assert ratio.bytes_per_token == 4.0


def test_one_absurd_report_moves_it_by_a_third_at_most():
    ratio = TokenRatio()
    ratio.observe(1, 10**12)
    assert 3.0 <= ratio.bytes_per_token < 4.0
    ratio = TokenRatio()
    ratio.observe(10**12, 1)
    assert 4.0 < ratio.bytes_per_token < 4.1


@given(st.lists(st.tuples(st.integers(-10, 10**9), st.integers(-10, 10**9))), st.integers(-10, 10**9))
def test_no_report_makes_a_count_impossible(reports, n_bytes):
    ratio = TokenRatio()
    for n_seen_bytes, n_tokens in reports:
        ratio.observe(n_seen_bytes, n_tokens)
    assert 1.0 <= ratio.bytes_per_token <= 16.0
    assert 0 <= ratio.tokens(n_bytes) <= max(0, n_bytes)
