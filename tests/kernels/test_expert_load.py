"""The mapping kernel and its reference give the slots and the counts that a loop in plain Python gives."""

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.expert_load import (
    KNUTH_MULTIPLIER,
    map_and_record,
    map_and_record_kernel,
    map_and_record_reference,
    map_and_record_triton,
)

INTEGERS = (torch.int32, torch.int64, torch.uint32, torch.int16)
SHAPES = [
    # tokens, real tokens, top_k, experts, slots of an expert at most
    (0, 0, 2, 4, 1),
    (5, 0, 2, 4, 2),
    (1, 1, 1, 1, 1),
    (7, 5, 2, 16, 3),
    (700, 700, 2, 16, 2),
    (513, 100, 8, 128, 4),
    (130, 129, 9, 256, 5),
]


def drawn(tokens: int, top_k: int, experts: int, width: int):
    """Ids, and the slots of each expert: some experts have several."""
    dice = torch.Generator().manual_seed(tokens * 1000 + top_k)
    ids = torch.randint(0, experts, (tokens, top_k), generator=dice).to(torch.int32)
    replicas = torch.randint(1, width + 1, (experts,), generator=dice)
    slots = torch.arange(experts * width).reshape(experts, width)
    slots[torch.arange(width)[None] >= replicas[:, None]] = -1
    return ids, slots, replicas


def by_hand(ids, slots, replicas, experts: int, real: int) -> tuple[list[list[int]], list[int]]:
    """The definition, token by token, in Python's own numbers."""
    mapped, counts = [], Counter()
    for token, chosen in enumerate(ids):
        hashed = token * KNUTH_MULTIPLIER & 0xFFFFFFFF
        known = [0 <= expert < experts for expert in chosen]
        mapped.append(
            [slots[expert][hashed % replicas[expert]] if ok else -1 for expert, ok in zip(chosen, known, strict=True)]
        )
        counts.update(expert for expert, ok in zip(chosen, known, strict=True) if ok and token < real)
    return mapped, [counts[expert] for expert in range(experts)]


@pytest.fixture(scope="session", params=["reference", "kernel"])
def run(request, machine):
    """Either way of mapping, on tensors of the machine: ids, slots, replicas, enabled, real tokens -> mapped, load."""
    way = map_and_record_reference
    if request.param == "kernel":
        way = partial(map_and_record_triton, kernel=machine.launchable(map_and_record_kernel))
    elif machine.device != "cpu":
        pytest.skip("the reference hashes positions on the CPU")

    def call(ids, slots, replicas, enabled=True, real=None):
        device = machine.device
        load = torch.zeros(len(replicas) + 3, dtype=torch.int32, device=device)
        real_tokens = None if real is None else torch.tensor(real, dtype=torch.int32, device=device)
        given = (load, slots.to(device), replicas.to(device), torch.tensor(enabled, device=device), real_tokens)
        mapped = way(ids.to(device), *given)
        return mapped.cpu(), load.cpu()

    return call


@pytest.mark.parametrize(("tokens", "real", "top_k", "experts", "width"), SHAPES)
def test_slots_and_counts_are_those_of_a_loop(run, tokens, real, top_k, experts, width):
    ids, slots, replicas = drawn(tokens, top_k, experts, width)
    mapped, load = run(ids, slots, replicas, real=real)
    expected = by_hand(ids.tolist(), slots.tolist(), replicas.tolist(), experts, real)
    assert (mapped.tolist(), load[:experts].tolist()) == expected
    assert not load[experts:].any(), "only experts are counted"
    assert mapped.dtype == ids.dtype


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_of_any_integer_type(run, dtype):
    ids, slots, replicas = drawn(40, 3, 100, 2)
    mapped, load = run(ids.to(dtype), slots, replicas, real=33)
    expected = by_hand(ids.tolist(), slots.tolist(), replicas.tolist(), 100, 33)
    assert (mapped.long().tolist(), load[:100].tolist()) == expected


STRANGE = [-1, -2, 4, 5, -4, 2**31 - 1, -(2**31), 2**32, 2**32 + 1, -(2**32) + 2, 2**63 - 1, -(2**63)]


def test_what_is_no_expert_has_no_slot_and_is_not_counted(run):
    _, slots, replicas = drawn(1, 1, 4, 2)
    mapped, load = run(torch.tensor([[number, 3] for number in STRANGE]), slots, replicas)
    assert mapped[:, 0].tolist() == [-1] * len(STRANGE)
    assert load.tolist() == [0, 0, 0, len(STRANGE), 0, 0, 0]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_ids_are_mapped_and_counted_as_by_hand(run, data):
    tokens, top_k, experts, width = (data.draw(st.integers(1, top)) for top in (6, 3, 5, 3))
    number = st.integers(-2, 6) | st.sampled_from(STRANGE)
    token = st.lists(number, min_size=top_k, max_size=top_k)
    ids = data.draw(st.lists(token, min_size=tokens, max_size=tokens))
    real = data.draw(st.integers(0, tokens + 2))
    _, slots, replicas = drawn(tokens, top_k, experts, width)
    mapped, load = run(torch.tensor(ids), slots, replicas, real=real)
    expected = by_hand(ids, slots.tolist(), replicas.tolist(), experts, real)
    assert (mapped.tolist(), load[:experts].tolist()) == expected


def test_switched_off_it_maps_and_counts_nothing(run):
    ids, slots, replicas = drawn(30, 2, 8, 2)
    mapped, load = run(ids, slots, replicas, enabled=False)
    assert mapped.tolist() == by_hand(ids.tolist(), slots.tolist(), replicas.tolist(), 8, 30)[0]
    assert not load.any()


def test_without_a_number_of_real_tokens_all_are_counted(run):
    ids, slots, replicas = drawn(30, 2, 8, 2)
    assert int(run(ids, slots, replicas)[1].sum()) == 60


def test_ids_need_not_be_contiguous(run):
    ids, slots, replicas = drawn(30, 4, 8, 2)
    apart, dense = run(ids[:, ::2], slots, replicas), run(ids[:, ::2].contiguous(), slots, replicas)
    assert apart[0].tolist() == dense[0].tolist()
    assert apart[1].tolist() == dense[1].tolist()


def test_passes_add_up(machine):
    ids, slots, replicas = (tensor.to(machine.device) for tensor in drawn(30, 2, 8, 2))
    load = torch.zeros(8, dtype=torch.int32, device=machine.device)
    enabled = torch.tensor(True, device=machine.device)
    for _ in range(3):
        map_and_record(ids, load, slots, replicas, enabled)
    assert int(load.sum()) == 3 * 60


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_captured_graph_counts_each_replay():
    ids, slots, replicas = (tensor.to("cuda") for tensor in drawn(30, 2, 8, 2))
    load = torch.zeros(8, dtype=torch.int32, device="cuda")
    enabled, real = torch.tensor(False, device="cuda"), torch.tensor(30, dtype=torch.int32, device="cuda")
    map_and_record(ids, load, slots, replicas, enabled, real)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        map_and_record(ids, load, slots, replicas, enabled, real)
    for on, tokens in ((True, 30), (False, 30), (True, 7)):
        enabled.fill_(on)
        real.fill_(tokens)
        graph.replay()
    assert int(load.sum()) == 2 * (30 + 7)
