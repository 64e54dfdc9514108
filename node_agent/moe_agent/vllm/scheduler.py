"""vLLM's scheduler with the queue order of layer 1; publishes the engine's state.

Named to vLLM by `--scheduler-cls moe_agent.vllm.scheduler.OrderedScheduler`; runs in the process of the engine core,
one for each data-parallel rank. Without `MOESERVING_RUN_DIR` it orders by the default settings and publishes nothing.

vLLM calls this interface not public: `moe_agent.vllm.version` refuses unknown versions, and `tests/agent` fails when
one of the attributes used here is gone.

Invariants: the settings of the control record are in force before any decision that follows their write. The rank's
record is written when a request is added or aborted and when the last one ends; between steps it is at most
`PUBLISH_INTERVAL_S` behind. What the rank's worker found about its expert group is passed on as it is; settings count
as taken when the group applies them too.
"""

import math
import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from moe_contract.engine_process import KV_TRANSFER_VARIABLE, RUN_DIR_VARIABLE
from moe_contract.tenancy import priority_of
from moe_scheduling.request.deferred_scheduling import DeferredScheduling
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.request.prefill_budget import StepTimeCurve
from moe_scheduling.request.prefill_speed import PrefillSpeed
from moe_scheduling.signals import EngineSignal
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from moe_agent.shared_memory.control_record import ControlRecordReader
from moe_agent.shared_memory.expert_record import ExpertRecordReader, ExpertState
from moe_agent.shared_memory.rank_record import RankRecordWriter, RankState
from moe_agent.shared_memory.seqlock import RecordUnreadableError
from moe_agent.step_curve import StepTimeCurveFit
from moe_agent.step_time import StepTimeFit
from moe_agent.vllm.admission import AdmissionStop
from moe_agent.vllm.deferred_start import defer_steps
from moe_agent.vllm.leases import LeaseGuard, find_lease_s
from moe_agent.vllm.lockstep_turns import TurnPublisher, publish_turns
from moe_agent.vllm.prefill_group import OtherParts, PrefillGroup, SharedMemoryPrefillGroup
from moe_agent.vllm.prefill_plan import PrefillPlan
from moe_agent.vllm.request_queue import OrderedRequestQueue
from moe_agent.vllm.transfers import TransferMeter
from moe_agent.vllm.version import check_version

if TYPE_CHECKING:
    from moe_agent.vllm.offload_tier import OffloadTier

# Between two writes of the rank's record while requests run: its reader looks every 100 ms.
PUBLISH_INTERVAL_S = 0.05
# An output that is there this soon after the launch of the next step was there before it.
_AT_ONCE_S = 0.001


@dataclass(slots=True)
class StepWork:
    """The load of one scheduled step, of this rank and of the others, kept until the fits learn from its time."""

    scheduled_s: float
    prefill_tokens: dict[str, int]
    tokens: int
    own_prefill_tokens: int
    own_decoding: int
    others: OtherParts
    predicted_s: float = 0.0
    step_s: float = 0.0
    # Whether the next step was deferred until its end, and when it was seen to have ended; 0: it was not.
    waited_for: bool = False
    ended_s: float = 0.0


