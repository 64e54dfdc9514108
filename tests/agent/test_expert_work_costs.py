"""What expert work costs: measured for tokens and experts apart, the sizes of steps, and slots that serve nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.experts.step_sizes import StepSizeWindow
from moe_agent.experts.step_times import WorkMeter, work_costs
from moe_scheduling.expert.gpu_priors import WorkCosts

PRIOR = WorkCosts(token_s=1e-8, expert_s=4e-6)


def measured(calls, fixed_s=1e-3, token_s=2e-6, expert_s=1e-4):
    meter = WorkMeter()
    for tokens, experts in calls:
        meter.add(tokens, fixed_s + token_s * tokens + expert_s * experts, experts)
    return meter.costs


def test_the_meter_tells_a_token_from_an_expert():
    costs = measured([(tokens % 97 + experts, experts) for tokens in range(300) for experts in (1, 3, 8)])
    assert costs.token_s == pytest.approx(2e-6)
    assert costs.expert_s == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("calls", "why"),
    [
        ([(4 * experts, experts) for experts in range(1, 9)] * 9, "they rise together"),
        ([(tokens, 8) for tokens in range(1, 99)], "always the same experts"),
        ([(tokens, 0) for tokens in range(1, 99)], "a GPU's steps"),
    ],
)
def test_where_they_rise_alike_all_time_is_that_of_tokens(calls, why):
    costs = measured(calls)
    assert costs.expert_s == 0.0, why
    assert costs.token_s > 0.0, why


def test_a_slope_that_would_be_negative_is_none():
    assert measured([(a, b) for a in range(1, 20) for b in (1, 5, 9)], expert_s=-1e-5).expert_s == 0.0


@pytest.mark.parametrize(
    ("meter", "prior", "used"),
    [
        (WorkCosts(token_s=0.0), None, WorkCosts(token_s=0.0)),
        (WorkCosts(token_s=3e-8), None, WorkCosts(token_s=3e-8)),
        (WorkCosts(token_s=0.0), PRIOR, PRIOR),
        (WorkCosts(token_s=3e-8), PRIOR, PRIOR),
        (WorkCosts(token_s=5e-9), PRIOR, WorkCosts(token_s=5e-9, expert_s=4e-6)),
        (WorkCosts(token_s=3e-8, expert_s=1e-6), PRIOR, WorkCosts(token_s=3e-8, expert_s=1e-6)),
    ],
)
def test_what_was_measured_comes_before_what_is_assumed(meter, prior, used):
    assert work_costs(meter, prior) == used


# --- sizes of steps


def test_sizes_are_kept_by_doublings_with_their_mean():
    window = StepSizeWindow()
    assert window.sizes is None
    for tokens in [0, 5, 7, 2048]:
        window.add(tokens)
    window.fold(4, 1000)
    assert window.sizes.tokens == (6.0, 2048.0)
    assert window.sizes.parts == pytest.approx((2 / 3, 1 / 3))
    window.clear()
    assert window.sizes is None


def test_what_no_longer_comes_is_forgotten():
    window = StepSizeWindow()
    window.add(2048)
    window.fold(1, 100)
    for _ in range(50):
        for _ in range(100):
            window.add(32)
        window.fold(100, 100)
    assert window.sizes.tokens == (32.0,)


@given(st.lists(st.lists(st.integers(0, 10**6), max_size=20), max_size=10), st.integers(1, 10**4))
def test_the_parts_add_up_whatever_comes(rounds, window_steps):
    window = StepSizeWindow()
    for tokens in rounds:
        for count in tokens:
            window.add(count)
        window.fold(max(1, len(tokens)), window_steps)
    sizes = window.sizes
    assert sizes is None or sum(sizes.parts) == pytest.approx(1.0)


# --- idle slots


def test_no_token_goes_to_a_second_slot_of_an_expert_on_a_rank():
    from moe_agent.vllm.idle_replicas import leave_out_idle

    row = torch.tensor([0, 0, 1, 2, 2, 0])
    slots = torch.tensor([[0, 1, 5], [2, -1, -1], [3, 4, -1]])
    replicas = torch.tensor([3, 1, 2])
    leave_out_idle(slots, replicas, row, 2)
    assert slots.tolist() == [[0, 5, -1], [2, -1, -1], [3, -1, -1]]
    assert replicas.tolist() == [2, 1, 1]


def test_a_layer_without_idle_slots_keeps_its_tables():
    from moe_agent.vllm.idle_replicas import leave_out_idle

    slots, replicas = torch.tensor([[0, 3], [1, -1], [2, -1]]), torch.tensor([2, 1, 1])
    leave_out_idle(slots, replicas, torch.tensor([0, 1, 2, 0]), 2)
    assert slots.tolist() == [[0, 3], [1, -1], [2, -1]]
    assert replicas.tolist() == np.array([2, 1, 1]).tolist()
