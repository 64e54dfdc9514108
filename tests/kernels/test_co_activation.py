"""The kernel of co-activation and its reference count what a count by hand counts, layer by layer."""

from collections import Counter
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.co_activation import (
    add_co_activation,
    add_co_activation_reference,
    add_co_activation_triton,
    pair_kernel,
)
from moe_kernels.routing import INTEGERS

SHAPES = [
    # layers, tokens, real tokens, top_k, next_top_k, experts, next_experts
    (1, 0, 0, 2, 2, 4, 4),
    (3, 5, 0, 2, 2, 4, 4),
    (1, 1, 1, 1, 1, 1, 1),
    (2, 7, 5, 2, 3, 16, 12),
    (3, 300, 290, 2, 2, 16, 16),
    (2, 65, 40, 8, 8, 64, 64),
    (2, 4, 4, 0, 2, 8, 8),
    (0, 4, 4, 2, 2, 8, 8),
    (2, 4, 4, 2, 2, 8, 0),
]
STRANGE = [-1, -2, 4, 5, -4, 2**31 - 1, -(2**31), 2**32, 2**32 + 1, -(2**32) + 2, 2**63 - 1, -(2**63)]


def routed(layers: int, tokens: int, top_k: int, experts: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens * 1000 + top_k + experts)
    return torch.randint(0, max(experts, 1), (layers, tokens, top_k), generator=generator).to(dtype)


def counted_by_hand(shape, ids, next_ids, real: int) -> list[list[list[int]]]:
    """The definition, token by token, in Python's own numbers."""
    counts = Counter(
        (layer, expert, following)
        for layer, (tokens, next_tokens) in enumerate(zip(ids, next_ids, strict=True))
        for token, next_token in zip(tokens[:real], next_tokens[:real], strict=True)
        for expert, following in product(token, next_token)
    )
    return [[[counts[layer, e, n] for n in range(shape[2])] for e in range(shape[1])] for layer in range(shape[0])]


@pytest.fixture(scope="session", params=["reference", "kernel"])
def add(request, machine):
    """Either way of counting, on tensors of the machine."""
    if request.param == "reference":
        return add_co_activation_reference
    return partial(add_co_activation_triton, kernel=machine.launchable(pair_kernel))


def test_counted_by_hand(add, machine):
    ids = torch.tensor([[[0, 1], [1, 2], [2, 2]]], device=machine.device)
    next_ids = torch.tensor([[[2, 0], [2, 1], [0, 0]]], device=machine.device)
    pairs = torch.zeros(1, 3, 3, dtype=torch.int32, device=machine.device)
    add(pairs, ids, next_ids, 2)
    assert pairs.tolist() == [[[1, 0, 1], [1, 1, 2], [0, 1, 1]]]


@pytest.mark.parametrize("counter", [torch.int32, torch.int64])
@pytest.mark.parametrize(("layers", "tokens", "real", "top_k", "next_top_k", "experts", "following"), SHAPES)
def test_the_kernel_counts_what_the_reference_counts(
    machine, layers, tokens, real, top_k, next_top_k, experts, following, counter
):
    ids, next_ids = routed(layers, tokens, top_k, experts), routed(layers, tokens, next_top_k, following)
    expected = torch.zeros(layers, experts, following, dtype=counter)
    add_co_activation_reference(expected, ids, next_ids, real)
    pairs = torch.zeros_like(expected, device=machine.device)
    kernel = machine.launchable(pair_kernel)
    add_co_activation_triton(pairs, ids.to(machine.device), next_ids.to(machine.device), real, kernel)
    assert torch.equal(pairs.cpu(), expected)
    assert int(expected.sum()) == (layers * real * top_k * next_top_k if experts and following else 0)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_of_any_integer_type(add, machine, dtype):
    ids, next_ids = routed(2, 40, 3, 100, dtype), routed(2, 40, 2, 90, dtype)
    pairs = torch.zeros(2, 100, 90, dtype=torch.int32, device=machine.device)
    add(pairs, ids.to(machine.device), next_ids.to(machine.device), 33)
    assert pairs.tolist() == counted_by_hand(pairs.shape, ids.tolist(), next_ids.tolist(), 33)


