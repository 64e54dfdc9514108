"""The one owner of what the gateway knows of engines: their books, their signals, who may get work, and who waits.

Exchanges ask it for a target and tell it what came of it; signal watchers tell it what engines say. Every decision is
`moe_scheduling`'s. It runs on the event loop's thread alone, does no I/O, and takes its clock as an argument.
"""

import math
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from moe_contract.gateway_config import EngineAddress, GatewayConfig, Group
from moe_scheduling.engine.choice import (
    Decision,
    EngineSettings,
    Job,
    Refuse,
    RefuseReason,
    Send,
    choose_target,
    explain,
)
from moe_scheduling.engine.prefix_index import DEFAULT_BLOCK_BYTES, PrefixIndex, block_keys
from moe_scheduling.engine.target_list import TargetList
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.token_ratio import TokenRatio
from moe_scheduling.engine.traffic_share import TrafficShare
from moe_scheduling.engine.ttft_calibration import TtftCalibration
from moe_scheduling.engine.weighted_round_robin import WeightedRoundRobin
from moe_scheduling.request.fairness import ANONYMOUS_TENANT
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.request.waiting_queue import WaitingQueue
from moe_scheduling.signals import EngineSignal, Target

from moe_gateway.request.parsing import Parsed
from moe_gateway.request_stats import RequestStats

# A failure keeps an engine from new work for so long, doubled by each further one in a row.
EJECTION_S = 0.25
LONGEST_EJECTION_S = 30.0
# An engine that turned a request away as full gets no new work for so long, and keeps its good name.
FULL_S = 0.1
# How many tokens a prompt had is looked for in so many answers, and then in one of so many.
FIRST_LESSONS = 1000
LESSON_PERIOD = 16
REMEMBERED_SESSIONS = 100_000
# A client names its session; a longer name is none, so that what is remembered has a bound.
LONGEST_SESSION = 256


class SignalSource(StrEnum):
    """Where the newest knowledge of an engine comes from."""

    AGENT = "agent"
    SCRAPE = "scrape"
    BOOKS = "books"


class Waiter(Hashable, Protocol):
    """A held request, as the dispatcher sees it."""

    job: Job
    tried: set[Target]

    @property
    def computes(self) -> bool: ...

    def release(self, decision: Send) -> None:
        """A target takes it."""

    def expire(self) -> None:
        """It waited for too long."""


@dataclass(slots=True, kw_only=True)
class Engine:
    """One server and its targets.

    Attributes:
        group: the Service that it was found behind; empty for one of a fixed list.
        offered: whether it may get new work as far as Kubernetes says.
        ready: what the engine's agent or its health route says; False before anything was heard.
        failures: failures in a row.
        closed_until_s: no new work before, because it failed or is full.
        reachable: whether the source of its signals answers.
        models: the names of the models that it serves, as far as known.
        pid: of the process that serves, as far as known.
    """

    address: EngineAddress
    host: bytes
    targets: tuple[Target, ...]
    group: str = ""
    offered: bool = True
    ready: bool = False
    reachable: bool = False
    failures: int = 0
    closed_until_s: float = -math.inf
    models: frozenset[str] = frozenset()
    pid: int | None = None


@dataclass(slots=True, kw_only=True)
class InFlightRequest:
    """A request that was sent: what the dispatcher has to be told back.

    Attributes:
        predicted_s: seconds to its first token, as corrected.
        ttft_factor: the correction in it.
    """

    target: Target
    key: int
    sent_s: float
    predicted_s: float
    ttft_factor: float = 1.0


