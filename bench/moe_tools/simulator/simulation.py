"""One run, as values: the simulation, its outcome, and the call between them.

Made from a scenario file by `scenario`, or directly to try a policy: the scheduler's class and the router are
factories, so that a new policy needs no change here.

    maker = load_vllm()
    outcome = simulate(Simulation(trace=..., cost=..., scheduler=MyScheduler), maker)
"""

import functools
import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.signals import Target

from moe_tools.simulator.arrivals import ClosedLoop, ConversationLoop, Senders
from moe_tools.simulator.costs import IDLE, CostModel, Work
from moe_tools.simulator.group import LockstepGroup
from moe_tools.simulator.outcome import Figures, TenantFigures, measure, measure_tenants
from moe_tools.simulator.prefills import share_prefills
from moe_tools.simulator.rank import OURS, EngineLimits, RankMaker, SchedulerFactory
from moe_tools.simulator.rivals import RIVALS
from moe_tools.simulator.router import OwnGateway, Router, RouterFactory, Wire
from moe_tools.simulator.signals import SignalKind, SignalPlan
from moe_tools.simulator.transfers import TransferPlan
from moe_tools.simulator.workload import SimRequest, build_requests
from moe_tools.simulator.world import Arrivals, RunTotals, ServerFailure, ServerPlan, World
from moe_tools.traces import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Clients:
    """A closed loop: `count` clients, each of which waits `think_s` after an answer before its next request."""

    count: int
    think_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerShape:
    """One server of a fleet whose servers differ.

    Attributes:
        ranks: in lockstep.
        cost: of a step of its group.
        limits: of each rank.
    """

    ranks: int
    cost: CostModel
    limits: EngineLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """Requests, engines, policies, signals and failures of one run.

    Attributes:
        trace: the requests, at their times of arrival; of a conversation the later ones come after the answers.
        cost: of a step of a server's group.
        servers: how many servers.
        ranks: data-parallel ranks of each, in lockstep.
        limits: of each rank.
        scheduler: class of the engines' scheduler by its path, or a factory that takes vLLM's own arguments.
        request: settings of layer 1, in the engines and in the hold queue.
        dispatch: settings of layer 2, the name of a rival, or a factory of routers.
        gateways: how many, each with a `TargetState` of its own for each target.
        hold_requests: requests that a gateway holds at most.
        hold_timeout_s: how long.
        signals: source, period and delay of the engines' signals; None: those of the chosen router.
        clients: a closed loop of this many clients; None: requests come at the trace's times.
        senders: tenants, sessions, priorities.
        startup_s: when each server is ready first: one value for all, or one for each.
        failures: servers that die.
        async_scheduling: whether a step is scheduled while the one before it runs, as vLLM does by default.
        exposed_s: seconds that a step takes longer when it was not scheduled while another one ran.
        seed: of senders and of the rivals' random draws.
        shapes: the servers one by one; empty: `servers` alike, of `ranks`, `cost` and `limits`. Where they are given,
            `cost`, `ranks` and `limits` describe the fleet as one group, for the figures of a request alone.
        transfers: how KV blocks travel between servers; None: they do not.
    """

    trace: Sequence[TraceRequest]
    cost: CostModel
    servers: int = 1
    ranks: int = 1
    limits: EngineLimits = field(default_factory=EngineLimits)
    scheduler: str | SchedulerFactory = OURS
    request: RequestSettings = field(default_factory=RequestSettings)
    dispatch: EngineSettings | str | RouterFactory = field(default_factory=EngineSettings)
    gateways: int = 1
    hold_requests: int = 1000
    hold_timeout_s: float = 60.0
    signals: SignalPlan | None = None
    clients: Clients | None = None
    senders: Senders = field(default_factory=Senders)
    startup_s: float | tuple[float, ...] = 0.0
    failures: Sequence[ServerFailure] = ()
    async_scheduling: bool = True
    exposed_s: float = 0.0
    seed: int = 0
    shapes: Sequence[ServerShape] = ()
    transfers: TransferPlan | None = None

    @property
    def fleet(self) -> Sequence[ServerShape]:
        """The shape of each server."""
        alike = ServerShape(ranks=self.ranks, cost=self.cost, limits=self.limits)
        return self.shapes or (alike,) * self.servers


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """Requests with their times, totals and figures of one run."""

    requests: Sequence[SimRequest]
    totals: RunTotals
    figures: Figures
    tenants: Sequence[TenantFigures]


def load_vllm() -> RankMaker:
    """Loads vLLM, which takes a while, once for a process; what it leaves behind is no work for the collector."""
    maker = _load_vllm()
    gc.collect()
    gc.freeze()
    return maker


@functools.cache
def _load_vllm() -> RankMaker:
    maker = RankMaker(Path(tempfile.mkdtemp(prefix="moeserving-simulator-")))
    # The first scheduler loads what the others find loaded.
    maker.make(EngineLimits(), OURS, RequestSettings()).close()
    return maker


