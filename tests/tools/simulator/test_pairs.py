"""Prefill here and decode there on vLLM's real schedulers: blocks, leases, failures, the choice in a closed loop."""

import itertools
import json
from dataclasses import asdict, replace

import pytest
from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.engine.disaggregation import EngineRole, KvTransfer, LatencyTargets
from moe_scheduling.fleet.roles import RoleSettings
from moe_scheduling.request.order import RequestSettings
from moe_tools.shapes import Shape, ShapeSettings, build_shape
from moe_tools.simulator.arrivals import ArrivalShape, arrange
from moe_tools.simulator.costs import LinearCost
from moe_tools.simulator.outcome import build_rows
from moe_tools.simulator.pair_router import PairGateway, PairSettings, pair_gateways
from moe_tools.simulator.rank import OURS, STOCK, EngineLimits, RequestPhase
from moe_tools.simulator.signals import SignalPlan
from moe_tools.simulator.simulation import ServerShape, Simulation, load_vllm, simulate
from moe_tools.simulator.transfers import TransferPlan
from moe_tools.simulator.workload import SimRequest
from moe_tools.simulator.world import ServerFailure
from moe_tools.traces import TraceRequest

LINE = LinearCost(base_s=0.006, prefill_s=0.00004, decode_s=0.0001)
LIMITS = EngineLimits(max_num_seqs=32, max_num_batched_tokens=1024, kv_blocks=2000, max_model_len=8192)
LINK = KvTransfer(token_bytes=1e5, bytes_per_s=1e9)
FIXED = {"engine-0": EngineRole.PREFILL, "engine-1": EngineRole.DECODE}
# Whichever test comes first pays for loading vLLM, which takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def maker():
    return load_vllm()


def short_trace(count=60, rate=40.0, seed=1):
    shape = ShapeSettings(
        count=count, seed=seed, longest_tokens=2000, median_output_tokens=12, longest_output_tokens=40
    )
    return arrange(build_shape(Shape.TWO_END, shape), ArrivalShape.POISSON, rate, seed)


def one(prompt_tokens=1000, arrival_s=0.0, output_tokens=4, **values):
    return TraceRequest(arrival_s=arrival_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens, **values)


def simulation(*, roles=FIXED, link=LINK, targets=None, role_settings=None, lease_s=30.0, **changes):
    settings = PairSettings(link=link, targets=targets or LatencyTargets(), roles=roles, role_settings=role_settings)
    usual = {
        "trace": short_trace(),
        "cost": LINE,
        "limits": LIMITS,
        "servers": 2,
        "dispatch": pair_gateways(settings, RequestSettings()),
        "transfers": TransferPlan(link=link, lease_s=lease_s),
        "signals": SignalPlan(),
    }
    return Simulation(**{**usual, **changes})


@pytest.mark.parametrize("scheduler", [OURS, STOCK])
def test_a_pair_takes_prefill_handshake_transfer_and_a_step(maker, scheduler):
    outcome = simulate(simulation(trace=[one()], scheduler=scheduler, async_scheduling=False), maker)
    row = outcome.requests[0]
    assert (row.prefill_server, row.server) == ("engine-0", "engine-1")
    assert row.prefilled_s == pytest.approx(0.006 + 1000 * 0.00004)
    arrived_s = row.prefilled_s + LINK.handshake_s + LINK.fixed_s + 1000 * 1e5 / 1e9
    # The decode engine polls while it has nothing to run, and computes the last token itself.
    assert arrived_s < row.first_token_s < arrived_s + 2 * 0.001 + 0.0062
    assert row.finished_s - row.first_token_s == pytest.approx(3 * 0.0061)
    assert outcome.totals.transfers.done == 1
    assert outcome.totals.transfers.tokens == 1000


@pytest.mark.parametrize("scheduler", [OURS, STOCK])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_request_is_answered_whole_and_no_block_is_held_at_the_end(maker, scheduler, ranks):
    outcome = simulate(simulation(scheduler=scheduler, ranks=ranks), maker)
    assert outcome.figures.failed == 0
    counts = outcome.totals.transfers
    assert counts.done == sum(bool(row.prefill_server) for row in outcome.requests) > 20
    assert (counts.failed, counts.expired, counts.held) == (0, 0, 0)
    for row in outcome.requests:
        assert row.arrival_s <= row.sent_s < row.first_token_s <= row.finished_s


def test_the_same_simulation_gives_the_same_bytes(maker):
    runs = [simulate(simulation(), maker) for _ in range(2)]
    first, other = (json.dumps([asdict(run.figures), asdict(run.totals), build_rows(run.requests)]) for run in runs)
    assert first == other


def test_answers_are_not_interrupted_where_prompts_are_computed_elsewhere(maker):
    trace = short_trace(count=200, rate=30.0)
    together = simulate(simulation(trace=trace, roles={}, link=LINK, transfers=None, dispatch="vllmInternal"), maker)
    apart = simulate(simulation(trace=trace), maker)
    assert apart.figures.tpot_mean < 0.6 * together.figures.tpot_mean


