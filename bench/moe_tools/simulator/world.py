"""The clock and the events of a run: arrivals, steps, signals, failures. The one owner of time.

Events are ordered by time and, within the same time, by their making, so that a run depends on its inputs alone.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Protocol

from moe_scheduling.signals import Target

from moe_tools.simulator.group import LockstepGroup
from moe_tools.simulator.rank import RequestPhase
from moe_tools.simulator.router import Router, RouterFactory
from moe_tools.simulator.signals import HEARTBEAT_S, SignalKind, SignalPlan
from moe_tools.simulator.transfers import KvLease, TransferCounts, TransferPlan, Transfers
from moe_tools.simulator.workload import SimRequest

TICK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFailure:
    """A server dies at `at_s` with all that it has; a new one is ready `startup_s` later, None: never."""

    server: str
    at_s: float
    startup_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """A server: how it is made, and when it is ready first."""

    name: str
    ranks: int
    make: Callable[[], LockstepGroup]
    ready_s: float = 0.0


class Arrivals(Protocol):
    """What comes: an open loop knows it all before, a closed loop lets answers call for more."""

    def first(self) -> Iterable[SimRequest]:
        """Those that come whatever happens."""

    def after(self, request: SimRequest, now_s: float) -> SimRequest | None:
        """The one that comes because this one has ended."""


@dataclass(slots=True, kw_only=True)
class _Server:
    plan: ServerPlan
    group: LockstepGroup | None = None
    epoch: int = 0
    last_sent_s: float = -1.0
    send_is_due: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTotals:
    """What a run counted.

    Attributes:
        now_s: its end.
        steps: of all servers, dead ones too.
        busy_s: seconds in steps of all servers, dead ones too.
        preemptions: requests that lost their place.
        transfers: KV transfers; None where there can be none.
    """

    now_s: float
    steps: int
    busy_s: float
    preemptions: int
    transfers: TransferCounts | None = None


@dataclass(slots=True)
class _Counts:
    steps: int = 0
    busy_s: float = 0.0
    preemptions: int = 0
    requests: list[SimRequest] = field(default_factory=list)


class World:
    """One run: its servers, its gateways, and the events between them; `run` is called once.

    Args:
        servers: the fleet.
        gateways: how many there are; each knows only its own requests in flight.
        router: makes each of them.
        signals: how what engines say travels.
        arrivals: what comes.
        failures: what breaks.
        transfers: how KV blocks travel; None: they do not.
    """

    def __init__(
        self,
        servers: Sequence[ServerPlan],
        *,
        gateways: int,
        router: RouterFactory,
        signals: SignalPlan,
        arrivals: Arrivals,
        failures: Sequence[ServerFailure] = (),
        transfers: TransferPlan | None = None,
    ) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._servers = {plan.name: _Server(plan=plan) for plan in servers}
        targets = [Target(plan.name, rank) for plan in servers for rank in range(plan.ranks)]
        self._routers: list[Router] = [router(self, targets, number) for number in range(gateways)]
        self._signals = signals
        self._arrivals = arrivals
        self._failures = failures
        self._open = 0
        self._counts = _Counts()
        self._transfers = None if transfers is None else Transfers(transfers)

    def run(self) -> tuple[list[SimRequest], RunTotals]:
        """To the end of the last request."""
        self._begin()
        events = self._events
        while self._open:
            self.now_s, _, call, arguments = heappop(events)
            call(*arguments)
        for server in self._servers.values():
            self._remove_group(server)
        counts = self._counts
        counts.requests.sort(key=lambda request: request.index)
        transfers = None
        if self._transfers is not None:
            transfers = self._transfers.counts
            transfers.held = len(self._transfers.leases)
        return counts.requests, RunTotals(
            now_s=self.now_s,
            steps=counts.steps,
            busy_s=counts.busy_s,
            preemptions=counts.preemptions,
            transfers=transfers,
        )

    def _begin(self) -> None:
        for server in self._servers.values():
            self._at(server.plan.ready_s, self._start, server)
        for failure in self._failures:
            self._at(failure.at_s, self._fail, failure)
        for request in self._arrivals.first():
            self._come(request)
        self._at(TICK_S, self._tick)

    def _at(self, time_s: float, call: Callable[..., None], *arguments: Any) -> None:
        self._order += 1
        heappush(self._events, (time_s, self._order, call, arguments))

    # Requests.

    def _come(self, request: SimRequest) -> None:
        self._open += 1
        self._counts.requests.append(request)
        self._at(request.arrival_s, self._arrive, request)

    def _arrive(self, request: SimRequest) -> None:
        self._routers[request.gateway].arrive(request, self.now_s)

    def send(self, request: SimRequest, target: Target) -> None:
        """Of `Wire`: a router sends a request."""
        request.prefill_server, request.prefilled_s = "", None
        request.server, request.rank = target
        request.sent_s = self.now_s
        request.attempts += 1
        self._add(request, target, RequestPhase.WHOLE)

    def prefill(self, request: SimRequest, target: Target) -> None:
        """Of `Wire`: a router asks for the prompt alone."""
        request.prefill_server, request.prefilled_s = target.server, None
        request.server, request.rank = target
        request.sent_s = self.now_s
        request.attempts += 1
        self._add(request, target, RequestPhase.PREFILL)

    def decode(self, request: SimRequest, target: Target) -> None:
        """Of `Wire`: a router asks for the answer to a prompt that was computed elsewhere."""
        assert self._transfers is not None
        request.server, request.rank = target
        self._transfers.claim(request.prefill_name)
        self._add(request, target, RequestPhase.DECODE)

    def _add(self, request: SimRequest, target: Target, phase: RequestPhase) -> None:
        server = self._servers[target.server]
        if server.group is None:
            self._at(self.now_s, self._break, request)
            return
        server.group.ranks[target.rank].add(request, self.now_s, phase)
        if not server.group.is_running:
            self._go_on(server)
        self._changed(server)

    def refuse(self, request: SimRequest, reason: str) -> None:
        """Of `Wire`: a router refuses a request."""
        request.failure = reason
        self._end(request)

    def _break(self, request: SimRequest) -> None:
        self._routers[request.gateway].failed(request, self.now_s)

    def _end(self, request: SimRequest) -> None:
        self._open -= 1
        following = self._arrivals.after(request, self.now_s)
        if following is not None:
            self._come(following)

    # Servers.

    def _start(self, server: _Server) -> None:
        server.group = server.plan.make()
        server.group.on_pull = functools.partial(self._pull, server)
        server.epoch += 1
        for router in self._routers:
            router.restarted(server.plan.name)
            router.set_ready(server.plan.name, True, self.now_s)
        self._watch(server, server.epoch)

    def _go_on(self, server: _Server) -> None:
        group = server.group
        assert group is not None
        deferred_s = group.fill(self.now_s)
        if group.is_running:
            self._at(self.now_s + group.current_s, self._step_ends, server, server.epoch)
            if deferred_s:
                self._at(self.now_s + deferred_s, self._schedule_deferred, server, server.epoch, group.steps_made)

    def _schedule_deferred(self, server: _Server, epoch: int, steps_made: int) -> None:
        """The wait is over; nothing to do where the step that ran has ended before."""
        group = server.group
        if group is None or epoch != server.epoch or group.steps_made != steps_made:
            return
        if deferred_s := group.fill(self.now_s):
            self._at(self.now_s + deferred_s, self._schedule_deferred, server, epoch, steps_made)
        else:
            self._changed(server)

    def _step_ends(self, server: _Server, epoch: int) -> None:
        group = server.group
        if group is None or epoch != server.epoch:
            return
        progress = group.finish(self.now_s)
        self._go_on(server)
        for request in progress.prefilled:
            self._hold(request, Target(server.plan.name, request.rank), server.epoch)
            self._routers[request.gateway].prefilled(request, self.now_s)
        for request in progress.first_tokens:
            self._routers[request.gateway].answered(request, self.now_s)
        for request in progress.finished:
            self._routers[request.gateway].settled(request, self.now_s)
            self._end(request)
        self._changed(server)

    def _fail(self, failure: ServerFailure) -> None:
        server = self._servers[failure.server]
        group = server.group
        if group is None:
            return
        broken = group.requests
        self._remove_group(server)
        for router in self._routers:
            router.set_ready(failure.server, False, self.now_s)
        for request in broken:
            self._give_up(request)
            self._routers[request.gateway].failed(request, self.now_s)
        if failure.startup_s is not None:
            self._at(self.now_s + failure.startup_s, self._start, server)

    def _remove_group(self, server: _Server) -> None:
        group, server.group = server.group, None
        if group is not None:
            self._counts.steps += group.steps_made
            self._counts.busy_s += group.busy_s
            self._counts.preemptions += sum(rank.preemptions for rank in group.ranks)
            group.close()

    # KV transfers.

    def _hold(self, request: SimRequest, source: Target, epoch: int) -> None:
        assert self._transfers is not None
        lease = self._transfers.hold(request.prefill_name, source, epoch, self.now_s)
        self._at(lease.expires_s, self._expire, lease)

    def _give_up(self, request: SimRequest) -> None:
        """The decode engine of a request is gone: the lease is not prolonged any longer."""
        if self._transfers is not None:
            lease = self._transfers.give_up(request.prefill_name, self.now_s)
            if lease is not None:
                self._at(lease.expires_s, self._expire, lease)

    def _expire(self, lease: KvLease) -> None:
        assert self._transfers is not None
        if self.now_s >= lease.expires_s and lease.name in self._transfers.leases:
            self._transfers.counts.expired += 1
            self._release(lease)

    def _release(self, lease: KvLease) -> None:
        """Frees the blocks of a lease at the prefill engine, if that still runs."""
        assert self._transfers is not None
        if self._transfers.leases.pop(lease.name, None) is not None:
            server = self._servers[lease.source.server]
            if server.group is not None and server.epoch == lease.epoch:
                server.group.ranks[lease.source.rank].sent(lease.name, self.now_s)
                self._changed(server)

    def _is_there(self, target: Target, epoch: int) -> bool:
        server = self._servers[target.server]
        return server.group is not None and server.epoch == epoch

    def _pull(self, server: _Server, rank: int, pull: Any) -> None:
        """A decode engine begins to fetch the blocks of a request; the lease may be over, or its engine gone."""
        transfers, group = self._transfers, server.group
        assert transfers is not None
        assert group is not None
        sink = Target(server.plan.name, rank)
        lease = transfers.leases.get(group.ranks[rank].find(pull.name).prefill_name)
        if lease is None or not self._is_there(lease.source, lease.epoch):
            wait_s = transfers.plan.failure_s
            if lease is not None:
                wait_s = transfers.fails_s(lease.source, lease.epoch, sink, server.epoch)
            self._at(self.now_s + wait_s, self._arrive_blocks, lease, pull, sink, server.epoch, self.now_s)
            return
        ends_s = transfers.begin(lease, sink, server.epoch, pull.tokens, self.now_s)
        self._at(ends_s, self._arrive_blocks, lease, pull, sink, server.epoch, self.now_s)

    def _arrive_blocks(self, lease: KvLease | None, pull: Any, sink: Target, sink_epoch: int, began_s: float) -> None:
        """A transfer ends: the blocks are at the decode engine, or are known not to come."""
        transfers = self._transfers
        assert transfers is not None
        arrives = lease is not None and self._is_there(lease.source, lease.epoch)
        if lease is not None:
            self._release(lease)
        group = self._servers[sink.server].group
        if group is None or not self._is_there(sink, sink_epoch):
            return
        if arrives:
            transfers.arrived(pull.tokens, self.now_s - began_s)
        else:
            transfers.counts.failed += 1
        if pull.tokens:
            group.ranks[sink.rank].received(pull.name, failed=not arrives)

    # Signals.

    def _changed(self, server: _Server) -> None:
        """The agent's stream: a line at a change, but not sooner than a period after the last."""
        plan = self._signals
        if plan.source is SignalKind.AGENT and not server.send_is_due:
            server.send_is_due = True
            due_s = max(self.now_s, server.last_sent_s + plan.period_s)
            self._at(due_s, self._publish, server, server.epoch)

    def _watch(self, server: _Server, epoch: int) -> None:
        """Signals that are sent without a change: a line a second, or a scrape each period."""
        if server.group is None or epoch != server.epoch:
            return
        if self._signals.source is SignalKind.AGENT:
            self._changed(server)
            self._at(self.now_s + HEARTBEAT_S, self._watch, server, epoch)
        elif self._signals.source is SignalKind.SCRAPE:
            self._publish(server, epoch)
            self._at(self.now_s + self._signals.period_s, self._watch, server, epoch)

    def _publish(self, server: _Server, epoch: int) -> None:
        server.send_is_due = False
        group, plan = server.group, self._signals
        if group is None or epoch != server.epoch:
            return
        server.last_sent_s = self.now_s
        if not plan.arrives(server.plan.name, self.now_s):
            return
        for number, rank in enumerate(group.ranks):
            signal, observed_s = rank.counts(), self.now_s
            if plan.source is SignalKind.AGENT and rank.published is not None:
                signal = rank.published
                # An idle engine makes no steps: its last signal is still true.
                observed_s = rank.published_s if rank.has_unfinished else self.now_s
            self._at(self.now_s + plan.delay_s, self._deliver, Target(server.plan.name, number), signal, observed_s)

    def _deliver(self, target: Target, signal: Any, observed_s: float) -> None:
        for router in self._routers:
            router.observe(target, signal, observed_s, self.now_s)

    def _tick(self) -> None:
        for router in self._routers:
            router.tick(self.now_s)
        self._at(self.now_s + TICK_S, self._tick)
