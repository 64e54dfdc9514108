"""Loads on experts: made from a seed, or recorded from an engine."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from moe_contract.input_errors import InputError, InvalidInput
from moe_scheduling.expert.decision import ExpertLoad, Placement, initial_placement

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairedLoad(ExpertLoad):
    """A load with its inter-layer affinity, which of the policies compared only Gimbal's anchor reads.

    Attributes:
        pairs: [layer, expert, next], tokens a step that take `expert` in a layer and `next` in the following one, for
            each layer but the last; None where it was not recorded.
    """

    pairs: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSizes:
    """Sizes of an expert group; `routing_groups` are the model's own groups of experts, which vLLM packs by node."""

    layers: int
    experts: int
    ranks: int
    nodes: int
    redundant: int
    routing_groups: int = 1

    @property
    def start(self) -> Placement:
        """vLLM's placement at the start."""
        return initial_placement(
            layers=self.layers, experts=self.experts, redundant=self.redundant, ranks=self.ranks, nodes=self.nodes
        )


# 256 experts and 32 copies do not divide by 64 ranks: there it is 64.
GROUPS: Mapping[str, GroupSizes] = {
    "16 experts, 2 ranks": GroupSizes(layers=4, experts=16, ranks=2, nodes=1, redundant=2),
    "128 experts, 8 ranks": GroupSizes(layers=48, experts=128, ranks=8, nodes=1, redundant=16),
    "128 experts, 8 ranks, 2 nodes": GroupSizes(layers=48, experts=128, ranks=8, nodes=2, redundant=16),
    "DeepSeek-V3, 32 ranks, 4 nodes": GroupSizes(
        layers=58, experts=256, ranks=32, nodes=4, redundant=32, routing_groups=8
    ),
    "DeepSeek-V3, 64 ranks, 8 nodes": GroupSizes(
        layers=58, experts=256, ranks=64, nodes=8, redundant=64, routing_groups=8
    ),
}
TOKENS_A_STEP = 32768.0


def make_tenants(group: GroupSizes, *, exponent: float, tenants: int, seed: int) -> ExpertLoad:
    """Each tenant has equal sources and its own Zipf order of the experts in each layer; one tenant: all alike."""
    return as_load(_orders(group, exponent, tenants, np.random.default_rng(seed)), group, tenants)


def _orders(group: GroupSizes, exponent: float, tenants: int, generator: np.random.Generator) -> Floats:
    """[tenant, layer, expert], parts of the tokens."""
    weights = np.arange(1, group.experts + 1) ** -exponent
    rows = [[generator.permutation(weights) for _ in range(group.layers)] for _ in range(tenants)]
    parts: Floats = np.asarray(rows) / weights.sum()
    return parts


def as_load(parts: Floats, group: GroupSizes, tenants: int) -> ExpertLoad:
    """Parts by tenant as tokens by source; a tenant's choices in neighbouring layers are independent of each other."""
    source = np.arange(group.ranks) * tenants // group.ranks
    each = TOKENS_A_STEP / group.ranks
    share = np.bincount(source, minlength=tenants)[:, None, None] * each
    pairs = np.einsum("tle,tlf->lef", share * parts[:, :-1], parts[:, 1:])
    return PairedLoad(tokens=parts[source] * each, pairs=pairs)


def sample(load: ExpertLoad, steps: int, generator: np.random.Generator) -> ExpertLoad:
    """Returns the load that a window of `steps` steps would count, in tokens a step: Poisson counts around `load`."""
    pairs = load.pairs if isinstance(load, PairedLoad) else None
    return PairedLoad(tokens=generator.poisson(load.tokens * steps) / steps, pairs=pairs, steps=steps)


Drift = Callable[[GroupSizes, np.random.Generator, int], Iterator[Floats]]


def _still(group: GroupSizes, generator: np.random.Generator, rounds: int) -> Iterator[Floats]:
    parts = _orders(group, 0.8, 2, generator)
    for _ in range(rounds):
        yield parts


def _even(group: GroupSizes, _generator: np.random.Generator, rounds: int) -> Iterator[Floats]:
    for _ in range(rounds):
        yield np.full((2, group.layers, group.experts), 1 / group.experts)


def _walk(pace: float) -> Drift:
    def drift(group: GroupSizes, generator: np.random.Generator, rounds: int) -> Iterator[Floats]:
        logs = np.log(_orders(group, 0.8, 2, generator))
        for _ in range(rounds):
            parts = np.exp(logs)
            yield parts / parts.sum(2, keepdims=True)
            logs = logs + pace * generator.standard_normal(logs.shape)

    return drift


def _turns(length: int) -> Drift:
    def drift(group: GroupSizes, generator: np.random.Generator, rounds: int) -> Iterator[Floats]:
        both = [_orders(group, 1.0, 2, generator) for _ in range(2)]
        for number in range(rounds):
            yield both[number // length % 2]

    return drift


def _strangers(group: GroupSizes, generator: np.random.Generator, rounds: int) -> Iterator[Floats]:
    for _ in range(rounds):
        yield _orders(group, 1.0, 2, generator)


def _one_switch(group: GroupSizes, generator: np.random.Generator, rounds: int) -> Iterator[Floats]:
    yield from (_orders(group, 1.0, 2, generator) for _ in range(1))
    first, second = (_orders(group, 1.0, 2, generator) for _ in range(2))
    for number in range(rounds - 1):
        yield first if number < rounds // 2 else second


DRIFTS: Mapping[str, Drift] = {
    "still": _still,
    "even": _even,
    "drifts slowly": _walk(0.05),
    "drifts fast": _walk(0.4),
    "another load once": _one_switch,
    "two loads, turn by turn": _turns(1),
    "two loads, two rounds each": _turns(2),
    "two loads, three rounds each": _turns(3),
    "two loads, five rounds each": _turns(5),
    "another load each round": _strangers,
}


def make_sequence(name: str, group: GroupSizes, *, rounds: int, seed: int) -> Iterator[ExpertLoad]:
    """Yields the load of each of `rounds` rounds; a round is the steps between two decisions."""
    generator = np.random.default_rng(seed)
    for parts in DRIFTS[name](group, generator, rounds):
        yield as_load(parts, group, 2)


def read_sequence(path: Path) -> list[ExpertLoad]:
    """A recorded sequence: the array `load[round, source, layer, expert]` of an npz file, in tokens a step.

    Where the file has them, `pairs[round, layer, expert, next]` count the tokens that neighbouring experts share.

    Raises:
        InvalidInput: the file has no such array.
    """
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            array = arrays["load"]
            pairs = arrays.get("pairs")
        if array.ndim != 4 or len(array) < 2:
            raise ValueError("load must be [round, source, layer, expert] with two rounds at least")
        pairs = [None] * len(array) if pairs is None else pairs
        return [PairedLoad(tokens=load, pairs=shared) for load, shared in zip(array, pairs, strict=True)]
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise InvalidInput([InputError(str(path), f"no recorded sequence of loads: {error}")]) from None