class OrderedScheduler(AsyncScheduler):
    """vLLM's asynchronous scheduler with our waiting queue, prefill plan and deferral of steps, one for each rank."""

    waiting: OrderedRequestQueue
    # The clock of the machine; virtual time sets its own.
    clock = staticmethod(time.monotonic)
    publish_interval_s = PUBLISH_INTERVAL_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_version()
        super().__init__(*args, **kwargs)
        run_dir = os.environ.get(RUN_DIR_VARIABLE)
        self._control = ControlRecordReader(Path(run_dir)) if run_dir else None
        self._pid = os.getpid()
        self._control_sequence = 0
        self._config_version = 0
        self._steps = self._preemptions = self._computed_tokens = 0
        self._step_work: deque[StepWork] = deque()
        self._last_planned: StepWork | None = None
        self._unlearnt: StepWork | None = None
        self._step_time = StepTimeFit()
        self._step_curve = StepTimeCurveFit()
        self._prefill_speed, self._deferral = PrefillSpeed(), DeferredScheduling()
        # Number of the next step, in a count that all ranks of a group share; set by the core where steps are deferred.
        self.turn = 0
        self._last_output_s = self._launched_s = 0.0
        self._busy = False
        self.waiting = OrderedRequestQueue(RequestSettings(), self._uncached_prefill_tokens)
        self._plan = PrefillPlan(self)
        self._admission = AdmissionStop(self)
        self.take_settings()
        rank = self.parallel_config.data_parallel_index
        self.turns: TurnPublisher | None = None
        # vLLM keeps the size where the ranks step together, and sets it to 1 where they are engines of their own.
        if run_dir and (ranks := self.parallel_config.data_parallel_size) > 1:
            self.join(SharedMemoryPrefillGroup(Path(run_dir), rank, ranks))
            self.turns = TurnPublisher(Path(run_dir), rank)
            _publish_turns()
        # More batches than two are on their way where a pipeline has to be filled: there waiting would leave it empty.
        has_one_stage = self.parallel_config.pipeline_parallel_size == 1
        if run_dir and self.vllm_config.scheduler_config.async_scheduling and has_one_stage:
            _defer_steps()
        self._transfers: TransferMeter | None = None
        if run_dir and KV_TRANSFER_VARIABLE in os.environ:
            self._transfers = TransferMeter(Path(run_dir), rank, self.vllm_config, self.kv_cache_config)
            self._transfers.watch(self.connector)
        transfer = self.vllm_config.kv_transfer_config
        lease_s = None if transfer is None else find_lease_s(transfer)
        self._leases = None if lease_s is None else LeaseGuard(lease_s)
        self._offload_tier = _find_offload_tier(self.connector)
        self._expert_record = _open_expert_record(Path(run_dir), rank) if run_dir else None
        self._experts, self._expert_sequence = ExpertState(), 0
        signal = EngineSignal(kv_tokens=self._count_kv_tokens(), step_tokens=self.max_num_scheduled_tokens)
        state = RankState(pid=self._pid, written_s=self.clock(), config_version=self._config_version, signal=signal)
        self._record = RankRecordWriter(Path(run_dir), rank, state) if run_dir else None
        # The same fields, writable: a frozen snapshot for each write would take longer than the write.
        self._state: Any = _writable(state)
        self._publish_at_s = -math.inf

    # 1. Decide by the settings in force.

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self.take_settings()
        if self._leases is not None:
            self._count_failed(self._leases.look())
        prefilling = self.prefilling()
        scheduled_s = self.clock()
        self._plan.begin(self._curve(), scheduled_s)
        self._complete_last_step()
        output = self._admission.schedule(lambda: super(OrderedScheduler, self).schedule(throttle_prefills))
        work = self.begin_step(output, prefilling, scheduled_s)
        self._plan.end(sum(work.prefill_tokens.values()), scheduled_s, self.turn, self._next_s())
        return output

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """The tokens of a request that a step may take; vLLM asks for each prompt, and 0 leaves the request out."""
        tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        granted = self._plan.grant(request, tokens)
        if tokens and not granted:
            self._admission.leave_out(request)
        return granted

    def join(self, group: PrefillGroup) -> None:
        """Plans prefills together with the other ranks of `group` from now on."""
        self._plan.group = group

    def _curve(self) -> StepTimeCurve | None:
        """The fitted step time at the requests that decode now; None until it is known."""
        decoding = max(len(self.running) - len(self._inflight_prefills), self._plan.others.decoding)
        return self._step_curve.at(decoding)

    def add_request(self, request: Request) -> None:
        self.take_settings()
        if (priority := priority_of(request.request_id)) is not None:
            request.priority = priority
        if self._leases is not None:
            self._count_failed(int(not self._leases.admit(request)))
        super().add_request(request)
        self._plan.publish(self.clock())
        self.publish()

    # 2. Observe what happened.

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        now_s = self.clock()
        if self._transfers is not None:
            self._transfers.observe(model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self.end_step(scheduler_output, now_s)
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        finished = super().finish_requests(request_ids, finished_status)
        self.publish()
        return finished

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        self.waiting.charge_output(request)
        transfer, encoder = super()._free_request(request, delay_free_blocks)
        if self._leases is not None:
            self._leases.stamp(transfer)
        return transfer, encoder

    def _count_failed(self, transfers: int) -> None:
        """Blocks that are not fetched any more count as failed transfers."""
        if transfers and self._transfers is not None:
            self._transfers.count_failed(transfers)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output)
        self._preemptions += 1

    def prefilling(self) -> list[str]:
        """Requests in the midst of their prefill."""
        return [request.request_id for request in self._inflight_prefills]

    def begin_step(self, output: SchedulerOutput, prefilling: list[str], scheduled_s: float) -> StepWork:
        """Records the load of a scheduled step: requests amid a prefill, new or resumed prefill, all others decode."""
        prefill_tokens = _prefill_tokens(output, prefilling)
        own_prefill_tokens = 0
        if prefill_tokens:
            own_prefill_tokens = sum(prefill_tokens.values())
            self.waiting.charge_prefill(prefill_tokens)
        tokens = output.total_num_scheduled_tokens
        decoding = len(output.num_scheduled_tokens) - len(prefill_tokens)
        work = StepWork(scheduled_s, prefill_tokens, tokens, own_prefill_tokens, decoding, self._plan.others)
        if tokens:
            work.predicted_s = self._step_curve.step_s(*_fullest(work))
        self._step_work.append(work)
        self._last_planned = work
        return work

    def end_step(self, output: SchedulerOutput, now_s: float) -> None:
        """Learns from a step whose output came at `now_s`, and publishes. Steps end in the order of their begin."""
        work = self._step_work.popleft()
        if work.tokens:
            self._computed_tokens += work.tokens
            work.step_s = (work.ended_s or now_s) - self._begun_s(work)
            overran = work.waited_for and (work.ended_s > 0.0 or now_s - self._launched_s < _AT_ONCE_S)
            self._deferral.observe(work.predicted_s, work.step_s, overran=overran)
            # The time of a step that had ended unseen is that of the wait, and would teach to wait for longer.
            if work.ended_s or not overran:
                self._learn_when_complete(work)
        self._last_output_s, self._busy = now_s, bool(self.running)
        self._steps += 1
        if self._plan.group is not None:
            self._plan.expect(self._next_s(), now_s)
        # While requests run another step ends soon; a state without any must not be left unpublished.
        if now_s >= self._publish_at_s or not self._busy:
            self.publish()

    def _begun_s(self, work: StepWork) -> float:
        """With asynchronous scheduling a step is scheduled while its predecessor runs, so it begins when that one's
        output comes; after an idle gap, or where the predecessor ended sooner, it begins when it is scheduled."""
        return max(self._last_output_s, work.scheduled_s) if self._busy else work.scheduled_s

    @property
    def keeps_step(self) -> bool:
        """Whether this rank schedules no sooner than another one of its group has to, and with the first that does."""
        return self._plan.group is not None and self._plan.settings.defer_scheduling

    def defer_s(self) -> float:
        """Seconds by which the scheduling of the next step may still be deferred; 0 where it may not.

        A rank without a step in flight waits for the ranks of its group that have one.
        """
        if len(self._step_work) > 1 or not self._plan.settings.defer_scheduling:
            return 0.0
        now_s = self.clock()
        next_s = self._next_s() if self._step_work else self._plan.others_next_s(self.turn, now_s)
        return max(0.0, next_s - now_s)

    def _next_s(self) -> float:
        """When the next step will be scheduled; an estimate while two steps are in flight; 0 while none is."""
        if not self._step_work:
            return 0.0
        first, last = self._step_work[0], self._step_work[-1]
        ends_s = first.predicted_s if last is not first else 0.0
        return self._begun_s(first) + ends_s + self._deferral.wait_s(last.predicted_s)

    def others_scheduled(self) -> bool:
        """Whether another rank of the group has scheduled its part of the next step."""
        return self._plan.others_scheduled(self.turn, self.clock())

    def waited(self, *, has_ended: bool) -> None:
        """Notes that the next step was deferred; `has_ended`: the step that runs was seen to have ended."""
        work = self._step_work[0]
        work.waited_for, work.ended_s = True, self.clock() if has_ended else 0.0

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """vLLM asks for it as soon as a step was launched."""
        self._launched_s = self.clock()
        return super().get_grammar_bitmask(scheduler_output)

    def _complete_last_step(self) -> None:
        """Replaces the predicted load of the other ranks in the last step by the load that they published since."""
        if self._last_planned is not None and self._plan.group is not None:
            self._last_planned.others = self._plan.others_before

    def _learn_when_complete(self, work: StepWork) -> None:
        """Learns from a step; in a group at the end of the next step, when the load of all ranks is known."""
        if self._plan.group is None:
            self._learn(work)
            return
        if self._unlearnt is not None:
            self._learn(self._unlearnt)
        self._unlearnt = work

    def _learn(self, work: StepWork) -> None:
        prefill_tokens, decoding, all_tokens = _fullest(work)
        step_s = work.step_s
        self._step_time.observe(prefill_tokens=prefill_tokens, decoding_requests=decoding, step_s=step_s)
        self._step_curve.observe(
            prefill_tokens=prefill_tokens, decoding_requests=decoding, all_tokens=all_tokens, step_s=step_s
        )
        if prefill_tokens:
            self._prefill_speed.observe(prefill_tokens, step_s)
            self.waiting.take_speed(self._prefill_speed.tokens_per_s)

    # 3. Publish.

    def publish(self) -> None:
        """Writes the rank's record, if there is one."""
        if self._record is None:
            return
        self.take_experts()
        prefilling, prefill_tokens = self._prefill_left()
        running, waiting = self.get_request_counts()
        state, signal, now_s = self._state, self._state.signal, self.clock()
        state.written_s = now_s
        state.config_version = self._taken_version()
        signal.step = self._steps
        signal.running = running
        # A session of streaming input waits for its client between two chunks, and not for a step.
        signal.waiting = waiting - self.num_waiting_for_streaming_input
        signal.waiting_prefill_tokens = self._waiting_prefill_tokens()
        signal.running_prefill_tokens = prefill_tokens
        signal.scheduled_prefill_tokens = sum([work.own_prefill_tokens for work in self._step_work])
        signal.busy_s = self._busy_s(now_s)
        signal.decode_tokens = running - prefilling
        signal.kv_usage = self.get_kv_cache_usage()
        signal.preemptions = self._preemptions
        signal.computed_tokens = self._computed_tokens
        signal.step_time = self._step_time.line
        signal.expert_balance = self._experts.balance
        signal.expert_pressure = self._experts.pressure
        self._record.write(state)
        self._publish_at_s = now_s + self.publish_interval_s

    def _busy_s(self, now_s: float) -> float:
        """Predicted seconds until the steps in flight have ended; 0 without any."""
        if not self._step_work or (model := self._step_time.line) is None:
            return 0.0
        steps_s = sum([model.step_s(*_fullest(work)[:2]) for work in self._step_work])
        return max(0.0, self._begun_s(self._step_work[0]) + steps_s - now_s)

    def _prefill_left(self) -> tuple[int, int]:
        """How many running requests have prompt tokens left to compute, and how many tokens these are.

        vLLM counts a token as computed once it is scheduled; the tokens of a step in flight are counted as left here.
        """
        if not self._inflight_prefills and not any(work.prefill_tokens for work in self._step_work):
            return 0, 0
        left = {
            request.request_id: request.num_tokens - request.num_computed_tokens
            for request in self._inflight_prefills
            if request.status is RequestStatus.RUNNING
        }
        for work in self._step_work:
            for request_id, tokens in work.prefill_tokens.items():
                request = self.requests.get(request_id)
                if request is not None and request.status is RequestStatus.RUNNING:
                    left[request_id] = left.get(request_id, 0) + tokens
        return len(left), sum(left.values())

    def _waiting_prefill_tokens(self) -> int:
        tokens = self.waiting.prefill_tokens
        for request in self.kv_holding_waiting:
            if request.status is not RequestStatus.WAITING_FOR_STREAMING_REQ:
                tokens += request.num_tokens - request.num_computed_tokens
        return tokens

    # 4. Size and order.

    def _uncached_prefill_tokens(self, request: Request) -> int:
        """Tokens to compute before the next new one; looks at the prefix caches without a trace in their statistics."""
        if request.num_computed_tokens:
            return request.num_tokens - request.num_computed_tokens
        if request.kv_transfer_params and request.kv_transfer_params.get("do_remote_prefill"):
            # Another engine computed the prompt; here only its last token is computed.
            return 1
        manager = self.kv_cache_manager
        if not manager.prefix_cache_lookup_enabled(request):
            return request.num_tokens
        _, cached_tokens, _ = manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)
        if self._offload_tier is not None:
            cached_tokens = self._offload_tier.held_tokens(request, cached_tokens)
        return request.num_tokens - cached_tokens

    def _count_kv_tokens(self) -> int:
        """Tokens for which the KV cache has room, as vLLM counts them, or its tier, which keeps copies of them."""
        groups = self.kv_cache_config.kv_cache_groups
        if not groups:
            return 0
        block_tokens = min(group.kv_cache_spec.block_size for group in groups)
        tokens = self.kv_cache_config.num_blocks // len(groups) * block_tokens
        return max(tokens, 0 if self._offload_tier is None else self._offload_tier.room_tokens)

    def take_settings(self) -> None:
        """Applies new settings; settings that are being written are taken at the next step.

        Two loads from memory when nothing changed.
        """
        if self._control is None or (sequence := self._control.sequence()) == self._control_sequence:
            return
        try:
            control = self._control.read()
        except RecordUnreadableError:
            return
        self._control_sequence, self._config_version = sequence, control.version
        self.waiting.reorder(control.request)
        self._plan.take(control.request)
        # vLLM reads its own policy for one thing: under `priority` the victim of a preemption is the least urgent
        # request, the newest among equals; under `fcfs` it is the one admitted last.
        self.policy = SchedulingPolicy.FCFS if control.request.policy == "fcfs" else SchedulingPolicy.PRIORITY

    def take_experts(self) -> None:
        """Reads the state of the expert group; one load from memory when it has not changed."""
        if self._expert_record is None or (sequence := self._expert_record.sequence()) == self._expert_sequence:
            return
        try:
            self._experts = self._expert_record.read()
        except RecordUnreadableError:
            return
        self._expert_sequence = sequence

    def _taken_version(self) -> int:
        """Version of the settings that both the queue and the expert group apply."""
        if self._expert_record is None:
            return self._config_version
        return min(self._config_version, self._experts.config_version)


