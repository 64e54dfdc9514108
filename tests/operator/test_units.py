"""Durations and quantities mean what Go and Kubernetes take them for."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_operator.api.units import duration_s, quantity_value, render_bytes, render_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0), ("500ms", 0.5), ("10s", 10), ("1m30s", 90), ("1.5h", 5400), ("2h0m0s", 7200), ("1h1ms", 3600.001)],
)
def test_a_duration_is_the_sum_of_its_parts(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "s", "-1s", "1 s", "1d", "1s ", "1s\n", "1..5s", "١s", "1e3s", "1s" * 17])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        duration_s(text)


@given(st.integers(0, 24 * 3600 * 1000))
def test_a_rendered_duration_reads_back_as_the_same_time(milliseconds: int) -> None:
    assert duration_s(render_duration(milliseconds / 1000)) == milliseconds / 1000


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", "2"), ("500m", "0.5"), ("1.5G", "1500000000"), ("4Gi", "4294967296"), ("1k", "1000"), ("1Ki", "1024")],
)
def test_a_quantity_is_its_number_times_its_suffix(text: str, value: str) -> None:
    assert quantity_value(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "Gi", "4GiB", "4gi", "-1", "1e3", "4 Gi", "4Gi\n", "1K", ".5"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no quantity"):
        quantity_value(text)


@given(st.integers(0, 2**45))
def test_rendered_bytes_read_back_as_the_same_number(count: int) -> None:
    assert quantity_value(render_bytes(count)) == count
