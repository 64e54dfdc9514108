"""The ablation of what the dispatch is told of experts: same arrivals, same physics, only the signals differ."""

import numpy as np
import pytest
from moe_lab.expert_feedback import (
    PREFILL_BUDGET,
    SCENARIOS,
    TOKEN_S,
    VARIANTS,
    WARM_UP_S,
    Known,
    Run,
    Scenario,
    draw,
    pressure,
    simulate,
)

SECONDS = WARM_UP_S + 10.0


def even(engine: int, now_s: float) -> tuple[float, bool]:
    return 1.0, True


def uneven(engine: int, now_s: float) -> tuple[float, bool]:
    return 1.9, True


def test_every_request_is_answered_after_what_it_takes_alone() -> None:
    requests = list(draw(5.0, seed=1))
    Run(SCENARIOS["moving"], VARIANTS["balance"]).serve(requests)
    assert len(requests) > 50
    for request in requests:
        assert request.left == 0
        # The experts of both ranks work on a prompt, so alone it takes a little more than half of its tokens' time.
        alone_s = min(request.prompt, PREFILL_BUDGET) * TOKEN_S / 2
        assert request.first_token_s - request.arrival_s > alone_s
        assert request.predicted_s > 0.0


def test_the_same_run_gives_the_same_times() -> None:
    runs = [simulate(SCENARIOS["drifting"], VARIANTS["balance"], SECONDS, seed=2) for _ in range(2)]
    assert np.array_equal(*runs)
    other = simulate(SCENARIOS["drifting"], VARIANTS["balance"], SECONDS, seed=3)
    assert other.shape != runs[0].shape or not np.array_equal(other, runs[0])


@pytest.mark.parametrize("label", [label for label in VARIANTS if label != "line"])
def test_where_all_is_even_there_is_nothing_to_tell(label: str) -> None:
    runs = [simulate(Scenario(balance=even), VARIANTS[name], SECONDS, seed=4) for name in ("line", label)]
    assert np.array_equal(*runs)


def test_uneven_experts_make_prompts_wait_longer() -> None:
    means = [simulate(Scenario(balance=how), VARIANTS["line"], SECONDS, seed=5)[0].mean() for how in (even, uneven)]
    assert means[1] > 1.1 * means[0]


def test_the_pressures_of_a_group_have_the_mean_one() -> None:
    known = Known(windowed=1.6)
    assert [pressure(known, rank) for rank in range(2)] == pytest.approx([1.6, 0.4])
