"""The hold queue: bounded, in order, and released in passes that never nest."""

from dataclasses import dataclass, field

import pytest
from moe_contract.gateway_config import EngineAddress, GatewayConfig, Limits, Listen
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.hold_queue import HELD, HoldQueue, Rejection
from moe_scheduling.engine.attempts import AttemptFailure, NextStep, RequestAttempts
from moe_scheduling.engine.choice import Job, Send, SendReason
from moe_scheduling.request.order import RequestPolicy, RequestSettings
from moe_scheduling.signals import EngineSignal, StepTime, Target

FCFS = RequestSettings(policy=RequestPolicy.FCFS)
NOW_S = 100.0
SEND = Send(Target("a"), 0.1, SendReason.TURN)


@dataclass(eq=False)
class Waiting:
    """A held request that records its end, and calls `on_release` within its release."""

    name: str
    log: list[str]
    job: Job = field(default_factory=lambda: Job(10))
    attempts: RequestAttempts = field(default_factory=lambda: RequestAttempts(60.0, NOW_S))
    computes: bool = True
    on_release: object = None

    def release(self, decision: Send) -> None:
        self.log.append(f"{self.name} begins")
        if self.on_release is not None:
            self.on_release()
        self.log.append(f"{self.name} ends")

    def reject(self, rejection: Rejection) -> None:
        self.log.append(f"{self.name} {rejection.value}")


def test_requests_are_released_in_order_while_a_target_takes_the_first():
    queue, log = HoldQueue(FCFS, most_requests=2), []
    first, second = Waiting("first", log), Waiting("second", log)
    assert (queue.push(first, 1.0), queue.push(second, 2.0)) == (True, True)
    assert not queue.push(Waiting("third", log), 3.0)
    queue.release_while(lambda waiter: SEND if waiter is first else None)
    assert log == ["first begins", "first ends"]
    assert list(queue.waiters) == [second]


def test_a_release_that_asks_for_another_pass_starts_none_and_no_request_is_missed():
    queue, log = HoldQueue(FCFS, most_requests=10), []
    late = Waiting("late", log)

    def ask_again() -> None:
        queue.push(late, 3.0)
        queue.release_while(lambda waiter: SEND)
        log.append("asked")

    for at_s, waiter in enumerate([Waiting("first", log, on_release=ask_again), Waiting("second", log)]):
        queue.push(waiter, float(at_s))
    queue.release_while(lambda waiter: SEND)
    names = ["first begins", "asked", "first ends", "second begins", "second ends", "late begins", "late ends"]
    assert log == names
    assert not queue.waiters


def test_a_release_that_raises_leaves_the_queue_usable():
    queue, log = HoldQueue(FCFS, most_requests=10), []

    def fail() -> None:
        raise OSError("no connection")

    queue.push(Waiting("bad", log, on_release=fail), 1.0)
    queue.push(Waiting("good", log), 2.0)
    with pytest.raises(OSError, match="no connection"):
        queue.release_while(lambda waiter: SEND)
    queue.release_while(lambda waiter: SEND)
    assert log == ["bad begins", "good begins", "good ends"]


def test_only_requests_whose_time_is_over_are_expired():
    queue, log = HoldQueue(FCFS, most_requests=10), []
    old = Waiting("old", log, attempts=RequestAttempts(5.0, NOW_S))
    new = Waiting("new", log, attempts=RequestAttempts(5.0, NOW_S + 3.0))
    queue.push(old, NOW_S)
    queue.push(new, NOW_S + 3.0)
    assert queue.longest_wait_s(NOW_S + 4.0) == 4.0
    assert queue.expired(NOW_S + 5.0) == [old]
    queue.discard(old)
    queue.discard(old)
    assert queue.expired(NOW_S + 8.0) == [new]


# Behind a dispatcher.


def make_dispatcher(tmp_path, *names: str, **limits: float) -> Dispatcher:
    config = GatewayConfig(
        listen=Listen(port=1),
        admin=Listen(port=2),
        token_file=tmp_path,
        engines=tuple(EngineAddress(name=name, url=f"http://{name}") for name in names),
        limits=Limits(**limits),
    )
    return Dispatcher(config)


def test_an_engine_that_fails_within_a_release_is_left_for_another_in_the_same_pass(tmp_path):
    dispatcher, log = make_dispatcher(tmp_path, "a", "b"), []
    depth = most = 0
    now_s = NOW_S

    class Failing(Waiting):
        """Its first attempt fails at once, as where the engine was taken away; what follows is the gateway's way."""

        def release(self, decision: Send) -> None:
            nonlocal depth, most
            depth += 1
            most = max(most, depth)
            sent = dispatcher.send(self.job, (), None, decision, now_s)
            self.attempts.begin()
            if self.attempts.count == 1:
                step = self.attempts.after_failure(decision.target, AttemptFailure.BROKEN, now_s)
                dispatcher.fail(decision.target, now_s)
                dispatcher.settle(sent, now_s)
                assert step is NextStep.RETRY
                dispatcher.admit(self, now_s)
            else:
                dispatcher.answer(sent, now_s)
                log.append(f"{self.name} at {decision.target.server}")
            depth -= 1

    for name in ("x", "y", "z"):
        assert dispatcher.admit(Failing(name, log), NOW_S) is HELD
    dispatcher.set_ready("a", True, NOW_S)
    assert log == []
    dispatcher.set_ready("b", True, NOW_S)
    for _ in range(3):
        now_s += 1.0
        dispatcher.tick(now_s)
    assert sorted(row[0] for row in log) == ["x", "y", "z"]
    assert (dispatcher.held, most) == (0, 1)


def test_a_request_is_rejected_by_the_reason_that_holds(tmp_path):
    log = []
    assert make_dispatcher(tmp_path).admit(Waiting("x", log), NOW_S) is Rejection.NO_ENGINE_CONFIGURED
    dispatcher = make_dispatcher(tmp_path, "a", hold_requests=1)
    assert dispatcher.admit(Waiting("held", log), NOW_S) is HELD
    assert dispatcher.admit(Waiting("y", log), NOW_S) is Rejection.QUEUE_FULL_NO_ENGINE
    dispatcher.tick(NOW_S + 59.0)
    assert log == []
    dispatcher.tick(NOW_S + 60.0)
    assert (log, dispatcher.held) == (["held timeout_no_engine"], 0)


@pytest.mark.parametrize(
    ("prefill_s", "order"),
    [(1e-6, ["long", "short"]), (1e-3, ["short", "long"]), (None, ["short", "long"])],
    ids=["fast engine", "slow engine", "not known"],
)
def test_what_a_second_of_waiting_makes_up_for_goes_by_the_engines_step_times(tmp_path, prefill_s, order):
    dispatcher, log = make_dispatcher(tmp_path, "a"), []
    if prefill_s is not None:
        step_time = StepTime(base_s=0.001, prefill_s=prefill_s, decode_s=0.0)
        dispatcher.observe(Target("a"), EngineSignal(step=1, step_time=step_time), NOW_S, NOW_S)
    for name, tokens, wait_s in (("long", 8192, 0.0), ("short", 16, 0.5)):
        assert dispatcher.admit(Waiting(name, log, job=Job(tokens)), NOW_S + wait_s) is HELD
    dispatcher.set_ready("a", True, NOW_S + 1.0)
    assert [row.split()[0] for row in log if row.endswith("begins")] == order
