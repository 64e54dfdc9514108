"""The load kernel and its reference count what a count by hand counts, by source, layer and expert."""

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.expert_load import (
    add_expert_load,
    add_expert_load_reference,
    add_expert_load_triton,
    count_kernel,
    expert_load,
)
from moe_kernels.routing import INTEGERS

SHAPES = [
    # layers, tokens, real tokens, top_k, experts, sources
    (1, 0, 0, 2, 4, 1),
    (3, 5, 0, 2, 4, 2),
    (1, 1, 1, 1, 1, 1),
    (2, 7, 5, 2, 16, 3),
    (4, 700, 700, 2, 16, 2),
    (3, 513, 100, 8, 128, 2),
    (2, 130, 129, 9, 256, 5),
    (2, 4, 4, 0, 8, 2),
    (0, 4, 4, 2, 8, 2),
    (2, 4, 4, 2, 0, 2),
    (2, 4, 4, 2, 8, 0),
]


def routed(layers: int, tokens: int, top_k: int, experts: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens * 1000 + top_k)
    return torch.randint(0, max(experts, 1), (layers, tokens, top_k), generator=generator).to(dtype)


def counted_by_hand(shape, ids, real: int, sources) -> list[list[list[int]]]:
    """The definition, token by token, in Python's own numbers."""
    counts = Counter(
        (source, layer, expert)
        for layer, tokens in enumerate(ids)
        for source, token in zip(sources[:real], tokens, strict=False)
        for expert in token
    )
    return [[[counts[s, layer, e] for e in range(shape[2])] for layer in range(shape[1])] for s in range(shape[0])]


@pytest.fixture(scope="session", params=["reference", "kernel"])
def add(request, machine):
    """Either way of counting, on tensors of the machine."""
    if request.param == "reference":
        return add_expert_load_reference
    return partial(add_expert_load_triton, kernel=machine.launchable(count_kernel))


def test_counted_by_hand(add, machine):
    ids = torch.tensor([[[0, 2], [2, 3], [1, 1]], [[3, 3], [0, 1], [2, 2]]], device=machine.device)
    load = torch.zeros(2, 2, 4, dtype=torch.int32, device=machine.device)
    add(load, ids, 2, torch.tensor([1, 0, 0], device=machine.device))
    assert load.tolist() == [[[0, 0, 1, 1], [1, 1, 0, 0]], [[1, 0, 1, 0], [0, 0, 0, 2]]]


@pytest.mark.parametrize("counter", [torch.int32, torch.int64])
@pytest.mark.parametrize(("layers", "tokens", "real", "top_k", "experts", "num_sources"), SHAPES)
def test_the_kernel_counts_what_the_reference_counts(
    machine, layers, tokens, real, top_k, experts, num_sources, counter
):
    ids = routed(layers, tokens, top_k, experts)
    sources = torch.arange(tokens) % max(num_sources, 1)
    expected = torch.zeros(num_sources, layers, experts, dtype=counter)
    add_expert_load_reference(expected, ids, real, sources)
    load = torch.zeros_like(expected, device=machine.device)
    kernel = machine.launchable(count_kernel)
    add_expert_load_triton(load, ids.to(machine.device), real, sources.to(machine.device), kernel)
    assert torch.equal(load.cpu(), expected)
    assert int(expected.sum()) == (layers * real * top_k if experts and num_sources else 0)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_and_sources_of_any_integer_type(add, machine, dtype):
    ids = routed(2, 40, 3, 100, dtype)
    sources = (torch.arange(40) % 3).to(dtype)
    load = torch.zeros(3, 2, 100, dtype=torch.int32, device=machine.device)
    add(load, ids.to(machine.device), 33, sources.to(machine.device))
    assert load.tolist() == counted_by_hand(load.shape, ids.tolist(), 33, sources.tolist())


# What an index of 32 bits, a sign or a division would turn into some expert.
STRANGE = [-1, -2, 4, 5, -4, 2**31 - 1, -(2**31), 2**32, 2**32 + 1, -(2**32) + 2, 2**63 - 1, -(2**63)]


def test_what_is_no_expert_and_no_source_is_not_counted(add, machine):
    ids = torch.tensor([[[number, 3] for number in STRANGE]], device=machine.device)
    around = torch.zeros(4, 1, 4, dtype=torch.int32, device=machine.device)
    add(around[1:2], ids, len(STRANGE), None)
    assert around.tolist() == [[[0, 0, 0, 0]], [[0, 0, 0, len(STRANGE)]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]]
    around.zero_()
    sources = torch.tensor([2 if number == 4 else number for number in STRANGE], device=machine.device)
    add(around[1:3], torch.full_like(ids, 2), len(STRANGE), sources)
    assert not around.any()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_ids_are_counted_as_by_hand(add, machine, data):
    layers, tokens, top_k, experts, sources = (data.draw(st.integers(1, top)) for top in (3, 6, 3, 5, 3))
    number = st.integers(-2, 6) | st.sampled_from(STRANGE)
    token = st.lists(number, min_size=top_k, max_size=top_k)
    layer = st.lists(token, min_size=tokens, max_size=tokens)
    ids = data.draw(st.lists(layer, min_size=layers, max_size=layers))
    origin = data.draw(st.lists(number, min_size=tokens, max_size=tokens))
    real = data.draw(st.integers(0, tokens + 2))
    load = torch.zeros(sources, layers, experts, dtype=torch.int64, device=machine.device)
    add(load, torch.tensor(ids, device=machine.device), real, torch.tensor(origin, device=machine.device))
    assert load.tolist() == counted_by_hand(load.shape, ids, real, origin)