def _find_offload_tier(connector: Any) -> "OffloadTier | None":
    """Only where there is a connector, whose modules are then loaded already."""
    if connector is None:
        return None
    from moe_agent.vllm.offload_tier import find_tier

    return find_tier(connector)


# The module of the cores is loaded here and not above: only an engine core has loaded it already.
def _defer_steps() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    defer_steps(EngineCoreProc)


def _publish_turns() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    publish_turns(EngineCoreProc)


def _prefill_tokens(output: SchedulerOutput, prefilling: list[str]) -> dict[str, int]:
    """Prompt tokens that a step computes, by request; a step that only decodes is found without looking at requests."""
    resumed, new = output.scheduled_cached_reqs.resumed_req_ids, output.scheduled_new_reqs
    if not (prefilling or resumed or new):
        return {}
    scheduled = output.num_scheduled_tokens
    candidates = [*prefilling, *resumed, *(request.req_id for request in new)]
    return {name: scheduled[name] for name in candidates if name in scheduled}


def _fullest(work: StepWork) -> tuple[int, int, int]:
    """Prompt tokens and decoding requests of the fullest rank, and the tokens of all ranks."""
    prefill_tokens, decoding, tokens = work.others
    if not tokens:
        return work.own_prefill_tokens, work.own_decoding, work.tokens
    return max(work.own_prefill_tokens, prefill_tokens), max(work.own_decoding, decoding), work.tokens + tokens


def _writable(state: RankState) -> SimpleNamespace:
    """The fields of a state, in objects whose fields can be set."""
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    signal = SimpleNamespace(**{field.name: getattr(state.signal, field.name) for field in fields(state.signal)})
    return SimpleNamespace(**{**values, "signal": signal})


def _open_expert_record(run_dir: Path, rank: int) -> ExpertRecordReader | None:
    """The worker puts its record in place while it loads the model, which is before there is a scheduler."""
    try:
        return ExpertRecordReader(run_dir, rank)
    except RecordUnreadableError:
        return None
