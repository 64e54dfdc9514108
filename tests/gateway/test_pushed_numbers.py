"""The numbers that a gateway pushes: one without requests of its own still says how loaded the engines are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.control_tokens import ControlTokens
from moe_contract.gateway_config import EngineAddress, GatewayConfig, GatewaySettings
from moe_contract.gateway_state import GatewayState, read_gateway_state
from moe_contract.sections import Listen
from moe_contract.state_stream import SparseStream
from moe_gateway.admin import LOOK_EVERY_S, Admin
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.recent import WINDOW_S
from moe_gateway.request_stats import RequestStats
from moe_scheduling.signals import EngineSignal, StepTime, Target

A = Target("a", 0)
INTERVAL_S = 3.0
IDLE = EngineSignal(step_time=StepTime(base_s=0.004, prefill_s=0.0001, decode_s=0.0002))


class Pushing:
    """A gateway whose clock is the test's, and the states that a watcher of it has got."""

    def __init__(self) -> None:
        config = GatewayConfig(
            listen=Listen(port=1),
            admin=Listen(port=2),
            token_file=Path("none"),
            engines=(EngineAddress(name="a", url="http://a", agent_url="http://a"),),
        )
        self.now_s, self.dispatcher, self.stats = 1000.0, Dispatcher(config), RequestStats(1000.0)
        self.dispatcher.set_ready("a", True, self.now_s)
        self.dispatcher.set_reachable("a", True)
        gateway = SimpleNamespace(
            dispatcher=self.dispatcher,
            stats=self.stats,
            draining=False,
            in_force=GatewaySettings(dispatch=config.dispatch, request=config.request),
            clock=lambda: self.now_s,
        )
        self._admin = Admin(cast(Any, gateway), cast(ControlTokens, None))
        self._sparse = SparseStream(INTERVAL_S)
        self.sent: list[tuple[float, GatewayState]] = []

    def run(self, seconds: float, signal: EngineSignal = IDLE) -> None:
        for _ in range(round(seconds / LOOK_EVERY_S)):
            self.dispatcher.observe(A, signal, self.now_s, self.now_s)
            if (line := self._admin._next_line(self._sparse)).strip():
                self.sent.append((self.now_s, read_gateway_state(line)))
            self.now_s += LOOK_EVERY_S

    @property
    def pushed(self) -> GatewayState:
        return self.sent[-1][1]

    @property
    def true(self) -> GatewayState:
        return read_gateway_state(self._admin._write_state())


def of_load(tokens: int) -> EngineSignal:
    return replace(IDLE, running=50, waiting=40, waiting_prefill_tokens=tokens)


def answer_slowly(pushing: Pushing) -> None:
    for _ in range(5):
        pushing.stats.arrive(100, pushing.now_s)
    pushing.run(12.0)
    for _ in range(5):
        pushing.stats.answer(12.0, pushing.now_s)
        pushing.stats.finish("chat", 200)
    pushing.run(INTERVAL_S + 1.0)
    assert pushing.pushed.ttft_s == pytest.approx(12.0)


def test_a_wait_that_others_requests_cause_is_pushed_by_a_gateway_without_requests() -> None:
    pushing = Pushing()
    pushing.run(10.0)
    assert pushing.pushed.wait_s == 0.0
    pushing.run(INTERVAL_S + 1.0, of_load(60_000))
    assert pushing.true.wait_s is not None
    assert pushing.true.wait_s > 1.0
    assert pushing.pushed.wait_s == pytest.approx(pushing.true.wait_s, abs=0.01)
    pushing.run(INTERVAL_S + 1.0)
    assert pushing.pushed.wait_s == 0.0


def test_the_end_of_the_window_of_times_to_first_token_is_pushed() -> None:
    pushing = Pushing()
    answer_slowly(pushing)
    pushing.run(WINDOW_S + INTERVAL_S)
    assert pushing.true.ttft_s is None
    assert pushing.pushed.ttft_s is None


def test_the_age_of_a_held_request_is_pushed_while_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    pushing, held_s = Pushing(), 1000.0
    monkeypatch.setattr(Dispatcher, "held", property(lambda _: 1))
    monkeypatch.setattr(Dispatcher, "held_since_s", lambda _, now_s: now_s - held_s)
    pushing.run(60.0)
    assert pushing.pushed.held_since_s == pytest.approx(60.0, abs=INTERVAL_S + 1.0)


def test_a_gateway_whose_engines_are_idle_pushes_one_state() -> None:
    pushing = Pushing()
    pushing.run(300.0)
    assert len(pushing.sent) == 1


STEPS: list[Callable[[Pushing], None]] = [
    lambda pushing: pushing.run(1.0, of_load(20_000)),
    lambda pushing: pushing.run(5.0, of_load(90_000)),
    lambda pushing: pushing.run(2.0),
    lambda pushing: pushing.stats.arrive(100, pushing.now_s),
    lambda pushing: pushing.stats.answer(0.5, pushing.now_s),
    lambda pushing: pushing.stats.finish("chat", 200),
]


@given(st.lists(st.sampled_from(STEPS), max_size=20))
def test_what_was_pushed_is_true_again_soon_after_the_last_change(steps: list[Callable[[Pushing], None]]) -> None:
    pushing = Pushing()
    for step in steps:
        step(pushing)
    pushing.run(WINDOW_S + INTERVAL_S)
    pushed, true = pushing.pushed, pushing.true
    assert (pushed.wait_s, pushed.ttft_s, pushed.arrivals_per_s) == (true.wait_s, true.ttft_s, true.arrivals_per_s)
    spans = [after - before for (before, _), (after, _) in zip(pushing.sent, pushing.sent[1:], strict=False)]
    assert min(spans, default=INTERVAL_S) >= INTERVAL_S - 1e-6
