"""What follows a failed attempt: a retry at another target, an error, or the end of the answer that has begun."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.attempts import MAX_ATTEMPTS, AttemptFailure, NextStep, RequestAttempts
from moe_scheduling.signals import Target

ARRIVED_S, HOLD_S = 100.0, 60.0
A, B = Target("a"), Target("b")


def attempt(attempts: RequestAttempts, target: Target, failure: AttemptFailure, now_s: float) -> NextStep:
    """One attempt that fails, as a gateway reports it."""
    attempts.begin()
    if failure is not AttemptFailure.UNREACHABLE:
        attempts.receive()
    return attempts.after_failure(target, failure, now_s)


@pytest.fixture
def attempts() -> RequestAttempts:
    return RequestAttempts(HOLD_S, ARRIVED_S)


@pytest.mark.parametrize("failure", [AttemptFailure.BROKEN, AttemptFailure.ENGINE_DEAD, AttemptFailure.ENGINE_FULL])
def test_a_failed_attempt_is_repeated_elsewhere_once(attempts, failure):
    assert attempt(attempts, A, failure, 101.0) is NextStep.RETRY
    assert attempts.failed_targets == {A}
    assert attempt(attempts, B, failure, 102.0) is NextStep.REFUSE
    assert attempts.count == MAX_ATTEMPTS


def test_a_request_may_be_repeated_until_its_last_attempt_and_not_once_it_is_answered(attempts):
    attempts.begin()
    assert attempts.may_repeat
    attempts.is_answering = True
    assert not attempts.may_repeat
    attempts.is_answering = False
    attempts.begin()
    assert attempts.may_repeat is (attempts.count < MAX_ATTEMPTS)


def test_an_engine_that_has_not_seen_the_request_uses_up_no_attempt_within_the_hold_time(attempts):
    for number in range(10):
        assert attempt(attempts, A, AttemptFailure.UNREACHABLE, ARRIVED_S + number) is NextStep.RETRY
    assert (attempts.count, attempts.waiting_since_s) == (0, ARRIVED_S)
    assert attempt(attempts, A, AttemptFailure.UNREACHABLE, ARRIVED_S + HOLD_S) is NextStep.RETRY
    assert attempt(attempts, A, AttemptFailure.UNREACHABLE, ARRIVED_S + HOLD_S) is NextStep.REFUSE


def test_the_hold_time_counts_from_the_loss_of_the_last_engine_that_received_it(attempts):
    assert attempt(attempts, A, AttemptFailure.BROKEN, ARRIVED_S + 500.0) is NextStep.RETRY
    assert attempts.may_wait(ARRIVED_S + 500.0 + HOLD_S - 0.001)
    assert not attempts.may_wait(ARRIVED_S + 500.0 + HOLD_S)
    attempt(attempts, A, AttemptFailure.UNREACHABLE, ARRIVED_S + 510.0)
    assert attempts.waiting_since_s == ARRIVED_S + 500.0


def test_an_answer_that_has_begun_is_broken_off_and_never_repeated(attempts):
    attempts.begin()
    attempts.receive()
    attempts.is_answering = True
    assert attempts.after_failure(A, AttemptFailure.BROKEN, 101.0) is NextStep.BREAK_OFF
    assert attempts.failed_targets == set()


def test_a_stream_that_can_go_on_has_the_attempts_and_the_hold_time_of_any_request(attempts):
    attempts.begin()
    attempts.receive()
    attempts.is_answering = True
    assert attempts.after_failure(A, AttemptFailure.BROKEN, 101.0, can_go_on=True) is NextStep.RETRY
    assert (attempts.failed_targets, attempts.waiting_since_s) == ({A}, 101.0)
    # An engine that cannot be reached has not seen it.
    attempts.begin()
    assert attempts.after_failure(B, AttemptFailure.UNREACHABLE, 102.0, can_go_on=True) is NextStep.RETRY
    attempts.begin()
    attempts.receive()
    assert attempts.after_failure(B, AttemptFailure.BROKEN, 103.0, can_go_on=True) is NextStep.BREAK_OFF


def test_a_stream_that_leaves_an_engine_that_drains_has_lost_no_attempt(attempts):
    attempts.begin()
    attempts.receive()
    attempts.is_answering = True
    attempts.move(101.0)
    attempts.begin()
    attempts.receive()
    assert attempts.after_failure(B, AttemptFailure.BROKEN, 102.0, can_go_on=True) is NextStep.RETRY


@pytest.mark.parametrize(
    ("status", "accepting", "failure"),
    [
        (503, True, AttemptFailure.ENGINE_FULL),
        (503, False, AttemptFailure.ENGINE_FULL),
        (500, False, AttemptFailure.BROKEN),
        (500, True, None),
        (502, False, None),
        (429, True, None),
        (200, False, None),
    ],
)
def test_the_status_of_a_full_or_draining_engine_is_a_failure_while_an_attempt_is_left(
    attempts, status, accepting, failure
):
    attempts.begin()
    assert attempts.failure_of_status(status, is_accepting=accepting) is failure
    attempts.begin()
    assert attempts.failure_of_status(status, is_accepting=accepting) is None


def test_a_busy_engine_is_a_failure_only_where_another_one_takes_the_request(attempts):
    attempts.begin()
    assert attempts.failure_of_status(429, is_accepting=True, has_other=True) is AttemptFailure.ENGINE_FULL
    attempts.begin()
    assert attempts.failure_of_status(429, is_accepting=True, has_other=True) is None


@given(st.lists(st.tuples(st.sampled_from(AttemptFailure), st.floats(0.0, 30.0)), max_size=40))
def test_a_request_is_received_by_no_more_engines_than_it_has_attempts(steps):
    attempts, now_s, received = RequestAttempts(HOLD_S, ARRIVED_S), ARRIVED_S, 0
    for failure, step_s in steps:
        now_s += step_s
        received += failure is not AttemptFailure.UNREACHABLE
        if attempt(attempts, A, failure, now_s) is not NextStep.RETRY:
            break
        assert attempts.waiting_since_s <= now_s
    assert received <= MAX_ATTEMPTS
