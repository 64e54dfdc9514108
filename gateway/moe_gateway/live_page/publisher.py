"""Makes one snapshot a second for all who watch the live page, and none while nobody does.

The one owner of the page's state: the counters of the second before, the points of the charts, the events.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from typing import Protocol

import aiohttp
from moe_contract.gateway_config import GatewaySettings, Limits
from moe_contract.live_page import History, LiveSnapshot, PageEvent, TimePoint, write_event
from moe_contract.pod_identity import PodIdentity

from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.live_page.changes import list_changed_settings, list_changes
from moe_gateway.live_page.experts import ExpertsReader
from moe_gateway.live_page.findings import find_problems
from moe_gateway.live_page.rates import Counters, measure_point, measure_ranks
from moe_gateway.live_page.snapshot import build_snapshot
from moe_gateway.request.recent_requests import RecentRequests
from moe_gateway.request_stats import RequestStats

PERIOD_S = 1.0
# The charts show as much.
KEPT_S = 600.0
KEPT_EVENTS = 100
MOST_WATCHERS = 50

log = logging.getLogger("moeserving.gateway")


class Watched(Protocol):
    """The part of a gateway that the page shows."""

    dispatcher: Dispatcher
    stats: RequestStats
    recent: RecentRequests
    clock: Callable[[], float]
    in_force: GatewaySettings
    gateways: tuple[str, ...]

    @property
    def tenant_names(self) -> Mapping[str, str]: ...

    @property
    def draining(self) -> bool: ...


class TooManyWatchers(Exception):
    """As many pages are open as may be."""


class Watcher:
    """One open page: the engine whose experts it shows, and a mark that something new is there."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.changed = asyncio.Event()


