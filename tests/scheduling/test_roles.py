"""Roles by load: which engines compute prompts alone, and when that changes."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.disaggregation import EngineRole
from moe_scheduling.fleet.role_latency import RoleObservation, ServerLoad, predict_costs_s, predict_latency_s
from moe_scheduling.fleet.roles import KeepRoles, RoleHistory, RoleReason, RoleSettings, SetRole, plan_roles
from moe_scheduling.signals import StepTime

STEP_TIME = StepTime(base_s=0.008, prefill_s=0.00003, decode_s=0.00005)
# The growth of TTFT is a test of its own.
SETTINGS = RoleSettings(ttft_growth=10.0)


def servers(prefill=0, unified=4, decoding=0):
    roles = [EngineRole.PREFILL] * prefill + [EngineRole.UNIFIED] * unified
    return [ServerLoad(name=f"e{number}", role=role, decoding=decoding) for number, role in enumerate(roles)]


def observe(now_s, fleet=None, **values):
    usual = {
        "step_time": STEP_TIME,
        "requests_per_s": 25.0,
        "prompt_tokens": 3000.0,
        "answer_tokens": 100.0,
        "transfer_s": 0.02,
    }
    return RoleObservation(observed_s=now_s, servers=servers() if fleet is None else fleet, **{**usual, **values})


def run(observation_at, seconds, *, fleet, step_s=5.0, settings=SETTINGS):
    """Calls it again and again, and carries its changes out; returns the changes with their times, and the fleet."""
    history, changes = RoleHistory(), []
    for number in range(int(seconds / step_s)):
        now_s = number * step_s
        decision, history = plan_roles(observation_at(now_s, fleet), settings, history, now_s)
        if isinstance(decision, SetRole):
            changes.append((now_s, decision))
            fleet = [replace(row, role=decision.role) if row.name == decision.server else row for row in fleet]
    return changes, fleet


def counted(fleet):
    return sum(row.role is EngineRole.PREFILL for row in fleet)


def test_a_lasting_load_of_long_prompts_makes_prefill_engines_one_at_a_time():
    changes, fleet = run(observe, 600, fleet=servers())
    costs_s = predict_costs_s(observe(0), SETTINGS.ttft_growth)
    assert counted(fleet) == costs_s.index(min(costs_s)) > 0
    assert [change.reason for _, change in changes] == [RoleReason.GAIN] * counted(fleet)
    times = [at_s for at_s, _ in changes]
    assert times[0] == SETTINGS.settle_s
    assert all(later - before >= SETTINGS.interval_s for before, later in itertools.pairwise(times))


def test_short_prompts_with_long_answers_make_all_engines_unified_again():
    def load(now_s, fleet):
        return observe(now_s, fleet, prompt_tokens=20.0, answer_tokens=900.0, requests_per_s=30.0)

    changes, fleet = run(load, 900, fleet=servers(prefill=3, unified=1))
    assert (counted(fleet), {change.role for _, change in changes}) == (0, {EngineRole.UNIFIED})


def test_a_load_that_changes_its_kind_each_minute_moves_little():
    def load(now_s, fleet):
        long = int(now_s / 10) % 2 == 0
        return observe(now_s, fleet, prompt_tokens=3000.0 if long else 20.0, answer_tokens=100.0 if long else 900.0)

    changes, _ = run(load, 1200, fleet=servers())
    assert changes == []


def test_the_engine_with_the_fewest_answers_changes_first():
    fleet = [replace(row, decoding=count) for row, count in zip(servers(), (9, 7, 2, 8), strict=True)]
    changes, _ = run(observe, 20, fleet=fleet)
    assert [change.server for _, change in changes] == ["e2"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"fleet": servers(unified=1)}, RoleReason.FLOOR),
        ({"fleet": []}, RoleReason.FLOOR),
        ({"requests_per_s": 0.0}, RoleReason.IDLE),
        ({"requests_per_s": 0.5, "prompt_tokens": 100.0}, RoleReason.NO_GAIN),
        ({"requests_per_s": 1e6}, RoleReason.NO_GAIN),
        ({"step_time": None}, RoleReason.UNKNOWN),
        ({"requests_per_s": math.nan}, RoleReason.UNKNOWN),
        ({"prompt_variation": math.inf}, RoleReason.UNKNOWN),
        ({"answer_tokens": -1.0}, RoleReason.UNKNOWN),
        ({"ranks": 0}, RoleReason.UNKNOWN),
    ],
)
def test_reasons_to_keep_the_roles(changed, reason):
    decision, _ = plan_roles(observe(50.0, **changed), SETTINGS, RoleHistory(), 50.0)
    assert decision == KeepRoles(reason)


def test_an_old_observation_changes_nothing_and_ends_the_wait():
    waiting = RoleHistory(favoured=2, since_s=0.0)
    decision, history = plan_roles(observe(50.0), SETTINGS, waiting, 90.0)
    assert (decision, history.favoured) == (KeepRoles(RoleReason.UNKNOWN), None)


def test_a_change_that_does_not_pay_within_the_horizon_is_not_made():
    impatient = replace(SETTINGS, horizon_s=0.0)
    history = RoleHistory(favoured=3, since_s=0.0)
    busy = servers(decoding=50)
    decision, _ = plan_roles(observe(50.0, busy), impatient, history, 50.0)
    assert decision == KeepRoles(RoleReason.UNPROFITABLE)


def test_another_direction_waits_anew():
    history = RoleHistory(favoured=0, since_s=0.0)
    decision, history = plan_roles(observe(50.0, servers(1, 3)), SETTINGS, history, 50.0)
    assert (decision, history.since_s) == (KeepRoles(RoleReason.SETTLING), 50.0)


def test_a_fleet_of_prefill_engines_alone_gets_a_unified_one():
    changes, fleet = run(observe, 60, fleet=servers(prefill=4, unified=0))
    assert (counted(fleet), changes[0][1].role) == (3, EngineRole.UNIFIED)


def test_a_fleet_that_can_serve_the_load_in_no_way_still_gets_a_unified_engine():
    def load(now_s, fleet):
        return observe(now_s, fleet, requests_per_s=1e6)

    _, fleet = run(load, 60, fleet=servers(prefill=4, unified=0))
    assert counted(fleet) == 3


def test_a_load_that_no_number_of_prefill_engines_can_serve_still_gets_those_that_serve_most_of_it():
    # Qwen3.6-35B-A3B on one B300.
    b300 = StepTime(base_s=0.0021, prefill_s=8.2e-6, decode_s=0.0, decode_root_s=0.00138, prefill_base_s=0.0136)

    def load(now_s, fleet):
        return observe(
            now_s, fleet, step_time=b300, step_tokens=8192, requests_per_s=120.0, prompt_tokens=4000.0, transfer_s=0.006
        )

    assert all(predict_latency_s(load(0.0, servers()), count, 0.5)[0] == math.inf for count in range(4))
    _, fleet = run(load, 600, fleet=servers(), settings=RoleSettings())
    assert counted(fleet) == 3


@pytest.mark.parametrize(("growth", "moves"), [(0.0, False), (0.1, False), (10.0, True)])
def test_prefill_engines_may_not_lengthen_ttft_beyond_the_declared_growth(growth, moves):
    _, fleet = run(observe, 600, fleet=servers(), settings=RoleSettings(ttft_growth=growth))
    assert (counted(fleet) > 0) is moves


def test_prefill_engines_that_lengthen_ttft_too_much_at_a_new_load_are_taken_back():
    _, fleet = run(observe, 600, fleet=servers(prefill=2, unified=2), settings=RoleSettings(ttft_growth=0.0))
    assert counted(fleet) == 0


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_prompts_of_any_rank_interrupt_the_answers_of_the_group(ranks):
    """At the same utilisation of a rank, and never longer than steps with full chunks."""
    load = observe(0.0, servers(unified=1), ranks=ranks, requests_per_s=4.0 * ranks, answer_tokens=20.0)
    _, inter_token_s = predict_latency_s(load, 0, 0.5)
    busy = 4.0 * 3000.0 * STEP_TIME.prefill_s
    decoding = STEP_TIME.decode_s * 4.0 * 20.0
    left, full_s = (1.0 - busy) ** ranks - decoding, (STEP_TIME.base_s + 2048 * STEP_TIME.prefill_s) / (1.0 - decoding)
    assert inter_token_s == pytest.approx(min(STEP_TIME.base_s / left, full_s) if left > 0 else full_s, rel=1e-3)


@pytest.mark.parametrize("base_s", [0.0, 0.008])
@pytest.mark.parametrize("prefill_s", [0.0, 0.00003])
@pytest.mark.parametrize("decode_s", [0.0, 0.00005])
def test_a_fitted_line_may_lack_any_of_its_parts(base_s, prefill_s, decode_s):
    step_time = StepTime(base_s=base_s, prefill_s=prefill_s, decode_s=decode_s)
    _, fleet = run(lambda now_s, fleet: observe(now_s, fleet, step_time=step_time), 300, fleet=servers())
    assert counted(fleet) < len(fleet)


# Rollback.


def test_a_change_that_made_things_worse_is_undone_and_not_tried_again_for_a_while():
    def load(now_s, fleet):
        return observe(now_s, fleet, measured_s=1.0 + counted(fleet))

    changes, _ = run(load, 900, fleet=servers())
    assert [change.reason for _, change in changes[:3]] == [RoleReason.GAIN, RoleReason.ROLLBACK, RoleReason.GAIN]
    assert changes[1][1].server == changes[0][1].server
    assert changes[2][0] - changes[1][0] >= SETTINGS.retry_s


def test_a_change_that_helped_stays():
    def load(now_s, fleet):
        return observe(now_s, fleet, measured_s=5.0 - counted(fleet))

    changes, fleet = run(load, 600, fleet=servers())
    assert {change.reason for _, change in changes} == {RoleReason.GAIN}
    assert counted(fleet) > 1


@pytest.mark.parametrize("fleet", [servers(0, 4), [row for row in servers(1, 3) if row.name != "e0"]])
def test_nothing_is_undone_where_the_engine_has_its_role_again_or_is_gone(fleet):
    history = RoleHistory(changed_s=0.0, trial=("e0", EngineRole.UNIFIED), before_s=0.1)
    decision, _ = plan_roles(observe(100.0, fleet, measured_s=9.0), SETTINGS, history, 100.0)
    assert isinstance(decision, KeepRoles)


@pytest.mark.parametrize("measured_s", [None, math.nan, math.inf, -1.0])
def test_an_implausible_measurement_undoes_nothing_and_leaves_the_change_on_trial(measured_s):
    history = RoleHistory(changed_s=0.0, trial=("e0", EngineRole.UNIFIED), before_s=1.0)
    decision, after = plan_roles(observe(100.0, servers(1, 3), measured_s=measured_s), SETTINGS, history, 100.0)
    assert (decision, after.trial) == (KeepRoles(RoleReason.SETTLING), history.trial)


@pytest.mark.parametrize("measured_s", [None, math.nan, math.inf])
def test_a_change_without_a_measured_cost_before_it_is_not_on_trial(measured_s):
    history = RoleHistory(favoured=1, since_s=0.0)
    decision, after = plan_roles(observe(100.0, servers(), measured_s=measured_s), SETTINGS, history, 100.0)
    assert isinstance(decision, SetRole)
    assert after.trial is None


# Invariants.


@given(
    st.lists(st.tuples(st.sampled_from(EngineRole), st.integers(0, 300)), max_size=8),
    st.fixed_dictionaries(
        {
            "requests_per_s": st.floats(),
            "prompt_tokens": st.floats(),
            "answer_tokens": st.floats(),
            "transfer_s": st.floats(),
            "ranks": st.integers(-1, 8),
            "measured_s": st.none() | st.floats(),
        }
    ),
    st.lists(st.floats(0, 100), max_size=12),
)
def test_a_decoding_engine_is_left_and_changes_keep_their_distance(rows, values, gaps):
    fleet = [ServerLoad(name=f"e{n}", role=role, decoding=count) for n, (role, count) in enumerate(rows)]
    begun_with_all = counted(fleet) == len(fleet)
    history, now_s, times = RoleHistory(), 0.0, []
    for gap in gaps:
        now_s += gap
        arguments = (observe(now_s, fleet, **values), SETTINGS, history, now_s)
        decision, history = plan_roles(*arguments)
        assert (decision, history) == plan_roles(*arguments)
        if isinstance(decision, SetRole):
            times.append(now_s)
            fleet = [replace(row, role=decision.role) if row.name == decision.server else row for row in fleet]
            assert begun_with_all or counted(fleet) < len(fleet)
    assert all(later - before >= SETTINGS.interval_s for before, later in itertools.pairwise(times))


@given(st.floats(0.01, 50), st.floats(1, 10_000), st.floats(0, 2000), st.integers(1, 8))
def test_a_predicted_cost_is_positive_and_more_requests_never_lower_it(rate, prompt_tokens, answer_tokens, ranks):
    def cost_s(requests_per_s):
        load = observe(
            0.0, requests_per_s=requests_per_s, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, ranks=ranks
        )
        ttft_s, inter_token_s = predict_latency_s(load, 0, 0.5)
        return ttft_s + answer_tokens * inter_token_s if ttft_s < math.inf else math.inf

    assert 0.0 < cost_s(rate) <= cost_s(rate * 1.5) * (1 + 1e-9)


def test_a_load_without_prompts_costs_its_answers_alone():
    load = observe(0.0, prompt_tokens=0.0)
    assert all(map(math.isfinite, predict_costs_s(load, 10.0)[:2]))


@pytest.mark.parametrize("values", [{"least_gain": -0.1}, {"interval_s": math.nan}, {"horizon_s": math.inf}])
def test_settings_out_of_range_are_refused_by_name(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        RoleSettings(**values)