def simulate(simulation: Simulation, maker: RankMaker) -> SimulationResult:
    """Runs it to the end of the last request. The same simulation gives the same outcome."""
    signals = simulation.signals or default_signals(simulation)
    world = World(
        plan_servers(simulation, maker),
        gateways=simulation.gateways,
        router=router_factory(simulation, signals),
        signals=signals,
        arrivals=_arrivals(simulation),
        failures=simulation.failures,
        transfers=simulation.transfers,
    )
    requests, totals = world.run()
    floor = functools.partial(alone_s, simulation.cost, simulation.limits.max_num_batched_tokens, simulation.ranks)
    return SimulationResult(
        requests=requests,
        totals=totals,
        figures=measure(requests, totals, len(simulation.fleet), floor),
        tenants=measure_tenants(requests, floor),
    )


def alone_s(cost: CostModel, step_tokens: int, ranks: int, request: SimRequest) -> float:
    """Seconds to the first token of a request that is alone: its own prefill, less the cached. No order beats it."""
    seconds, done = 0.0, request.cached_tokens
    while done < request.prompt_tokens:
        tokens = min(step_tokens, request.prompt_tokens - done)
        work = Work(prefill_tokens=tokens, prefill_pairs=tokens * (done + tokens // 2))
        seconds += cost.group_step_s([work, *(IDLE,) * (ranks - 1)])
        done += tokens
    return seconds


def plan_servers(simulation: Simulation, maker: RankMaker) -> list[ServerPlan]:
    """Returns the plan of each server of the fleet: name, ranks, and the time at which it is ready."""
    return [
        ServerPlan(
            name=server_name(number),
            ranks=shape.ranks,
            make=functools.partial(_make_group, simulation, maker, server_name(number), shape),
            ready_s=_ready_s(simulation, number),
        )
        for number, shape in enumerate(simulation.fleet)
    ]


def server_name(number: int) -> str:
    """Returns the name of the server with this number."""
    return f"engine-{number}"


def _ready_s(simulation: Simulation, number: int) -> float:
    startup_s = simulation.startup_s
    return startup_s if isinstance(startup_s, int | float) else startup_s[number]


def _make_group(simulation: Simulation, maker: RankMaker, name: str, shape: ServerShape) -> LockstepGroup:
    transfers = simulation.transfers is not None
    interval, limits = shape.limits.prefill_schedule_interval, shape.limits
    if shape.ranks > 1:
        # Their steps count for all of them, as in the engines; a single rank of vLLM 0.33 counts its own.
        limits = replace(limits, prefill_schedule_interval=1)
    ranks = [
        maker.make(limits, simulation.scheduler, simulation.request, transfers=transfers) for _ in range(shape.ranks)
    ]
    share_prefills(ranks)
    return LockstepGroup(
        name,
        ranks,
        shape.cost,
        prefill_interval=interval if shape.ranks > 1 else 1,
        ahead=2 if simulation.async_scheduling else 1,
        exposed_s=simulation.exposed_s,
    )


def default_signals(simulation: Simulation) -> SignalPlan:
    """As the router would have them: ours an agent's stream where the scheduler publishes, each rival its own."""
    dispatch = simulation.dispatch
    if isinstance(dispatch, str):
        return RIVALS[dispatch].signals
    if simulation.scheduler == OURS or not isinstance(simulation.scheduler, str):
        return SignalPlan()
    return SCRAPED


# The period of the gateway's own scraper (`moe_gateway.engines.signals`), and a scrape's way.
SCRAPED = SignalPlan(source=SignalKind.SCRAPE, period_s=0.25, delay_s=0.01)


def router_factory(simulation: Simulation, signals: SignalPlan) -> RouterFactory:
    """Makes the routers of the gateways."""
    dispatch = simulation.dispatch
    if isinstance(dispatch, str):
        return functools.partial(RIVALS[dispatch].make, gateways=simulation.gateways, seed=simulation.seed)
    if not isinstance(dispatch, EngineSettings):
        return dispatch

    def make(wire: Wire, targets: Sequence[Target], number: int) -> Router:
        return OwnGateway(
            wire,
            targets,
            dispatch=dispatch,
            request=simulation.request,
            hold_requests=simulation.hold_requests,
            hold_timeout_s=simulation.hold_timeout_s,
            first_turn=number,
            scrapes=signals.source is SignalKind.SCRAPE,
        )

    return make


def _arrivals(simulation: Simulation) -> Arrivals:
    senders = simulation.senders
    if senders.gateways != simulation.gateways:
        senders = replace(senders, gateways=simulation.gateways)
    requests = senders.sign(build_requests(simulation.trace), simulation.seed)
    if simulation.clients is None:
        return ConversationLoop(requests)
    return ClosedLoop(requests, clients=simulation.clients.count, think_s=simulation.clients.think_s)
