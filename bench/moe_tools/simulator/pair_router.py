"""The product's choice with KV transfers, in virtual time: whole requests and pairs, with fixed or moving roles.

`PairGateway` is a router as `OwnGateway` is: the product's `Dispatcher` keeps the states of targets, prefixes and
calibration, `choose_placement` decides about each request, and `plan_roles` about the roles. The prompt of a pair goes
to one engine, and when it is computed the request goes to the other; a failure before the first token begins anew.

Invariants: the answer of a request comes from one engine; a request is at one engine at a time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moe_contract.gateway_config import GatewayConfig
from moe_contract.sections import Listen
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.target_states import InFlightRequest
from moe_gateway.request.parsing import Parsed
from moe_scheduling.engine.attempts import AttemptFailure, NextStep, RequestAttempts
from moe_scheduling.engine.choice import EngineSettings, Job, Send, SendReason
from moe_scheduling.engine.disaggregation import EngineRole, KvTransfer, LatencyTargets
from moe_scheduling.engine.pair_choice import PairContext, RequestPlacement, choose_placement
from moe_scheduling.engine.prefill_share import PrefillShares
from moe_scheduling.fleet.measured_load import MeasuredLoad, observe_roles
from moe_scheduling.fleet.role_latency import RoleObservation, find_prefill_wait_s
from moe_scheduling.fleet.roles import RoleHistory, RoleSettings, SetRole, plan_roles
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.signals import EngineSignal, Target

from moe_tools.simulator.router import ENGINE_FAILED, Router, RouterFactory, Wire, engine_addresses
from moe_tools.simulator.workload import SimRequest, prompt_bytes

# Between two decisions about roles, in seconds.
ROLES_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSettings:
    """Settings of the choice with KV transfers.

    Attributes:
        link: of the transfers; None: each request stays whole.
        targets: the objective.
        roles: of servers, by name; those that are absent are unified.
        role_settings: when a role moves with the load; None: roles stay as they are.
        scrapes: whether the signals are scraped from plain vLLM servers.
    """

    link: KvTransfer | None
    targets: LatencyTargets = field(default_factory=LatencyTargets)
    roles: Mapping[str, EngineRole] = field(default_factory=dict)
    role_settings: RoleSettings | None = None
    scrapes: bool = False


def pair_gateways(settings: PairSettings, request: RequestSettings) -> RouterFactory:
    """Returns a factory of gateways that place requests as pairs."""

    def make(wire: Wire, targets: Sequence[Target], number: int) -> Router:
        return PairGateway(wire, targets, settings=settings, request=request, first_turn=number)

    return make


@dataclass(slots=True, eq=False)
class _PlacedRequest:
    """A request at the gateway; `in_flight` are its entries at the engines of its placement."""

    request: SimRequest
    job: Job
    keys: tuple[int, ...]
    attempts: RequestAttempts
    placement: RequestPlacement | None = None
    prefill: InFlightRequest | None = None
    decode: InFlightRequest | None = None


class PairGateway:
    """A gateway that may compute the prompt of a request at one engine and its answer at another.

    Args:
        wire: to the engines.
        targets: all targets of the fleet.
        settings: of the choice.
        request: order of the hold queue, which stays empty.
        first_turn: another number for each gateway.

    Attributes:
        role_changes: time, server and role of each change.
    """

    def __init__(
        self,
        wire: Wire,
        targets: Sequence[Target],
        *,
        settings: PairSettings,
        request: RequestSettings,
        first_turn: int,
    ) -> None:
        self.wire = wire
        self.settings = settings
        self.role_changes: list[tuple[float, str, EngineRole]] = []
        config = GatewayConfig(
            listen=Listen(port=1),
            admin=Listen(port=2),
            token_file=Path("token"),
            engines=engine_addresses(targets),
            dispatch=EngineSettings(),
            request=request,
        )
        self.dispatcher = Dispatcher(config, first_turn=first_turn)
        self._turn = first_turn
        self._exchanges: dict[SimRequest, _PlacedRequest] = {}
        self._roles = dict(settings.roles)
        self._shares = PrefillShares()
        self._met: set[tuple[str, str]] = set()
        self._load = MeasuredLoad()
        self._history = RoleHistory()
        self._roles_due_s = ROLES_PERIOD_S
        self._prefill_wait_s = 0.0

    # A request.

    def arrive(self, request: SimRequest, now_s: float) -> None:
        parsed = Parsed(None, True, request.priority, None, prompt_bytes(request), None)
        job, keys = self.dispatcher.build_job(parsed, request.session, request.sender)
        attempts = RequestAttempts(self.dispatcher.hold_timeout_s, now_s)
        self._exchanges[request] = exchange = _PlacedRequest(request, job, keys, attempts)
        self._load.arrived(job.size_tokens, now_s)
        self._place(exchange, now_s)

    def _place(self, exchange: _PlacedRequest, now_s: float) -> None:
        self._turn += 1
        placement = choose_placement(
            exchange.job,
            self.dispatcher.targets.ordered,
            self._context(now_s),
            turn=self._turn,
            now_s=now_s,
            exclude=exchange.attempts.failed_targets,
        )
        if not isinstance(placement, RequestPlacement):
            del self._exchanges[exchange.request]
            self.wire.refuse(exchange.request, str(placement.reason))
            return
        exchange.placement = placement
        exchange.attempts.begin()
        exchange.attempts.receive()
        self._count_prefill(exchange.job, placement.prefill, now_s)
        if placement.is_pair:
            self._send_pair(exchange, placement, now_s)
        else:
            self._send_whole(exchange, placement, now_s)

    def _context(self, now_s: float) -> PairContext:
        return PairContext(
            targets=self.settings.targets,
            transfer=self.settings.link,
            roles=self._roles,
            prefill_shares=self._shares.at(now_s),
            met=self._met,
            answer_tokens=self._load.answer_tokens,
            prefill_wait_s=self._prefill_wait_s,
        )

    def _count_prefill(self, job: Job, target: Target, now_s: float) -> None:
        """The ranks of a group compute side by side: each prompt takes its part of the group's time."""
        state, stale_after_s = self.dispatcher.target_states[target], self.dispatcher.settings.stale_after_s
        ranks = len(self.dispatcher.engines[target.server].targets)
        prefill_s = state.added_prefill_s(job.uncached_tokens(target), now_s, stale_after_s)
        self._shares.add(target.server, prefill_s / ranks, now_s)

    def _send_whole(self, exchange: _PlacedRequest, placement: RequestPlacement, now_s: float) -> None:
        request, predicted_s = exchange.request, placement.prediction.ttft_s
        sending = Send(placement.decode, predicted_s, SendReason.LEAST_PREDICTED)
        exchange.decode = self.dispatcher.send(exchange.job, exchange.keys, request.session, sending, now_s)
        request.predicted_s = predicted_s
        self.wire.send(request, placement.decode)

    def _send_pair(self, exchange: _PlacedRequest, placement: RequestPlacement, now_s: float) -> None:
        request, prediction = exchange.request, placement.prediction
        sending = Send(placement.prefill, prediction.prefill_s, SendReason.LEAST_PREDICTED)
        exchange.prefill = self.dispatcher.send(exchange.job, exchange.keys, None, sending, now_s)
        # Counted from now on, so that requests that come together do not all choose the same decode engine.
        coming = Send(placement.decode, prediction.ttft_s, SendReason.LEAST_PREDICTED)
        one_token = exchange.job._replace(prompt_tokens=1, cached={})
        exchange.decode = self.dispatcher.send(one_token, exchange.keys, request.session, coming, now_s)
        request.predicted_s = prediction.ttft_s
        self.wire.prefill(request, placement.prefill)

    def prefilled(self, request: SimRequest, now_s: float) -> None:
        exchange = self._exchanges[request]
        assert exchange.prefill is not None
        assert exchange.placement is not None
        self.dispatcher.answer(exchange.prefill, now_s)
        self.dispatcher.settle(exchange.prefill, now_s)
        exchange.prefill = None
        self._met.add((exchange.placement.prefill.server, exchange.placement.decode.server))
        self.wire.decode(request, exchange.placement.decode)

    def answered(self, request: SimRequest, now_s: float) -> None:
        exchange = self._exchanges[request]
        assert exchange.decode is not None
        exchange.attempts.is_answering = True
        # The first token of a pair is no measure of the decode engine's prefill.
        is_whole = exchange.placement is not None and not exchange.placement.is_pair
        self.dispatcher.answer(exchange.decode, now_s, is_first_token=is_whole)

    def settled(self, request: SimRequest, now_s: float) -> None:
        exchange = self._exchanges.pop(request)
        assert exchange.decode is not None
        self.dispatcher.settle(exchange.decode, now_s)
        self._load.ended(request.output_tokens, now_s - request.arrival_s)

    def failed(self, request: SimRequest, now_s: float) -> None:
        exchange = self._exchanges[request]
        failing = exchange.prefill or exchange.decode
        assert failing is not None
        step = exchange.attempts.after_failure(failing.target, AttemptFailure.BROKEN, now_s)
        self.dispatcher.fail(failing.target, now_s)
        for entry in (exchange.prefill, exchange.decode):
            if entry is not None:
                self.dispatcher.settle(entry, now_s)
        exchange.prefill = exchange.decode = None
        if step is NextStep.RETRY:
            self._place(exchange, now_s)
        else:
            del self._exchanges[request]
            self.wire.refuse(request, ENGINE_FAILED)

    # Engines.

    def observe(self, target: Target, signal: EngineSignal, observed_s: float, now_s: float) -> None:
        if self.settings.scrapes and (state := self.dispatcher.target_states.get(target)) is not None:
            # vLLM's metrics have no prefill work.
            signal = replace(signal, waiting_prefill_tokens=state.unanswered_prefill_tokens)
        self.dispatcher.observe(target, signal, observed_s, now_s)

    def set_ready(self, server: str, ready: bool, now_s: float) -> None:
        self.dispatcher.set_ready(server, ready, now_s)

    def restarted(self, server: str) -> None:
        engine = self.dispatcher.engines[server]
        self.dispatcher.set_process(server, 1 if engine.pid is None else engine.pid + 1)
        self._shares.forget(server)
        self._met = {pair for pair in self._met if server not in pair}

    def tick(self, now_s: float) -> None:
        self.dispatcher.tick(now_s)
        if self.settings.role_settings is not None and now_s >= self._roles_due_s:
            self._roles_due_s = now_s + ROLES_PERIOD_S
            self._move_roles(self.settings.role_settings, now_s)

    def _move_roles(self, settings: RoleSettings, now_s: float) -> None:
        load = self.observe_load(now_s)
        self._prefill_wait_s = find_prefill_wait_s(load, settings.ttft_growth)
        decision, self._history = plan_roles(load, settings, self._history, now_s)
        if isinstance(decision, SetRole):
            self._roles[decision.server] = decision.role
            self._load.forget_measured()
            self.role_changes.append((now_s, decision.server, decision.role))

    def observe_load(self, now_s: float) -> RoleObservation:
        """Returns the load of the present, for the roles."""
        states = [state for state in self.dispatcher.target_states.values() if state.accepting]
        load, link = self._load, self.settings.link
        return observe_roles(
            load,
            states,
            self._roles,
            transfer_s=math.inf if link is None else link.transfer_s(round(load.prompt_tokens), met=True),
            now_s=now_s,
            stale_after_s=self.dispatcher.settings.stale_after_s,
        )
