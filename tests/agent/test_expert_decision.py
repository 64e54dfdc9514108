"""The real decision behind the controller's request: closed loops over loads whose right answer is known."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moe_agent.experts.bookkeeping import KEPT_DECISIONS, DecisionOutcome
from moe_agent.experts.controller import Controller
from moe_agent.experts.coordinator import checksum
from moe_agent.experts.directive import GroupShape
from moe_agent.experts.document import PublishedExperts, build_state, list_hottest, take_publication, write_document
from moe_agent.experts.heat import build_heat
from moe_agent.experts.load import count_moves_by_layer, measure_balance
from moe_agent.experts.planning import Decider, MeasuredCosts, PlanRequest
from moe_contract.experts_state import HotExpertPart, read_experts
from moe_scheduling.expert.decision import ExpertSettings, initial_placement

SHAPE = GroupShape(ranks=2, nodes=1, layers=2, experts=4, slots_per_rank=3)
START = initial_placement(layers=2, experts=4, redundant=2, ranks=2).physical_to_logical


def request(tokens: np.ndarray, *, token_s: float = 1e-3, move_s: float = 1e-3, horizon: int = 1000) -> PlanRequest:
    return PlanRequest(
        tokens=tokens,
        steps=64.0,
        placement=START,
        shape=SHAPE,
        version=1,
        costs=MeasuredCosts(token_s=token_s, remote_token_s=0.0, internode_token_s=0.0, move_s=move_s),
        settings=ExpertSettings(),
        horizon_steps=horizon,
    )


# Experts 2 and 3 have all tokens, and 2 lies on the first rank alone, 3 on the second alone, in layer 0; in layer 1
# both experts with tokens lie on the first rank alone.
SKEWED = np.array([[[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 20.0, 0.0]]] * 2)


def test_a_skewed_load_is_balanced_when_that_pays():
    answer = Decider().decide(request(SKEWED))
    assert answer.pays
    assert answer.balance_after < answer.balance_before
    assert measure_balance(SKEWED, answer.placement, SHAPE).mean == pytest.approx(answer.balance_after)
    assert answer.gain_s > 0.0
    assert answer.seconds > 0.0
    assert "load" in answer.reason


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (request(np.zeros((2, 2, 4))), "idle"),
        (request(np.ones((2, 2, 4)) * [1, 1, 0.5, 0.5]), "balanced"),
        (request(SKEWED, move_s=1e3, horizon=1), "unpaid"),
    ],
)
def test_what_does_not_pay_stays_with_the_reason(asked, reason):
    answer = Decider().decide(asked)
    assert not answer.pays
    assert answer.reason.startswith(f"{reason}: ")
    assert answer.stay_reason == reason


def test_a_load_that_turned_round_is_counted_on_less():
    decider = Decider()
    assert decider.decide(request(SKEWED)).pays
    turned = SKEWED[:, :, ::-1].copy()
    first = Decider().decide(request(turned))
    again = decider.decide(request(turned, move_s=first.gain_s * 500))
    assert not again.pays


def test_a_rolled_back_move_is_accounted_with_the_time_that_it_was_in_force():
    decider = Decider()
    first = replace(request(SKEWED), accounted_steps=100)
    moved = decider.decide(first)
    moves = sum(count_moves_by_layer(START, moved.placement, SHAPE))
    assert moves > 0
    tried = replace(first, placement=moved.placement, regret=moved.regret.add_moves(moves * 1e-3), accounted_steps=20)
    back = decider.decide(tried)
    after = back.regret.add_moves(moves * 1e-3)
    assert after.paid_s == pytest.approx(2 * moves * 1e-3)
    assert after.won_s == pytest.approx(moved.gain_s * 20)
    assert (after.began.physical_to_logical == START).all()


def test_what_is_published_is_read_with_all_its_tables_or_in_short(tmp_path):
    controller = Controller(SHAPE, START, request(SKEWED).costs, planner=None, checksum=checksum)
    write_document(tmp_path, take_publication(controller, 5.0))
    published = PublishedExperts(tmp_path)
    document = published.read(5.0)
    assert document["placement"]["physical_to_logical"] == START.tolist()
    assert document["load"] == {"steps": 0.0, "tokens": np.zeros((2, 2, 4)).tolist(), "hottest": [], "sizes": None}
    assert document["balance"] == {"mean": 1.0, "worst": 1.0, "by_layer": [1.0, 1.0], "by_rank": [1.0, 1.0]}
    assert (document["problems"], document["costs"]["token_s"], document["affinity"]) == ([], 0.001, None)
    short = published.read(5.0, short=True)
    assert "physical_to_logical" not in short["placement"]
    assert short["load"] == {"steps": 0.0, "hottest": [], "sizes": None}
    json.dumps([document, short])


def test_heat_is_read_from_the_file_of_its_brief_form_though_that_is_removed_meanwhile(tmp_path, monkeypatch):
    controller = Controller(SHAPE, START, request(SKEWED).costs, planner=None, checksum=checksum)
    write_document(tmp_path, take_publication(controller, 5.0))
    published, opened = PublishedExperts(tmp_path), Path.open

    def open_and_remove(path, *args):
        file = opened(path, *args)
        path.unlink()
        return file

    monkeypatch.setattr(Path, "open", open_and_remove)
    heat = published.read_heat(5.0)
    assert heat is not None
    assert heat["heat"] is None, "no load was counted"
    assert published.read_heat(6.0) is None


def test_the_hottest_come_first_and_those_without_tokens_not_at_all():
    rows = list_hottest(SKEWED)
    assert rows[0] == HotExpertPart(layer=1, expert=2, tokens=40.0)
    assert [row.tokens for row in rows] == sorted((row.tokens for row in rows), reverse=True)
    assert len(rows) == 5


def test_a_publication_keeps_what_it_took_when_the_controller_goes_on():
    controller = Controller(SHAPE, START, request(SKEWED).costs, planner=None, checksum=checksum)
    decision = controller.bookkeeping.add(1, 2.0, DecisionOutcome.MOVED, "because", placement=START)
    taken = take_publication(controller, 5.0)
    controller.bookkeeping.amend(decision.number, lambda row: replace(row, measured_gain_s=0.5))
    controller.bookkeeping.append_reason(decision.number, "and more")
    controller.bookkeeping.add(2, 3.0, DecisionOutcome.STAYED, "idle")
    controller.placement[...] = 0
    state = build_state(taken)
    assert [(row.reason, row.measured_gain_s, row.age_s) for row in state.decisions] == [("because", None, 3.0)]
    assert dict(state.totals.decisions) == {"moved": 1}
    assert (taken.placement == START).all()
    found = {row.number: (row.reason, row.measured_gain_s, row.placement) for row in controller.bookkeeping.rows}
    assert found == {1: ("because; and more", 0.5, None), 2: ("idle", None, None)}


def test_a_decision_that_is_no_longer_kept_is_not_amended():
    controller = Controller(SHAPE, START, request(SKEWED).costs, planner=None, checksum=checksum)
    for _ in range(KEPT_DECISIONS + 1):
        controller.bookkeeping.add(1, 2.0, DecisionOutcome.STAYED, "idle")
    controller.bookkeeping.append_reason(1, "never seen")
    assert {row.reason for row in controller.bookkeeping.rows} == {"idle"}


def test_the_brief_form_is_valid_by_the_contract():
    controller = Controller(SHAPE, START, request(SKEWED).costs, planner=None, checksum=checksum)
    controller.bookkeeping.add(1, 2.0, DecisionOutcome.DRY_RUN, "because", placement=START, predicted_gain_s=0.1)
    state = build_state(take_publication(controller, 5.0))
    assert read_experts(state.model_dump_json().encode()) == state


def test_the_heat_of_a_load_is_a_byte_for_each_expert_and_rank():
    heat = build_heat(SKEWED, START, SHAPE.ranks)
    assert heat is not None
    by_expert = np.frombuffer(base64.b64decode(heat.by_expert), np.uint8).reshape(START.shape[0], -1) * heat.unit
    load = SKEWED.sum(0)
    assert by_expert == pytest.approx(np.minimum(load / load.mean(1, keepdims=True), 255 * heat.unit), abs=heat.unit)
    by_rank = np.frombuffer(base64.b64decode(heat.by_rank), np.uint8).reshape(START.shape[0], -1) * heat.unit
    assert by_rank.shape == (START.shape[0], SHAPE.ranks)
    assert by_rank.mean(1) == pytest.approx(1.0, abs=heat.unit)


def test_a_load_that_fits_no_placement_or_has_no_tokens_is_no_heat():
    assert build_heat(SKEWED[:, :1], START, SHAPE.ranks) is None
    empty = build_heat(np.zeros_like(SKEWED), START, SHAPE.ranks)
    assert empty is not None
    assert set(base64.b64decode(empty.by_expert + empty.by_rank)) == {0}
