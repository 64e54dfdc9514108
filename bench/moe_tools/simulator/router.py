"""Who chooses the engine: the protocol of a router, the product's own gateway behind it, and the base of its rivals.

`OwnGateway` is the product: `moe_gateway.engines.dispatcher.Dispatcher` with its books, prefixes, hold queue and
ejections, driven as an exchange of the gateway drives it. A rival is a `Balancer` with a `choose` of its own.

Invariants: a router knows only what it was told (`observe`) and what it did itself; it sends a request to one engine
at a time, to another one once when the first failed before its first token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from moe_contract.gateway_config import EngineAddress, GatewayConfig, Limits
from moe_contract.sections import Listen
from moe_gateway.engines.dispatcher import Dispatcher, InFlightRequest
from moe_gateway.request.exchange import ATTEMPTS
from moe_gateway.request.parsing import Parsed
from moe_gateway.request_stats import RequestStats
from moe_scheduling.engine.choice import EngineSettings, Job, Send
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.signals import EngineSignal, Target

from moe_tools.simulator.workload import SimRequest, prompt_bytes


class Wire(Protocol):
    """What a router can do."""

    def send(self, request: SimRequest, target: Target) -> None:
        """Sends it to an engine."""

    def refuse(self, request: SimRequest, reason: str) -> None:
        """Turns it away; it has failed."""


class Router(Protocol):
    """One gateway. Times are seconds of the run."""

    def arrive(self, request: SimRequest, now_s: float) -> None:
        """A request has come: sends, holds or refuses it."""

    def answered(self, request: SimRequest, now_s: float) -> None:
        """Its first token is there."""

    def settled(self, request: SimRequest, now_s: float) -> None:
        """Its answer is whole."""

    def failed(self, request: SimRequest, now_s: float) -> None:
        """Its engine broke it off."""

    def observe(self, target: Target, signal: EngineSignal, observed_s: float, now_s: float) -> None:
        """An engine was in this state at `observed_s`."""

    def set_ready(self, server: str, ready: bool, now_s: float) -> None:
        """A server takes new work, or no more."""

    def restarted(self, server: str) -> None:
        """A server runs in another process: its cache is empty."""

    def tick(self, now_s: float) -> None:
        """Time passes; called several times a second."""


RouterFactory = Callable[[Wire, Sequence[Target], int], Router]
"""Makes the router of gateway number N for these targets."""


# The product.


@dataclass(slots=True, eq=False)
class _Exchange:
    """A request at the gateway; what `moe_gateway.request.exchange.Exchange` is to the dispatcher."""

    gateway: "OwnGateway"
    request: SimRequest
    job: Job
    keys: tuple[int, ...]
    tried: set[Target]
    placed: InFlightRequest | None = None
    # Each asks for tokens.
    computes: bool = True

    def release(self, decision: Send) -> None:
        self.gateway.place(self, decision)

    def expire(self) -> None:
        self.gateway.wire.refuse(self.request, "held for too long")


class OwnGateway:
    """See the module.

    Args:
        wire: to the engines.
        targets: all that there are.
        dispatch: settings of layer 2.
        request: order of the hold queue.
        hold_requests: requests that it holds at most.
        hold_timeout_s: how long it holds one.
        first_turn: another number for each gateway.
        scrapes: whether the signals are scraped from a plain vLLM server.
    """

    def __init__(
        self,
        wire: Wire,
        targets: Sequence[Target],
        *,
        dispatch: EngineSettings,
        request: RequestSettings,
        hold_requests: int,
        hold_timeout_s: float,
        first_turn: int,
        scrapes: bool,
    ) -> None:
        self.wire = wire
        self._now_s = 0.0
        self._scrapes = scrapes
        config = GatewayConfig(
            listen=Listen(port=1),
            admin=Listen(port=2),
            token_file=Path("token"),
            engines=_addresses(targets),
            dispatch=dispatch,
            request=request,
            limits=Limits(hold_requests=hold_requests, hold_timeout_s=hold_timeout_s),
        )
        self.dispatcher = Dispatcher(config, RequestStats(), first_turn=first_turn)
        self._exchanges: dict[SimRequest, _Exchange] = {}

    def arrive(self, request: SimRequest, now_s: float) -> None:
        self._now_s = now_s
        parsed = Parsed(None, True, request.priority, None, prompt_bytes(request), None)
        job, keys = self.dispatcher.size(parsed, request.session, request.sender)
        exchange = _Exchange(self, request, job, keys, set())
        self._exchanges[request] = exchange
        self._begin(exchange)

    def _begin(self, exchange: _Exchange) -> None:
        dispatcher, now_s = self.dispatcher, self._now_s
        if dispatcher.held:
            dispatcher.pump(now_s)
        decision = None if dispatcher.held else dispatcher.choose(exchange.job, now_s, exchange.tried)
        if isinstance(decision, Send):
            self.place(exchange, decision)
        elif not dispatcher.hold(exchange, now_s):
            del self._exchanges[exchange.request]
            self.wire.refuse(exchange.request, "the hold queue is full")

    def place(self, exchange: _Exchange, decision: Send) -> None:
        """The dispatcher's choice."""
        request = exchange.request
        placed = self.dispatcher.place(exchange.job, exchange.keys, request.session, decision, self._now_s)
        exchange.placed = placed
        request.predicted_s = placed.predicted_s
        self.wire.send(request, placed.target)

    def answered(self, request: SimRequest, now_s: float) -> None:
        self._now_s = now_s
        if (placed := self._exchanges[request].placed) is not None:
            self.dispatcher.answered(placed, now_s)

    def settled(self, request: SimRequest, now_s: float) -> None:
        self._now_s = now_s
        if (placed := self._exchanges.pop(request).placed) is not None:
            self.dispatcher.settled(placed, now_s)

    def failed(self, request: SimRequest, now_s: float) -> None:
        self._now_s = now_s
        exchange = self._exchanges[request]
        assert exchange.placed is not None
        self.dispatcher.failed(exchange.placed.target, now_s)
        self.dispatcher.settled(exchange.placed, now_s)
        if request.first_token_s is None and request.attempts < ATTEMPTS:
            exchange.tried.add(exchange.placed.target)
            self._begin(exchange)
        else:
            del self._exchanges[request]
            self.wire.refuse(request, "its engine failed")

    def observe(self, target: Target, signal: EngineSignal, observed_s: float, now_s: float) -> None:
        self._now_s = now_s
        if self._scrapes and (books := self.dispatcher.target_states.get(target)) is not None:
            # As the gateway's own scraper: vLLM's metrics say nothing of prefill work.
            signal = replace(signal, waiting_prefill_tokens=books.unanswered_prefill_tokens)
        self.dispatcher.observe(target, signal, observed_s, now_s)

    def set_ready(self, server: str, ready: bool, now_s: float) -> None:
        self._now_s = now_s
        self.dispatcher.set_ready(server, ready, now_s)

    def restarted(self, server: str) -> None:
        engine = self.dispatcher.engines[server]
        self.dispatcher.set_process(server, 1 if engine.pid is None else engine.pid + 1)

    def tick(self, now_s: float) -> None:
        self._now_s = now_s
        self.dispatcher.tick(now_s)


