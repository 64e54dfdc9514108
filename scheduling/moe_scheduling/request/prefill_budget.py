"""Layer 1: how many prompt tokens the next step computes, in step with the other ranks of a lockstep group.

Called by the scheduler of each rank before each step. The ranks of a group end a step together, so what one of them
prefills, the decoding requests of all of them wait for. A prefill beside those of the other ranks costs them nothing
more; one alone costs them its whole length. So a backlog may be held until the other ranks have one too, for as long
as that costs less than it saves. And a step has a number of tokens up to which reading the weights decides how long it
takes, and beyond which computing does: so a backlog may be cut, and its rest go into the next steps.

Invariants: a rank alone, or one of a group that decodes nothing, never holds; a backlog is held for at most
`prefill_hold_s`; what is cut is never cut to nothing; equal views give equal plans, whichever rank makes them.
"""

import math
from collections.abc import Iterator, Sequence
from math import fsum
from typing import NamedTuple

from moe_scheduling.request.order import RequestSettings

# Work of a step in units of the step's base, from which on a group counts as full: a fit of the base that is next to
# nothing must not make a lost second endlessly dear.
_FULL = 32.0


class RankLoad(NamedTuple):
    """What a rank could prefill now, and who waits for it.

    Attributes:
        prefill_tokens: prompt tokens that it could compute in the next step: those that its KV blocks, its seats and
            the step's limit allow.
        held_s: seconds that the requests of these tokens have waited since they could have been computed, summed.
        oldest_s: the longest of these waits.
        decoding: requests that decode.
        prefilling: requests that wait for their first token.
    """

    prefill_tokens: int = 0
    held_s: float = 0.0
    oldest_s: float = 0.0
    decoding: int = 0
    prefilling: int = 0


class RooflineKnee(NamedTuple):
    """Beyond so many tokens of all ranks, each takes so many seconds more."""

    tokens: int
    token_s: float


class StepTimeCurve(NamedTuple):
    """How a step's time bends with its tokens (fitted).

    Attributes:
        token_s: seconds for each prompt token of the fullest rank.
        floor_s: seconds of a step that only decodes, with the requests that decode now.
        bends: where it begins to take longer for each token, by tokens.
    """

    token_s: float
    floor_s: float
    bends: tuple[RooflineKnee, ...]


class StepModel(NamedTuple):
    """How fast a group steps.

    Attributes:
        token_s: seconds for each prompt token (fitted).
        base_s: seconds of a step that carries next to nothing (fitted).
        step_s: mean seconds of the recent steps.
        curve: None while it is not known.
    """

    token_s: float
    base_s: float
    step_s: float
    curve: StepTimeCurve | None = None


def plan_prefill_tokens(ranks: Sequence[RankLoad], pace: StepModel | None, settings: RequestSettings) -> int:
    """The prompt tokens that each rank may compute in the next step; 0: none does, the group decodes only.

    The candidates are the backlogs of the ranks. A level of L tokens loses `token_s * sum((L - backlog) * decoding)`
    request-seconds over the ranks with less than L: time in which their decoding requests wait for prefills of others.
    The highest level is taken whose loss, at its price, is at most `first_token_weight` times what the held requests
    have waited. This is the break-even rule of ski rental: it costs at most twice what the best decision in hindsight
    would have (Karlin, Manasse, Rudolph, Sleator, "Competitive Snoopy Caching", 1988).

    Where the time of a step bends with its tokens (`StepModel.curve`), a part of that level may be cheaper: see `_cut`.

    O(ranks * (ranks + bends)).

    Args:
        ranks: the loads of all ranks of the group, the own one among them; what is not known is left out.
        pace: None while it is not known: then nothing is held.
        settings: `prefill_hold_s`, `cut_prefills` and `first_token_weight` are read.
    """
    most = max((rank.prefill_tokens for rank in ranks), default=0)
    if pace is None:
        return most
    level = _level(ranks, pace, settings) if settings.prefill_hold_s else most
    if not settings.cut_prefills or pace.curve is None or not pace.curve.bends:
        return level
    return _cut(level, ranks, pace.curve, settings.first_token_weight)


