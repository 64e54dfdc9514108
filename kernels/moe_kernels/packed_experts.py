"""The weights of chosen experts as one contiguous buffer of bytes, and back: what travels when experts move.

A layer keeps several tensors with a row for each local expert (such as w13 [experts, 2 * intermediate, hidden], w2,
their scales), of different types. `gather_experts` packs the rows of chosen experts, expert by expert, so that what
goes to one peer lies together; `scatter_experts` unpacks them into the rows of other experts, there or here. Bytes are
copied and never read as numbers: any type goes, NaN and all. On a GPU the Triton kernel unpacks; packing is torch's
own everywhere, which was measured to be faster (docs/kernels.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

ALIGNMENT = 16
"""Each tensor's part of a packed expert begins at a multiple of this many bytes: the widest access of a GPU."""

BLOCK = 1024
"""Words that one program of the kernel copies."""

WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
"""Types in which the kernel copies, the widest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Where the rows of one expert lie in its part of the buffer, in bytes; `expert_bytes` is the part's length."""

    offsets: tuple[int, ...]
    row_bytes: tuple[int, ...]
    expert_bytes: int

    @property
    def padded(self) -> bool:
        """Whether some bytes of the part belong to no row."""
        return self.expert_bytes > sum(self.row_bytes)


def plan_packing(weights: Sequence[torch.Tensor]) -> Packing:
    """The packing of experts of these tensors; it follows from their row shapes and types alone, so that both ends of a
    move come to the same.

    Raises:
        ValueError: no tensor, one without a dimension of experts, experts that differ in number or device, or rows that
            are not contiguous or overlap.
    """
    _check_weights(weights)
    row_bytes = tuple(math.prod(weight.shape[1:]) * weight.element_size() for weight in weights)
    offsets, end = [], 0
    for length in row_bytes:
        offsets.append(end)
        end += math.ceil(length / ALIGNMENT) * ALIGNMENT
    return Packing(offsets=tuple(offsets), row_bytes=row_bytes, expert_bytes=end)


def gather_experts(weights: Sequence[torch.Tensor], experts: Sequence[int]) -> torch.Tensor:
    """`gather_experts_reference`, which is the fastest way on CPUs and on an H100 (docs/kernels.md)."""
    return gather_experts_reference(weights, experts)


def scatter_experts(packed: torch.Tensor, weights: Sequence[torch.Tensor], experts: Sequence[int]) -> None:
    """`scatter_experts_reference`, by the fastest way on the tensors' device."""
    scatter = scatter_experts_triton if weights and weights[0].is_cuda else scatter_experts_reference
    scatter(packed, weights, experts)


def gather_experts_reference(weights: Sequence[torch.Tensor], experts: Sequence[int]) -> torch.Tensor:
    """Packs rows of experts.

    Args:
        weights: tensors [local_experts, ...] of any types on one device; each row is contiguous, rows may lie apart.
        experts: rows to pack, in this order; one may come twice.

    Returns:
        uint8 [len(experts), expert_bytes], contiguous, laid out by `plan_packing(weights)`; padding is zero.

    Raises:
        ValueError: weights that cannot be packed, or an expert that is none of the rows.
    """
    packing = plan_packing(weights)
    chosen = _take_chosen(weights, experts)
    packed = _new_buffer(packing, weights, experts)
    for weight, part in zip(weights, _split(packed, packing), strict=True):
        torch.index_select(_rows(weight), 0, chosen, out=part)
    return packed


def scatter_experts_reference(packed: torch.Tensor, weights: Sequence[torch.Tensor], experts: Sequence[int]) -> None:
    """Unpacks what `gather_experts` packed: row i of `packed` becomes expert `experts[i]`, in place.

    Raises:
        ValueError: weights that cannot be packed, an expert that is none of the rows or comes twice, or a buffer that
            does not hold these experts; nothing is written.
    """
    packing = _check_packed(packed, weights, experts)
    for weight, part in zip(weights, _split(packed, packing), strict=True):
        rows = _rows(weight)
        for index, expert in enumerate(experts):
            rows[expert].copy_(part[index])


