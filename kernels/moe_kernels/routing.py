"""Top-k ids as they come from the router, read as indexes; the counting modules of this package share it.

An id is a fact from outside: padding, a mark for "no expert" or a broken router may leave any number in it. Such a
number never becomes an index here; a mask tells it apart.
"""

import torch

BLOCK = 1024
"""Ids, or pairs of them, that one program of a counting kernel takes."""

COUNTERS = (torch.int32, torch.int64)
"""Types in which counts are kept."""

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint32, torch.int64)
"""Types in which ids come: int32 and int64 from most routers, uint32 from some."""


def take_known(ids: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits ids of any shape into indexes and whether each is one; `count` is at least 1.

    Returns:
        int64 indexes in 0..count-1, and a bool mask that is False where the id itself was outside (its index then
        means nothing); both of the shape of `ids`.
    """
    wide = ids.long()
    index = wide.clamp(0, count - 1)
    return index, wide == index


def count_real_tokens(topk_ids: torch.Tensor, num_tokens: int, name: str = "topk_ids") -> int:
    """How many of the tokens of `topk_ids` [layers, padded_tokens, top_k] are real when the first `num_tokens` are.

    Raises:
        ValueError: another shape, another type than `INTEGERS`, or a negative `num_tokens`.
    """
    if topk_ids.ndim != 3 or topk_ids.dtype not in INTEGERS:
        raise ValueError(
            f"{name}: integers [layers, padded_tokens, top_k] are needed, "
            f"these are {topk_ids.dtype} {list(topk_ids.shape)}"
        )
    if num_tokens < 0:
        raise ValueError(f"num_tokens: {num_tokens} is below 0")
    return min(num_tokens, topk_ids.shape[1])


def check_sources(sources: torch.Tensor, topk_ids: torch.Tensor) -> None:
    """Each token of `topk_ids` [layers, padded_tokens, top_k], real or not, has a source.

    Raises:
        ValueError: it has not, or the sources are no integers or elsewhere.
    """
    if sources.shape != topk_ids.shape[1:2] or sources.dtype not in INTEGERS or sources.device != topk_ids.device:
        raise ValueError(
            f"sources: integers [{topk_ids.shape[1]}] on {topk_ids.device} are needed, "
            f"these are {sources.dtype} {list(sources.shape)} on {sources.device}"
        )


def check_counters(name: str, counters: torch.Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    """Counters are added to in place: they have the shape (None: any length), lie dense, and are where the ids are.

    Raises:
        ValueError: they are not so.
    """
    if counters.ndim != len(shape) or any(
        wanted not in (None, got) for wanted, got in zip(shape, counters.shape, strict=True)
    ):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name}: shape [{wanted}] is needed, this is {list(counters.shape)}")
    if counters.dtype not in COUNTERS or not counters.is_contiguous() or counters.device != device:
        raise ValueError(
            f"{name}: contiguous int32 or int64 on {device} is needed, "
            f"this is {counters.dtype} on {counters.device} with strides {list(counters.stride())}"
        )
