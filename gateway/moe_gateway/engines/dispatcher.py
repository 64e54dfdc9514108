"""The choice of an engine for each request, by signals, requests in flight and cached prefixes.

One for a gateway. Exchanges ask it for a target and report the result; signal watchers report the engines' signals. It
runs on the event loop's thread alone, does no I/O, has no clock. Every decision is `moe_scheduling`'s.

Its parts each own one piece of state and are its one writer: `EngineFleet` (which engines there are and may get
requests), `TargetStates` (requests in flight, signals, calibration), `JobBuilder` (sizes, prefixes, sessions),
`GroupRotation` (weights and turns) and `HoldQueue` (requests that wait).
"""

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

from moe_contract.agent_state import EngineState
from moe_contract.gateway_config import EngineAddress, GatewayConfig, Group
from moe_scheduling.engine.choice import Decision, EngineSettings, Job, Refuse, RefuseReason, Send, choose_target
from moe_scheduling.engine.target_list import TargetList
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.request.fairness import ANONYMOUS_TENANT
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.signals import EngineSignal, Target

from moe_gateway.engines.fleet import Engine, EngineFleet
from moe_gateway.engines.group_rotation import GroupRotation
from moe_gateway.engines.hold_queue import HELD, Held, HoldQueue, Rejection, Waiter
from moe_gateway.engines.job_builder import JobBuilder
from moe_gateway.engines.placements import make_placements
from moe_gateway.engines.served_models import find_partial
from moe_gateway.engines.target_states import InFlightRequest, TargetStates
from moe_gateway.request.parsing import Parsed

# The tokens of a prompt are read from this many first answers, then from one in `TOKENISATION_PERIOD`.
FIRST_TOKENISATION_SAMPLES = 1000
TOKENISATION_PERIOD = 16
# A request that only few engines can answer waits for one that is out for no longer than this.
SHORT_PAUSE_S = 0.5

log = logging.getLogger("moeserving.gateway")


