"""What an engine has scheduled, followed by a gateway between two signals of its ranks.

A signal is as old as the line that brought it: on a GPU one or two steps. Requests sent since count in the next step
that is scheduled, and that happens when a step ends, which the gateway sees: answers begin then. So from a signal on,
each request sent adds its tokens to those that wait, and each end of a step takes as many of them as a step holds.

One `EngineSteps` for an engine, shared by the `TargetState`s of its ranks, which step together: a request waits for the
scheduled steps of all of them, whichever rank it goes to. Pure; all times are arguments on one monotonic clock.

Invariants: no count is below 0; the tokens that wait on a rank are at most those of its signal and those sent since;
counts of an engine do not outlive its next signals, of whichever agent; calls are O(ranks), a signal O(the requests
sent since it).
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import astuple, fields

from moe_scheduling.signals import EngineSignal, StepTime

# Ends of steps that are remembered, for signals that come after them.
_REMEMBERED = 32
# Steps after which the model of an engine counts as much as the mean of all: its fit forgets after 500.
_OWN_STEPS = 1000
# The answers of one step come one after the other; after this part of the least time of a step it is the next one's.
_SAME_STEP = 0.25
# In place of the tokens of a request: the end of a step, before requests of the same time.
_END = -1
_TERMS = tuple(field.name for field in fields(StepTime))


class FleetStepTimes:
    """The step-time models of all engines of a gateway, and what it predicts an engine with.

    A new engine's model rests on few steps, and identical engines' models differ then by half. So the mean of all
    counts until an engine has made steps of its own; in the long run its own model decides.
    """

    __slots__ = ("_models", "_sums")

    def __init__(self) -> None:
        self._models: dict[EngineSteps, StepTime] = {}
        self._sums = [0.0] * len(_TERMS)

    def blend(self, engine: "EngineSteps", model: StepTime, steps: int) -> StepTime:
        """Returns the model for an engine that has published `model` after this number of steps."""
        if self._models.get(engine) != model:
            self.forget(engine)
            self._models[engine] = model
            self._add(model, 1.0)
        own, count = steps / (steps + _OWN_STEPS), len(self._models)
        if count == 1:
            return model
        # Sums round; a time is not negative.
        parts = zip(_TERMS, astuple(model), self._sums, strict=True)
        return StepTime(**{term: max(0.0, own * part + (1.0 - own) * whole / count) for term, part, whole in parts})

    def forget(self, engine: "EngineSteps") -> None:
        """Drops the model of an engine that is gone."""
        if (model := self._models.pop(engine, None)) is not None:
            self._add(model, -1.0)

    def _add(self, model: StepTime, sign: float) -> None:
        self._sums = [whole + sign * part for whole, part in zip(self._sums, astuple(model), strict=True)]


class RankSteps:
    """One rank: prompt tokens that no step has yet, and when the scheduled ones end by its own signal."""

    __slots__ = ("decoding", "ends_s", "unscheduled_tokens")

    def __init__(self) -> None:
        self.unscheduled_tokens = self.decoding = 0
        self.ends_s = -math.inf


class EngineSteps:
    """The scheduled steps of one engine.

    Args:
        fleet: the models of the other engines; None: it is judged by its own alone.

    Attributes:
        step_time: what its steps are predicted with, from the newest signal that has a model; None: none of them had
            one, or the newest has too few fields, and no prediction uses these steps.
        prompt_step_s: seconds of a step with prompt tokens, apart from them, with the present decoding requests.
        step_tokens: tokens that a step of a rank holds at most.
        ends_s: when the scheduled steps end.
        decoding: decoding requests of the rank that has most.
    """

    __slots__ = ("_ended_s", "_fleet", "_ranks", "decoding", "ends_s", "prompt_step_s", "step_time", "step_tokens")

    def __init__(self, fleet: FleetStepTimes | None = None) -> None:
        self._fleet = FleetStepTimes() if fleet is None else fleet
        self.step_time: StepTime | None = None
        self.prompt_step_s = 0.0
        self.step_tokens = 1
        self.ends_s = -math.inf
        self.decoding = 0
        self._ranks: list[RankSteps] = []
        self._ended_s: deque[float] = deque(maxlen=_REMEMBERED)

    def add_rank(self) -> RankSteps:
        """Returns a new rank of the engine."""
        self._ranks.append(RankSteps())
        return self._ranks[-1]

    def observe(
        self, rank: RankSteps, signal: EngineSignal, observed_s: float, sent: Iterable[tuple[float, int]]
    ) -> None:
        """A rank was in this state at `observed_s`.

        Args:
            rank: of this engine.
            signal: its state, plausible.
            observed_s: when.
            sent: time and tokens of the requests sent there since, in order.
        """
        if not signal.step_tokens:
            # Of an older agent, or a plain server's metrics: what waits there cannot be followed.
            self.step_time = None
            return
        if signal.step_time is not None:
            # A rank without a model, which has done little yet, is followed by that of the others.
            self.step_time = self._fleet.blend(self, signal.step_time, signal.step)
        self.step_tokens = signal.step_tokens
        left = signal.waiting_prefill_tokens + signal.running_prefill_tokens - signal.scheduled_prefill_tokens
        rank.unscheduled_tokens, rank.decoding = max(0, left), signal.decode_tokens
        rank.ends_s = observed_s + signal.busy_s
        self._gather()
        # The signal of the end of a step is written before the next one is scheduled.
        events = [(at_s, _END) for at_s in self._ended_s if at_s >= observed_s]
        for at_s, tokens in sorted([*events, *sent]) if events else sent:
            if tokens == _END:
                self._schedule(rank, at_s)
            else:
                self._send(rank, tokens, at_s)
        self._gather()

    def sent(self, rank: RankSteps, tokens: int, now_s: float) -> None:
        """A request with this number of uncached prompt tokens goes to a rank."""
        self._send(rank, tokens, now_s)
        self._gather()

    def step_ended(self, now_s: float) -> None:
        """An answer of the engine has begun, so a step has ended: the next one takes what it holds of what waits."""
        if self.step_time is None or (self._ended_s and now_s - self._ended_s[-1] < _SAME_STEP * self.prompt_step_s):
            return
        self._ended_s.append(now_s)
        for rank in self._ranks:
            self._schedule(rank, now_s)
        self._gather()

    def _send(self, rank: RankSteps, tokens: int, at_s: float) -> None:
        rank.unscheduled_tokens += tokens
        if max(self.ends_s, rank.ends_s) <= at_s:
            # An idle engine begins at once.
            self._schedule(rank, at_s)

    def _schedule(self, rank: RankSteps, at_s: float) -> None:
        tokens, model = min(self.step_tokens, rank.unscheduled_tokens), self.step_time
        if tokens and model is not None:
            rank.unscheduled_tokens -= tokens
            rank.ends_s = max(rank.ends_s, at_s) + self.prompt_step_s + model.prefill_s * tokens

    def _gather(self) -> None:
        self.ends_s = max([rank.ends_s for rank in self._ranks])
        decoding = max([rank.decoding for rank in self._ranks])
        if self.step_time is not None:
            self.decoding = decoding
            self.prompt_step_s = self.step_time.prefill_base_s + self.step_time.decode_step_s(decoding)
