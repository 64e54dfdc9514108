"""Routers of the simulator: the protocol, the product's own gateway behind it, and the base of its rivals.

`OwnGateway` is the product: `moe_gateway.engines.dispatcher.Dispatcher`, which chooses, holds and ejects, and
`moe_scheduling.engine.attempts.RequestAttempts`, which decides about retries, driven as the gateway's exchange drives
them. A rival is a `Balancer` with a `choose` of its own; it retries by the same rule.

Invariants: a router knows only the signals that it got (`observe`) and what it did itself; it sends a request to one
engine at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from moe_contract.gateway_config import EngineAddress, GatewayConfig, Limits
from moe_contract.sections import Listen
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.hold_queue import Rejection
from moe_gateway.engines.target_states import InFlightRequest
from moe_gateway.request.parsing import Parsed
from moe_scheduling.engine.attempts import AttemptFailure, NextStep, RequestAttempts
from moe_scheduling.engine.choice import EngineSettings, Job, Send
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.signals import EngineSignal, Target

from moe_tools.simulator.workload import SimRequest, prompt_bytes

ENGINE_FAILED = "its engine failed"
_REJECTIONS = {
    Rejection.NO_ENGINE_CONFIGURED: "there is no engine",
    Rejection.QUEUE_FULL_NO_ENGINE: "the hold queue is full",
    Rejection.QUEUE_FULL_SATURATED: "the hold queue is full",
    Rejection.TIMEOUT_NO_ENGINE: "held for too long",
    Rejection.TIMEOUT_SATURATED: "held for too long",
}


class Wire(Protocol):
    """The network of a router, by which it sends or refuses requests."""

    def send(self, request: SimRequest, target: Target) -> None:
        """Sends it to an engine."""

    def prefill(self, request: SimRequest, target: Target) -> None:
        """Asks an engine to compute the prompt and to keep its KV blocks for another."""

    def decode(self, request: SimRequest, target: Target) -> None:
        """Sends a request whose prompt was computed elsewhere to the engine that fetches its blocks."""

    def refuse(self, request: SimRequest, reason: str) -> None:
        """Answers it with an error; it has failed."""


class Router(Protocol):
    """One gateway, the product's or a rival's. Times are seconds of the run."""

    def arrive(self, request: SimRequest, now_s: float) -> None:
        """A request arrived: sends, holds or refuses it."""

    def answered(self, request: SimRequest, now_s: float) -> None:
        """Its first token is there."""

    def prefilled(self, request: SimRequest, now_s: float) -> None:
        """Its prompt is computed at the engine that was asked to keep its KV blocks."""

    def settled(self, request: SimRequest, now_s: float) -> None:
        """Called when the answer of a request is complete."""

    def failed(self, request: SimRequest, now_s: float) -> None:
        """Its engine broke off the attempt."""

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
    """A request at the gateway: the `Waiter` that `moe_gateway.request.exchange.Exchange` is in the product."""

    gateway: "OwnGateway"
    request: SimRequest
    job: Job
    keys: tuple[int, ...]
    attempts: RequestAttempts
    in_flight: InFlightRequest | None = None
    # Each asks for tokens.
    computes: bool = True

    def release(self, decision: Send) -> None:
        self.gateway.send(self, decision)

    def reject(self, rejection: Rejection) -> None:
        self.gateway.reject(self, rejection)


class OwnGateway:
    """The product's gateway in virtual time.

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
            engines=engine_addresses(targets),
            dispatch=dispatch,
            request=request,
            limits=Limits(hold_requests=hold_requests, hold_timeout_s=hold_timeout_s),
        )
        self.dispatcher = Dispatcher(config, first_turn=first_turn)
        self._exchanges: dict[SimRequest, _Exchange] = {}

    def arrive(self, request: SimRequest, now_s: float) -> None:
        self._now_s = now_s
        parsed = Parsed(None, True, request.priority, None, prompt_bytes(request), None)
        job, keys = self.dispatcher.build_job(parsed, request.session, request.sender)
        attempts = RequestAttempts(self.dispatcher.hold_timeout_s, now_s)
        self._exchanges[request] = exchange = _Exchange(self, request, job, keys, attempts)
        self._begin(exchange)

    def _begin(self, exchange: _Exchange) -> None:
        admission = self.dispatcher.admit(exchange, self._now_s)
        if isinstance(admission, Send):
            self.send(exchange, admission)
        elif isinstance(admission, Rejection):
            self.reject(exchange, admission)

    def send(self, exchange: _Exchange, decision: Send) -> None:
        """Sends a request to the chosen target."""
        request = exchange.request
        in_flight = self.dispatcher.send(exchange.job, exchange.keys, request.session, decision, self._now_s)
        exchange.in_flight = in_flight
        exchange.attempts.begin()
        exchange.attempts.receive()
        request.predicted_s = in_flight.predicted_s
        self.wire.send(request, in_flight.target)

    def reject(self, exchange: _Exchange, rejection: Rejection) -> None:
        """Answers a request that no engine takes."""
        del self._exchanges[exchange.request]
        self.wire.refuse(exchange.request, _REJECTIONS[rejection])

    def answered(self, request: SimRequest, now_s: float) -> None:
        self._now_s = now_s
        exchange = self._exchanges[request]
        assert exchange.in_flight is not None
        exchange.attempts.is_answering = True
        self.dispatcher.answer(exchange.in_flight, now_s)

    def prefilled(self, request: SimRequest, now_s: float) -> None:
        raise NotImplementedError

    def settled(self, request: SimRequest, now_s: float) -> None:
        self._now_s = now_s
        exchange = self._exchanges.pop(request)
        assert exchange.in_flight is not None
        self.dispatcher.settle(exchange.in_flight, now_s)

    def failed(self, request: SimRequest, now_s: float) -> None:
        self._now_s = now_s
        exchange = self._exchanges[request]
        assert exchange.in_flight is not None
        step = exchange.attempts.after_failure(exchange.in_flight.target, AttemptFailure.BROKEN, now_s)
        self.dispatcher.fail(exchange.in_flight.target, now_s)
        self.dispatcher.settle(exchange.in_flight, now_s)
        if step is NextStep.RETRY:
            self._begin(exchange)
        else:
            del self._exchanges[request]
            self.wire.refuse(request, ENGINE_FAILED)

    def observe(self, target: Target, signal: EngineSignal, observed_s: float, now_s: float) -> None:
        self._now_s = now_s
        if self._scrapes and (state := self.dispatcher.target_states.get(target)) is not None:
            # As the gateway's own scraper: vLLM's metrics have no prefill work.
            signal = replace(signal, waiting_prefill_tokens=state.unanswered_prefill_tokens)
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


