"""How many tokens each logical expert got, by source and layer, from the router's top-k ids: the raw signal of the
expert layer.

`add_expert_load` adds a step, or several whose tokens stand one after the other, to counters that the caller keeps: all
layers in one call, one launch on a GPU. It takes the Triton kernel there and the torch reference elsewhere; both count
exactly. The tests hold the kernel against the reference by Triton's interpreter, so they need no GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from moe_kernels.routing import BLOCK, check_counters, check_sources, count_real_tokens, take_known


def expert_load(topk_ids: torch.Tensor, num_experts: int, num_tokens: int) -> torch.Tensor:
    """The load of one layer in one step.

    Args:
        topk_ids: integers [padded_tokens, top_k], as one layer of `add_expert_load` takes them.
        num_experts: logical experts of the layer.
        num_tokens: leading tokens that are real.

    Returns:
        int32 tensor [num_experts].
    """
    load = torch.zeros(1, 1, num_experts, dtype=torch.int32, device=topk_ids.device)
    add_expert_load(load, topk_ids[None], num_tokens)
    return load[0, 0]


def add_expert_load(
    load: torch.Tensor, topk_ids: torch.Tensor, num_tokens: int, sources: torch.Tensor | None = None
) -> None:
    """`add_expert_load_reference`, by the fastest exact way on the tensors' device."""
    add = add_expert_load_triton if topk_ids.is_cuda else add_expert_load_reference
    add(load, topk_ids, num_tokens, sources)


def add_expert_load_reference(
    load: torch.Tensor, topk_ids: torch.Tensor, num_tokens: int, sources: torch.Tensor | None = None
) -> None:
    """Adds 1 to `load` for each id of a real token, at the token's source, the layer and the expert.

    Args:
        load: int32 or int64 [sources, layers, experts], contiguous, added to in place.
        topk_ids: integers [layers, padded_tokens, top_k] with any strides: logical expert ids. An id outside
            0..experts-1 is not counted.
        num_tokens: leading tokens that are real; those after them are padding and are not counted.
        sources: integers [padded_tokens]: where each token comes from. A token whose source is outside 0..sources-1 is
            not counted. None: all come from the only source that `load` has.

    Raises:
        ValueError: a shape, a type or a device that does not fit, or a negative `num_tokens`; nothing is added.
    """
    tokens = _check(load, topk_ids, num_tokens, sources)
    num_sources, num_layers, num_experts = load.shape
    if not load.numel():
        return
    expert, counted = take_known(topk_ids[:, :tokens], num_experts)
    if sources is None:
        counts = load.view(num_layers, num_experts)
        counts.scatter_add_(1, expert.reshape(num_layers, -1), counted.reshape(num_layers, -1).to(load.dtype))
        return
    source, known = take_known(sources[:tokens], num_sources)
    by_source = num_layers * num_experts
    row = source * by_source + torch.arange(0, by_source, num_experts, device=load.device)[:, None]
    cell = expert + row[:, :, None]
    counted = counted & known[:, None]
    load.view(-1).scatter_add_(0, cell.reshape(-1), counted.reshape(-1).to(load.dtype))


# What changes from step to step must not make Triton compile anew while requests are served.
@triton.jit(do_not_specialize=["num_ids"])  # type: ignore[untyped-decorator]
def count_kernel(
    load: tl.tensor,
    ids: tl.tensor,
    sources: tl.tensor,
    num_ids: tl.tensor,
    layer_stride: tl.tensor,
    token_stride: tl.tensor,
    slot_stride: tl.tensor,
    source_stride: tl.tensor,
    num_sources: tl.tensor,
    num_layers: tl.tensor,
    num_experts: tl.tensor,
    TOP_K: tl.constexpr,  # noqa: N803
    BY_SOURCE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Program (block, layer) adds BLOCK of the layer's `num_ids` real ids to `load` by atomic additions."""
    layer = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counted = offsets < num_ids
    token = offsets // TOP_K
    place = layer * layer_stride + token * token_stride + offsets % TOP_K * slot_stride
    expert = tl.load(ids + place, mask=counted, other=0).to(tl.int64)
    counted = counted & (expert >= 0) & (expert < num_experts)
    row = layer
    if BY_SOURCE:
        source = tl.load(sources + token * source_stride, mask=counted, other=0).to(tl.int64)
        counted = counted & (source >= 0) & (source < num_sources)
        row = source * num_layers + layer
    tl.atomic_add(load + row * num_experts + expert, 1, mask=counted)


def add_expert_load_triton(
    load: torch.Tensor,
    topk_ids: torch.Tensor,
    num_tokens: int,
    sources: torch.Tensor | None = None,
    kernel: Any = count_kernel,
) -> None:
    """`add_expert_load_reference` as a Triton kernel."""
    tokens = _check(load, topk_ids, num_tokens, sources)
    num_sources, num_layers, num_experts = load.shape
    top_k = topk_ids.shape[2]
    num_ids = tokens * top_k
    if not load.numel() or not num_ids:
        return
    kernel[(triton.cdiv(num_ids, BLOCK), num_layers)](
        load,
        topk_ids,
        topk_ids if sources is None else sources,
        num_ids,
        *topk_ids.stride(),
        0 if sources is None else sources.stride(0),
        num_sources,
        num_layers,
        num_experts,
        TOP_K=top_k,
        BY_SOURCE=sources is not None,
        BLOCK=BLOCK,
    )


def _check(load: torch.Tensor, topk_ids: torch.Tensor, num_tokens: int, sources: torch.Tensor | None) -> int:
    """Raises the errors of `add_expert_load_reference`; how many tokens are real."""
    tokens = count_real_tokens(topk_ids, num_tokens)
    num_sources = 1 if sources is None else None
    check_counters("load", load, (num_sources, topk_ids.shape[0], None), topk_ids.device)
    if sources is not None:
        check_sources(sources, topk_ids)
    return tokens
