"""The comparison of `compare_command` in virtual time: real schedulers and our decisions, modelled step times.

The demo shows it where a measurement shows no difference. The speed of this machine does not enter: the same
requests give the same figures everywhere. Importing this module imports neither vllm nor torch.

Modelled are the step times (`TINY_MODEL_COST`), the network and the age of signals. Real are vLLM's scheduler with ours
on top, the prefix cache, and the gateway's choice of the engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_scheduling.engine.choice import DispatchPolicy, EngineSettings
from moe_scheduling.request.order import RequestPolicy, RequestSettings

from moe_tools.compare_command import ComparisonEffort
from moe_tools.comparison import PiecePair, plan_pieces
from moe_tools.replay import AnsweredRequest, ReplayResult
from moe_tools.simulator.costs import CostModel, LinearCost
from moe_tools.simulator.rank import EngineLimits, RankMaker
from moe_tools.simulator.simulation import Clients, Simulation, simulate
from moe_tools.simulator.workload import SimRequest
from moe_tools.traces import TraceRequest

TINY_MODEL_COST = LinearCost(
    base_s=0.0078,
    prefill_s=0.000053,
    decode_s=0.00024,
    context_s=8.4e-7,
    pair_s=1.5e-8,
    source="`moeserving calibrate` of the tiny model on two cores, bfloat16, compiled",
)
# The sample's: 512 MiB, 16 tokens a block, 4 layers of 2 heads of 64 float32 values, keys and values.
TINY_MODEL_LIMITS = EngineLimits(max_num_seqs=64, max_num_batched_tokens=2048, kv_blocks=8192, max_model_len=4096)
CAPACITY_REQUESTS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualEngines:
    """The engines behind the gateway: how many, their limits and their step time."""

    servers: int = 2
    limits: EngineLimits = TINY_MODEL_LIMITS
    cost: CostModel = TINY_MODEL_COST


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualPolicy:
    """Settings of layers 1 and 2 that `moeserving set` would bring about."""

    request: RequestSettings
    dispatch: EngineSettings


STOCK = VirtualPolicy(
    request=RequestSettings(policy=RequestPolicy.FCFS), dispatch=EngineSettings(policy=DispatchPolicy.ROUND_ROBIN)
)
OURS = VirtualPolicy(request=RequestSettings(), dispatch=EngineSettings())


def model_pairs(
    requests: Sequence[TraceRequest], effort: ComparisonEffort, seed: int, engines: VirtualEngines, maker: RankMaker
) -> tuple[PiecePair, ...]:
    """The pairs of `measure_pairs`, in virtual time: the same procedure, requests, pieces and load.

    Args:
        requests: the trace, in order of arrival.
        effort: number and length of the pieces, and their load as a share of the capacity, which is that of a closed
            loop in virtual time.
        seed: draws the pieces.
        engines: the fleet.
        maker: from `load_vllm`.
    """
    loop = _simulate(requests[:CAPACITY_REQUESTS], OURS, engines, maker, Clients(count=effort.in_flight))
    rate = effort.rate or closed_loop_rate(loop) * effort.load
    pieces = plan_pieces(requests, pairs=effort.pairs, piece_s=effort.piece_s, rate=rate, seed=seed)
    return tuple(
        PiecePair(stock=_simulate(piece, STOCK, engines, maker), ours=_simulate(piece, OURS, engines, maker))
        for piece in pieces
    )


def closed_loop_rate(run: ReplayResult) -> float:
    """Requests a second that were completed while the loop was full: until its last request was sent."""
    full_s = max(row.due_s for row in run.answered)
    ends_s = sorted(end_s for row in run.answered if (end_s := row.due_s + row.end_s) <= full_s)
    return (len(ends_s) - 1) / (ends_s[-1] - ends_s[0])


def _simulate(
    requests: Sequence[TraceRequest],
    policy: VirtualPolicy,
    engines: VirtualEngines,
    maker: RankMaker,
    clients: Clients | None = None,
) -> ReplayResult:
    simulation = Simulation(
        trace=requests,
        cost=engines.cost,
        servers=engines.servers,
        limits=engines.limits,
        request=policy.request,
        dispatch=policy.dispatch,
        clients=clients,
        # vLLM on a CPU schedules a step when the one before it has ended.
        async_scheduling=False,
    )
    answered = [_answer(request) for request in simulate(simulation, maker).requests]
    return ReplayResult(outcomes=tuple(answered), wall_s=max(row.due_s + row.end_s for row in answered))


def _answer(request: SimRequest) -> AnsweredRequest:
    """Nothing fails in virtual time: no engine dies, and no client waits too long."""
    assert request.first_token_s is not None
    assert request.finished_s is not None
    return AnsweredRequest(
        index=request.index,
        due_s=request.arrival_s,
        lateness_s=0.0,
        prompt_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens,
        ttft_s=request.first_token_s - request.arrival_s,
        last_token_s=request.finished_s - request.arrival_s,
        end_s=request.finished_s - request.arrival_s,
    )