def engine_addresses(targets: Sequence[Target]) -> tuple[EngineAddress, ...]:
    """Returns the addresses of the servers that have these targets, by name."""
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
        self._attempts: dict[SimRequest, RequestAttempts] = {}
        self._sent_to: dict[SimRequest, Target] = {}

    def choose(self, request: SimRequest, candidates: Sequence[Target], now_s: float) -> Target:
        """Which of the candidates, at least one, takes it."""
        raise NotImplementedError

    def arrive(self, request: SimRequest, now_s: float) -> None:
        self._attempts[request] = RequestAttempts(0.0, now_s)
        self._route(request, now_s)

    def _route(self, request: SimRequest, now_s: float) -> None:
        attempts = self._attempts[request]
        failed = attempts.failed_targets
        candidates = [target for target in self.targets if target.server in self.ready and target not in failed]
        if not candidates:
            self._refuse(request, "no engine is ready")
            return
        target = self.choose(request, candidates, now_s)
        attempts.begin()
        self._sent_to[request] = target
        self.in_flight[target] += 1
        self.sent(request, target, now_s)
        self.wire.send(request, target)

    def _refuse(self, request: SimRequest, reason: str) -> None:
        del self._attempts[request]
        self._sent_to.pop(request, None)
        self.wire.refuse(request, reason)

    def sent(self, request: SimRequest, target: Target, now_s: float) -> None:
        """For rivals that remember more."""

    def answered(self, request: SimRequest, now_s: float) -> None:
        """For rivals that remember more."""

    def ended(self, request: SimRequest, target: Target, now_s: float) -> None:
        """For rivals that remember more; whole or broken."""

    def prefilled(self, request: SimRequest, now_s: float) -> None:
        raise NotImplementedError

    def settled(self, request: SimRequest, now_s: float) -> None:
        del self._attempts[request]
        target = self._sent_to.pop(request)
        self.in_flight[target] -= 1
        self.ended(request, target, now_s)

    def failed(self, request: SimRequest, now_s: float) -> None:
        target, attempts = self._sent_to[request], self._attempts[request]
        self.in_flight[target] -= 1
        self.ended(request, target, now_s)
        attempts.is_answering = request.first_token_s is not None
        if attempts.after_failure(target, AttemptFailure.BROKEN, now_s) is NextStep.RETRY:
            self._route(request, now_s)
        else:
            self._refuse(request, ENGINE_FAILED)

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
        """Does nothing: a balancer holds no requests."""
