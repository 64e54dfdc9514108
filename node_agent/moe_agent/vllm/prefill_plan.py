"""The prefills of the next step of one rank: who could start, how many tokens, and who lets others go first.

Made and asked by the scheduler, which alone calls it: `begin` before vLLM schedules a step, `grant` for each prompt
that vLLM is about to put into it, `end` after.

Invariants: decoding requests are never touched; where nothing decodes, all that vLLM would take is granted, so that no
request is ever stuck; a request gets no more than vLLM would have given. Under another order than `sjf` all is granted
always: `fcfs` and `priority` are vLLM's own, step for step.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from moe_scheduling.request.order import RequestPolicy, RequestSettings, Waiting
from moe_scheduling.request.prefill_budget import RankLoad, StepTimeCurve, plan_prefill_tokens
from vllm.v1.request import Request, RequestStatus

from moe_agent.shared_memory.prefill_record import PrefillState, StepPart
from moe_agent.vllm.prefill_group import WAVE_TURNS, OtherParts, PrefillGroup, load_in_this_step, sum_parts

_UNBOUNDED = 2**53


class PrefillPlan:
    """See the module.

    Args:
        scheduler: a vLLM scheduler whose waiting queue is an `OrderedRequestQueue`.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._kv_groups = max(1, len(scheduler.kv_cache_config.kv_cache_groups))
        self._block_tokens: int = scheduler.block_size
        self._decided_s = -math.inf
        self._before = RankLoad()
        self._left = _UNBOUNDED
        self._allowed: dict[str, int] = {}
        self._settings = RequestSettings()
        self.group: PrefillGroup | None = None
        self._published: PrefillState | None = None
        self._parts = (StepPart(), StepPart())
        self._turn, self._next_s = 0, 0.0
        # What the other ranks put into the planned step, as far as is known; and what into the one before it.
        self.others = OtherParts()
        self.others_before = OtherParts()

    def take(self, settings: RequestSettings) -> None:
        """Plans by `settings` from now on; what does more than order acts under `sjf` alone."""
        if settings.policy is not RequestPolicy.SJF:
            settings = replace(
                settings, yield_prefills=False, cut_prefills=False, defer_scheduling=False, kv_growth_blocks=0
            )
        self._settings = settings

    @property
    def settings(self) -> RequestSettings:
        """Those in force."""
        return self._settings

    def begin(self, curve: StepTimeCurve | None, now_s: float) -> None:
        """Plans the step that vLLM schedules now."""
        scheduler = self._scheduler
        self._left, self._allowed = _UNBOUNDED, {}
        partial = scheduler._inflight_prefills
        if self.group is None and not (partial or scheduler.waiting):
            return
        ready = self._ready()
        if self.group is not None:
            self._plan_group(self.group, ready, curve, now_s)
        elif self._settings.cut_prefills and curve is not None and curve.knees:
            self._bound([self._load(ready)], curve)
        if self._settings.yield_prefills and partial and scheduler.waiting:
            self._let_others_first(ready)

    def _plan_group(
        self, group: PrefillGroup, ready: list[Waiting[Request]], curve: StepTimeCurve | None, now_s: float
    ) -> None:
        self._before = self._load(ready)
        states = group.others(now_s)
        others = [load_in_this_step(state, self._decided_s, now_s) for state in states]
        before_s, last_s = self._parts[1].planned_s, self._decided_s
        self.others_before = sum_parts(
            part
            for state in states
            for part in state.parts
            if (before_s + last_s) / 2 < part.planned_s <= (last_s + now_s) / 2
        )
        self._decided_s = now_s
        level = self._bound([self._before, *others], curve)
        self.others = sum_parts(StepPart(now_s, min(level, load.prefill_tokens), load.decoding) for load in others)

    def _bound(self, loads: list[RankLoad], curve: StepTimeCurve | None) -> int:
        """The own load comes first."""
        level = plan_prefill_tokens(loads, curve if self._settings.cut_prefills else None)
        # The level is made of estimates: where nothing is to be cut it must not cut either.
        if loads[0].decoding and self._settings.cut_prefills:
            self._left = level
        return level

    def grant(self, request: Request, tokens: int) -> int:
        """How many of the tokens that vLLM would compute of a prompt it may; 0: none in this step."""
        if not request.is_prefill_chunk and request.status is RequestStatus.RUNNING:
            return tokens
        if request.num_computed_tokens == 0 and not self._fits(request):
            return 0
        granted = min(tokens, self._left, self._allowed.get(request.request_id, _UNBOUNDED))
        self._left -= granted
        return granted

    def end(self, computed_tokens: int, now_s: float, turn: int, next_s: float) -> None:
        """The step of this turn was scheduled with so many prompt tokens; the next one will be at `next_s`."""
        if self.group is None:
            return
        self._turn, self._next_s = turn, next_s
        self._parts = (StepPart(now_s, computed_tokens, self._before.decoding), self._parts[0])
        self.publish(now_s)

    def publish(self, now_s: float) -> None:
        """Makes the present load visible to the other ranks."""
        if self.group is not None:
            after = self._load(self._ready())
            self._published = PrefillState(
                now_s, self._decided_s, self._before, after, self._parts, self._turn, self._next_s
            )
            self.group.publish(self._published)

    def expect(self, next_s: float, now_s: float) -> None:
        """More is known of when the next step will be scheduled."""
        if self.group is not None and self._published is not None and self._settings.defer_scheduling:
            self._next_s = next_s
            self._published = self._published._replace(written_s=now_s, next_s=next_s)
            self.group.publish(self._published)

    def others_scheduled(self, turn: int, now_s: float) -> bool:
        """Whether another rank has scheduled its part of the step of this turn."""
        return self.group is not None and any(
            turn <= state.turn < turn + WAVE_TURNS - turn % WAVE_TURNS for state in self.group.others(now_s)
        )

    def others_next_s(self, turn: int, now_s: float) -> float:
        """When the last of those schedules that took part in the step before this turn; 0 where none did."""
        if self.group is None:
            return 0.0
        return max((state.next_s for state in self.group.others(now_s) if state.turn == turn - 1), default=0.0)

    def _load(self, ready: list[Waiting[Request]]) -> RankLoad:
        scheduler = self._scheduler
        begun = [request for request in scheduler._inflight_prefills if request.status is RequestStatus.RUNNING]
        tokens = sum(request.num_tokens - request.num_computed_tokens for request in begun)
        tokens += sum(int(waiting.size_tokens) for waiting in ready)
        holding = [
            request
            for request in scheduler.kv_holding_waiting
            if request.status is not RequestStatus.WAITING_FOR_STREAMING_REQ
        ]
        tokens += sum(request.num_tokens - request.num_computed_tokens for request in holding)
        return RankLoad(
            min(tokens, scheduler.max_num_scheduled_tokens),
            len(scheduler.running) - len(begun),
            len(begun) + len(scheduler.waiting),
        )

    def _ready(self) -> list[Waiting[Request]]:
        """Those first in the queue that KV blocks and `max_num_seqs` allow, up to the tokens of a step."""
        scheduler = self._scheduler
        if not scheduler.waiting:
            return []
        free_seqs = scheduler.max_num_active_reqs - len(scheduler.running) - scheduler.num_waiting_for_streaming_input
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks() - self._blocks(_left(scheduler))
        running = len(scheduler.running)
        tokens = 0
        ready: list[Waiting[Request]] = []
        for waiting in scheduler.waiting.in_order():
            free -= self._blocks(waiting.size_tokens)
            if free_seqs <= len(ready) or tokens >= scheduler.max_num_scheduled_tokens:
                break
            if running + len(ready) and free < self._growth(running + len(ready)):
                break
            tokens += int(waiting.size_tokens)
            ready.append(waiting)
        return ready

    def _let_others_first(self, ready: list[Waiting[Request]]) -> None:
        """A prompt in chunks gets what waiting ones that come before it leave."""
        scheduler = self._scheduler
        step_tokens = min(self._left, scheduler.max_num_scheduled_tokens - len(scheduler.running))
        for request in scheduler._inflight_prefills:
            key = scheduler.waiting.key(request, request.num_tokens - request.num_computed_tokens)
            before = sum(int(waiting.size_tokens) for waiting in ready if waiting.key < key)
            if before:
                self._allowed[request.request_id] = max(0, step_tokens - before)

    def _fits(self, request: Request) -> bool:
        """Whether the running requests can still grow once this one is admitted."""
        scheduler = self._scheduler
        running = len(scheduler.running)
        if not self._settings.kv_growth_blocks or not running:
            return True
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return bool(free - self._blocks(request.num_tokens) >= self._growth(running))

    def _growth(self, running: int) -> int:
        return self._settings.kv_growth_blocks * running * self._kv_groups

    def _blocks(self, tokens: float) -> int:
        return math.ceil(tokens / self._block_tokens) * self._kv_groups


def _left(scheduler: Any) -> int:
    prefilling: Iterable[Request] = scheduler._inflight_prefills
    return sum(request.num_tokens - request.num_computed_tokens for request in prefilling)