class Dispatcher:
    """Chooses targets, and holds the requests that no engine may take.

    Args:
        config: addresses or discovery, settings and limits.
        first_turn: another number for each gateway, so that several do not choose alike.

    Attributes:
        settings: of the choice.
        request_settings: order of the hold queue.
        decisions: choices by reason; a metric.
        models: names of the models that can be asked for; empty while none is known.
        stalled: targets that have an unanswered request and make no steps.
        partial_models: by a name that only some engines serve, the names of those engines.
        placements: where requests may be split between two engines; None: each goes to one.
    """

    def __init__(self, config: GatewayConfig, *, first_turn: int = 0) -> None:
        discovery = config.discovery
        self.discovers = discovery is not None
        self.settings: EngineSettings = config.dispatch
        self.request_settings: RequestSettings = config.request
        self.hold_timeout_s, self.hold_requests = config.limits.hold_timeout_s, config.limits.hold_requests
        self.decisions: Counter[str] = Counter()
        self.models = self._configured_models = frozenset() if config.model is None else frozenset({config.model})
        self.partial_models: Mapping[str, frozenset[str]] = {}
        self._fleet, self._targets, self._jobs = EngineFleet(), TargetStates(), JobBuilder()
        self._groups = GroupRotation(() if discovery is None else discovery.groups, first_turn=first_turn)
        self._queue = HoldQueue(config.request, most_requests=self.hold_requests)
        self._turn = first_turn
        self.stalled: frozenset[Target] = frozenset()
        self.placements = make_placements(config.disaggregation, self)
        self.set_engines(config.engines)

    def set_engines(self, addresses: Collection[EngineAddress]) -> None:
        """These engines and no others; those whose address stays keep their state.

        Requests at an engine that goes run to their end there, and count as in flight until then.
        """
        gone = self._fleet.replace(addresses)
        self._targets.replace(self.engines.values(), gone)
        for engine in gone:
            self._forget(engine)
        self._gather_models()
        self._gather_groups()

    def set_offers(self, groups: Mapping[str, str], offered: Collection[str], now_s: float) -> None:
        """The group of each engine by its name, and which engines Kubernetes offers for new requests."""
        self._fleet.offer(groups, offered)
        for engine in self.engines.values():
            self._refresh(engine, now_s)
        self._gather_groups()
        self.release_held(now_s)

    def set_groups(self, groups: Collection[Group], now_s: float) -> None:
        """The weights of the groups."""
        self._groups.set_weights(groups)
        self.release_held(now_s)

    def set_policies(self, dispatch: EngineSettings, request: RequestSettings, now_s: float) -> None:
        """Other settings from now on; held requests are ordered anew."""
        self.settings, self.request_settings = dispatch, request
        self.placements = self.placements or make_placements(None, self)
        self._queue.reorder(request)
        self.release_held(now_s)

    def _gather_groups(self) -> None:
        states = self.target_states.items()
        self._groups.set_targets((self.engines[target.server].group, state) for target, state in states)

    def _gather_models(self) -> None:
        self.models = self._fleet.models() or self._configured_models
        self.partial_models = find_partial(self.engines.values())
        self._jobs.set_models(self.models)

    # Signals of engines.

    def observe(self, target: Target, signal: EngineSignal, observed_s: float, now_s: float) -> None:
        """A rank was in this state at `observed_s`; unknown targets are ignored."""
        if self._targets.observe(target, signal, observed_s):
            self._jobs.set_room(target, signal.kv_tokens)
            self.release_held(now_s)

    def set_ready(self, name: str, ready: bool, now_s: float, *, draining: bool = False, stuck: bool = False) -> None:
        """An engine takes new requests, or no more; `stuck`: one of its ranks makes no steps."""
        self._refresh_and_release(self._fleet.set_ready(name, ready, draining=draining, stuck=stuck), now_s)

    def set_reachable(self, name: str, reachable: bool, reported: EngineState | None = None) -> bool:
        """The source of an engine's signals answers, or no more; returns whether that has changed."""
        return self._fleet.set_reachable(name, reachable, reported) is not None

    def set_process(self, name: str, pid: int | None, identity: str = "", *, exchanges_blocks: bool = False) -> None:
        """The process that serves and the engine's identity; another process has nothing cached, and its own speed."""
        if (engine := self._fleet.set_process(name, pid, identity, exchanges_blocks=exchanges_blocks)) is not None:
            self._forget(engine)

    def _forget(self, engine: Engine) -> None:
        """Another engine process has taken its place, or none: nothing is cached there, and its speed is another."""
        for target in engine.targets:
            self._targets.forget(target)
            self._jobs.forget(target)
        if self.placements is not None:
            self.placements.forget(engine.address.name)

    def set_models(self, name: str, rows: Mapping[str, Any], *, listed: bool = True) -> None:
        """What an engine lists of the models that it serves, by their names; `listed`: these are all of them."""
        if self._fleet.set_models(name, rows, listed=listed) is not None:
            self._gather_models()

    def unanswered_prefill_tokens(self, name: str) -> Mapping[int, int]:
        """By rank of an engine, uncached prompt tokens of the requests sent there that have no answer yet."""
        return self._targets.unanswered_prefill_tokens(self.engines[name].targets)

    def _refresh(self, engine: Engine, now_s: float) -> bool:
        accepting = engine.may_accept(now_s)
        self._targets.set_accepting(engine.targets, accepting)
        return self._use_the_last(now_s) or accepting

    def _use_the_last(self, now_s: float) -> bool:
        """Uses engines that answered errors while no other may get requests; returns whether there are any."""
        suspects = self._fleet.ejected()
        if not suspects:
            return False
        servers = {state.target.server for state in self.open_targets()}
        is_alone = not self._fleet.any_may_accept(servers, now_s)
        models = self.partial_models.values()
        sole = {server for named in models if not self._fleet.any_may_accept(named, now_s) for server in named}
        for engine in suspects:
            is_last = is_alone or engine.address.name in sole
            accepting = engine.may_accept_alone(now_s) if is_last else engine.may_accept(now_s)
            self._targets.set_accepting(engine.targets, accepting)
        return is_alone or bool(sole)

    def _refresh_and_release(self, engine: Engine | None, now_s: float) -> None:
        if engine is not None and self._refresh(engine, now_s):
            self.release_held(now_s)

    # A request from its admission to its end.

    def build_job(
        self, parsed: Parsed, session: str | None, tenant: str = ANONYMOUS_TENANT
    ) -> tuple[Job, tuple[int, ...]]:
        """The job of a request, and the keys of its prompt's blocks."""
        return self._jobs.build(parsed, session, tenant)

    def count_tokens(self, parsed: Parsed) -> int:
        """Tokens of a prompt, as far as they are known before an engine has read it."""
        return self._jobs.count_tokens(parsed)

    def admit(self, waiter: Waiter, now_s: float) -> Send | Held | Rejection:
        """Decides about a request that came, or that another engine failed: send it now, hold it, or reject it.

        Held requests go first: while any request that needs computing stays held, so does this one.
        """
        if waiter.attempts.is_late(now_s):
            return Rejection.DEADLINE
        waiting = self._queue.waiters
        if waiting and waiter.computes:
            self.release_held(now_s)
            if waiting:
                return self._hold(waiter, now_s)
        decision = self.choose(waiter.job, now_s, waiter.attempts.failed_targets, computes=waiter.computes)
        if type(decision) is Send:
            return decision
        if isinstance(decision, Refuse) and not self.engines and not self.discovers:
            return Rejection.NO_ENGINE_CONFIGURED
        if isinstance(decision, Refuse) and not self._may_hold(waiter, now_s):
            return Rejection.NO_FITTING_ENGINE
        return self._hold(waiter, now_s)

    def _may_hold(self, waiter: Waiter, now_s: float) -> bool:
        """Whether a request that no target takes may wait: one that waits for a few engines would stop all others."""
        servers = self._servers_of(waiter.job)
        if servers is None or self._fleet.any_may_accept(servers, now_s + SHORT_PAUSE_S):
            return True
        return not any(state.accepting for state in self.open_targets() if state.target.server not in servers)

    def _hold(self, waiter: Waiter, now_s: float) -> Held | Rejection:
        self._queue.take_speed(self._targets.first_modelled)
        if self._queue.push(waiter, now_s):
            return HELD
        return Rejection.QUEUE_FULL_SATURATED if self.accepting else Rejection.QUEUE_FULL_NO_ENGINE

    def choose(self, job: Job, now_s: float, tried: Collection[Target] = (), *, computes: bool = True) -> Decision:
        """Which target takes it now; what an engine answers without computing may go to a saturated one too."""
        self._turn += 1
        servers = self._servers_of(job)
        if not computes:
            settings, known = replace(self.settings, saturation_s=None), self.open_targets()
            states = list(known) if servers is None else _at(servers, known)
            return choose_target(job, states, settings, turn=self._turn, now_s=now_s, exclude=tried)
        placements = self.placements
        if placements is None and servers is None and not self.discovers:
            return choose_target(job, self._targets.ordered, self.settings, turn=self._turn, now_s=now_s, exclude=tried)

        def choose_in(states: TargetList, turn: int) -> Decision:
            among = states if servers is None else _at(servers, states)
            if placements is not None:
                return placements.choose(job, among, turn, now_s, tried)
            return choose_target(job, among, self.settings, turn=turn, now_s=now_s, exclude=tried)

        if not self.discovers:
            return choose_in(self._targets.ordered, self._turn)
        return self._groups.choose(choose_in, self._group_of(job.session_target))

    def _servers_of(self, job: Job) -> Set[str] | None:
        """The names of the engines that can answer a job; None: any."""
        servers: Set[str] | None = None if job.server is None else frozenset({job.server})
        if servers is None and self.partial_models and job.model is not None:
            servers = self.partial_models.get(job.model)
        if job.servers is None:
            return servers
        return job.servers if servers is None else servers & job.servers

    def record_response(self, response_id: str, target: Target, owner: str | None = None) -> None:
        """A response came from this target, whose engine keeps it; `owner` is the tenant, None without keys."""
        self._jobs.responses.record(response_id, target.server, owner)

    def is_lost(self, response_id: str, owner: str | None = None) -> bool:
        """Whether no engine is known that has a response of this tenant; without keys a single engine is asked."""
        if owner is not None:
            return not self._jobs.responses.belongs_to(response_id, owner)
        return len(self.engines) > 1 and self._jobs.responses.find(response_id) is None

    def _group_of(self, target: Target | None) -> str | None:
        engine = None if target is None else self.engines.get(target.server)
        return None if engine is None else engine.group

    def send(
        self, job: Job, keys: tuple[int, ...], session: str | None, sending: Send, now_s: float
    ) -> InFlightRequest:
        """Counts the job as in flight at the chosen target, and remembers its prefix and session there."""
        tokens = job.uncached_tokens(sending.target)
        self._queue.charge(job.tenant, tokens)
        self.decisions[sending.reason] += 1
        request = self._targets.send(sending, tokens, now_s)
        if keys or session is not None:
            self._jobs.record(keys, session, request)
        return self._begin_trial(request, now_s)

    def _begin_trial(self, request: InFlightRequest, now_s: float) -> InFlightRequest:
        if (engine := self._fleet.begin_trial(request.target, request.key, now_s)) is not None:
            self._refresh(engine, now_s)
        return request

    def reserve(self, target: Target, now_s: float) -> InFlightRequest:
        """Counts a request as in flight at a target that will get it once its prompt is computed elsewhere."""
        return self._begin_trial(self._targets.reserve(target, now_s), now_s)

    def answer(self, request: InFlightRequest, now_s: float, *, is_first_token: bool = True) -> None:
        """The engine answers what it was asked; `is_first_token`: this came as soon as the first token.

        An error is no such answer: of the engine it is reported to `count_error`, of the client to nobody.
        """
        self._targets.answer(request, now_s, is_first_token=is_first_token)
        if request.uncomputed_keys:
            self._jobs.confirm(request)
        if (engine := self._fleet.succeed(request.target)) is not None:
            self._refresh_and_release(engine, now_s)
        if self._queue.waiters:
            self.release_held(now_s)

    def complete(self, request: InFlightRequest, now_s: float) -> None:
        """The engine gave its whole answer without an error."""
        self._refresh_and_release(self._fleet.complete(request.target), now_s)

    def settle(self, request: InFlightRequest, now_s: float, *, successor: InFlightRequest | None = None) -> None:
        """The request has ended there, or `successor` has taken its place; a second call changes nothing."""
        if successor is not None:
            self._fleet.pass_trial(request.target, request.key, successor.key, now_s)
        self._targets.settle(request, now_s)
        if request.uncomputed_keys:
            self._jobs.discard(request)
        if (engine := self._fleet.end_trial(request.target, request.key)) is not None:
            self._refresh_and_release(engine, now_s)
        if self._queue.waiters:
            self.release_held(now_s)

    def count_error(self, target: Target, now_s: float) -> None:
        """The engine answered with an error of its own; after some of them it is ejected while others work."""
        self._refresh_and_release(self._fleet.err(target, now_s), now_s)

    def has_other(self, job: Job, target: Target, tried: Collection[Target]) -> bool:
        """Whether a job that `target` and those in `tried` failed can be sent to another one at once."""
        return any(state.target != target and state.target not in tried for state in self.takers(job))

    def takers(self, job: Job) -> list[TargetState]:
        """The targets to which a job could be sent at once."""
        states, servers = self.open_targets(), self._servers_of(job)
        return [state for state in (states if servers is None else _at(servers, states)) if state.accepting]

    def fail(self, target: Target, now_s: float, *, dead: bool = False) -> None:
        """The engine broke a request or refused the connection: it is ejected for a while, for long if it is dead."""
        self._refresh_and_release(self._fleet.fail(target, now_s, dead=dead), now_s)

    def pause_full(self, target: Target, now_s: float) -> None:
        """The engine answered 503: no new requests for a moment; its signals say what else there is to know."""
        self._refresh_and_release(self._fleet.pause_full(target, now_s), now_s)

    @property
    def samples_tokenisation(self) -> bool:
        """Whether the prompt tokens of this answer are worth reading: of the first ones, then of a few."""
        sent = self._targets.sent
        return sent < FIRST_TOKENISATION_SAMPLES or sent % TOKENISATION_PERIOD == 0

    def learn_tokens(self, parsed: Parsed, prompt_tokens: int) -> None:
        """An engine reported how many tokens a prompt had."""
        self._jobs.learn_tokens(parsed, prompt_tokens)

    # Held requests.

    @property
    def waiting(self) -> Collection[Waiter]:
        """The held requests, oldest first; to be read only."""
        return self._queue.waiters

    @property
    def held(self) -> int:
        """Number of requests in the hold queue."""
        return len(self._queue.waiters)

    def release_held(self, now_s: float) -> None:
        """Sends held requests, in order, while a target takes the first of them. Never nests: see `HoldQueue`."""
        if self._queue.waiters:
            self._queue.release_while(lambda waiter: self._choose_held(waiter, now_s))

    def _choose_held(self, waiter: Waiter, now_s: float) -> Send | Rejection | None:
        if waiter.attempts.is_late(now_s):
            return Rejection.DEADLINE
        failed = waiter.attempts.failed_targets
        decision = self.choose(waiter.job, now_s, failed, computes=waiter.computes)
        if isinstance(decision, Refuse) and decision.reason is RefuseReason.NO_OTHER_ENGINE:
            # Only the engines that failed it are there: they may have come back meanwhile.
            failed.clear()
            decision = self.choose(waiter.job, now_s, computes=waiter.computes)
        if isinstance(decision, Send):
            return decision
        return None if self._may_hold(waiter, now_s) else Rejection.NO_FITTING_ENGINE

    def unhold(self, waiter: Waiter) -> None:
        """The client of a request is gone; nothing happens when it is not held."""
        self._queue.discard(waiter)

    def tick(self, now_s: float) -> None:
        """Called a few times a second: ends ejections, recalibrates, releases or rejects held requests."""
        for engine in self._fleet.ejected():
            self._refresh_and_release(engine, now_s)
        self._targets.recalibrate(now_s, self.settings.stale_after_s)
        self._eject_stalled(now_s)
        if self.placements is not None:
            self.placements.tick(now_s)
        self.release_held(now_s)
        for waiter in self._queue.expired(now_s):
            # The end of one can release another.
            if waiter in self._queue.waiters:
                self._queue.discard(waiter)
                waiter.reject(Rejection.TIMEOUT_SATURATED if self.accepting else Rejection.TIMEOUT_NO_ENGINE)

    def _eject_stalled(self, now_s: float) -> None:
        stalled = self._targets.stalled(now_s)
        for target in stalled:
            if target not in self.stalled:
                log.warning("an engine makes no steps", extra={"engine": target.server, "rank": target.rank})
            if self._shows_steps(target):
                self._refresh_and_release(self._fleet.stall(target, now_s), now_s)
        self.stalled = frozenset(stalled)

    def note_progress(self, target: Target, at_s: float) -> None:
        """A part of an answer came from there at this time."""
        self._targets.note_progress(target, at_s)

    def is_abandoned(self, target: Target, *, stream: bool) -> bool:
        """Whether a request that waits there for its answer is better sent to another engine.

        An answer in one piece takes as long as it takes: without signals that show steps it is waited for.
        """
        return target in self.stalled and (stream or self._shows_steps(target))

    def is_working(self, target: Target, now_s: float, within_s: float) -> bool:
        """Whether the signals of a target show that it has worked within this time, so that an answer may yet come."""
        return self._targets.is_working(target, now_s, within_s, self.settings.stale_after_s)

    def _shows_steps(self, target: Target) -> bool:
        """Whether the source of a target's signals answers and shows its steps: a lost source is not a lost engine."""
        engine = self.engines.get(target.server)
        return engine is not None and engine.is_reachable and self._targets.counts_steps(target)

    def retry_after_s(self, now_s: float) -> int:
        """After how many seconds a client may ask again, 1 to 60.

        Once the engines have computed the held requests, by their step-time model. Where a discovered fleet has no
        engine, once the request that is held longest has made room.
        """
        if self.discovers and not self.accepting:
            return _clamp_s(self.hold_timeout_s - (self.held_since_s(now_s) or 0.0))
        first = self._targets.first_modelled
        model = None if first is None else first.step_time_model
        return _clamp_s(self._queue.size_tokens * model.prefill_s / len(self._targets.ordered)) if model else 1

    # For readers.

    @property
    def knows_all_models(self) -> bool:
        """Whether each engine that is ready has listed its names, so that `models` has all of them."""
        return all(engine.has_listed for engine in self.engines.values() if engine.is_ready)

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The known engines by name; to be read only."""
        return self._fleet.engines

    @property
    def target_states(self) -> Mapping[Target, TargetState]:
        """The state of each target; to be read only."""
        return self._targets.by_target

    @property
    def targets(self) -> TargetStates:
        """The targets, with the traffic share and the predictions; to be read only."""
        return self._targets

    @property
    def ejections(self) -> Mapping[str, int]:
        """Failures that ejected an engine, by its name."""
        return self._fleet.ejections

    @property
    def accepting(self) -> bool:
        """Whether any target takes new requests."""
        return any(state.accepting for state in self.open_targets())

    def is_accepting(self, target: Target) -> bool:
        """Whether this target takes new requests; False for one that is not known."""
        state = self.target_states.get(target)
        return state is not None and state.accepting

    def open_targets(self) -> Iterator[TargetState]:
        """The targets that may get a share of the requests."""
        return self._groups.open_targets() if self.discovers else iter(self._targets.ordered)

    @property
    def in_flight(self) -> int:
        """Requests that were sent and have not ended, those at engines that are known no more included."""
        return self._targets.in_flight

    def held_since_s(self, now_s: float) -> float | None:
        """Seconds that the longest held request has been without an engine; None when none is held."""
        return self._queue.longest_wait_s(now_s)


def _at(servers: Set[str], states: Iterable[TargetState]) -> list[TargetState]:
    return [state for state in states if state.target.server in servers]


def _clamp_s(seconds: float) -> int:
    return max(1, min(60, math.ceil(seconds)))
