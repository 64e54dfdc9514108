"""Mapping of logical experts to slots, with a count of the tokens of each expert: one kernel launch per MoE layer.

It takes the place of vLLM's own mapping kernel in an engine with an expert group, so that recording the load adds no
launch to a step. vLLM counts by slot; here the counts are by logical expert, so that they stay valid when experts move.
Called by vLLM's router in every forward pass, also inside CUDA graphs: what changes from pass to pass (`enabled`,
`num_tokens`) is read from the device's memory.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 256
"""Ids that one program of the kernel maps."""

KNUTH_MULTIPLIER = 2654435769
"""floor(2**32 / phi), as in vLLM: replicas take turns by a hash of the token's position."""


def map_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """`map_and_record_reference`, by the Triton kernel on a GPU; the names of the arguments are those of vLLM."""
    mapped = map_and_record_triton if topk_ids.is_cuda else map_and_record_reference
    return mapped(
        topk_ids,
        expert_load_view,
        logical_to_physical_map,
        logical_replica_count,
        record_enabled,
        num_unpadded_tokens,
    )


def map_and_record_reference(
    topk_ids: torch.Tensor,
    load: torch.Tensor,
    slots: torch.Tensor,
    replicas: torch.Tensor,
    enabled: torch.Tensor,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Maps the logical experts of one layer to slots, and adds 1 to `load` for each expert of a real token.

    Args:
        topk_ids: integers [padded_tokens, top_k], logical experts. An id outside 0..experts-1 is mapped to -1 and not
            counted.
        load: int32 [at least experts], contiguous, added to in place; element `expert` is the count of that expert.
        slots: int64 [experts, width], the slots of each expert; elements from `replicas[expert]` on are not read.
        replicas: int64 [experts], number of slots of each expert. The replica is chosen by a hash of the token's
            position.
        enabled: bool scalar, whether to count.
        num_tokens: int32 scalar, number of leading tokens that are real; None: all.

    Returns:
        Slots, shape and type of `topk_ids`.
    """
    logical = topk_ids.long()
    experts = replicas.shape[0]
    known = (logical >= 0) & (logical < experts)
    logical = torch.where(known, logical, 0)
    replica = _hash_positions(logical.shape[0]) % replicas[logical].clamp(min=1)
    mapped = torch.where(known, slots[logical, replica], -1)
    if bool(enabled):
        real = logical.shape[0] if num_tokens is None else int(num_tokens)
        load.scatter_add_(0, logical[:real].flatten(), known[:real].flatten().to(load.dtype))
    return mapped.to(topk_ids.dtype)


@lru_cache(maxsize=64)
def _hash_positions(tokens: int) -> torch.Tensor:
    return ((torch.arange(tokens) * KNUTH_MULTIPLIER) & 0xFFFFFFFF).unsqueeze(1)


# What changes from step to step must not make Triton compile again while requests are served.
@triton.jit(do_not_specialize=["num_ids"])  # type: ignore[untyped-decorator]
def map_and_record_kernel(
    ids: tl.tensor,
    load: tl.tensor,
    slots: tl.tensor,
    replicas: tl.tensor,
    mapped: tl.tensor,
    enabled: tl.tensor,
    num_tokens: tl.tensor,
    num_ids: tl.tensor,
    num_experts: tl.tensor,
    width: tl.tensor,
    top_k: tl.tensor,
    HAS_NUM_TOKENS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Maps BLOCK of the `num_ids` ids and counts those of real tokens by atomic additions."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_ids
    expert = tl.load(ids + offsets, mask=inside, other=-1).to(tl.int64)
    known = inside & (expert >= 0) & (expert < num_experts)
    expert = tl.where(known, expert, 0)
    token = offsets // top_k
    hashed = (token * 2654435769) & 0xFFFFFFFF
    count = tl.maximum(tl.load(replicas + expert, mask=known, other=1), 1)
    slot = tl.load(slots + expert * width + hashed % count, mask=known, other=-1)
    tl.store(mapped + offsets, slot, mask=inside)
    counted = known & (tl.load(enabled) != 0)
    if HAS_NUM_TOKENS:
        counted = counted & (token < tl.load(num_tokens))
    tl.atomic_add(load + expert, 1, mask=counted)


def map_and_record_triton(
    topk_ids: torch.Tensor,
    load: torch.Tensor,
    slots: torch.Tensor,
    replicas: torch.Tensor,
    enabled: torch.Tensor,
    num_tokens: torch.Tensor | None = None,
    kernel: Any = map_and_record_kernel,
) -> torch.Tensor:
    """`map_and_record_reference` as a Triton kernel."""
    ids = topk_ids.contiguous()
    mapped = torch.empty_like(ids)
    if not ids.numel():
        return mapped
    kernel[(triton.cdiv(ids.numel(), BLOCK),)](
        ids,
        load,
        slots.contiguous(),
        replicas.contiguous(),
        mapped,
        enabled,
        enabled if num_tokens is None else num_tokens,
        ids.numel(),
        replicas.shape[0],
        slots.shape[1],
        ids.shape[-1],
        HAS_NUM_TOKENS=num_tokens is not None,
        BLOCK=BLOCK,
    )
    return mapped
