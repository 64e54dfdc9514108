"""A stand-in for a real expert group, and results of the bench made by hand."""

import asyncio

from moe_contract.experts_state import ExpertsState
from moe_lab.experts.serving import ExpertServingEffort, Start
from moe_lab.experts.waves import WaveSettings, Window
from moe_scheduling.expert.decision import ExpertSettings
from moe_tools.replay import AnsweredRequest, FailedRequest, ReplayResult

from tests.operator.experts_documents import DECISION, PLACED, experts

A = tuple(tuple(row) for row in PLACED)
B = ((0, 2, 3, 1, 2, 3), (0, 2, 3, 1, 2, 3))
C = ((0, 3, 2, 1, 3, 2), (0, 3, 2, 1, 3, 2))
SETTINGS = WaveSettings(users=2, prompt_tokens=4, output_tokens=11)
IDLE = {"load_average": 0.0, "cores": 2}


def answered(ttft_s: float, last_s: float, tokens: int = 11) -> AnsweredRequest:
    return AnsweredRequest(
        index=0, due_s=0.0, lateness_s=0.0, prompt_tokens=4, output_tokens=tokens, ttft_s=ttft_s, last_token_s=last_s,
        end_s=last_s,
    )  # fmt: skip


def failed() -> FailedRequest:
    return FailedRequest(index=0, due_s=0.0, lateness_s=0.0, prompt_tokens=4, kind="HTTP 503", detail="nobody there")


def wave_of(step_s: float) -> ReplayResult:
    return ReplayResult(outcomes=(answered(step_s, 11 * step_s), answered(2 * step_s, 12 * step_s)), wall_s=12 * step_s)


def window_of(step_s: float, gain_s: float | None = None, balance: float = 1.2) -> Window:
    return Window(waves=(wave_of(step_s),) * 2, steps=24, balance=balance, by_rank=(1.2, 0.8), engine_gain_s=gain_s)


def effort_of(**changes) -> ExpertServingEffort:
    return ExpertServingEffort(
        **({"pairs": 3, "window_s": 0.2, "active_s": 0.0, "start": Start.INITIAL, "seed": 5} | changes)
    )


class FakeGroup:
    """Moves with the next wave, and in the mode active when `plans` say so; its steps last 10 ms, 8 ms under B."""

    def __init__(self, plans=(), predicted=(), obeys: bool = True, **document) -> None:
        self.slots, self.wanted, self.mode = A, None, "observe"
        self.steps, self.number, self.rows, self.calls = 0, 0, [], []
        self.plans, self.predicted, self.obeys, self.changes = list(plans), list(predicted), obeys, document

    async def look(self):
        placement = {"version": 1, "directive": 0, "physical_to_logical": [list(row) for row in self.slots]}
        document = {"mode": self.mode, "placement": placement, "decisions": self.rows[:20]} | self.changes
        return ExpertsState.model_validate(experts(**document))

    async def read_steps(self) -> int:
        return self.steps

    async def apply(self, slots) -> None:
        self.wanted = slots
        self.calls.append(("apply", slots))

    async def set(self, settings) -> None:
        self.calls.append(("set", *settings))
        self.mode = settings[0].partition("=")[2]

    async def read_settings(self) -> ExpertSettings:
        return ExpertSettings(interval_steps=3000)

    def decide(self, outcome: str, slots, **changes) -> None:
        self.number += 1
        for row in self.rows:
            row.pop("physical_to_logical", None)
        placed = {"physical_to_logical": [list(row) for row in slots]}
        self.rows.insert(0, {**DECISION, "number": self.number, "outcome": outcome, **placed, **changes})

    async def serve(self, load, settings, salt) -> ReplayResult:
        await asyncio.sleep(0)
        self.calls.append(("wave", salt))
        if self.mode == "active" and self.plans:
            outcome, self.slots = self.plans.pop(0)
            gain_s = self.predicted.pop(0) if outcome == "moved" and self.predicted else None
            self.decide(outcome, self.slots, predicted_gain_s=gain_s)
        if self.wanted and self.obeys:
            self.slots, self.wanted = self.wanted, None
            self.decide("applied", self.slots, measured_gain_s=0.002 if self.slots == B else -0.002)
        self.steps += 12
        return wave_of(0.008 if self.slots == B else 0.01)