def test_what_is_no_expert_is_in_no_pair(add, machine):
    strange = torch.tensor([[[number, 3] for number in STRANGE]], device=machine.device)
    plain = torch.full((1, len(STRANGE), 1), 2, device=machine.device)
    for ids, next_ids, cell in ((strange, plain, (1, 3, 2)), (plain, strange, (1, 2, 3))):
        around = torch.zeros(3, 4, 4, dtype=torch.int32, device=machine.device)
        add(around[1:2], ids, next_ids, len(STRANGE))
        assert int(around[cell]) == len(STRANGE) == int(around.sum())


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_ids_are_counted_as_by_hand(add, machine, data):
    layers, tokens, top_k, next_top_k, experts, following = (
        data.draw(st.integers(1, top)) for top in (3, 6, 3, 3, 5, 4)
    )
    number = st.integers(-2, 6) | st.sampled_from(STRANGE)

    def stack(slots):
        layer = st.lists(st.lists(number, min_size=slots, max_size=slots), min_size=tokens, max_size=tokens)
        return data.draw(st.lists(layer, min_size=layers, max_size=layers))

    ids, next_ids, real = stack(top_k), stack(next_top_k), data.draw(st.integers(0, tokens + 2))
    pairs = torch.zeros(layers, experts, following, dtype=torch.int64, device=machine.device)
    add(pairs, torch.tensor(ids, device=machine.device), torch.tensor(next_ids, device=machine.device), real)
    assert pairs.tolist() == counted_by_hand(pairs.shape, ids, next_ids, real)


def test_steps_add_up(add, machine):
    ids = routed(4, 90, 2, 8).to(machine.device)
    whole, steps = (torch.zeros(3, 8, 8, dtype=torch.int32, device=machine.device) for _ in range(2))
    add(whole, ids[:-1], ids[1:], 90)
    for first in range(0, 90, 30):
        part = ids[:, first : first + 30]
        add(steps, part[:-1], part[1:], 30)
    assert torch.equal(steps, whole)


def test_ids_need_not_be_contiguous(add, machine):
    ids = routed(50, 4, 4, 8).to(machine.device).transpose(0, 1)[..., ::2]
    pairs, expected = (torch.zeros(3, 8, 8, dtype=torch.int32, device=machine.device) for _ in range(2))
    add(pairs, ids[:-1], ids[1:], 45)
    add(expected, ids[:-1].contiguous(), ids[1:].contiguous(), 45)
    assert torch.equal(pairs, expected)
    assert int(pairs.sum()) == 3 * 45 * 4


PAIRS, IDS = torch.zeros(3, 8, 8, dtype=torch.int32), torch.zeros(3, 5, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("pairs", "ids", "next_ids", "real", "message"),
    [
        (PAIRS, IDS[0], IDS, 5, r"topk_ids: integers \[layers, padded_tokens, top_k\].*\[5, 2\]"),
        (PAIRS, IDS, IDS.double(), 5, "next_ids: integers .*float64"),
        (PAIRS, IDS, IDS[:2], 5, r"next_ids: \[2, 5, 2\] on cpu are not of the layers and tokens of topk_ids"),
        (PAIRS, IDS, IDS[:, :4], 5, r"next_ids: \[3, 4, 2\]"),
        (PAIRS, IDS, IDS.to("meta"), 5, "next_ids: .* on meta"),
        (PAIRS, IDS, IDS, -5, "num_tokens: -5 is below 0"),
        (PAIRS[:2], IDS, IDS, 5, r"pairs: shape \[3, any, any\] is needed, this is \[2, 8, 8\]"),
        (PAIRS[0], IDS, IDS, 5, "pairs: shape"),
        (PAIRS.to(torch.int16), IDS, IDS, 5, "pairs: contiguous int32 or int64 on cpu is needed, this is torch.int16"),
        (PAIRS.transpose(1, 2), IDS, IDS, 5, "pairs: contiguous"),
    ],
)
@pytest.mark.parametrize("count", [add_co_activation_reference, add_co_activation_triton, add_co_activation])
def test_what_does_not_fit_is_refused(count, pairs, ids, next_ids, real, message):
    with pytest.raises(ValueError, match=message):
        count(pairs, ids, next_ids, real)
    assert not pairs.any()


def test_the_devices_own_way_serves(machine):
    ids = routed(3, 1024, 8, 64).to(machine.device)
    pairs, expected = (torch.zeros(2, 64, 64, dtype=torch.int32, device=machine.device) for _ in range(2))
    add_co_activation(pairs, ids[:-1], ids[1:], 1000)
    add_co_activation_reference(expected, ids[:-1], ids[1:], 1000)
    assert torch.equal(pairs, expected)
