"""The load that `plan_roles` reads, as one who sends requests measures it."""

import pytest
from moe_scheduling.engine.disaggregation import EngineRole
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.fleet.measured_load import MeasuredLoad, mean_step_time, observe_roles
from moe_scheduling.signals import EngineSignal, StepTime, Target

STEP = StepTime(base_s=0.01, prefill_s=0.001, decode_s=0.0005)


def state(server, rank=0, decoding=3, step_time=STEP):
    found = TargetState(Target(server, rank))
    found.observe(EngineSignal(step=1, running=decoding, decode_tokens=decoding, step_time=step_time), 10.0)
    return found


def observe(states, load=None, **changes):
    usual = {"transfer_s": 0.2, "now_s": 10.0, "stale_after_s": 5.0}
    return observe_roles(load or MeasuredLoad(), states, {"a": EngineRole.PREFILL}, **(usual | changes))


def test_ranks_of_a_server_count_together_and_roles_are_those_that_are_known():
    found = observe([state("a", 0), state("a", 1), state("b", 0), state("b", 1)])
    assert [(row.name, row.role, row.decoding) for row in found.servers] == [
        ("a", EngineRole.PREFILL, 6),
        ("b", EngineRole.UNIFIED, 6),
    ]
    assert (found.ranks, found.step_time, found.transfer_s, found.observed_s) == (2, STEP, 0.2, 10.0)


def test_without_targets_there_are_no_servers_and_no_step_time():
    found = observe([])
    assert (list(found.servers), found.ranks, found.step_time, found.measured_s) == ([], 1, None, None)


@pytest.mark.parametrize(("share", "factor"), [(1.0, 1.0), (0.5, 2.0), (0.0, 100.0)])
def test_a_sender_scales_its_rate_up_by_its_part_of_the_traffic(share, factor):
    load = MeasuredLoad()
    load.arrived(100, 10.0)
    load.ended(50, 2.0)
    found = observe([state("a")], load, traffic_share=share)
    assert found.requests_per_s == pytest.approx(factor * load.requests_per_s(10.0))
    assert (found.prompt_tokens, found.measured_s) == (100.0, 2.0)
    load.forget_measured()
    assert load.measured_s is None


@pytest.mark.parametrize(("prompts", "variation"), [([], 0.0), ([0, 0], 0.0), ([300, 300], 0.0), ([100, 300], 0.25)])
def test_the_variation_of_prompts_is_their_variance_over_the_square_of_the_mean(prompts, variation):
    load = MeasuredLoad()
    for tokens in prompts:
        load.arrived(tokens, 10.0)
    assert load.prompt_variation == pytest.approx(variation)
    assert observe([state("a")], load).prompt_variation == load.prompt_variation


@pytest.mark.parametrize("idle_s", [1e3, 1e4, 1.2e4, 2e4, 1e6])
def test_a_prompt_without_a_token_after_hours_of_silence_has_no_variation(idle_s):
    load = MeasuredLoad()
    load.arrived(300, 10.0)
    load.arrived(0, 10.0 + idle_s)
    assert load.prompt_variation == 0.0


def test_each_part_of_the_step_time_is_that_of_the_engines_which_see_it():
    """A prefill engine decodes nothing: its fit splits a step's time between two terms that it cannot tell apart."""
    prefill = StepTime(base_s=0.011, prefill_s=0.000007, decode_s=0.0, prefill_base_s=0.011)
    decode = StepTime(base_s=0.003, prefill_s=0.00003, decode_s=0.0001, decode_root_s=0.001, prefill_base_s=0.001)
    found = observe([state("a", step_time=prefill), state("b", step_time=decode)]).step_time
    assert (found.base_s, found.decode_s, found.decode_root_s) == (0.003, 0.0001, 0.001)
    assert found.step_s(8192, 0) == pytest.approx(prefill.step_s(8192, 0))
    # The roles decide it, not the engines.
    other = observe([state("a", step_time=decode), state("b", step_time=prefill)]).step_time
    assert other.base_s == 0.011
    assert other.prefill_base_s == 0.0


@pytest.mark.parametrize("servers", ["a", "b"])
def test_engines_of_one_role_count_alone(servers):
    assert observe([state(name) for name in servers]).step_time == STEP
    assert observe([state("a", step_time=None), state("b", step_time=None)]).step_time is None


def test_the_mean_step_time_is_that_of_the_models_that_are_known():
    slow = StepTime(base_s=0.03, prefill_s=0.003, decode_s=0.0015)
    found = mean_step_time([STEP, None, slow])
    assert (found.base_s, found.prefill_s, found.decode_s) == pytest.approx((0.02, 0.002, 0.001))
    assert mean_step_time([None]) is None