# Blocks.


def rank_with_transfers(maker, scheduler=OURS):
    return maker.make(LIMITS, scheduler, RequestSettings(), transfers=True)


def request(index=0, **values):
    return SimRequest(index=index, arrival_s=0.0, **{"prompt_tokens": 1000, "output_tokens": 4, **values})


def step(rank, now_s):
    made = rank.schedule(now_s, throttle_prefills=False)
    return made, rank.finish(made, now_s + 0.01)


@pytest.mark.parametrize("scheduler", [OURS, STOCK])
def test_a_prefill_engine_keeps_blocks_until_they_were_fetched(maker, scheduler):
    rank, row = rank_with_transfers(maker, scheduler), request()
    rank.add(row, 0.0, RequestPhase.PREFILL)
    _, progress = step(rank, 0.0)
    assert (progress.prefilled, progress.first_tokens, row.first_token_s) == ([row], [], None)
    step(rank, 0.1)
    assert rank.scheduler.get_kv_cache_usage() > 0.0
    assert not rank.has_requests
    rank.sent(row.prefill_name, 0.2)
    assert rank.scheduler.get_kv_cache_usage() == 0.0
    rank.close()


@pytest.mark.parametrize("scheduler", [OURS, STOCK])
def test_a_decode_engine_allocates_before_the_blocks_come_and_computes_one_token(maker, scheduler):
    rank, row = rank_with_transfers(maker, scheduler), request()
    row.prefilled_s = 0.0
    rank.add(row, 0.0, RequestPhase.DECODE)
    made, _ = step(rank, 0.0)
    assert [(pull.name, pull.tokens) for pull in made.pulls] == [(row.name, 1000)]
    assert made.work.tokens == 0
    assert rank.scheduler.get_kv_cache_usage() > 0.0
    waiting, _ = step(rank, 0.1)
    assert (waiting.work.tokens, waiting.pulls) == (0, [])
    rank.received(row.name)
    step(rank, 0.2)
    made, progress = step(rank, 0.3)
    assert (made.work.decode_requests, made.work.prefill_tokens) == (1, 0)
    assert progress.first_tokens == [row]
    rank.close()


@pytest.mark.parametrize("scheduler", [OURS, STOCK])
def test_a_transfer_that_failed_is_computed_at_the_decode_engine(maker, scheduler):
    rank, row = rank_with_transfers(maker, scheduler), request()
    rank.add(row, 0.0, RequestPhase.DECODE)
    step(rank, 0.0)
    rank.received(row.name, failed=True)
    step(rank, 0.1)
    made, progress = step(rank, 0.2)
    assert (made.work.prefill_tokens, progress.first_tokens) == (1000, [row])
    rank.close()


def test_a_decode_engine_fetches_only_what_its_prefix_cache_lacks(maker):
    shared = {"blocks": (1,), "block_tokens": 512}
    trace = [one(), one(512 + 488, arrival_s=2.0, **shared), one(512 + 488, arrival_s=4.0, **shared)]
    outcome = simulate(simulation(trace=trace), maker)
    assert outcome.totals.transfers.tokens == 1000 + 1000 + 488
    assert [row.cached_tokens for row in outcome.requests] == [0, 0, 512]


def test_prompts_that_come_from_elsewhere_are_no_prefill_work_in_the_signal(maker):
    rank = rank_with_transfers(maker)
    for index in range(40):
        rank.add(request(index), 0.0, RequestPhase.DECODE)
    step(rank, 0.0)
    assert rank.published.waiting > 0
    assert rank.published.waiting_prefill_tokens <= 40
    rank.close()


# Failures.


def test_a_prefill_engine_that_dies_between_the_phases_costs_a_prefill(maker):
    slow = replace(LINK, bytes_per_s=1e8)
    outcome = simulate(
        simulation(trace=[one()], link=slow, failures=[ServerFailure(server="engine-0", at_s=0.5)]), maker
    )
    row = outcome.requests[0]
    assert (row.failure, row.attempts, outcome.totals.transfers.failed) == ("", 1, 1)
    assert outcome.totals.transfers.held == 0


def test_a_decode_engine_that_dies_begins_the_request_anew_and_its_lease_ends(maker):
    slow = replace(LINK, bytes_per_s=1e8)
    roles = {**FIXED, "engine-2": EngineRole.DECODE}
    outcome = simulate(
        simulation(
            trace=[one(), one(arrival_s=60.0)], roles=roles, servers=3, link=slow,
            failures=[ServerFailure(server="engine-1", at_s=0.5), ServerFailure(server="engine-2", at_s=40.0)],
        ),
        maker,
    )  # fmt: skip
    first, second = outcome.requests
    assert (first.failure, first.attempts, first.server) == ("", 2, "engine-2")
    assert (second.failure, second.server) == ("", "engine-0")
    assert outcome.totals.transfers.held == 0


