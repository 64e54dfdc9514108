"""Experts packed and unpacked are the same bytes, whatever their types, shapes and places in memory."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.packed_experts import (
    ALIGNMENT,
    copy_kernel,
    gather_experts,
    gather_experts_reference,
    gather_experts_triton,
    plan_packing,
    scatter_experts,
    scatter_experts_reference,
    scatter_experts_triton,
    widest_word,
)

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8,
    torch.float64, torch.int32, torch.bool,
]  # fmt: skip

LAYERS = {
    "bf16": [((8, 6, 16), torch.bfloat16), ((8, 16, 3), torch.bfloat16)],
    "fp8 with scales": [
        ((4, 96, 32), torch.float8_e4m3fn),
        ((4, 32, 48), torch.float8_e4m3fn),
        ((4, 3, 1), torch.float32),
        ((4,), torch.float32),
    ],
    "int8, odd rows": [((5, 7), torch.int8), ((5, 3, 3), torch.int8), ((5, 5), torch.float16)],
    "longer than a block": [((3, 2500), torch.float32), ((3, 1025), torch.int8)],
    "rows of nothing": [((4, 0), torch.float32), ((4, 2, 2), torch.float32)],
    "one expert": [((1, 9), torch.bfloat16)],
}


def filled(shape, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """Random bytes: among them NaN, infinities and numbers that are not normal."""
    empty = torch.empty(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (empty.numel() * empty.element_size(),), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape).to(device)


def layer(name: str, device: str) -> list[torch.Tensor]:
    return [filled(shape, dtype, device, seed) for seed, (shape, dtype) in enumerate(LAYERS[name])]


def bytes_of(tensor: torch.Tensor) -> list[bytes]:
    """Each expert's row, by the long way."""
    return [row.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for row in tensor]


@pytest.fixture(scope="session", params=["reference", "kernel"])
def gather(request, machine):
    if request.param == "reference":
        return gather_experts_reference
    return partial(gather_experts_triton, kernel=machine.launchable(copy_kernel))


@pytest.fixture(scope="session", params=["reference", "kernel"])
def scatter(request, machine):
    if request.param == "reference":
        return scatter_experts_reference
    return partial(scatter_experts_triton, kernel=machine.launchable(copy_kernel))


def test_the_packing_is_aligned_and_follows_from_shapes_alone():
    packing = plan_packing([torch.zeros(4, 7, dtype=torch.int8), torch.zeros(4, 2, 4), torch.zeros(4)])
    assert packing.row_bytes == (7, 32, 4)
    assert packing.offsets == (0, 16, 48)
    assert packing.expert_bytes == 64
    assert plan_packing([torch.zeros(9, 7, dtype=torch.uint8), torch.ones(9, 8), torch.ones(9, 1)]) == packing


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_of_the_buffer_is_the_experts_bytes(gather, machine, name):
    weights = layer(name, machine.device)
    experts = [*reversed(range(weights[0].shape[0])), 0]
    packed = gather(weights, experts)
    packing = plan_packing(weights)
    assert packed.shape == (len(experts), packing.expert_bytes)
    assert packed.is_contiguous()
    rows = [bytes_of(weight) for weight in weights]
    for part, expert in zip(packed, experts, strict=True):
        expected = b"".join(row[expert] + bytes(-len(row[expert]) % ALIGNMENT) for row in rows)
        assert part.cpu().numpy().tobytes() == expected


@pytest.mark.parametrize("name", LAYERS)
def test_a_move_changes_the_chosen_rows_alone(gather, scatter, machine, name):
    weights = layer(name, machine.device)
    count = weights[0].shape[0]
    origin, target = list(range(count))[:2], list(range(count))[-2:]
    moved = [weight.clone() for weight in weights]
    scatter(gather(weights, origin), moved, target)
    came_from = dict(zip(target, origin, strict=True))
    for before, after in zip(weights, moved, strict=True):
        rows = bytes_of(before)
        assert bytes_of(after) == [rows[came_from.get(expert, expert)] for expert in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 3, 8, 17, 1030])
def test_any_type_goes(gather, scatter, machine, dtype, length):
    weight = filled((6, length), dtype, machine.device)
    there = filled((4, length), dtype, machine.device, seed=1)
    kept = bytes_of(there)
    scatter(gather([weight], [5, 0, 3]), [there], [1, 3, 0])
    rows = bytes_of(weight)
    assert bytes_of(there) == [rows[3], rows[5], kept[2], rows[0]]


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_there_and_back_is_the_same(gather, scatter, machine, data):
    count = data.draw(st.integers(1, 6))
    shapes = st.lists(st.integers(0, 5), max_size=3)
    kinds = data.draw(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=4))
    weights = [filled((count, *shape), dtype, machine.device, seed) for seed, (shape, dtype) in enumerate(kinds)]
    experts = data.draw(st.lists(st.integers(0, count - 1), unique=True))
    into = [filled(weight.shape, weight.dtype, machine.device, 99) for weight in weights]
    kept = [bytes_of(weight) for weight in into]
    scatter(gather(weights, experts), into, experts)
    for weight, after, before in zip(weights, into, kept, strict=True):
        rows = bytes_of(weight)
        assert bytes_of(after) == [rows[e] if e in experts else before[e] for e in range(count)]