def test_steps_add_up_and_sources_share_the_whole(add, machine):
    ids = routed(3, 90, 2, 8).to(machine.device)
    sources = (torch.arange(90) % 4).to(machine.device)
    whole, steps = (torch.zeros(1, 3, 8, dtype=torch.int32, device=machine.device) for _ in range(2))
    by_source = torch.zeros(4, 3, 8, dtype=torch.int32, device=machine.device)
    add(whole, ids, 90, None)
    add(by_source, ids, 90, sources)
    for first in range(0, 90, 30):
        add(steps, ids[:, first : first + 30], 30, None)
    assert torch.equal(steps, whole)
    assert torch.equal(by_source.sum(0, keepdim=True), whole)


def test_ids_need_not_be_contiguous(add, machine):
    by_token = routed(50, 3, 4, 8).to(machine.device)
    ids = by_token.transpose(0, 1)[..., ::2]
    sources = (torch.arange(100) % 2).to(machine.device)[::2]
    load, expected = (torch.zeros(2, 3, 8, dtype=torch.int32, device=machine.device) for _ in range(2))
    add(load, ids, 45, sources)
    add(expected, ids.contiguous(), 45, sources.contiguous())
    assert torch.equal(load, expected)
    assert int(load.sum()) == 3 * 45 * 2


def test_counters_of_one_layer_may_lie_in_those_of_all(add, machine):
    ids = routed(1, 30, 2, 8).to(machine.device)
    sources = torch.zeros(30, dtype=torch.int32, device=machine.device)
    for origin in (sources, None):
        every = torch.zeros(1, 3, 8, dtype=torch.int32, device=machine.device)
        add(every[:, 1:2], ids, 30, origin)
        assert every.sum(2).tolist() == [[0, 60, 0]]


LOAD, IDS = torch.zeros(2, 3, 8, dtype=torch.int32), torch.zeros(3, 5, 2, dtype=torch.int32)
SOURCES = torch.zeros(5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("load", "ids", "real", "sources", "message"),
    [
        (LOAD, IDS[0], 5, SOURCES, r"topk_ids: integers \[layers, padded_tokens, top_k\].*\[5, 2\]"),
        (LOAD, IDS.float(), 5, SOURCES, "topk_ids: integers .*float32"),
        (LOAD, IDS, -1, SOURCES, "num_tokens: -1 is below 0"),
        (LOAD, IDS, 5, None, r"load: shape \[1, 3, any\] is needed, this is \[2, 3, 8\]"),
        (LOAD[:, :2], IDS, 5, SOURCES, r"load: shape \[any, 3, any\] is needed, this is \[2, 2, 8\]"),
        (LOAD[0], IDS, 5, SOURCES, "load: shape"),
        (LOAD.float(), IDS, 5, SOURCES, "load: contiguous int32 or int64 on cpu is needed, this is torch.float32"),
        (LOAD[..., ::2], IDS, 5, SOURCES, "load: contiguous"),
        (LOAD.to("meta"), IDS, 5, SOURCES, "on meta"),
        (LOAD, IDS, 5, SOURCES[:4], r"sources: integers \[5\] on cpu are needed, .*\[4\]"),
        (LOAD, IDS, 5, SOURCES.bool(), "sources: integers .*torch.bool"),
        (LOAD, IDS, 5, SOURCES.to("meta"), "sources: .* on meta"),
    ],
)
@pytest.mark.parametrize("count", [add_expert_load_reference, add_expert_load_triton, add_expert_load])
def test_what_does_not_fit_is_refused(count, load, ids, real, sources, message):
    with pytest.raises(ValueError, match=message):
        count(load, ids, real, sources)
    assert load.is_meta or not load.any()


def test_the_devices_own_way_serves(machine):
    ids = routed(4, 4096, 8, 128).to(machine.device)
    load, expected = (torch.zeros(1, 4, 128, dtype=torch.int32, device=machine.device) for _ in range(2))
    add_expert_load(load, ids, 4000)
    add_expert_load_reference(expected, ids, 4000)
    assert torch.equal(load, expected)
    assert torch.equal(expert_load(ids[1], 128, 4000), load[0, 1])
