"""Layer 1: how many prompt tokens each rank of a lockstep group computes in the next step.

Called by the scheduler of each rank before each step, on a rank without a group too. All ranks of an expert-parallel
group end a step together. Up to some number of tokens a step takes as long as reading the weights; beyond that number,
the roofline knee, computing decides and each further token costs more. So a backlog of prompt tokens may be cut at the
knee, and its rest goes into the next steps. A bound of the time between tokens cuts it further: no step with answers
is planned to last longer.

Invariants: a backlog is never cut to nothing, and by a bound to no less than `LEAST_CHUNK_TOKENS`; equal arguments in
any order give equal plans, so all ranks that see the same loads make the same plan.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from math import fsum
from typing import NamedTuple

# Seconds of TPOT that one second of TTFT is worth, summed over the requests, when a backlog is cut. How it was chosen:
# docs/adr/0011-prefills-of-a-lockstep-group.md.
TTFT_WEIGHT = 40.0
# Prompt tokens that a step computes though it exceeds the bound, so that prompts go on where answers alone take longer.
LEAST_CHUNK_TOKENS = 128
# Relative difference up to which two costs count as equal.
_ROUNDING = 1e-9


class RankLoad(NamedTuple):
    """What a rank could prefill in the next step, and how many requests wait for that step.

    Attributes:
        prefill_tokens: prompt tokens that its KV blocks, `max_num_seqs` and the token budget of a step allow.
        decoding: requests that decode.
        prefilling: requests that wait for their first token.
    """

    prefill_tokens: int = 0
    decoding: int = 0
    prefilling: int = 0


class RooflineKnee(NamedTuple):
    """A number of tokens from which a step takes longer for each further one.

    Attributes:
        tokens: tokens of all ranks together at the knee.
        token_s: seconds that each token beyond it adds.
    """

    tokens: int
    token_s: float


class StepTimeCurve(NamedTuple):
    """Piecewise-linear step time of a group, as fitted by its ranks.

    Attributes:
        token_s: seconds for each prompt token of the fullest rank.
        decode_only_s: seconds of a step without prompt tokens, with the requests that decode now.
        knees: where the slope grows, in ascending order of tokens.
    """

    token_s: float
    decode_only_s: float
    knees: tuple[RooflineKnee, ...]


def plan_prefill_tokens(ranks: Sequence[RankLoad], curve: StepTimeCurve | None, bound_s: float | None = None) -> int:
    """Returns the most prompt tokens that each rank may compute in the next step; 0 only where no rank has any.

    Without a knee it is the largest backlog, so nothing is cut. With knees, the part of that backlog that minimises the
    cost of working the backlogs off. In steps of T tokens that take f seconds, d = `decode_only_s` of them without any
    prefill, a backlog of W tokens takes W / T steps. In each, decoding requests wait f - d longer, and requests before
    their first token wait f, at `TTFT_WEIGHT`: `W / T * (decoding * (f - d) + TTFT_WEIGHT * prefilling * f)`. Large
    steps share out d, small ones stay below the knees. The best T does not depend on W.

    O(ranks * (ranks + knees)).

    Args:
        ranks: the loads of all ranks of the group, the caller's own among them; unknown ranks are left out.
        curve: the fitted step time; None until it is known, or where nothing is to be cut.
        bound_s: longest step while requests decode (seconds); None: no bound.
    """
    backlogs = sorted(rank.prefill_tokens for rank in ranks)
    most = backlogs[-1] if backlogs else 0
    decoding = sum(rank.decoding for rank in ranks)
    if curve is None or not decoding:
        return most
    if bound_s is not None:
        most = _most_within(bound_s, backlogs, decoding, curve)
        backlogs = [min(backlog, most) for backlog in backlogs]
    if not curve.knees:
        return most
    waiting = TTFT_WEIGHT * sum(rank.prefilling for rank in ranks)
    best, best_cost = most, math.inf
    for candidate in _candidates(backlogs, [knee.tokens - decoding for knee in curve.knees]):
        tokens = sum(min(candidate, backlog) for backlog in backlogs)
        added_s = curve.token_s * candidate + _beyond_knees_s(curve, decoding + tokens)
        added_s -= _beyond_knees_s(curve, decoding)
        cost = (decoding * added_s + waiting * (added_s + curve.decode_only_s)) / tokens
        # Costs that differ by rounding alone are equal: then the largest backlog, which comes first, stays.
        if cost < best_cost * (1.0 - _ROUNDING):
            best, best_cost = candidate, cost
    return best


def _most_within(bound_s: float, backlogs: Sequence[int], decoding: int, curve: StepTimeCurve) -> int:
    """Returns the most prompt tokens of a rank with which a step lasts no longer than the bound.

    At least `LEAST_CHUNK_TOKENS`, or the largest backlog where that is less. The time of a step rises with the tokens,
    so that number is found by bisection.
    """
    most = backlogs[-1]
    before_s = curve.decode_only_s - _beyond_knees_s(curve, decoding)

    def exceeds(level: int) -> bool:
        tokens = sum(min(level, backlog) for backlog in backlogs)
        return before_s + curve.token_s * level + _beyond_knees_s(curve, decoding + tokens) > bound_s

    return max(min(most, LEAST_CHUNK_TOKENS), bisect_left(range(1, most + 1), True, key=exceeds))


def _candidates(backlogs: Sequence[int], totals: Sequence[int]) -> Iterator[int]:
    """Yields the levels at which the cost can have its minimum, the largest backlog first.

    These are the backlogs, and the levels at which all ranks together compute one of `totals` tokens.

    Args:
        backlogs: prompt tokens of each rank, ascending.
        totals: prompt tokens of all ranks at each knee; those that are not positive have no level.
    """
    most = backlogs[-1]
    if most:
        yield most
    before = covered = 0
    for place, backlog in enumerate(backlogs):
        for total in totals:
            level = (total - covered) // (len(backlogs) - place)
            if before < level < backlog:
                yield level
        if before < backlog < most:
            yield backlog
        covered += backlog
        before = backlog


def _beyond_knees_s(curve: StepTimeCurve, tokens: int) -> float:
    return fsum(knee.token_s * (tokens - knee.tokens) for knee in curve.knees if tokens > knee.tokens)