@triton.jit  # type: ignore[untyped-decorator]
def copy_kernel(
    rows: tl.tensor,
    part: tl.tensor,
    chosen: tl.tensor,
    row_words: tl.tensor,
    row_stride: tl.tensor,
    part_stride: tl.tensor,
    row_blocks: tl.tensor,
    GATHER: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """One program copies BLOCK words of one chosen expert's row into the buffer (GATHER) or out of it.

    Lengths and strides are in words; a row has `row_blocks` programs.
    """
    index = (tl.program_id(0) // row_blocks).to(tl.int64)
    offsets = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < row_words
    row = rows + tl.load(chosen + index) * row_stride + offsets
    place = part + index * part_stride + offsets
    if GATHER:
        tl.store(place, tl.load(row, mask=inside), mask=inside)
    else:
        tl.store(row, tl.load(place, mask=inside), mask=inside)


def gather_experts_triton(
    weights: Sequence[torch.Tensor], experts: Sequence[int], kernel: Any = copy_kernel
) -> torch.Tensor:
    """`gather_experts_reference` as a Triton kernel, one launch a tensor."""
    packing = plan_packing(weights)
    chosen = _take_chosen(weights, experts)
    packed = _new_buffer(packing, weights, experts)
    for weight, part in zip(weights, _split(packed, packing), strict=True):
        _copy(kernel, _rows(weight), part, chosen, gather=True)
    return packed


def scatter_experts_triton(
    packed: torch.Tensor, weights: Sequence[torch.Tensor], experts: Sequence[int], kernel: Any = copy_kernel
) -> None:
    """`scatter_experts_reference` as a Triton kernel, one launch a tensor."""
    packing = _check_packed(packed, weights, experts)
    chosen = _take_chosen(weights, experts)
    for weight, part in zip(weights, _split(packed, packing), strict=True):
        _copy(kernel, _rows(weight), part, chosen, gather=False)


def _copy(kernel: Any, rows: torch.Tensor, part: torch.Tensor, chosen: torch.Tensor, *, gather: bool) -> None:
    """Launches the copy between `rows` [experts, row_bytes] and `part` [chosen, row_bytes] in the widest words."""
    if not part.numel():
        return
    word = widest_word(rows, part)
    rows, part = rows.view(word), part.view(word)
    row_blocks = triton.cdiv(rows.shape[1], BLOCK)
    kernel[(row_blocks * part.shape[0],)](
        rows, part, chosen, rows.shape[1], rows.stride(0), part.stride(0), row_blocks, GATHER=gather, BLOCK=BLOCK
    )


def widest_word(*bytes_of_rows: torch.Tensor) -> torch.dtype:
    """The widest of `WORDS` in which all rows of these uint8 tensors [rows, bytes] begin and end."""
    places = ((rows.shape[1], rows.stride(0), rows.storage_offset(), rows.data_ptr()) for rows in bytes_of_rows)
    shared = math.gcd(*(number for place in places for number in place))
    return next(word for word in WORDS if shared % word.itemsize == 0)


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """The bytes of each expert's row: a uint8 view [experts, row_bytes]."""
    length = math.prod(weight.shape[1:])
    return weight.detach().as_strided((weight.shape[0], length), (weight.stride(0), 1)).view(torch.uint8)


def _split(packed: torch.Tensor, packing: Packing) -> list[torch.Tensor]:
    """Each tensor's part of the buffer: uint8 views [chosen, row_bytes]."""
    return [
        packed[:, offset : offset + length] for offset, length in zip(packing.offsets, packing.row_bytes, strict=True)
    ]


def _new_buffer(packing: Packing, weights: Sequence[torch.Tensor], experts: Sequence[int]) -> torch.Tensor:
    make = torch.zeros if packing.padded else torch.empty
    return make(len(experts), packing.expert_bytes, dtype=torch.uint8, device=weights[0].device)


def _take_chosen(weights: Sequence[torch.Tensor], experts: Sequence[int]) -> torch.Tensor:
    """The chosen rows as an int64 tensor on the weights' device."""
    _check_experts(weights, experts)
    return torch.tensor(experts, dtype=torch.int64, device=weights[0].device)


def _check_weights(weights: Sequence[torch.Tensor]) -> None:
    if not weights:
        raise ValueError("weights: at least one tensor is needed")
    for position, weight in enumerate(weights):
        if weight.ndim < 1:
            raise ValueError(f"weights[{position}]: a dimension of experts is needed, this is a scalar")
        if weight.shape[0] != weights[0].shape[0] or weight.device != weights[0].device:
            raise ValueError(
                f"weights[{position}]: {weight.shape[0]} experts on {weight.device}, "
                f"but weights[0] has {weights[0].shape[0]} on {weights[0].device}"
            )
        apart = weight.shape[0] < 2 or weight.stride(0) >= math.prod(weight.shape[1:])
        if not weight[:1].is_contiguous() or not apart:
            raise ValueError(
                f"weights[{position}]: rows are not contiguous or overlap, "
                f"shape {list(weight.shape)}, strides {list(weight.stride())}"
            )


def _check_experts(weights: Sequence[torch.Tensor], experts: Sequence[int]) -> None:
    count = weights[0].shape[0]
    for position, expert in enumerate(experts):
        if not 0 <= expert < count:
            raise ValueError(f"experts[{position}]: {expert} is not among the {count} rows")


def _check_packed(packed: torch.Tensor, weights: Sequence[torch.Tensor], experts: Sequence[int]) -> Packing:
    """Raises the errors of `scatter_experts_reference`; the packing otherwise."""
    packing = plan_packing(weights)
    _check_experts(weights, experts)
    if len(set(experts)) != len(experts):
        raise ValueError(f"experts: one comes twice in {list(experts)}")
    shape = (len(experts), packing.expert_bytes)
    of_bytes = packed.dtype == torch.uint8 and packed.device == weights[0].device
    if not of_bytes or packed.shape != shape or (packed.numel() and packed.stride(1) != 1):
        raise ValueError(
            f"packed: uint8 {list(shape)} on {weights[0].device} with contiguous rows is needed, "
            f"this is {packed.dtype} {list(packed.shape)} on {packed.device}, strides {list(packed.stride())}"
        )
    return packing
