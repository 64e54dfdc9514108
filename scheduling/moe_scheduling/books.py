"""The books of one target: what was sent to it and has not answered, and what its engine last said about itself.

Owned by one task, the gateway's dispatcher or the simulator, and read by `engine.py`. All clocks are arguments, on one
monotonic time line.

Invariants: sums never go below zero; every call is O(1), amortised over what was sent; calls about unknown keys, repeated
calls and absurd signals change nothing that a later decision reads.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

from moe_scheduling.signals import EngineSignal, StepTime, Target

# Whole numbers up to here are exact in a float; no engine counts as far.
_LARGEST = 2**53


class TargetBooks:
    """See the module.

    A request is unanswered from `sent` to its first token, and in flight from `sent` to `settled`.

    Args:
        target: whose books they are.
        accepting: whether it takes new requests; the owner changes it as the engine's phase changes.
    """

    __slots__ = (
        "_answered",
        "_observed_s",
        "_signal",
        "_since_signal",
        "_since_signal_tokens",
        "_unanswered",
        "_unanswered_tokens",
        "accepting",
        "target",
    )

    def __init__(self, target: Target, *, accepting: bool = True) -> None:
        self.target = target
        self.accepting = accepting
        self._unanswered: dict[Hashable, tuple[float, int]] = {}
        self._unanswered_tokens = 0
        self._answered: dict[Hashable, float] = {}
        # The unanswered requests that the signal cannot know of yet, in the order of their sending.
        self._since_signal: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()
        self._since_signal_tokens = 0
        self._signal: EngineSignal | None = None
        self._observed_s = -math.inf

    # What happens to requests.

    def sent(self, key: Hashable, prefill_tokens: int, now_s: float) -> None:
        """A request with so many uncached prompt tokens went out; the same key again starts anew."""
        self.settled(key, now_s)
        tokens = _count(prefill_tokens)
        self._unanswered[key] = self._since_signal[key] = (now_s, tokens)
        self._unanswered_tokens += tokens
        self._since_signal_tokens += tokens

    def first_token(self, key: Hashable, now_s: float) -> float | None:
        """The request has answered: its prefill is done. Returns the seconds since it was sent, None when it is unknown or had answered."""
        sent_s = self._answer(key)
        if sent_s is None:
            return None
        self._answered[key] = sent_s
        return now_s - sent_s

    def settled(self, key: Hashable, now_s: float) -> float | None:
        """The request has ended, in whatever way. Returns the seconds since it was sent, None when it is unknown."""
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
        if self._since_signal.pop(key, None) is not None:
            self._since_signal_tokens -= tokens
        return sent_s

    # What the engine says.

    def observe(self, signal: EngineSignal, observed_s: float) -> None:
        """The engine was in this state at `observed_s`. A signal older than the one at hand is ignored, and so is one without a time."""
        if not self._observed_s <= observed_s < math.inf:
            return
        self._signal = _plausible(signal)
        self._observed_s = observed_s
        since = self._since_signal
        while since:
            key, (sent_s, tokens) = next(iter(since.items()))
            if sent_s > observed_s:
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

    def fresh_signal(self, now_s: float, stale_after_s: float) -> EngineSignal | None:
        """The newest signal if it is to be believed: not older than `stale_after_s`, nor further in the future than that."""
        return self._signal if abs(now_s - self._observed_s) <= stale_after_s else None

    # What a decision reads.

    @property
    def in_flight(self) -> int:
        """Requests sent and not settled."""
        return len(self._unanswered) + len(self._answered)

    @property
    def unanswered_prefill_tokens(self) -> int:
        """Uncached prompt tokens of the requests that have not answered."""
        return self._unanswered_tokens

    def ahead_prefill_tokens(self, now_s: float, stale_after_s: float) -> int:
        """Prompt tokens to be computed before those of a new request.

        By a fresh signal what waits and runs in the engine, whoever sent it, and what was sent since; else the own unanswered alone.
        """
        signal = self.fresh_signal(now_s, stale_after_s)
        if signal is None:
            return self._unanswered_tokens
        return signal.waiting_prefill_tokens + signal.running_prefill_tokens + self._since_signal_tokens

    def decoding_requests(self, now_s: float, stale_after_s: float) -> int:
        """Requests that decode: as the engine says by a fresh signal, else the own that have answered."""
        signal = self.fresh_signal(now_s, stale_after_s)
        return len(self._answered) if signal is None else signal.decode_tokens

    def requests(self, now_s: float, stale_after_s: float) -> int:
        """Requests at the engine: the greater of the own in flight, and what it says by a fresh signal and was sent since."""
        signal = self.fresh_signal(now_s, stale_after_s)
        if signal is None:
            return self.in_flight
        return max(self.in_flight, signal.waiting + signal.running + len(self._since_signal))


def _count(value: float) -> int:
    return int(value) if 0 < value < _LARGEST else 0


def _within(value: float, least: float, most: float) -> float:
    """The nearest in the range; the least for what is not a number."""
    return min(value, most) if value > least else least


def _line(step_time: StepTime | None) -> StepTime | None:
    """A line that predicts a time: no part negative or endless, and not all of them zero."""
    if step_time is None:
        return None
    parts = (step_time.base_s, step_time.prefill_s, step_time.decode_s)
    return step_time if all(0.0 <= part < math.inf for part in parts) and any(parts) else None


def _plausible(signal: EngineSignal) -> EngineSignal:
    """The signal with absurd values replaced by the least possible: a count by 0, a balance by 1, a step time by none."""
    return replace(
        signal,
        step=_count(signal.step),
        running=_count(signal.running),
        waiting=_count(signal.waiting),
        waiting_prefill_tokens=_count(signal.waiting_prefill_tokens),
        running_prefill_tokens=_count(signal.running_prefill_tokens),
        decode_tokens=_count(signal.decode_tokens),
        kv_usage=_within(signal.kv_usage, 0.0, 1.0),
        preemptions=_count(signal.preemptions),
        step_time=_line(signal.step_time),
        expert_balance=_within(signal.expert_balance, 1.0, _LARGEST),
    )