def test_failures_of_either_side_lose_no_request_before_its_first_token(maker):
    trace = short_trace(count=150, rate=15.0)
    roles = {f"engine-{number}": EngineRole.PREFILL if number < 2 else EngineRole.DECODE for number in range(4)}
    failures = [
        ServerFailure(server="engine-0", at_s=2.0, startup_s=1.0),
        ServerFailure(server="engine-2", at_s=4.0, startup_s=1.0),
        ServerFailure(server="engine-1", at_s=6.0, startup_s=1.0),
    ]
    outcome = simulate(simulation(trace=trace, roles=roles, servers=4, failures=failures, lease_s=3.0), maker)
    lost = [row for row in outcome.requests if row.failure]
    assert all(row.first_token_s is not None for row in lost)
    assert sum(row.attempts > 1 for row in outcome.requests) > 0


def test_a_lease_that_nobody_claims_ends_and_its_blocks_are_free(maker):
    class Forgetful(PairGateway):
        def prefilled(self, request, now_s):
            if request.index:
                super().prefilled(request, now_s)
            else:
                self.wire.refuse(request, "forgotten")

    def factory(wire, targets, number):
        settings = PairSettings(link=LINK, roles=FIXED)
        return Forgetful(wire, targets, settings=settings, request=RequestSettings(), first_turn=number)

    trace = [one(), one(arrival_s=50.0)]
    counts = simulate(simulation(trace=trace, dispatch=factory), maker).totals.transfers
    assert (counts.expired, counts.done, counts.held) == (1, 1, 0)


# The choice in a closed loop.


def test_auto_is_not_worse_than_whole_requests_by_its_objective(maker):
    """Long answers, prompts beside them, and a fast link: some requests go as pairs."""
    fast = KvTransfer(token_bytes=1e5, bytes_per_s=25e9)
    shape = ShapeSettings(count=200, seed=1, longest_tokens=4000, median_output_tokens=100, longest_output_tokens=600)
    trace = arrange(build_shape(Shape.RANDOM, shape), ArrivalShape.POISSON, 15.0, 1)
    limits = replace(LIMITS, max_num_seqs=128, kv_blocks=20_000)
    common = {"trace": trace, "roles": {}, "ranks": 2, "limits": limits}
    whole = simulate(simulation(**common, link=None, transfers=TransferPlan(link=fast)), maker)
    generous = LatencyTargets(ttft_growth=100.0)
    auto = simulate(simulation(**common, link=fast, targets=generous), maker)
    assert whole.totals.transfers.done == 0 < auto.totals.transfers.done
    assert auto.figures.end_mean <= 1.03 * whole.figures.end_mean


def test_without_a_declared_growth_of_ttft_auto_serves_as_whole_requests_do(maker):
    """Nobody has the role of a prefill engine yet, and each transfer would delay a first token by more than half."""
    common = {"roles": {}, "ranks": 2, "transfers": TransferPlan(link=LINK)}
    own = simulate(simulation(**common, dispatch=EngineSettings()), maker)
    auto = simulate(simulation(**common), maker)
    assert auto.totals.transfers.done == 0
    assert (auto.figures.ttft_mean, auto.figures.tpot_mean) == (own.figures.ttft_mean, own.figures.tpot_mean)


def test_a_slow_link_makes_auto_whole(maker):
    slow = KvTransfer(token_bytes=1e5, bytes_per_s=1e6)
    outcome = simulate(simulation(roles={}, link=slow), maker)
    assert outcome.totals.transfers.done == 0


def test_roles_move_with_the_load_and_not_more_often_than_allowed(maker):
    made = []
    settings = RoleSettings(settle_s=1.0, interval_s=4.0, least_gain=0.02, ttft_growth=10.0)
    inner = simulation(roles={}, role_settings=settings).dispatch

    def factory(wire, targets, number):
        made.append(inner(wire, targets, number))
        return made[-1]

    shape = ShapeSettings(
        count=400, seed=1, shortest_tokens=1500, longest_tokens=3000, median_output_tokens=24,
        longest_output_tokens=60,
    )  # fmt: skip
    trace = arrange(build_shape(Shape.AVERAGE, shape), ArrivalShape.POISSON, 30.0, 1)
    outcome = simulate(simulation(trace=trace, servers=4, dispatch=factory), maker)
    changes = made[0].role_changes
    assert outcome.figures.failed == 0
    assert changes
    assert changes[0][2] is EngineRole.PREFILL
    assert all(later[0] - before[0] >= 4.0 for before, later in itertools.pairwise(changes))


def test_servers_of_different_shapes_serve_together(maker):
    shapes = [ServerShape(ranks=ranks, cost=LINE, limits=LIMITS) for ranks in (2, 1)]
    outcome = simulate(simulation(shapes=shapes), maker)
    assert {(row.server, row.rank) for row in outcome.requests if row.prefill_server} == {("engine-1", 0)}
    assert outcome.figures.failed == 0


def test_a_fleet_that_is_gone_refuses(maker):
    failures = [ServerFailure(server=f"engine-{number}", at_s=0.001) for number in range(2)]
    outcome = simulate(simulation(trace=[one(arrival_s=1.0)], failures=failures), maker)
    assert outcome.requests[0].failure == "no_engine"