def _level(ranks: Sequence[RankLoad], pace: StepModel, settings: RequestSettings) -> int:
    allowed = settings.first_token_weight * fsum(rank.held_s for rank in ranks)
    price = pace.token_s * _price(pace)
    # Over the ranks with less than the level: `sum((level - backlog) * decoding)` is `level * decoding - covered`.
    level = overdue = decoding = covered = 0
    for rank in sorted(ranks):
        tokens = rank.prefill_tokens
        if price * (tokens * decoding - covered) <= allowed:
            level = tokens
        if rank.oldest_s >= settings.prefill_hold_s:
            overdue = tokens
        decoding += rank.decoding
        covered += tokens * rank.decoding
    return max(level, overdue)


def _cut(level: int, ranks: Sequence[RankLoad], curve: StepTimeCurve, first_token_weight: float) -> int:
    """The part of a level at which the backlogs are worked off at the least cost; 0 stays 0, more is never less than 1.

    In steps of T tokens that take f seconds, of them `floor_s` without any prefill, a backlog of W tokens takes W / T
    steps. In each the decoding requests wait `f - floor_s` longer, and those before their first token wait f, at their
    weight: `W / T * (decoding * (f - floor_s) + weight * prefilling * f)`. Large steps share out `floor_s`, small ones
    stay before the bends. What is the best of a backlog does not depend on W.
    """
    decoding = sum(rank.decoding for rank in ranks)
    waiting = first_token_weight * sum(rank.prefilling for rank in ranks)
    backlogs = sorted(rank.prefill_tokens for rank in ranks)
    if not decoding:
        return level
    least, least_cost = level, math.inf
    for candidate in _parts(level, backlogs, [bend.tokens - decoding for bend in curve.bends]):
        tokens = sum(min(candidate, backlog) for backlog in backlogs)
        more_s = curve.token_s * candidate + _bent_s(curve, decoding + tokens) - _bent_s(curve, decoding)
        cost = (decoding * more_s + waiting * (more_s + curve.floor_s)) / tokens
        if cost < least_cost:
            least, least_cost = candidate, cost
    return least


def _parts(level: int, backlogs: Sequence[int], totals: Sequence[int]) -> Iterator[int]:
    """The level, and those below it that end a rank's backlog or at which all ranks together have one of the totals."""
    if level:
        yield level
    before = given = 0
    for place, backlog in enumerate(backlogs):
        yield from (
            part
            for total in totals
            if before < (part := (total - given) // (len(backlogs) - place)) < min(backlog, level)
        )
        if before < backlog < level:
            yield backlog
        given += backlog
        before = backlog


def _bent_s(curve: StepTimeCurve, tokens: int) -> float:
    return fsum(bend.token_s * (tokens - bend.tokens) for bend in curve.bends if tokens > bend.tokens)


def _price(pace: StepModel) -> float:
    """What a lost second costs, in seconds.

    With utilisation u a step takes `step_s = base_s / (1 - u)`, so `u / (1 - u) = (step_s - base_s) / base_s`. A lost
    second costs more the fuller the group is, twice over: the steps after it become longer by 1 / (1 - u), and it is
    as likely as u that other ranks get a backlog in time.
    """
    work_s = max(0.0, pace.step_s - pace.base_s)
    ratio = _FULL if work_s >= _FULL * pace.base_s else work_s / pace.base_s
    return ratio * ratio


class HeldPrefill:
    """How long the prefills of one rank have been held; one owner, the clock is an argument."""

    __slots__ = ("_held_s", "_requests", "_seen_s", "_since_s")

    def __init__(self) -> None:
        self._requests = 0
        self._held_s = 0.0
        self._seen_s = 0.0
        self._since_s = 0.0

    def observe(self, requests: int, now_s: float) -> None:
        """So many requests could prefill now; those seen before have waited since then."""
        if not self._requests:
            self._since_s, self._held_s = now_s, 0.0
        self._held_s += min(self._requests, requests) * max(0.0, now_s - self._seen_s)
        self._requests, self._seen_s = requests, now_s

    def serve(self, share: float, now_s: float) -> None:
        """This share of the backlog has been computed."""
        self._held_s *= max(0.0, 1.0 - share)
        if share > 0.0:
            self._since_s = now_s

    @property
    def held_s(self) -> float:
        """Request-seconds that those which could prefill have waited."""
        return self._held_s

    @property
    def oldest_s(self) -> float:
        """Seconds since the rank began to hold, or last prefilled."""
        return self._seen_s - self._since_s if self._requests else 0.0
