"""State of one target: the requests that this gateway has in flight there, and the newest signal of its engine.

Owned by one task, the gateway's dispatcher or the simulator; read by `choice.py`. All times are arguments, on one
monotonic clock.

The two views are joined. The signal knows the engine's queue exactly, but as of some milliseconds ago; in-flight
accounting knows the requests sent since, and `EngineSteps` what the engine has scheduled of them. Without a fresh
signal, in-flight accounting stands alone.

Invariants: sums never go below zero; every call is O(1), amortised over the requests sent; calls about unknown keys,
repeated calls and implausible signals change nothing that a later decision reads.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import astuple

from moe_scheduling.engine.engine_steps import EngineSteps, RankSteps
from moe_scheduling.engine.ttft_model import (
    STEP_PREFILL_TOKENS,
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
    """In-flight accounting and newest signal of one target.

    A request is unanswered from `sent` to its first token, and in flight from `sent` to `settled`.

    Args:
        target: the data-parallel rank that requests are sent to.
        accepting: whether it takes new requests; the owner changes it with the engine's phase.
        steps: of its engine, shared with the states of the engine's other ranks; None: it has one rank.

    Attributes:
        step_time_model: the newest step-time model in a signal; None before the first. It outlives the signal, because
            it describes the engine and not the moment. For the same reason the owner writes it into the states of the
            engine's other ranks.
        traffic_share: part of the engines' requests that this gateway sends, above 0 and at most 1, set by the owner
            (`traffic_share.py`). Until the next signal, each request sent stands for `1 / traffic_share` requests of
            all gateways.
    """

    __slots__ = (
        "_answered",
        "_engine_tokens",
        "_observed_s",
        "_rank",
        "_signal",
        "_since_signal",
        "_since_signal_tokens",
        "_ttft_factor",
        "_ttft_model",
        "_ttft_model_step_time",
        "_unanswered",
        "_unanswered_tokens",
        "accepting",
        "step_time_model",
        "steps",
        "target",
        "traffic_share",
    )

    def __init__(self, target: Target, *, accepting: bool = True, steps: EngineSteps | None = None) -> None:
        self.target = target
        self.accepting = accepting
        self.steps = EngineSteps() if steps is None else steps
        self._rank: RankSteps = self.steps.add_rank()
        self.step_time_model: StepTime | None = None
        self.traffic_share = 1.0
        self._ttft_factor = 1.0
        # Time of sending and uncached prompt tokens of each unanswered request.
        self._unanswered: dict[Hashable, tuple[float, int]] = {}
        self._unanswered_tokens = 0
        # Time of sending of each answered request in flight.
        self._answered: dict[Hashable, float] = {}
        # The unanswered requests that were sent after the signal, in the order of sending: time, and the tokens that
        # all gateways sent meanwhile by the traffic share.
        self._since_signal: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()
        self._since_signal_tokens = 0
        self._signal: EngineSignal | None = None
        self._observed_s = -math.inf
        self._engine_tokens = 0
        # The TTFT model of the present signal and factor, and the step-time model that it was built from; None: not
        # built yet.
        self._ttft_model_step_time: StepTime | None = None
        self._ttft_model = TtftModel(0.0, 0.0, 0.0)

    @property
    def ttft_factor(self) -> float:
        """Measured TTFT over predicted TTFT; the owner sets it from `TtftCalibration.factor`."""
        return self._ttft_factor

    @ttft_factor.setter
    def ttft_factor(self, ttft_factor: float) -> None:
        if ttft_factor != self._ttft_factor:
            self._ttft_factor = ttft_factor
            self._ttft_model_step_time = None

    # In-flight accounting.

    def sent(self, key: Hashable, prefill_tokens: int, now_s: float) -> None:
        """Counts a request with `prefill_tokens` uncached prompt tokens as unanswered. A known key begins anew."""
        if key in self._unanswered or key in self._answered:
            self.settled(key, now_s)
        tokens = _count(prefill_tokens)
        everyones = tokens if self.traffic_share == 1.0 else _count(tokens / self.traffic_share)
        self._unanswered[key] = now_s, tokens
        self._since_signal[key] = now_s, everyones
        self._unanswered_tokens += tokens
        self._since_signal_tokens += everyones
        if self.steps.step_time is not None:
            self.steps.sent(self._rank, everyones, now_s)

    def first_token(self, key: Hashable, now_s: float) -> float | None:
        """Counts a request as answered: its prefill is done.

        Returns the seconds since it was sent; None when it is unknown or had answered before.
        """
        sent_s = self._answer(key)
        if sent_s is None:
            return None
        self._answered[key] = sent_s
        return now_s - sent_s

    def settled(self, key: Hashable, now_s: float) -> float | None:
        """Stops counting a request that has ended, whatever its outcome.

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

    # The engine's signal.

    def observe(self, signal: EngineSignal, observed_s: float) -> None:
        """Takes the engine's state as of `observed_s`.

        Ignored when it is older than the present signal, or its time is not finite. A time in the future would shut out
        later signals: a caller that computes it as receipt minus age keeps the age from being negative.
        """
        if not self._observed_s <= observed_s < math.inf:
            return
        self._signal = signal = _plausible(signal)
        self._observed_s = observed_s
        self._engine_tokens = signal.waiting_prefill_tokens + signal.running_prefill_tokens
        self.step_time_model = signal.step_time or self.step_time_model
        self._ttft_model_step_time = None
        since = self._since_signal
        while since:
            key, (sent_s, tokens) = next(iter(since.items()))
            # A rank publishes when it gets a request, so one sent at this very time is known to it.
            if sent_s > observed_s:
                break
            del since[key]
            self._since_signal_tokens -= tokens
        self.steps.observe(self._rank, signal, observed_s, since.values())

    @property
    def signal(self) -> EngineSignal | None:
        """The newest signal, implausible values replaced; None before the first."""
        return self._signal

    @property
    def observed_s(self) -> float | None:
        """The time of the newest signal; None before the first."""
        return None if self._signal is None else self._observed_s

    def signal_age_s(self, now_s: float) -> float | None:
        """Returns the age of the newest signal; None before the first."""
        return None if self._signal is None else now_s - self._observed_s

    def is_fresh(self, now_s: float, stale_after_s: float) -> bool:
        """Returns whether there is a signal at most `stale_after_s` old, nor further in the future than that."""
        return -stale_after_s <= now_s - self._observed_s <= stale_after_s

    # What a decision reads.

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step of the engine; vLLM's usual number until a signal says it."""
        return (self._signal.step_tokens if self._signal else 0) or STEP_PREFILL_TOKENS

    @property
    def in_flight(self) -> int:
        """Requests of this gateway that were sent and have not ended."""
        return len(self._unanswered) + len(self._answered)

    @property
    def oldest_unanswered_s(self) -> float | None:
        """When the request was sent that has been unanswered for longest; None without one."""
        return next(iter(self._unanswered.values()))[0] if self._unanswered else None

    @property
    def sent_since_signal(self) -> int:
        """Unanswered requests that were sent after the newest signal, so that it cannot count them."""
        return len(self._since_signal)

    @property
    def unanswered_prefill_tokens(self) -> int:
        """Uncached prompt tokens of the requests that have not answered."""
        return self._unanswered_tokens

    def ahead_prefill_tokens(self, now_s: float, stale_after_s: float) -> int:
        """Returns the prompt tokens that the engine computes before those of a new request.

        By a fresh signal: of all requests at the engine, and of those sent since, by other gateways too. Else: of this
        gateway's unanswered requests.
        """
        if self.is_fresh(now_s, stale_after_s):
            return self._engine_tokens + self._since_signal_tokens
        return self._unanswered_tokens

    def ttft_model(self, fleet_default: StepTime, now_s: float, stale_after_s: float) -> TtftModel:
        """Returns the TTFT model of the present, `ttft_factor` included.

        By a fresh signal: in the state that it describes. Else: with this gateway's answered requests decoding.

        Args:
            fleet_default: step-time model of an engine that has not sent its own.
            now_s: the time.
            stale_after_s: age from which a signal is ignored.
        """
        step_time, signal = self.step_time_model or fleet_default, self._signal
        if signal is None or not self.is_fresh(now_s, stale_after_s):
            model = build_unsignalled_ttft_model(step_time, len(self._answered), self.step_tokens)
            return model.times(self._ttft_factor)
        if step_time is not self._ttft_model_step_time:
            self._ttft_model_step_time = step_time
            self._ttft_model = build_ttft_model(step_time, signal).times(self._ttft_factor)
        return self._ttft_model

    def first_token_s(self, own_tokens: int, fleet_default: StepTime, now_s: float, stale_after_s: float) -> float:
        """Returns the predicted seconds until the first token of a new request.

        The one call that a choice makes for each target, so the usual case reads its parts without further calls.

        Args:
            own_tokens: its uncached prompt tokens.
            fleet_default: step-time model of an engine that has not sent its own.
            now_s: the time.
            stale_after_s: age from which a signal is ignored.
        """
        model, steps = self.steps.step_time, self.steps
        step_time = self.step_time_model or fleet_default
        if model is not None and self.is_fresh(now_s, stale_after_s):
            rest_s, tokens = steps.ends_s - now_s, own_tokens + self._rank.unscheduled_tokens
            computed_s = model.prefill_s * tokens - steps.prompt_step_s * (-tokens // steps.step_tokens)
            kv_s = self.ttft_model(step_time, now_s, stale_after_s).kv_s
            return kv_s + self._ttft_factor * (computed_s + rest_s if rest_s > 0.0 else computed_s)
        if step_time is self._ttft_model_step_time and -stale_after_s <= now_s - self._observed_s <= stale_after_s:
            return self._ttft_model.first_token_s(own_tokens + self._engine_tokens + self._since_signal_tokens)
        tokens = own_tokens + self.ahead_prefill_tokens(now_s, stale_after_s)
        return self.ttft_model(fleet_default, now_s, stale_after_s).first_token_s(tokens)

    def added_prefill_s(self, own_tokens: int, now_s: float, stale_after_s: float) -> float:
        """Returns the seconds that a new prompt adds to the steps here; 0 until a signal had a step-time model.

        A prompt that fits into the last step of those ahead adds no step of its own.

        Args:
            own_tokens: its uncached prompt tokens.
            now_s: the time.
            stale_after_s: age from which a signal is ignored.
        """
        model, step_tokens = self.step_time_model, self.step_tokens
        if model is None or not own_tokens:
            return 0.0
        ahead = self.ahead_prefill_tokens(now_s, stale_after_s)
        steps = -(-(ahead + own_tokens) // step_tokens) - -(-ahead // step_tokens)
        return model.prefill_s * own_tokens + model.prefill_base_s * steps

    def wait_s(self, fleet_default: StepTime, now_s: float, stale_after_s: float) -> float:
        """Returns the predicted seconds until the prompt of a new request begins to be computed; as `first_token_s`.

        Steps that hold as many tokens as they can count as a whole: the last one is shared with the new request.
        """
        known, steps, model = self.steps.step_time, self.steps, self.ttft_model(fleet_default, now_s, stale_after_s)
        if known is None or not self.is_fresh(now_s, stale_after_s):
            return model.wait_s(self.ahead_prefill_tokens(now_s, stale_after_s))
        tokens = self._rank.unscheduled_tokens
        full_s = known.prefill_s * tokens + steps.prompt_step_s * (tokens // steps.step_tokens)
        return model.kv_s + self._ttft_factor * (max(0.0, steps.ends_s - now_s) + full_s)

    def requests(self, now_s: float, stale_after_s: float) -> int:
        """Returns the requests at the engine.

        The greater of this gateway's requests in flight and, by a fresh signal, those at the engine and sent since.
        """
        own = len(self._unanswered) + len(self._answered)
        signal = self._signal
        if signal is None or not self.is_fresh(now_s, stale_after_s):
            return own
        return max(own, signal.waiting + signal.running + int(len(self._since_signal) / self.traffic_share))

    def decoding(self, now_s: float, stale_after_s: float) -> int:
        """Returns the requests that decode there: by a fresh signal, else this gateway's answered ones."""
        signal = self._signal
        if signal is None or not self.is_fresh(now_s, stale_after_s):
            return len(self._answered)
        return signal.decode_tokens


def _plausible(signal: EngineSignal) -> EngineSignal:
    """Returns the signal with implausible values replaced: counts by 0, a balance by 1, a step-time model by None."""
    return EngineSignal(
        step=_count(signal.step),
        running=_count(signal.running),
        waiting=_count(signal.waiting),
        waiting_prefill_tokens=_count(signal.waiting_prefill_tokens),
        running_prefill_tokens=_count(signal.running_prefill_tokens),
        scheduled_prefill_tokens=_count(signal.scheduled_prefill_tokens),
        busy_s=_within(signal.busy_s, 0.0, _LONGEST_STEP_S),
        step_tokens=_count(signal.step_tokens),
        decode_tokens=_count(signal.decode_tokens),
        kv_usage=_within(signal.kv_usage, 0.0, 1.0),
        preemptions=_count(signal.preemptions),
        computed_tokens=_count(signal.computed_tokens),
        step_time=signal.step_time if signal.step_time is not None and _predicts(signal.step_time) else None,
        expert_balance=_within(signal.expert_balance, 1.0, _GREATEST_BALANCE),
        expert_pressure=_within(signal.expert_pressure, 0.0, _GREATEST_BALANCE) or 1.0,
    )


def _count(value: float) -> int:
    return int(value) if 0 < value < _LARGEST else 0


def _within(value: float, least: float, most: float) -> float:
    """Returns the nearest value in the range; `least` for NaN."""
    return min(value, most) if value > least else least


def _predicts(step_time: StepTime) -> bool:
    """Returns whether all coefficients are plausible times, and one of them is positive."""
    parts = astuple(step_time)
    return all(0.0 <= part < _LONGEST_STEP_S for part in parts) and any(parts)
