"""A number of GPUs cut into servers with roles, and its simulation.

A server is one lockstep group of data-parallel ranks, each of one GPU or of several with tensor parallelism.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.engine.disaggregation import EngineRole, KvTransfer, LatencyTargets
from moe_scheduling.fleet.roles import RoleSettings
from moe_scheduling.request.order import RequestSettings

from moe_tools.advisor.clocks import Clock, ServerParallelism
from moe_tools.simulator.pair_router import PairSettings, pair_gateways
from moe_tools.simulator.rank import OURS, STOCK, EngineLimits
from moe_tools.simulator.signals import SignalPlan
from moe_tools.simulator.simulation import SCRAPED, ServerShape, Simulation, server_name
from moe_tools.simulator.transfers import TransferPlan
from moe_tools.traces import TraceRequest

# 200 Gbit/s InfiniBand, one adapter a GPU (assumed).
LINK_BYTES_PER_S = 25e9
# Seconds of a step that scheduling ahead does not hide (assumed).
EXPOSED_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetShape:
    """One way to use the GPUs.

    Attributes:
        servers: data-parallel ranks of each server.
        tensor: GPUs of a rank.
        expert: whether experts are spread over the GPUs of a server.
        prefill: number of the first servers, which compute prompts while the others decode; None: no fixed roles.
        pairs: whether requests may be split.
        moves: whether roles move with the load.
        begin: number of the first servers that have the role of a prefill engine at the begin, where roles move.
        stock: whether the engines have vLLM's own scheduler.
        redundant: slots of experts in a layer beside one for each expert.
        limits: fields of the engines' limits.
    """

    servers: tuple[int, ...]
    tensor: int = 1
    expert: bool = True
    prefill: int | None = None
    pairs: bool = False
    moves: bool = False
    begin: int = 0
    stock: bool = False
    redundant: int = 0
    limits: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        """Returns the GPUs of all servers."""
        return sum(self.servers) * self.tensor

    def group(self, ranks: int) -> ServerParallelism:
        """Returns the parallelism of a server of this many ranks."""
        return ServerParallelism(ranks, self.tensor, self.expert)

    @property
    def uses_product(self) -> bool:
        """Whether code of the product decides in it."""
        return self.pairs or not self.stock


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetLoad:
    """What all shapes of a comparison have in common.

    Attributes:
        clock: step times of the model on a GPU.
        trace: the requests.
        max_model_len: longest prompt with its answer.
        request: order of the requests in our engines.
        engine: choice of the engine for whole requests.
        targets: objective of the choice between whole requests and pairs.
        sequences: vLLM's `max_num_seqs`.
        seed: of the experts' popularity.
    """

    clock: Clock
    trace: Sequence[TraceRequest]
    max_model_len: int
    request: RequestSettings = field(default_factory=RequestSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    targets: LatencyTargets = field(default_factory=LatencyTargets)
    sequences: int = 256
    seed: int = 0

    def link(self, tensor: int) -> KvTransfer:
        """Returns the transfer of KV blocks between two ranks of this many GPUs, each of which sends its part."""
        return KvTransfer(token_bytes=self.clock.kv_token_bytes, bytes_per_s=LINK_BYTES_PER_S * tensor)


def shape_server(shape: FleetShape, ranks: int, load: FleetLoad) -> ServerShape:
    """Returns a server of this many ranks."""
    clock, group = load.clock, shape.group(ranks)
    usual = EngineLimits(
        max_num_seqs=load.sequences, kv_blocks=clock.kv_blocks(group), max_model_len=load.max_model_len
    )
    limits = replace(usual, **shape.limits)
    return ServerShape(
        ranks=ranks,
        cost=clock.cost(group, redundant=shape.redundant, seed=load.seed),
        # A step has a token for each request that decodes at least: so does vLLM lower its default.
        limits=replace(limits, max_num_seqs=min(limits.max_num_seqs, limits.max_num_batched_tokens)),
    )


def build_fleet(shape: FleetShape, load: FleetLoad) -> Simulation:
    """The simulation in which a shape serves a load.

    A request alone has all GPUs as one group, or the largest server where the step times of such a group are not known.
    """
    ranks = sum(shape.servers)
    ranks_alone = ranks if load.clock.covers(shape.group(ranks)) else max(shape.servers)
    alone = shape_server(
        FleetShape(servers=(ranks_alone,), tensor=shape.tensor, expert=shape.expert), ranks_alone, load
    )
    servers = [shape_server(shape, ranks, load) for ranks in shape.servers]
    whole = Simulation(
        trace=load.trace,
        cost=alone.cost,
        ranks=ranks_alone,
        limits=alone.limits,
        shapes=servers,
        scheduler=STOCK if shape.stock else OURS,
        request=RequestSettings() if shape.stock else load.request,
        dispatch="vllmInternal" if shape.stock else load.engine,
        exposed_s=EXPOSED_S,
        seed=load.seed,
    )
    if not shape.pairs:
        return whole
    link = load.link(shape.tensor)
    settings = PairSettings(
        link=link,
        targets=load.targets,
        roles=_roles(shape),
        role_settings=RoleSettings() if shape.moves else None,
        scrapes=shape.stock,
    )
    return replace(
        whole,
        dispatch=pair_gateways(settings, load.request),
        transfers=TransferPlan(link=link),
        signals=SCRAPED if shape.stock else SignalPlan(),
    )


def _roles(shape: FleetShape) -> dict[str, EngineRole]:
    if shape.prefill is None:
        return {server_name(number): EngineRole.PREFILL for number in range(shape.begin)}
    return {
        server_name(number): EngineRole.PREFILL if number < shape.prefill else EngineRole.DECODE
        for number in range(len(shape.servers))
    }
