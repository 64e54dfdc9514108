"""The five shapes: each has the distribution that its name says."""

import numpy as np
import pytest
from moe_contract.input_errors import InvalidInput
from moe_tools.shapes import Shape, ShapeSettings, build_shape, parse_shape

SETTINGS = ShapeSettings(rate=5.0, count=4000, seed=3, shortest_tokens=100, longest_tokens=1100)


def shares(shape: Shape) -> np.ndarray:
    """How far each prompt lies from the shortest (0) to the longest (1)."""
    return np.array([(row.prompt_tokens - 100) / 1000 for row in build_shape(shape, SETTINGS)])


def thirds(shape: Shape) -> np.ndarray:
    return np.histogram(shares(shape), bins=[0, 1 / 3, 2 / 3, 1.0])[0] / SETTINGS.count


@pytest.mark.parametrize("shape", Shape)
def test_lengths_stay_in_their_range_and_arrivals_come_at_the_rate(shape):
    requests = build_shape(shape, SETTINGS)
    assert len(requests) == SETTINGS.count
    assert all(100 <= row.prompt_tokens <= 1100 for row in requests)
    assert all(1 <= row.output_tokens <= SETTINGS.longest_output_tokens for row in requests)
    arrivals = np.array([row.arrival_s for row in requests])
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    # Poisson: the gaps are exponential, so their spread equals their mean.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)


def test_random_is_long_tailed():
    found = shares(Shape.RANDOM)
    assert np.median(found) == pytest.approx(0.1, rel=0.1)
    assert found.mean() > 1.3 * np.median(found)
    assert found.max() > 0.9


def test_central_gathers_in_the_middle():
    low, middle, high = thirds(Shape.CENTRAL)
    assert middle > 0.75
    assert low == pytest.approx(high, abs=0.03)


def test_descending_falls():
    low, middle, high = thirds(Shape.DESCENDING)
    assert (low, middle, high) == pytest.approx((5 / 9, 3 / 9, 1 / 9), abs=0.03)


def test_two_end_is_empty_in_the_middle():
    low, middle, high = thirds(Shape.TWO_END)
    assert middle < 0.01
    assert low == pytest.approx(high, abs=0.04)


def test_average_is_even():
    assert thirds(Shape.AVERAGE) == pytest.approx([1 / 3] * 3, abs=0.03)


def test_the_seed_decides():
    assert build_shape(Shape.RANDOM, SETTINGS) == build_shape(Shape.RANDOM, SETTINGS)
    other = ShapeSettings(rate=5.0, count=4000, seed=4)
    assert build_shape(Shape.RANDOM, SETTINGS) != build_shape(Shape.RANDOM, other)


def test_what_cannot_be_meant_is_reported():
    known = "average, central, descending, random, twoEnd"
    with pytest.raises(InvalidInput, match=f"shape: unknown 'twoend'; known: {known}"):
        parse_shape("twoend")
    with pytest.raises(InvalidInput, match=r"^rate: "):
        ShapeSettings(rate=0)
    with pytest.raises(InvalidInput, match=r"^limit: "):
        ShapeSettings(count=0)
    with pytest.raises(InvalidInput, match=r"^max-tokens: "):
        ShapeSettings(longest_tokens=5)