class LivePublisher:
    """Snapshots for the pages that are open.

    Args:
        gateway: to be shown.
        limits: of the hold queue.
        pod: of the gateway.
        session: to ask agents for experts with.
        wall: seconds since the epoch.

    Attributes:
        made: snapshots so far; it stays while nobody watches.
    """

    def __init__(
        self,
        gateway: Watched,
        limits: Limits,
        pod: PodIdentity,
        session: aiohttp.ClientSession,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._gateway, self._limits, self._pod, self._wall = gateway, limits, pod, wall
        self._experts = ExpertsReader(session)
        self._watchers: set[Watcher] = set()
        self._task: asyncio.Task[None] | None = None
        self._before: Counters | None = None
        self._newest: LiveSnapshot | None = None
        self._text = b""
        self._points: deque[TimePoint] = deque(maxlen=int(KEPT_S / PERIOD_S))
        self._events: deque[PageEvent] = deque(maxlen=KEPT_EVENTS)
        self._settings = gateway.in_force
        self._is_ended = self._is_failing = False
        self.made = 0

    async def watch(self, engine: str = "") -> AsyncGenerator[bytes]:
        """Yields server-sent events: the history, then each snapshot, and the experts of an engine when they change.

        A slow reader skips snapshots and gets the newest. The end of the gateway ends it.

        Raises:
            TooManyWatchers: at most `MOST_WATCHERS` watch.
        """
        if len(self._watchers) >= MOST_WATCHERS:
            raise TooManyWatchers
        watcher = Watcher(engine)
        self._watchers.add(watcher)
        if self._task is None or self._task.done():
            self._begin()
        sent, experts = b"", None
        try:
            yield write_event(History(points=tuple(self._points)))
            while not self._is_ended:
                watcher.changed.clear()
                if self._text is not sent:
                    sent = self._text
                    yield sent
                if (newest := self._experts.newest(engine)) is not None and newest is not experts:
                    experts = newest
                    yield write_event(newest)
                await watcher.changed.wait()
        finally:
            self._watchers.discard(watcher)
            if not self._watchers and self._task is not None:
                self._task.cancel()
                self._task = None

    def end(self) -> None:
        """Ends all streams; the gateway stops."""
        self._is_ended = True
        for watcher in self._watchers:
            watcher.changed.set()

    async def close(self) -> None:
        """Ends all work; the streams have ended."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._experts.close()

    def _begin(self) -> None:
        """Starts anew after a time without watchers: older seconds are known by the remembered requests alone."""
        now_s = self._gateway.clock()
        self._before, self._newest = self._count(now_s), None
        self._points.clear()
        self._points.extend(self._remember(now_s))
        self._text = b""
        self._try_to_publish(now_s)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            self._try_to_publish(self._gateway.clock())

    def _try_to_publish(self, now_s: float) -> None:
        """Publishes a snapshot; one that cannot be made is logged, and the next second tries again."""
        try:
            self._publish(now_s)
            self._is_failing = False
        except Exception:
            if not self._is_failing:
                log.exception("no snapshot could be made for the live page; it is tried each second")
            self._is_failing = True
            # A comment, which the page ignores: the write finds watchers that went away.
            self._text = b": no snapshot at %d\n\n" % now_s
        for watcher in self._watchers:
            watcher.changed.set()

    def _publish(self, now_s: float) -> None:
        gateway, dispatcher, at_s = self._gateway, self._gateway.dispatcher, self._wall()
        before, after = self._before, self._count(now_s)
        assert before is not None
        rates = measure_ranks(before, after)
        bounds, held, in_flight = gateway.stats.ttft.bounds, dispatcher.held, dispatcher.in_flight
        point = measure_point(before, after, rates, bounds, at_s=at_s, held=held, in_flight=in_flight)
        snapshot = build_snapshot(
            dispatcher,
            gateway.stats,
            gateway.recent,
            limits=self._limits,
            point=point,
            rates=rates,
            draining=gateway.draining,
            pod=self._pod,
            now_s=now_s,
            gateways=gateway.gateways,
            tenants=gateway.tenant_names,
        )
        snapshot = replace(snapshot, findings=find_problems(snapshot, self._points))
        self._events.extendleft(list_changes(self._newest, snapshot))
        self._events.extendleft(self._list_changed_settings(at_s))
        snapshot = replace(snapshot, events=tuple(self._events))
        if self._newest is not None:
            self._points.append(point)
        self._before, self._newest, self._text = after, snapshot, write_event(snapshot)
        self.made += 1
        self._experts.refresh(self._wanted(), now_s, at_s)

    def _list_changed_settings(self, at_s: float) -> list[PageEvent]:
        """Changes of settings since the last snapshot, also while no page was open."""
        before, self._settings = self._settings, self._gateway.in_force
        return list_changed_settings(before, self._settings, at_s, was_seen=self._newest is not None)

    def _wanted(self) -> set[tuple[str, str]]:
        """Engines whose experts somebody looks at, with the URL of their agents."""
        engines = self._gateway.dispatcher.engines
        shown = {engines[watcher.engine].address for watcher in self._watchers if watcher.engine in engines}
        return {(address.name, address.agent_url) for address in shown if address.agent_url is not None}

    def _count(self, now_s: float) -> Counters:
        stats, states = self._gateway.stats, self._gateway.dispatcher.target_states
        return Counters(
            at_s=now_s,
            arrivals=stats.arrivals,
            ttft_counts=tuple(stats.ttft.counts),
            ttft_total_s=stats.ttft.total,
            signals={target: state.signal for target, state in states.items() if state.signal is not None},
        )

    def _remember(self, now_s: float) -> list[TimePoint]:
        """Points of the seconds before, as far as the remembered streams show them."""
        by_second: dict[int, list[float]] = {}
        for arrived_s, ttft_s in self._gateway.recent.first_tokens():
            age_s = now_s - arrived_s - ttft_s
            if 0.0 <= age_s < KEPT_S:
                by_second.setdefault(int(age_s), []).append(ttft_s)
        at_s = self._wall()
        return [
            TimePoint(at_s=round(at_s - age_s, 3), ttft_s=round(sum(values) / len(values), 6))
            for age_s, values in sorted(by_second.items(), reverse=True)
        ]
