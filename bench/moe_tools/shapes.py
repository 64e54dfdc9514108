"""The five constructed workloads of the Gimbal papers: Random, Central, Descending, Two-end, Average.

The papers draw requests of BurstGPT by prompt length into five length distributions but publish no formula. The
definitions here are reconstructed from the names; they are densities over a share x of the way from the shortest to the
longest prompt. Arrivals are Poisson; answers are log-normal, as BurstGPT's are long-tailed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from moe_contract.input_errors import InputError, InvalidInput, unknown_choice

from moe_tools.traces import TraceRequest

TAIL_SPREAD = 1.0
"""Standard deviation of the logarithm of a long-tailed length."""


class Shape(StrEnum):
    """Distribution of the prompts' lengths, by the names of the Gimbal paper."""

    RANDOM = "random"
    CENTRAL = "central"
    DESCENDING = "descending"
    TWO_END = "twoEnd"
    AVERAGE = "average"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeSettings:
    """`rate` in requests a second; lengths in tokens. The defaults fit a model with a context of 4,096 tokens."""

    rate: float = 2.0
    count: int = 200
    seed: int = 0
    shortest_tokens: int = 16
    longest_tokens: int = 3072
    median_output_tokens: int = 48
    longest_output_tokens: int = 512

    def __post_init__(self) -> None:
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise InvalidInput([InputError("rate", f"must be more than 0 requests a second, got {self.rate}")])
        if self.count < 1:
            raise InvalidInput([InputError("limit", f"must be 1 or more, got {self.count}")])
        if not 1 <= self.shortest_tokens <= self.longest_tokens:
            raise InvalidInput([InputError("max-tokens", "leaves no room for a prompt")])


def parse_shape(name: str) -> Shape:
    """The shape of this name."""
    try:
        return Shape(name)
    except ValueError:
        raise InvalidInput([unknown_choice("shape", name, Shape)]) from None


def build_shape(shape: Shape, settings: ShapeSettings) -> tuple[TraceRequest, ...]:
    """`count` requests whose prompt lengths follow the shape; the same for the same seed."""
    random = np.random.default_rng(settings.seed)
    arrivals = np.cumsum(random.exponential(1 / settings.rate, settings.count))
    span = settings.longest_tokens - settings.shortest_tokens
    prompts = settings.shortest_tokens + np.rint(_SHARES[shape](random, settings.count) * span).astype(int)
    tail = random.lognormal(math.log(settings.median_output_tokens), TAIL_SPREAD, settings.count)
    outputs = np.clip(np.rint(tail), 1, settings.longest_output_tokens).astype(int)
    return tuple(
        TraceRequest(arrival_s=float(arrival - arrivals[0]), prompt_tokens=int(prompt), output_tokens=int(output))
        for arrival, prompt, output in zip(arrivals, prompts, outputs, strict=True)
    )


def _long_tail(random: np.random.Generator, count: int) -> np.ndarray:
    """As requests come in practice: most are short, a few very long; a tenth of the way at the median."""
    return np.minimum(random.lognormal(math.log(0.1), TAIL_SPREAD, count), 1.0)


def _middle(random: np.random.Generator, count: int) -> np.ndarray:
    """Normally distributed values about 0.5, within 0 and 1."""
    return np.clip(random.normal(0.5, 0.12, count), 0.0, 1.0)


def _falling(random: np.random.Generator, count: int) -> np.ndarray:
    """Density 2(1 - x): the longer, the rarer, in a straight line."""
    return 1.0 - np.sqrt(random.random(count))


def _both_ends(random: np.random.Generator, count: int) -> np.ndarray:
    """Half near the shortest, half near the longest, few between."""
    near = np.abs(random.normal(0.0, 0.08, count)).clip(max=0.5)
    return np.where(random.random(count) < 0.5, near, 1.0 - near)


def _even(random: np.random.Generator, count: int) -> np.ndarray:
    """Every length as often as any other."""
    return random.random(count)


_SHARES: dict[Shape, Callable[[np.random.Generator, int], np.ndarray]] = {
    Shape.RANDOM: _long_tail,
    Shape.CENTRAL: _middle,
    Shape.DESCENDING: _falling,
    Shape.TWO_END: _both_ends,
    Shape.AVERAGE: _even,
}