def test_rows_may_lie_apart_and_at_odd_addresses(gather, scatter, machine):
    raw = filled((4 * 40 + 3,), torch.int8, machine.device)
    weights = [raw[3 : 3 + 4 * 40].view(4, 40)[:, 1:30], filled((4, 9, 2), torch.float32, machine.device)[:, 2:7]]
    buffer = torch.zeros(3, plan_packing(weights).expert_bytes + 5, dtype=torch.uint8, device=machine.device)
    part = buffer[:, 5:]
    part.copy_(gather(weights, [3, 1, 0]))
    rows, around = [bytes_of(weight) for weight in weights], raw.clone()
    scatter(part, weights, [0, 1, 3])
    for weight, before in zip(weights, rows, strict=True):
        assert bytes_of(weight) == [before[3], before[1], before[2], before[0]]
    weights[0].copy_(around[3 : 3 + 4 * 40].view(4, 40)[:, 1:30])
    assert torch.equal(raw, around), "bytes between the rows were written"


def test_parameters_that_learn_are_written_too(gather, scatter, machine):
    weight = torch.nn.Parameter(filled((3, 4), torch.float32, machine.device))
    rows = bytes_of(weight.detach())
    scatter(gather([weight], [0]), [weight], [2])
    assert bytes_of(weight.detach()) == [rows[0], rows[1], rows[0]]


def test_no_expert_is_an_empty_buffer(gather, scatter, machine):
    weights = layer("bf16", machine.device)
    kept = [weight.clone() for weight in weights]
    packed = gather(weights, [])
    scatter(packed, weights, [])
    assert packed.shape == (0, plan_packing(weights).expert_bytes)
    assert all(bytes_of(before) == bytes_of(after) for before, after in zip(kept, weights, strict=True))


def test_the_kernel_copies_in_the_widest_words_that_fit():
    raw = torch.zeros(1024, dtype=torch.uint8)
    assert widest_word(raw[:96].view(2, 48), raw[96:160].view(2, 32)) == torch.int64
    assert widest_word(raw[:24].view(2, 12)) == torch.int32
    assert widest_word(raw[2:34].view(2, 16)) == torch.int16
    assert widest_word(raw[:32].view(2, 16), raw[1:33].view(2, 16)) == torch.uint8


WEIGHTS = [torch.zeros(4, 6), torch.zeros(4, 5, dtype=torch.int8)]
PACKED = torch.ones(2, 48, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("weights", "experts", "message"),
    [
        ([], [0], "weights: at least one tensor"),
        ([torch.tensor(0.0)], [0], r"weights\[0\]: a dimension of experts"),
        ([WEIGHTS[0], torch.zeros(3, 5)], [0], r"weights\[1\]: 3 experts on cpu, but weights\[0\] has 4 on cpu"),
        ([WEIGHTS[0], torch.zeros(4, 5, device="meta")], [0], r"weights\[1\]: 4 experts on meta"),
        ([torch.zeros(4, 6, 3).transpose(1, 2)], [0], r"weights\[0\]: rows are not contiguous"),
        ([torch.zeros(1, 6).expand(4, 6)], [0], r"weights\[0\]: rows .* overlap"),
        (WEIGHTS, [0, 4], r"experts\[1\]: 4 is not among the 4 rows"),
        (WEIGHTS, [-1, 0], r"experts\[0\]: -1 is not among the 4 rows"),
        ([torch.zeros(0, 6)], [0], r"experts\[0\]: 0 is not among the 0 rows"),
    ],
)
def test_what_cannot_be_packed_is_refused(weights, experts, message):
    for pack in (gather_experts_reference, gather_experts_triton, gather_experts):
        with pytest.raises(ValueError, match=message):
            pack(weights, experts)
    for unpack in (scatter_experts_reference, scatter_experts_triton, scatter_experts):
        with pytest.raises(ValueError, match=message):
            unpack(PACKED, weights, experts)
    assert not any(weight.any() for weight in weights if not weight.is_meta)


@pytest.mark.parametrize(
    ("packed", "experts", "message"),
    [
        (PACKED, [1, 1], r"experts: one comes twice in \[1, 1\]"),
        (PACKED, [0], r"packed: uint8 \[1, 48\] on cpu .* this is torch.uint8 \[2, 48\]"),
        (PACKED[:, :47], [0, 1], r"packed: .*\[2, 47\]"),
        (PACKED.view(-1), [0, 1], "packed: "),
        (PACKED.char(), [0, 1], "packed: .*torch.int8"),
        (PACKED.to("meta"), [0, 1], "packed: .*on meta"),
        (torch.ones(48, 2, dtype=torch.uint8).T, [0, 1], "packed: .*strides"),
    ],
)
@pytest.mark.parametrize("unpack", [scatter_experts_reference, scatter_experts_triton, scatter_experts])
def test_a_buffer_of_something_else_is_refused(unpack, packed, experts, message):
    with pytest.raises(ValueError, match=message):
        unpack(packed, WEIGHTS, experts)
    assert not any(weight.any() for weight in WEIGHTS)


def test_the_devices_own_way_serves(machine):
    weights = [filled((8, 64, 96), torch.bfloat16, machine.device), filled((8, 33), torch.int8, machine.device)]
    into = [torch.zeros_like(weight) for weight in weights]
    packed = gather_experts(weights, [7, 2])
    assert torch.equal(packed, gather_experts_reference(weights, [7, 2]))
    scatter_experts(packed, into, [0, 4])
    assert [bytes_of(weight)[0] for weight in into] == [bytes_of(weight)[7] for weight in weights]
    assert [bytes_of(weight)[4] for weight in into] == [bytes_of(weight)[2] for weight in weights]
