"""The real decision behind the controller's question: closed loops over loads whose right answer is known."""

import json
from dataclasses import replace

import numpy as np
import pytest
from moe_agent.experts.controller import Controller
from moe_agent.experts.decision import Decider
from moe_agent.experts.directive import GroupShape
from moe_agent.experts.document import build_document, list_hottest, render_document
from moe_agent.experts.figures import count_moves_by_layer, measure_balance
from moe_agent.experts.first_rank import checksum
from moe_agent.experts.planning import Costs, Question
from moe_scheduling.expert.decision import ExpertSettings, initial_placement

SHAPE = GroupShape(ranks=2, nodes=1, layers=2, experts=4, slots_per_rank=3)
START = initial_placement(layers=2, experts=4, redundant=2, ranks=2).physical_to_logical


def question(tokens: np.ndarray, *, token_s: float = 1e-3, move_s: float = 1e-3, horizon: int = 1000) -> Question:
    return Question(
        tokens=tokens,
        pairs=None,
        steps=64.0,
        placement=START,
        shape=SHAPE,
        version=1,
        costs=Costs(token_s=token_s, remote_token_s=0.0, internode_token_s=0.0, move_s=move_s),
        settings=ExpertSettings(),
        horizon_steps=horizon,
    )


# Experts 2 and 3 have all tokens, and 2 lies on the first rank alone, 3 on the second alone, in layer 0; in layer 1
# both experts with tokens lie on the first rank alone.
SKEWED = np.array([[[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 20.0, 0.0]]] * 2)


def test_a_skewed_load_is_balanced_when_that_pays():
    answer = Decider().decide(question(SKEWED))
    assert answer.pays
    assert answer.balance_after < answer.balance_before
    assert measure_balance(SKEWED, answer.placement, SHAPE).mean == pytest.approx(answer.balance_after)
    assert answer.gain_s > 0.0
    assert answer.seconds > 0.0
    assert "load" in answer.reason


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (question(np.zeros((2, 2, 4))), "idle"),
        (question(np.ones((2, 2, 4)) * [1, 1, 0.5, 0.5]), "balanced"),
        (question(SKEWED, move_s=1e3, horizon=1), "unpaid"),
    ],
)
def test_what_does_not_pay_stays_with_the_reason(asked, reason):
    answer = Decider().decide(asked)
    assert not answer.pays
    assert answer.reason.startswith(f"{reason}: ")
    assert answer.kept_by == reason


def test_a_load_that_turned_round_is_less_trusted():
    decider = Decider()
    assert decider.decide(question(SKEWED)).pays
    turned = SKEWED[:, :, ::-1].copy()
    first = Decider().decide(question(turned))
    again = decider.decide(question(turned, move_s=first.gain_s * 500))
    assert not again.pays


def test_a_move_that_was_taken_back_is_paid_for_there_and_back():
    decider = Decider()
    moved = decider.decide(question(SKEWED))
    decider.decide(replace(question(SKEWED), spells=((moved.placement, 20), (START, 40))))
    account = decider._history.account
    moves = sum(count_moves_by_layer(START, moved.placement, SHAPE))
    assert moves > 0
    assert account.paid_s == pytest.approx(2 * moves * 1e-3)
    assert account.won_s == pytest.approx(moved.gain_s * 20)
    assert (account.began.physical_to_logical == START).all()


def test_the_text_of_a_document_is_that_of_json():
    controller = Controller(SHAPE, START, question(SKEWED).costs, planner=None, checksum=checksum)
    document = build_document(controller, 5.0)
    text = json.loads(render_document(document))
    assert text["placement"]["physical_to_logical"] == START.tolist()
    assert text["load"] == {"steps": 0.0, "tokens": np.zeros((2, 2, 4)).tolist(), "hottest": []}
    assert text["balance"] == {"mean": 1.0, "worst": 1.0, "by_layer": [1.0, 1.0], "by_rank": [1.0, 1.0]}
    assert (text["written_s"], text["problems"], text["costs"]["token_s"]) == (5.0, [], 0.001)


def test_the_hottest_come_first_and_those_without_tokens_not_at_all():
    rows = list_hottest(SKEWED)
    assert rows[0] == {"layer": 1, "expert": 2, "tokens": 40.0}
    assert [row["tokens"] for row in rows] == sorted((row["tokens"] for row in rows), reverse=True)
    assert len(rows) == 5