def _addresses(targets: Sequence[Target]) -> tuple[EngineAddress, ...]:
    ranks: dict[str, int] = {}
    for target in targets:
        ranks[target.server] = max(ranks.get(target.server, 0), target.rank + 1)
    return tuple(
        EngineAddress(name=name, url=f"http://{name}:8000", ranks=count) for name, count in sorted(ranks.items())
    )


# The base of the rivals.


class Balancer:
    """A router that never holds: it chooses among the ready targets, or refuses.

    Args:
        wire: to the engines.
        targets: all that there are.

    Attributes:
        in_flight: requests sent and not settled, by target.
        signals: the newest signal of each target.
    """

    def __init__(self, wire: Wire, targets: Sequence[Target]) -> None:
        self.wire = wire
        self.targets = tuple(targets)
        self.ready: set[str] = set()
        self.in_flight = dict.fromkeys(self.targets, 0)
        self.signals = dict.fromkeys(self.targets, EngineSignal())
        self._sent_to: dict[SimRequest, Target] = {}

    def choose(self, request: SimRequest, candidates: Sequence[Target], now_s: float) -> Target:
        """Which of the candidates, at least one, takes it."""
        raise NotImplementedError

    def arrive(self, request: SimRequest, now_s: float) -> None:
        self._route(request, now_s)

    def _route(self, request: SimRequest, now_s: float) -> None:
        tried = self._sent_to.get(request)
        candidates = [target for target in self.targets if target.server in self.ready and target != tried]
        if not candidates:
            self._sent_to.pop(request, None)
            self.wire.refuse(request, "no engine is ready")
            return
        target = self.choose(request, candidates, now_s)
        self._sent_to[request] = target
        self.in_flight[target] += 1
        self.sent(request, target, now_s)
        self.wire.send(request, target)

    def sent(self, request: SimRequest, target: Target, now_s: float) -> None:
        """For rivals that remember more."""

    def answered(self, request: SimRequest, now_s: float) -> None:
        """For rivals that remember more."""

    def ended(self, request: SimRequest, target: Target, now_s: float) -> None:
        """For rivals that remember more; whole or broken."""

    def settled(self, request: SimRequest, now_s: float) -> None:
        target = self._sent_to.pop(request)
        self.in_flight[target] -= 1
        self.ended(request, target, now_s)

    def failed(self, request: SimRequest, now_s: float) -> None:
        target = self._sent_to[request]
        self.in_flight[target] -= 1
        self.ended(request, target, now_s)
        if request.first_token_s is None and request.attempts < ATTEMPTS:
            self._route(request, now_s)
        else:
            del self._sent_to[request]
            self.wire.refuse(request, "its engine failed")

    def observe(self, target: Target, signal: EngineSignal, observed_s: float, now_s: float) -> None:
        self.signals[target] = signal

    def set_ready(self, server: str, ready: bool, now_s: float) -> None:
        if ready:
            self.ready.add(server)
        else:
            self.ready.discard(server)

    def restarted(self, server: str) -> None:
        """For rivals that remember prefixes."""

    def tick(self, now_s: float) -> None:
        """Nothing waits here."""
