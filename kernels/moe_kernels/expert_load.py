"""How many tokens each logical expert got in a step, from the router's top-k ids: the raw signal of the expert layer.

`expert_load` takes the Triton kernel on a GPU and the torch reference elsewhere; both count exactly. The tests hold the
kernel against the reference by Triton's interpreter, so they need no GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024


def expert_load_reference(topk_ids: torch.Tensor, num_experts: int, num_tokens: int) -> torch.Tensor:
    """Counts the routed tokens of each logical expert.

    Args:
        topk_ids: integer tensor [padded_tokens, top_k] of logical expert ids; an id outside 0..num_experts-1 is not
            counted.
        num_experts: logical experts of the layer.
        num_tokens: leading rows that are real; the rows after them are padding and are not counted.

    Returns:
        int32 tensor [num_experts].
    """
    ids = topk_ids[:num_tokens].reshape(-1).long()
    ids = ids[(ids >= 0) & (ids < num_experts)]
    return torch.bincount(ids, minlength=num_experts).to(torch.int32)


@triton.jit  # type: ignore[untyped-decorator]
def count_kernel(ids: Any, load: Any, num_ids: Any, num_experts: Any, BLOCK: tl.constexpr) -> None:  # noqa: N803
    """One program counts BLOCK ids of the flattened, real part of `topk_ids` into `load` by atomic additions."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + offsets, mask=offsets < num_ids, other=-1)
    counted = (expert >= 0) & (expert < num_experts)
    tl.atomic_add(load + expert, 1, mask=counted)


def expert_load_triton(
    topk_ids: torch.Tensor, num_experts: int, num_tokens: int, kernel: Any = count_kernel
) -> torch.Tensor:
    """`expert_load_reference` as a Triton kernel; `topk_ids` must be contiguous (ValueError otherwise)."""
    if not topk_ids.is_contiguous():
        raise ValueError("topk_ids must be contiguous")
    load = torch.zeros(num_experts, dtype=torch.int32, device=topk_ids.device)
    num_ids = min(num_tokens, topk_ids.shape[0]) * topk_ids.shape[1]
    if num_ids:
        kernel[(triton.cdiv(num_ids, BLOCK),)](topk_ids, load, num_ids, num_experts, BLOCK=BLOCK)
    return load


def expert_load(topk_ids: torch.Tensor, num_experts: int, num_tokens: int) -> torch.Tensor:
    """Routed tokens of each logical expert, int32 [num_experts], by the fastest exact way on the tensor's device."""
    count = expert_load_triton if topk_ids.is_cuda else expert_load_reference
    return count(topk_ids, num_experts, num_tokens)
