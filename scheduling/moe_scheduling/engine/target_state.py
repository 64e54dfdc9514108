"""The books of one target: what was sent to it and has not answered, and what its engine last said about itself.

Owned by one task, the gateway's dispatcher or the simulator, and read by `engine.py`. All clocks are arguments, on one
monotonic time line.

Invariants: sums never go below zero; every call is O(1), amortised over what was sent; calls about unknown keys,
repeated calls and absurd signals change nothing that a later decision reads.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable

from moe_scheduling.engine.ttft_model import (
    LINE_MEMORY_STEPS,
    TtftModel,
    build_ttft_model,
    build_unsignalled_ttft_model,
)
from moe_scheduling.signals import EngineSignal, StepTime, Target

# Whole numbers up to here are exact in a float; no engine counts as far.
_LARGEST = 2**53
_LONGEST_STEP_S = 3600.0
# The balance cannot exceed the number of expert-parallel ranks.
_GREATEST_BALANCE = 1024.0


class TargetState:
    """See the module.

    A request is unanswered from `sent` to its first token, and in flight from `sent` to `settled`.

    Args:
        target: whose books they are.
        accepting: whether it takes new requests; the owner changes it as the engine's phase changes.

    Attributes:
        line: the last step-time line that the engine told, which outlives the signal: it is a property of the engine,
            not of the moment; None before the first.
        traffic_share: part of the engines' work that the owner sends, above 0, at most 1; it changes it as `peers.py`
            says.
            What it sends stands for what others send meanwhile, until a signal tells.
    """

    __slots__ = (
        "_answered",
        "_engine_tokens",
        "_fitted_balance",
        "_observed_s",
        "_pace",
        "_pace_line",
        "_signal",
        "_since_signal",
        "_since_signal_tokens",
        "_ttft_factor",
        "_unanswered",
        "_unanswered_tokens",
        "accepting",
        "line",
        "target",
        "traffic_share",
    )

    def __init__(self, target: Target, *, accepting: bool = True) -> None:
        self.target = target
        self.accepting = accepting
        self.line: StepTime | None = None
        self.traffic_share = 1.0
        self._ttft_factor = 1.0
        self._unanswered: dict[Hashable, tuple[float, int]] = {}
        self._unanswered_tokens = 0
        self._answered: dict[Hashable, float] = {}
        # The unanswered requests that the signal cannot know of yet, in the order of their sending, with what they
        # stand for.
        self._since_signal: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()
        self._since_signal_tokens = 0
        self._signal: EngineSignal | None = None
        self._observed_s = -math.inf
        self._engine_tokens = 0
        # Of the experts, over the steps that the line remembers.
        self._fitted_balance = 1.0
        # Made by this line when the signal was first asked about, and kept until the next signal or another
        # ttft_factor;
        # None before.
        self._pace_line: StepTime | None = None
        self._pace = TtftModel(0.0, 0.0, 0.0)

    @property
    def ttft_factor(self) -> float:
        """Measured over predicted times to the first token, as far as known; the owner sets it by `correction.py`."""
        return self._ttft_factor

    @ttft_factor.setter
    def ttft_factor(self, ttft_factor: float) -> None:
        if ttft_factor != self._ttft_factor:
            self._ttft_factor = ttft_factor
            self._pace_line = None

    # What happens to requests.

    def sent(self, key: Hashable, prefill_tokens: int, now_s: float) -> None:
        """A request with so many uncached prompt tokens went out; the same key again starts anew."""
        self.settled(key, now_s)
        tokens = _count(prefill_tokens)
        everyones = tokens if self.traffic_share == 1.0 else _count(tokens / self.traffic_share)
        self._unanswered[key] = now_s, tokens
        self._since_signal[key] = now_s, everyones
        self._unanswered_tokens += tokens
        self._since_signal_tokens += everyones

    def first_token(self, key: Hashable, now_s: float) -> float | None:
        """The request has answered: its prefill is done.

        Returns the seconds since it was sent; None when it is unknown or had answered before.
        """
        sent_s = self._answer(key)
        if sent_s is None:
            return None
        self._answered[key] = sent_s
        return now_s - sent_s

    def settled(self, key: Hashable, now_s: float) -> float | None:
        """The request has ended, in whatever way.

        Returns the seconds since it was sent; None when it is unknown.
        """
        sent_s = self._answer(key)
        if sent_s is None:
            sent_s = self._answered.pop(key, None)
        return None if sent_s is None else now_s - sent_s

    def _answer(self, key: Hashable) -> float | None:
        sent = self._unanswered.pop(key, None)
        if sent is None:
            return None
        sent_s, tokens = sent
        self._unanswered_tokens -= tokens
        if (since := self._since_signal.pop(key, None)) is not None:
            self._since_signal_tokens -= since[1]
        return sent_s

    # What the engine says.

    def observe(self, signal: EngineSignal, observed_s: float) -> None:
        """The engine was in this state at `observed_s`.

        Ignored when it is older than the signal at hand, or its time is none. A time in the future would shut out what
        comes after it: who computes it as receipt minus age has to keep the age from being negative.
        """
        if not self._observed_s <= observed_s < math.inf:
            return
        before, self._signal = self._signal, (signal := _plausible(signal))
        self._fitted_balance = _remembered_balance(self._fitted_balance, before, signal)
        self._observed_s = observed_s
        self._engine_tokens = signal.waiting_prefill_tokens + signal.running_prefill_tokens
        self.line = signal.step_time or self.line
        self._pace_line = None
        since = self._since_signal
        while since:
            key, (sent_s, tokens) = next(iter(since.items()))
            if sent_s >= observed_s:
                break
            del since[key]
            self._since_signal_tokens -= tokens

    @property
    def signal(self) -> EngineSignal | None:
        """The newest signal, what is absurd in it replaced; None before the first."""
        return self._signal

    @property
    def observed_s(self) -> float | None:
        """The time of the newest signal; None before the first."""
        return None if self._signal is None else self._observed_s

    def signal_age_s(self, now_s: float) -> float | None:
        """Age of the newest signal; None before the first."""
        return None if self._signal is None else now_s - self._observed_s

    def is_fresh(self, now_s: float, stale_after_s: float) -> bool:
        """Whether there is a signal to believe: not older than `stale_after_s`, nor further in the future than that."""
        return -stale_after_s <= now_s - self._observed_s <= stale_after_s

    # What a decision reads.

    @property
    def in_flight(self) -> int:
        """Requests sent and not settled."""
        return len(self._unanswered) + len(self._answered)

    @property
    def sent_since_signal(self) -> int:
        """Unanswered requests that were sent after the newest signal, so that it cannot know of them."""
        return len(self._since_signal)

    @property
    def unanswered_prefill_tokens(self) -> int:
        """Uncached prompt tokens of the requests that have not answered."""
        return self._unanswered_tokens

    def ahead_prefill_tokens(self, now_s: float, stale_after_s: float) -> int:
        """Prompt tokens to be computed before those of a new request.

        By a fresh signal what waits and runs in the engine, whoever sent it, and what was sent since, by others too;
        else the own unanswered alone.
        """
        if self.is_fresh(now_s, stale_after_s):
            return self._engine_tokens + self._since_signal_tokens
        return self._unanswered_tokens

    def pace(self, common_line: StepTime, now_s: float, stale_after_s: float) -> TtftModel:
        """How fast the engine computes: in the state that a fresh signal says, else with the own answered decoding.

        Its `ttft_factor` is in it.

        Args:
            common_line: the line of an engine that has not told its own.
            now_s: the time.
            stale_after_s: age at which a signal is no longer believed.
        """
        line, signal = self.line or common_line, self._signal
        if signal is None or not self.is_fresh(now_s, stale_after_s):
            return build_unsignalled_ttft_model(line, len(self._answered)).times(self._ttft_factor)
        if line is not self._pace_line:
            pace = build_ttft_model(line, signal, self._fitted_balance)
            self._pace_line, self._pace = line, pace.times(self._ttft_factor)
        return self._pace

    def first_token_s(self, own_tokens: int, common_line: StepTime, now_s: float, stale_after_s: float) -> float:
        """Predicted seconds until the first token of a new request: what is ahead and its own, through the pace.

        The one call that a choice makes for each target, so the usual case reads its parts without further calls.

        Args:
            own_tokens: its uncached prompt tokens.
            common_line: the line of an engine that has not told its own.
            now_s: the time.
            stale_after_s: age at which a signal is no longer believed.
        """
        line = self.line or common_line
        if line is self._pace_line and -stale_after_s <= now_s - self._observed_s <= stale_after_s:
            return self._pace.first_token_s(own_tokens + self._engine_tokens + self._since_signal_tokens)
        tokens = own_tokens + self.ahead_prefill_tokens(now_s, stale_after_s)
        return self.pace(common_line, now_s, stale_after_s).first_token_s(tokens)

    def requests(self, now_s: float, stale_after_s: float) -> int:
        """Requests at the engine: the own in flight, or what it says by a fresh signal and was sent since, if more."""
        own = len(self._unanswered) + len(self._answered)
        signal = self._signal
        if signal is None or not self.is_fresh(now_s, stale_after_s):
            return own
        return max(own, signal.waiting + signal.running + int(len(self._since_signal) / self.traffic_share))


def _remembered_balance(known: float, before: EngineSignal | None, signal: EngineSignal) -> float:
    """Mean balance over an engine's steps as its line remembers them; of a new or restarted engine the present one."""
    if before is None or signal.step < before.step:
        return signal.expert_balance
    kept = math.exp((before.step - signal.step) / LINE_MEMORY_STEPS)
    return signal.expert_balance + kept * (known - signal.expert_balance)