class Dispatcher:
    """See the module.

    Attributes:
        traffic_share: part of the requests at the engines that came from here, as far as engines tell; the rest is
            that of
            other gateways.
    """

    def __init__(self, config: GatewayConfig, stats: RequestStats, *, first_turn: int = 0) -> None:
        discovery = config.discovery
        self.discovers = discovery is not None
        self.settings: EngineSettings = config.dispatch
        self.request_settings: RequestSettings = config.request
        self.stats = stats
        self.engines: dict[str, Engine] = {}
        self.target_states: dict[Target, TargetState] = {}
        self._ordered_books = TargetList()
        # Of engines that are no longer known, until what they were sent has ended.
        self._departing: list[TargetState] = []
        self._shares = _shares_of(() if discovery is None else discovery.groups)
        self._group_books: dict[str, TargetList] = {}
        self._group_turns: dict[str, int] = {}
        self._hold_requests = config.limits.hold_requests
        self._hold_timeout_s = config.limits.hold_timeout_s
        self._peers = TrafficShare()
        self._corrections = TtftCalibration()
        self.traffic_share = 1.0
        self._prefixes = PrefixIndex()
        self._known_models = frozenset() if config.model is None else frozenset({config.model})
        self.models: frozenset[str] = frozenset()
        self._ratios: dict[str | None, TokenRatio] = {None: TokenRatio()}
        self._sessions: OrderedDict[str, Target] = OrderedDict()
        self._queue: WaitingQueue[Waiter] = WaitingQueue(config.request)
        self._held_since: dict[Waiter, float] = {}
        self._first_turn = self._turn = first_turn
        self._keys = 0
        self.set_engines(config.engines)

    # Configuration.

    def set_engines(self, addresses: Collection[EngineAddress]) -> None:
        """These engines and no others; the books of those that stay are kept. Another address is another engine.

        What was sent to an engine that goes runs to its end there, and counts until then.
        """
        before, books = self.engines, self.target_states
        staying = {address.name for address in addresses if address in [engine.address for engine in before.values()]}
        self.engines = {
            address.name: before[address.name] if address.name in staying else _new_engine(address)
            for address in addresses
        }
        for target in books:
            if target.server not in staying:
                self._forget(target)
                self.stats.prediction_ratios.pop(target, None)
                if books[target].in_flight:
                    self._departing.append(books[target])
        self.target_states = {
            target: books[target] if engine.address.name in staying else TargetState(target, accepting=False)
            for engine in self.engines.values()
            for target in engine.targets
        }
        self._ordered_books = TargetList(self.target_states.values())
        self._gather_models()
        self._gather_groups()

    def set_offers(self, groups: Mapping[str, str], offered: Collection[str], now_s: float) -> None:
        """What Kubernetes says of the engines: the group of each, and which may get new work."""
        for engine in self.engines.values():
            engine.group = groups[engine.address.name]
            engine.offered = engine.address.name in offered
            self._refresh_books(engine, now_s)
        self._gather_groups()
        self.pump(now_s)

    def set_groups(self, groups: Collection[Group], now_s: float) -> None:
        """The weights of the groups."""
        self._shares = _shares_of(groups)
        self.pump(now_s)

    def _gather_groups(self) -> None:
        groups: dict[str, list[TargetState]] = {}
        for target, books in self.target_states.items():
            groups.setdefault(self.engines[target.server].group, []).append(books)
        self._group_books = {group: TargetList(books) for group, books in groups.items()}

    def set_policies(self, dispatch: EngineSettings, request: RequestSettings, now_s: float) -> None:
        """Other settings from now on; what is held is ordered anew."""
        self.settings, self.request_settings = dispatch, request
        self._queue.reorder(request)
        self.pump(now_s)

    # What engines say.

    def observe(self, target: Target, signal: EngineSignal, observed_s: float, now_s: float) -> None:
        """A signal of a rank."""
        if (books := self.target_states.get(target)) is not None:
            books.observe(signal, observed_s)
            self.pump(now_s)

    def set_ready(self, name: str, ready: bool, now_s: float) -> None:
        """An engine takes new work, or no more."""
        if (engine := self.engines.get(name)) is None:
            return
        if ready and not engine.ready:
            engine.failures, engine.closed_until_s = 0, -math.inf
        engine.ready = ready
        self._refresh(engine, now_s)

    def set_process(self, name: str, pid: int | None) -> None:
        """The process that serves; another one holds nothing of what its predecessor cached, nor is as fast."""
        if (engine := self.engines.get(name)) is not None and pid != engine.pid:
            engine.pid = pid
            for target in engine.targets:
                self._forget(target)

    def _forget(self, target: Target) -> None:
        self._prefixes.forget(target)
        self._corrections.forget(target)

    def set_models(self, name: str, models: frozenset[str]) -> None:
        """The names of the models that an engine serves."""
        if (engine := self.engines.get(name)) is not None and models != engine.models:
            engine.models = models
            self._gather_models()

    def _gather_models(self) -> None:
        known = frozenset(model for engine in self.engines.values() for model in engine.models)
        self.models = known or self._known_models
        # Names of models come from clients; only those that engines serve get a ratio of their own.
        for model in self.models - self._ratios.keys():
            self._ratios[model] = TokenRatio()

    def _refresh(self, engine: Engine, now_s: float) -> None:
        if self._refresh_books(engine, now_s):
            self.pump(now_s)

    def _refresh_books(self, engine: Engine, now_s: float) -> bool:
        accepting = engine.offered and engine.ready and now_s >= engine.closed_until_s
        for target in engine.targets:
            self.target_states[target].accepting = accepting
        return accepting

    # The way of a request.

    def size(self, parsed: Parsed, session: str | None, tenant: str = ANONYMOUS_TENANT) -> tuple[Job, tuple[int, ...]]:
        """The job, and the keys of its prompt's blocks."""
        prompt, tokens = parsed.prompt, parsed.prompt_tokens
        if tokens is None:
            tokens = self._ratio(parsed.model).tokens(len(prompt))
        session_target = None if session is None else self._sessions.get(session)
        if len(prompt) < DEFAULT_BLOCK_BYTES:
            return Job(tokens, _NONE_CACHED, session_target, parsed.priority, tenant), ()
        keys = block_keys(prompt)
        block_tokens = tokens * DEFAULT_BLOCK_BYTES / len(prompt)
        held = self._prefixes.held_blocks(keys)
        cached = {target: int(blocks * block_tokens) for target, blocks in held.items()}
        return Job(tokens, cached, session_target, parsed.priority, tenant), keys

    def choose(self, job: Job, now_s: float, tried: Collection[Target] = (), *, computes: bool = True) -> Decision:
        """Which target takes it now; what an engine answers without computing may go to a saturated one too."""
        self._turn += 1
        if not computes:
            books, settings = list(self._open_books()), replace(self.settings, saturation_s=None)
            return choose_target(job, books, settings, turn=self._turn, now_s=now_s, exclude=tried)
        if self.discovers:
            return self._choose_by_group(job, now_s, tried)
        return choose_target(job, self._ordered_books, self.settings, turn=self._turn, now_s=now_s, exclude=tried)

    def _choose_by_group(self, job: Job, now_s: float, tried: Collection[Target]) -> Decision:
        """In the group whose turn it is; when it cannot take the job, in the next."""
        present = self._present_groups()
        order = self._shares.order(present)
        if job.session_target is not None and (home := self._home_of(job.session_target)) in order:
            return self._choose_in([home, *(group for group in order if group != home)], job, now_s, tried)
        decision = self._choose_in(order, job, now_s, tried)
        if isinstance(decision, Send):
            self._shares.take(present)
        return decision

    def _choose_in(self, order: list[str], job: Job, now_s: float, tried: Collection[Target]) -> Decision:
        first: Decision | None = None
        for group in order:
            books = self._group_books[group]
            # Turns of its own: those of all requests would meet the same engine each time that it is the group's.
            turn = self._group_turns.get(group, self._first_turn)
            decision = choose_target(job, books, self.settings, turn=turn, now_s=now_s, exclude=tried)
            if isinstance(decision, Send):
                self._group_turns[group] = turn + 1
                return decision
            first = first or decision
        return first or Refuse(RefuseReason.NO_ENGINE)

    def _present_groups(self) -> list[str]:
        return [group for group, books in self._group_books.items() if any(row.accepting for row in books)]

    def _home_of(self, target: Target) -> str | None:
        """The group of the engine that a session was sent to last."""
        engine = self.engines.get(target.server)
        return None if engine is None else engine.group

    def place(
        self, job: Job, keys: tuple[int, ...], session: str | None, sending: Send, now_s: float
    ) -> InFlightRequest:
        """Writes down that the job goes to this target."""
        target, predicted_s = sending.target, sending.predicted_s
        self._keys += 1
        books = self.target_states[target]
        tokens = job.uncached_tokens(target)
        books.sent(self._keys, tokens, now_s)
        self._queue.charge(job.tenant, tokens)
        if keys:
            self._prefixes.record(keys, target)
        if session is not None and len(session) <= LONGEST_SESSION:
            self._remember(session, target)
        self.stats.decisions[sending.reason] += 1
        return InFlightRequest(
            target=target, key=self._keys, sent_s=now_s, predicted_s=predicted_s, ttft_factor=books.ttft_factor
        )

    def answered(self, placed: InFlightRequest, now_s: float, *, is_first_token: bool = True) -> None:
        """The first byte of the body is there; whether it was there as soon as the first token was."""
        if (books := self.target_states.get(placed.target)) is not None:
            books.first_token(placed.key, now_s)
        if (engine := self.engines.get(placed.target.server)) is not None and engine.failures:
            engine.failures, engine.closed_until_s = 0, -math.inf
            self._refresh(engine, now_s)
        if is_first_token:
            self._compare(placed, now_s)
        if self._held_since:
            self.pump(now_s)

    def _compare(self, placed: InFlightRequest, now_s: float) -> None:
        """What was predicted with what is measured."""
        target, measured_s = placed.target, now_s - placed.sent_s
        if target in self.target_states:
            self.stats.predicted(target, placed.predicted_s, measured_s)
            self._corrections.observe(target, placed.predicted_s / placed.ttft_factor, measured_s, now_s)

    def settled(self, placed: InFlightRequest, now_s: float) -> None:
        """The request has ended there."""
        if (books := self.target_states.get(placed.target)) is not None:
            books.settled(placed.key, now_s)
        if self._departing:
            for books in self._departing:
                books.settled(placed.key, now_s)
            self._departing = [books for books in self._departing if books.in_flight]
        if self._held_since:
            self.pump(now_s)

    def failed(self, target: Target, now_s: float, *, dead: bool = False) -> None:
        """The engine broke a request or refused the connection: no new work for a while.

        Where it says that it is dead it starts anew, and is told to be ready then: nothing is sent before.
        """
        engine = self.engines.get(target.server)
        if engine is None:
            return
        engine.failures += 1
        ejection_s = LONGEST_EJECTION_S if dead else EJECTION_S * 2 ** min(engine.failures - 1, 16)
        engine.closed_until_s = now_s + min(LONGEST_EJECTION_S, ejection_s)
        self.stats.ejections[target.server] += 1
        self._refresh(engine, now_s)

    def turned_away(self, target: Target, now_s: float) -> None:
        """The engine answered 503: it is full or about to end, and says what else there is by its signals."""
        if (engine := self.engines.get(target.server)) is not None:
            engine.closed_until_s = max(engine.closed_until_s, now_s + FULL_S)
            self._refresh(engine, now_s)

    @property
    def wants_lesson(self) -> bool:
        """Whether the tokens of this prompt are worth to be looked for: the first, then some of them."""
        return self._keys < FIRST_LESSONS or self._keys % LESSON_PERIOD == 0

    def learn_tokens(self, parsed: Parsed, prompt_tokens: int) -> None:
        """An engine said how many tokens a prompt had."""
        if parsed.prompt_tokens is None:
            self._ratio(parsed.model).observe(len(parsed.prompt), prompt_tokens)

    def _ratio(self, model: str | None) -> TokenRatio:
        return self._ratios.get(model) or self._ratios[None]

    def _remember(self, session: str, target: Target) -> None:
        self._sessions[session] = target
        self._sessions.move_to_end(session)
        if len(self._sessions) > REMEMBERED_SESSIONS:
            self._sessions.popitem(last=False)

    # Who waits.

    @property
    def held(self) -> int:
        """Requests held."""
        return len(self._held_since)

    def hold(self, waiter: Waiter, now_s: float, since_s: float | None = None) -> bool:
        """Lets a request wait; False when the queue is full.

        Args:
            waiter: the request.
            now_s: the clock.
            since_s: since when no engine has it, where that is longer: it is not held for longer than others are.
        """
        if len(self._queue) >= self._hold_requests:
            return False
        job = waiter.job
        self._queue.push(waiter, size_tokens=job.size_tokens, arrival_s=now_s, priority=job.priority, tenant=job.tenant)
        self._held_since[waiter] = now_s if since_s is None else since_s
        return True

    def may_hold(self, since_s: float, now_s: float) -> bool:
        """Whether a request that no engine has had since then would still be held."""
        return now_s - since_s < self._hold_timeout_s

    def unhold(self, waiter: Waiter) -> None:
        """The client of a held request is gone."""
        if self._held_since.pop(waiter, None) is not None:
            self._queue.discard(waiter)

    def retry_after_s(self, now_s: float) -> int:
        """When it is worth to ask again, 1 to 60 s.

        Once what is held has been computed at the engines' pace; where a fleet has no engine, once the request that is
        held longest has made room.
        """
        if self.discovers and not self.accepting:
            return max(1, min(60, math.ceil(self._hold_timeout_s - (self.held_since_s(now_s) or 0.0))))
        lines = [state.step_time_model for state in self._ordered_books if state.step_time_model is not None]
        if not lines:
            return 1
        seconds = self._queue.size_tokens * lines[0].prefill_s / max(1, len(self._ordered_books))
        return max(1, min(60, math.ceil(seconds)))

    def pump(self, now_s: float) -> None:
        """Sends what is held, in order, while a target takes it."""
        queue = self._queue
        while queue:
            waiter = queue.peek()
            decision = self.choose(waiter.job, now_s, waiter.tried, computes=waiter.computes)
            if isinstance(decision, Refuse) and decision.reason is RefuseReason.NO_OTHER_ENGINE:
                # Only the engines that failed it are there: they may have come back meanwhile.
                waiter.tried.clear()
                decision = self.choose(waiter.job, now_s, computes=waiter.computes)
            if not isinstance(decision, Send):
                return
            self.unhold(waiter)
            waiter.release(decision)

    def tick(self, now_s: float) -> None:
        """Called a few times a second: ends ejections, sends what time alone made possible, lets the held expire."""
        for engine in self.engines.values():
            if engine.closed_until_s > -math.inf:
                self._refresh(engine, now_s)
        self.traffic_share = self._peers.observe(self._ordered_books, now_s, self.settings.stale_after_s)
        for books in self._ordered_books:
            books.traffic_share = self.traffic_share
            books.ttft_factor = self._corrections.factor(books.target, now_s)
        self.pump(now_s)
        for waiter, since_s in list(self._held_since.items()):
            # The end of one can be the turn of another.
            if not self.may_hold(since_s, now_s) and waiter in self._held_since:
                self.unhold(waiter)
                waiter.expire()

    # What others read.

    @property
    def accepting(self) -> bool:
        """Whether any target takes new work."""
        return any(books.accepting for books in self._open_books())

    def _open_books(self) -> Iterator[TargetState]:
        """Books of the targets that may get a share of the requests."""
        if not self.discovers:
            return iter(self._ordered_books)
        groups = self._group_books.items()
        return (row for group, books in groups if self._shares.weight(group) > 0 for row in books)

    @property
    def in_flight(self) -> int:
        """Requests that were sent and have not ended, those at engines that are gone from the list too."""
        return sum(books.in_flight for books in (*self._ordered_books, *self._departing))

    def held_since_s(self, now_s: float) -> float | None:
        """Age of the request that is held longest; None when none is."""
        return max((now_s - since_s for since_s in self._held_since.values()), default=None)

    def least_wait_s(self, now_s: float) -> float | None:
        """Predicted seconds until a new request begins to be computed, where that is soonest; None without a target."""
        rows = explain(Job(1), list(self._open_books()), self.settings, now_s=now_s)
        return min((row.wait_s for row in rows), default=None)

    def source(self, target: Target, now_s: float) -> SignalSource:
        """Where what is believed of a target comes from."""
        if not self.target_states[target].is_fresh(now_s, self.settings.stale_after_s):
            return SignalSource.BOOKS
        return SignalSource.SCRAPE if self.engines[target.server].address.agent_url is None else SignalSource.AGENT


def _shares_of(groups: Collection[Group]) -> WeightedRoundRobin:
    return WeightedRoundRobin({group.service: group.weight for group in groups})


_NONE_CACHED: Mapping[Target, int] = {}


def _new_engine(address: EngineAddress) -> Engine:
    return Engine(
        address=address,
        host=address.url.removeprefix("http://").encode(),
        targets=tuple(Target(address.name, rank) for rank in range(address.ranks)),
    )
