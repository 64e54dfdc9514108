"""The state of every target: requests in flight, the newest signal, the TTFT calibration. Owned by the dispatcher.

This module is the one writer of `TargetState`; the choice of a target only reads it. A target that is known no more
keeps its count of requests in flight until they have ended.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from moe_scheduling.engine.choice import Send
from moe_scheduling.engine.engine_steps import EngineSteps, FleetStepTimes
from moe_scheduling.engine.target_list import TargetList
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.traffic_share import TrafficShare
from moe_scheduling.engine.ttft_calibration import TtftCalibration
from moe_scheduling.signals import EngineSignal, Target

from moe_gateway.engines.fleet import Engine
from moe_gateway.request_stats import PredictionStats


@dataclass(slots=True, kw_only=True)
class InFlightRequest:
    """A request that was sent and has not ended.

    Attributes:
        target: where it was sent.
        key: its key in the target's state.
        sent_s: when.
        predicted_s: predicted seconds to its first token, `ttft_factor` included.
        ttft_factor: the calibration factor in that prediction.
        uncomputed_keys: keys of the blocks of its prompt that nobody had computed there before it.
        is_measure: whether its time to the first token is compared with the prediction.
    """

    target: Target
    key: int
    sent_s: float
    predicted_s: float
    ttft_factor: float = 1.0
    uncomputed_keys: Sequence[int] = ()
    is_measure: bool = True


# An engine that has an unanswered request and makes no step for this long hangs, or is as good as one that does. Steps
# take milliseconds on GPUs and at most some seconds on CPUs; a long prompt is computed in many steps. A step that
# compiles may take longer, which costs the engine new requests for that time while others take them.
STALL_S = 20.0


def _has_stepped(before: EngineSignal | None, after: EngineSignal) -> bool:
    """Whether an engine has worked between two signals. What waits there is no sign: arrivals change it too."""
    return before is None or (
        (before.step, before.computed_tokens, before.running, before.preemptions, before.kv_usage)
        != (after.step, after.computed_tokens, after.running, after.preemptions, after.kv_usage)
    )


class TargetStates:
    """All targets of the known engines.

    Attributes:
        by_target: state by target.
        ordered: the same in an order that stays, as `choose_target` takes it.
        traffic_share: part of the requests at the engines that this gateway sent, 0 to 1; the rest is of others.
        sent: requests sent so far.
        predictions: predicted and measured times to first token.
    """

    def __init__(self) -> None:
        self.by_target: dict[Target, TargetState] = {}
        self.ordered = TargetList()
        self.traffic_share = 1.0
        self.sent = 0
        self.predictions = PredictionStats()
        self._departed: list[TargetState] = []
        # The states of an engine's ranks, by the engine's name.
        self._ranks: dict[str, list[TargetState]] = {}
        self._progress_s: dict[Target, float] = {}
        self._share_estimate = TrafficShare()
        self._calibration = TtftCalibration()
        self._step_times = FleetStepTimes()

    @property
    def in_flight(self) -> int:
        """Requests that were sent and have not ended, those at targets that are known no more included."""
        return sum(state.in_flight for state in (*self.ordered, *self._departed))

    @property
    def first_modelled(self) -> TargetState | None:
        """The first target whose step-time model is known."""
        return next((state for state in self.ordered if state.step_time_model is not None), None)

    # Which targets there are.

    def replace(self, engines: Collection[Engine], gone: Collection[Engine]) -> None:
        """Makes the targets of `engines` the known ones; those of `gone` are known no more. Others keep their state."""
        before = self.by_target
        for engine in gone:
            for target in engine.targets:
                self.forget(target)
                self.predictions.forget(target)
                self._progress_s.pop(target, None)
                state = before.pop(target)
                self._step_times.forget(state.steps)
                if state.in_flight:
                    self._departed.append(state)
        self.by_target = {}
        for engine in engines:
            known = next((before[target] for target in engine.targets if target in before), None)
            steps = EngineSteps(self._step_times) if known is None else known.steps
            for target in engine.targets:
                self.by_target[target] = before.get(target) or TargetState(target, accepting=False, steps=steps)
        self.ordered = TargetList(self.by_target.values())
        self._ranks = {}
        for target, state in self.by_target.items():
            self._ranks.setdefault(target.server, []).append(state)

    def set_accepting(self, targets: Collection[Target], accepting: bool) -> None:
        """Whether these targets may get new requests."""
        for target in targets:
            self.by_target[target].accepting = accepting

    def forget(self, target: Target) -> None:
        """The target is another engine process from now on: its calibration begins anew."""
        self._calibration.forget(target)

    # Requests in flight.

    def send(self, sending: Send, prefill_tokens: int, now_s: float) -> InFlightRequest:
        """Counts a request with this many uncached prompt tokens as in flight at the chosen target."""
        state = self.by_target[sending.target]
        self.sent += 1
        state.sent(self.sent, prefill_tokens, now_s)
        return InFlightRequest(
            target=sending.target,
            key=self.sent,
            sent_s=now_s,
            predicted_s=sending.predicted_s,
            ttft_factor=state.ttft_factor,
        )

    def reserve(self, target: Target, now_s: float) -> InFlightRequest:
        """Counts a request that will come to a target later, once its prompt is computed elsewhere."""
        state = self.by_target[target]
        self.sent += 1
        state.sent(self.sent, 0, now_s)
        state.first_token(self.sent, now_s)
        return InFlightRequest(target=target, key=self.sent, sent_s=now_s, predicted_s=0.0)

    def answer(self, request: InFlightRequest, now_s: float, *, is_first_token: bool) -> None:
        """The answer has begun; where its first byte shows the first token, the prediction is compared with it."""
        if (state := self.by_target.get(request.target)) is None:
            return
        state.first_token(request.key, now_s)
        if state.steps.step_time is not None:
            state.steps.step_ended(now_s)
        self.note_progress(request.target, now_s)
        if is_first_token and request.is_measure:
            measured_s = now_s - request.sent_s
            self.predictions.compare(request.target, request.predicted_s, measured_s)
            uncalibrated_s = request.predicted_s / request.ttft_factor
            self._calibration.observe(request.target, uncalibrated_s, measured_s, now_s)

    def settle(self, request: InFlightRequest, now_s: float) -> None:
        """The request has ended there, in whatever way; a second call changes nothing."""
        if (state := self.by_target.get(request.target)) is not None:
            state.settled(request.key, now_s)
        if self._departed:
            for state in self._departed:
                state.settled(request.key, now_s)
            self._departed = [state for state in self._departed if state.in_flight]

    # Signals.

    def observe(self, target: Target, signal: EngineSignal, observed_s: float) -> bool:
        """An engine's rank was in this state at `observed_s`; returns whether the target is known."""
        if (state := self.by_target.get(target)) is None:
            return False
        if _has_stepped(state.signal, signal):
            self.note_progress(target, observed_s)
        state.observe(signal, observed_s)
        if state.step_time_model is not None:
            # The ranks of an engine step together, but each fits the times by itself, and some later than others. By
            # models of their own, one would look faster than the other.
            for other in self._ranks[target.server]:
                other.step_time_model = state.step_time_model
        return True

    # Engines that hang.

    def note_progress(self, target: Target, at_s: float) -> None:
        """The engine made a step, or sent a part of an answer."""
        self._progress_s[target] = max(at_s, self._progress_s.get(target, at_s))

    def stalled(self, now_s: float) -> list[Target]:
        """The targets with an unanswered request that have made no step, and sent nothing, for `STALL_S`."""
        before_s = now_s - STALL_S
        return [
            state.target
            for state in self.ordered
            if (sent_s := state.oldest_unanswered_s) is not None
            and sent_s < before_s
            and self._progress_s.get(state.target, sent_s) < before_s
        ]

    def counts_steps(self, target: Target) -> bool:
        """Whether the signals of a target show its steps, so that silence is no long answer in one piece."""
        state = self.by_target.get(target)
        return state is not None and state.signal is not None and state.signal.step > 0

    def is_working(self, target: Target, now_s: float, within_s: float, stale_after_s: float) -> bool:
        """Whether a target has made a step within this time; where none are counted, whether a request runs there."""
        state = self.by_target.get(target)
        if state is None or state.signal is None:
            return False
        if state.signal.step > 0:
            return now_s - self._progress_s.get(target, -math.inf) < within_s
        return state.signal.running > 0 and state.is_fresh(now_s, stale_after_s)

    def recalibrate(self, now_s: float, stale_after_s: float) -> None:
        """Writes the newest traffic share and TTFT factors into the states; called a few times a second."""
        self.traffic_share = self._share_estimate.observe(self.ordered, now_s, stale_after_s)
        for state in self.ordered:
            state.traffic_share = self.traffic_share
            state.ttft_factor = self._calibration.factor(state.target, now_s)

    def unanswered_prefill_tokens(self, targets: Collection[Target]) -> Mapping[int, int]:
        """By rank, uncached prompt tokens of the requests sent to these known targets that have no answer yet."""
        return {target.rank: self.by_target[target].unanswered_prefill_tokens for target in targets}