def _plausible(signal: EngineSignal) -> EngineSignal:
    """The signal with what is absurd replaced by the least possible: a count by 0, a balance by 1, a line by none."""
    return EngineSignal(
        step=_count(signal.step),
        running=_count(signal.running),
        waiting=_count(signal.waiting),
        waiting_prefill_tokens=_count(signal.waiting_prefill_tokens),
        running_prefill_tokens=_count(signal.running_prefill_tokens),
        decode_tokens=_count(signal.decode_tokens),
        kv_usage=_within(signal.kv_usage, 0.0, 1.0),
        preemptions=_count(signal.preemptions),
        computed_tokens=_count(signal.computed_tokens),
        step_time=signal.step_time if signal.step_time is not None and _predicts(signal.step_time) else None,
        expert_balance=_within(signal.expert_balance, 1.0, _GREATEST_BALANCE),
        # A rank that says it has no pressure at all would be the most attractive of all.
        expert_pressure=_within(signal.expert_pressure, 0.0, _GREATEST_BALANCE) or 1.0,
    )


def _count(value: float) -> int:
    return int(value) if 0 < value < _LARGEST else 0


def _within(value: float, least: float, most: float) -> float:
    """The nearest in the range; the least for what is not a number."""
    return min(value, most) if value > least else least


def _predicts(line: StepTime) -> bool:
    """Whether a line can be one of step times: no part negative or beyond all measure, and not all of them zero."""
    parts = (line.base_s, line.prefill_s, line.decode_s)
    return all(0.0 <= part < _LONGEST_STEP_S for part in parts) and any(parts)
