"""The load of engines that have one role: what the sizes of prefill engines and of decode engines are planned by.

The step-time model of each engine turns its queue into seconds (`StepTime`). The ranks of an engine end their steps
together, so the one with the most work counts.
"""

import math
from collections.abc import Iterable, Sequence

from moe_scheduling.signals import EngineSignal


def prefill_backlog_s(ranks: Iterable[EngineSignal]) -> float | None:
    """Returns the seconds of the prompt tokens that wait or are being computed; None without a step-time model.

    What any prompt tokens add to a step is left out: how many steps they are computed in is not known here.

    Args:
        ranks: the newest signal of each rank of one engine.
    """
    return _worst([_backlog_s(rank) for rank in ranks])


def decode_load(ranks: Iterable[EngineSignal], inter_token_s: float) -> float | None:
    """Returns the decoding requests over the number with which a step takes `inter_token_s`.

    None where that is not known, without a step-time model. 0 where nothing decodes, and where a step takes longer
    whatever decodes in it: more engines do not change that, so it asks for none.

    Args:
        ranks: the newest signal of each rank of one engine.
        inter_token_s: longest step (seconds).
    """
    return _worst([_load(rank, inter_token_s) for rank in ranks])


def _backlog_s(rank: EngineSignal) -> float | None:
    tokens = rank.waiting_prefill_tokens + rank.running_prefill_tokens
    if not tokens:
        return 0.0
    return None if rank.step_time is None else tokens * rank.step_time.prefill_s


def _load(rank: EngineSignal, inter_token_s: float) -> float | None:
    if not rank.decode_tokens:
        return 0.0
    model = rank.step_time
    if model is None:
        return None
    left_s, each_s, root_s = inter_token_s - model.base_s, model.decode_s, model.decode_root_s
    if left_s <= 0.0:
        return 0.0
    # One over the root of the number of requests n with each_s * n + root_s * sqrt(n) = left_s.
    under_s = root_s * root_s + 4.0 * each_s * left_s
    if not under_s >= 0.0:
        return None
    per_root = (root_s + math.sqrt(under_s)) / (2.0 * left_s)
    return rank.decode_tokens * per_root * per_root


def _worst(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and 0.0 <= value < math.inf]
    return max(known) if known and len(known) == len(values) else None
