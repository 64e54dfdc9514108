"""The prefills of the next step of one rank: which requests, and how many tokens of each.

Made and called by the scheduler alone: `begin` before vLLM schedules a step, `grant` for each prompt that vLLM is about
to put into it, `end` after it.

Invariants: decoding requests are never changed; where nothing decodes, vLLM's own amount is granted, so that no request
is ever stuck; a request gets at most what vLLM would have given it. Under `fcfs` and `priority` everything is granted:
an engine does what vLLM does, step for step.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from moe_scheduling.request.order import RequestPolicy, RequestSettings
from moe_scheduling.request.prefill_budget import RankLoad, StepTimeCurve, plan_prefill_tokens
from moe_scheduling.request.waiting_queue import Waiting
from vllm.v1.request import Request, RequestStatus

from moe_agent.shared_memory.prefill_record import PrefillState, StepPart
from moe_agent.vllm.prefill_group import WAVE_TURNS, OtherParts, PrefillGroup, load_in_this_step, sum_parts

_UNBOUNDED = 2**53


class PrefillPlan:
    """Bounds the prompt tokens of each step by the plan of the rank's group.

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
        # Tokens and requests of the other ranks in the planned step, as far as known; and in the step before it.
        self.others = OtherParts()
        self.others_before = OtherParts()

    def take(self, settings: RequestSettings) -> None:
        """Plans by `settings` from now on; all switches are off under another policy than `sjf`."""
        if settings.policy is not RequestPolicy.SJF:
            settings = replace(
                settings,
                yield_prefills=False,
                cut_prefills=False,
                defer_scheduling=False,
                kv_growth_blocks=0,
                inter_token_s=None,
            )
        self._settings = settings

    @property
    def settings(self) -> RequestSettings:
        """The settings in force; switches are off where the policy turns them off."""
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
        elif self._settings.cut_prefills and curve is not None and (curve.knees or self._settings.inter_token_s):
            self._bound([self._load(ready)], curve)
        if self._settings.yield_prefills and partial and scheduler.waiting:
            self._yield_to_waiting(ready)

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
        """Returns the planned level and makes it the bound of this step. The rank's own load comes first."""
        settings = self._settings
        level = plan_prefill_tokens(loads, curve if settings.cut_prefills else None, settings.inter_token_s)
        # The level comes from estimates: where cutting is off it must not bound the step. A bound between tokens is one
        # for all ranks, since answers on any of them wait for all.
        decoding = loads[:1] if settings.inter_token_s is None else loads
        if settings.cut_prefills and any(load.decoding for load in decoding):
            self._left = level
        return level

    def grant(self, request: Request, tokens: int) -> int:
        """Returns how many of `tokens`, which vLLM would compute of a prompt, this step may; 0: none."""
        if not request.is_prefill_chunk and request.status is RequestStatus.RUNNING:
            return tokens
        if request.num_computed_tokens == 0 and not self._fits(request):
            return 0
        granted = min(tokens, self._left, self._allowed.get(request.request_id, _UNBOUNDED))
        self._left -= granted
        return granted

    def end(self, computed_tokens: int, now_s: float, turn: int, next_s: float) -> None:
        """Publishes that the step of this turn was scheduled.

        Args:
            computed_tokens: its prompt tokens.
            now_s: the time.
            turn: number of the step, as all ranks count.
            next_s: when the next step will be scheduled.
        """
        if self.group is None:
            return
        self._turn, self._next_s = turn, next_s
        self._parts = (StepPart(now_s, computed_tokens, self._before.decoding), self._parts[0])
        self.publish(now_s)

    def publish(self, now_s: float) -> None:
        """Publishes the present load to the other ranks."""
        if self.group is not None:
            after = self._load(self._ready())
            self._published = PrefillState(
                now_s, self._decided_s, self._before, after, self._parts, self._turn, self._next_s
            )
            self.group.publish(self._published)

    def expect(self, next_s: float, now_s: float) -> None:
        """Publishes a better estimate of when the next step will be scheduled."""
        if self.group is not None and self._published is not None and self._settings.defer_scheduling:
            self._next_s = next_s
            self._published = self._published._replace(written_s=now_s, next_s=next_s)
            self.group.publish(self._published)

    def others_scheduled(self, turn: int, now_s: float) -> bool:
        """Returns whether another rank has scheduled its part of the step of this turn."""
        return self.group is not None and any(
            turn <= state.turn < turn + WAVE_TURNS - turn % WAVE_TURNS for state in self.group.others(now_s)
        )

    def others_next_s(self, turn: int, now_s: float) -> float:
        """Returns when the last rank of the step before this turn schedules the next one; 0 where none took part."""
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
        """Returns the first waiting requests that KV blocks, `max_num_seqs` and the token budget of a step allow."""
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

    def _yield_to_waiting(self, ready: list[Waiting[Request]]) -> None:
        """Grants each prompt in chunks the tokens that waiting requests with a lesser key leave of the step."""
        scheduler = self._scheduler
        step_tokens = min(self._left, scheduler.max_num_scheduled_tokens - len(scheduler.running))
        for request in scheduler._inflight_prefills:
            key = scheduler.waiting.key(request, request.num_tokens - request.num_computed_tokens)
            before = sum(int(waiting.size_tokens) for waiting in ready if waiting.key < key)
            if before:
                self._allowed[request.request_id] = max(0, step_tokens - before)

    def _fits(self, request: Request) -> bool:
        """Returns whether enough KV blocks stay free for the running requests once this one is admitted."""
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
