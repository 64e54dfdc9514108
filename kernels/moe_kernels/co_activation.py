"""Which experts of two neighbouring layers the same tokens take: what says that two experts should share a rank.

`add_co_activation` adds a step, or several, to counters that the caller keeps. All neighbouring layers of a stack
`ids` [layers, ...] are one call, `add_co_activation(pairs, ids[:-1], ids[1:], num_tokens)`, and one launch on a GPU. It
takes the Triton kernel there and the torch reference elsewhere; both count exactly.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from moe_kernels.routing import BLOCK, check_counters, count_real_tokens, take_known


def add_co_activation(pairs: torch.Tensor, topk_ids: torch.Tensor, next_ids: torch.Tensor, num_tokens: int) -> None:
    """`add_co_activation_reference`, by the fastest exact way on the tensors' device."""
    add = add_co_activation_triton if topk_ids.is_cuda else add_co_activation_reference
    add(pairs, topk_ids, next_ids, num_tokens)


def add_co_activation_reference(
    pairs: torch.Tensor, topk_ids: torch.Tensor, next_ids: torch.Tensor, num_tokens: int
) -> None:
    """Adds 1 to `pairs` for each (expert of a layer, expert of the next one) that a real token takes.

    A token of top_k experts in both layers adds top_k * top_k in all.

    Args:
        pairs: int32 or int64 [layers, experts, next_experts], contiguous, added to in place.
        topk_ids: integers [layers, padded_tokens, top_k] with any strides: logical expert ids. An id outside
            0..experts-1 is in no pair.
        next_ids: integers [layers, padded_tokens, next_top_k]: of the same tokens, each layer's next one; an id outside
            0..next_experts-1 is in no pair.
        num_tokens: leading tokens that are real; those after them are padding and are not counted.

    Raises:
        ValueError: a shape, a type or a device that does not fit, or a negative `num_tokens`; nothing is added.
    """
    tokens = _check(pairs, topk_ids, next_ids, num_tokens)
    num_layers, num_experts, num_next = pairs.shape
    if not pairs.numel():
        return
    # Tokens last: the sums over pairs of slots below run along memory.
    expert, counted = take_known(topk_ids[:, :tokens].transpose(1, 2).contiguous(), num_experts)
    following, known = take_known(next_ids[:, :tokens].transpose(1, 2).contiguous(), num_next)
    cell = (expert * num_next)[:, :, None] + following[:, None]
    both = (counted[:, :, None] & known[:, None]).to(pairs.dtype)
    flat = (num_layers, cell[0].numel())
    pairs.view(num_layers, -1).scatter_add_(1, cell.view(flat), both.view(flat))


# What changes from step to step must not make Triton compile anew while requests are served.
@triton.jit(do_not_specialize=["num_pairs"])  # type: ignore[untyped-decorator]
def pair_kernel(
    pairs: tl.tensor,
    ids: tl.tensor,
    next_ids: tl.tensor,
    num_pairs: tl.tensor,
    layer_stride: tl.tensor,
    token_stride: tl.tensor,
    slot_stride: tl.tensor,
    next_layer_stride: tl.tensor,
    next_token_stride: tl.tensor,
    next_slot_stride: tl.tensor,
    num_experts: tl.tensor,
    num_next: tl.tensor,
    TOP_K: tl.constexpr,  # noqa: N803
    NEXT_TOP_K: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Program (block, layer) adds BLOCK of the layer's `num_pairs` pairs of slots to `pairs` by atomic additions."""
    layer = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counted = offsets < num_pairs
    token = offsets // (TOP_K * NEXT_TOP_K)
    slot = offsets // NEXT_TOP_K % TOP_K
    next_slot = offsets % NEXT_TOP_K
    place = layer * layer_stride + token * token_stride + slot * slot_stride
    next_place = layer * next_layer_stride + token * next_token_stride + next_slot * next_slot_stride
    expert = tl.load(ids + place, mask=counted, other=0).to(tl.int64)
    following = tl.load(next_ids + next_place, mask=counted, other=0).to(tl.int64)
    counted = counted & (expert >= 0) & (expert < num_experts) & (following >= 0) & (following < num_next)
    tl.atomic_add(pairs + (layer * num_experts + expert) * num_next + following, 1, mask=counted)


def add_co_activation_triton(
    pairs: torch.Tensor, topk_ids: torch.Tensor, next_ids: torch.Tensor, num_tokens: int, kernel: Any = pair_kernel
) -> None:
    """`add_co_activation_reference` as a Triton kernel."""
    tokens = _check(pairs, topk_ids, next_ids, num_tokens)
    num_layers, num_experts, num_next = pairs.shape
    top_k, next_top_k = topk_ids.shape[2], next_ids.shape[2]
    num_pairs = tokens * top_k * next_top_k
    if not pairs.numel() or not num_pairs:
        return
    kernel[(triton.cdiv(num_pairs, BLOCK), num_layers)](
        pairs,
        topk_ids,
        next_ids,
        num_pairs,
        *topk_ids.stride(),
        *next_ids.stride(),
        num_experts,
        num_next,
        TOP_K=top_k,
        NEXT_TOP_K=next_top_k,
        BLOCK=BLOCK,
    )


def _check(pairs: torch.Tensor, topk_ids: torch.Tensor, next_ids: torch.Tensor, num_tokens: int) -> int:
    """Raises the errors of `add_co_activation_reference`; how many tokens are real."""
    tokens = count_real_tokens(topk_ids, num_tokens)
    count_real_tokens(next_ids, num_tokens, "next_ids")
    if next_ids.shape[:2] != topk_ids.shape[:2] or next_ids.device != topk_ids.device:
        raise ValueError(
            f"next_ids: {list(next_ids.shape)} on {next_ids.device} are not of the layers and tokens of topk_ids, "
            f"{list(topk_ids.shape)} on {topk_ids.device}"
        )
    check_counters("pairs", pairs, (topk_ids.shape[0], None, None), topk_ids.device)
    return tokens
