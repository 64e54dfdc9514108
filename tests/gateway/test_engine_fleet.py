"""Which engines may get requests: readiness, ejection, and one writer for each piece of state."""

import ast
from pathlib import Path

import moe_gateway
import pytest
from moe_contract.gateway_config import EngineAddress
from moe_gateway.engines.fleet import ERRORS_TO_EJECT, FULL_PAUSE_S, LONGEST_EJECTION_S, LONGEST_TRIAL_S, EngineFleet
from moe_scheduling.signals import Target

A, NOW_S = Target("a"), 100.0


@pytest.fixture
def fleet() -> EngineFleet:
    fleet = EngineFleet()
    fleet.replace([EngineAddress(name="a", url="http://a"), EngineAddress(name="b", url="http://b")])
    fleet.set_ready("a", True)
    return fleet


def test_an_engine_is_used_once_it_is_ready_and_offered(fleet):
    assert [engine.may_accept(NOW_S) for engine in fleet.engines.values()] == [True, False]
    fleet.offer({"a": "group", "b": "group"}, {"b"})
    assert [engine.may_accept(NOW_S) for engine in fleet.engines.values()] == [False, False]
    assert fleet.engines["a"].group == "group"


def test_failures_in_a_row_double_the_ejection_up_to_a_bound_and_an_answer_ends_it(fleet):
    engine = fleet.engines["a"]
    for ejection_s in (0.25, 0.5, 1.0, 2.0):
        fleet.fail(A, NOW_S)
        assert engine.ejected_until_s == NOW_S + ejection_s
    for _ in range(40):
        fleet.fail(A, NOW_S)
    assert engine.ejected_until_s == NOW_S + LONGEST_EJECTION_S
    assert fleet.ejected() == [engine]
    assert fleet.succeed(A) is engine
    assert (engine.may_accept(NOW_S), fleet.ejected(), fleet.succeed(A)) == (True, [], None)
    assert fleet.ejections == {"a": 44}


def test_errors_eject_from_the_third_on_and_good_answers_forgive_half_of_them(fleet):
    engine = fleet.engines["a"]
    for _ in range(2):
        fleet.err(A, NOW_S)
    assert engine.may_accept(NOW_S)
    fleet.complete(A)
    assert engine.errors == 1
    now_s = NOW_S
    for ejection_s in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        fleet.err(A, now_s)
        assert engine.may_accept(now_s + ejection_s)
        assert not ejection_s or not engine.may_accept(now_s + ejection_s - 0.001)
        # Requests that were sent before the ejection prolong nothing.
        assert not ejection_s or fleet.err(A, now_s) is None
        assert engine.may_accept_alone(now_s)
        now_s += ejection_s
    assert fleet.ejections == {"a": 9}


def test_an_engine_that_makes_no_steps_is_ejected_at_once_and_again_while_it_stays_so(fleet):
    engine = fleet.engines["a"]
    assert fleet.stall(A, NOW_S) is engine
    assert (engine.may_accept(NOW_S), engine.may_accept_alone(NOW_S)) == (False, True)
    assert fleet.stall(A, NOW_S + 0.2) is None
    fleet.stall(A, NOW_S + 0.25)
    assert engine.suspended_until_s == NOW_S + 0.75


def test_an_engine_on_trial_gets_one_request_at_a_time(fleet):
    engine = fleet.engines["a"]
    assert fleet.begin_trial(A, 1, NOW_S) is None
    fleet.fail(A, NOW_S)
    later_s = NOW_S + 1.0
    assert engine.may_accept(later_s)
    assert fleet.begin_trial(A, 2, later_s) is engine
    assert (engine.may_accept(later_s), engine.may_accept_alone(later_s), fleet.ejected()) == (False, True, [engine])
    assert (fleet.begin_trial(A, 3, later_s), fleet.end_trial(A, 3)) == (None, None)
    assert fleet.end_trial(A, 2) is engine
    assert engine.may_accept(later_s)
    fleet.begin_trial(A, 4, later_s)
    assert not engine.may_accept(later_s + LONGEST_TRIAL_S - 0.1)
    assert engine.may_accept(later_s + LONGEST_TRIAL_S), "a long answer in one piece does not keep others out"
    fleet.succeed(A)
    assert (engine.may_accept(later_s), engine.is_on_trial, fleet.ejected()) == (True, False, [])


def test_a_full_engine_pauses_without_a_failure_and_never_shortens_an_ejection(fleet):
    engine = fleet.pause_full(A, NOW_S)
    assert (engine.failures, engine.may_accept(NOW_S), engine.may_accept(NOW_S + FULL_PAUSE_S)) == (0, False, True)
    fleet.fail(A, NOW_S, dead=True)
    fleet.pause_full(A, NOW_S)
    assert engine.ejected_until_s == NOW_S + LONGEST_EJECTION_S


def test_an_engine_that_becomes_ready_again_starts_without_its_failures(fleet):
    fleet.fail(A, NOW_S, dead=True)
    fleet.set_ready("a", True)
    assert not fleet.engines["a"].may_accept(NOW_S)
    fleet.set_ready("a", False)
    fleet.set_ready("a", True)
    assert fleet.engines["a"].may_accept(NOW_S)


def test_the_same_name_at_another_address_is_another_engine(fleet):
    before = dict(fleet.engines)
    gone = fleet.replace([EngineAddress(name="a", url="http://elsewhere"), EngineAddress(name="b", url="http://b")])
    assert gone == [before["a"]]
    assert fleet.engines["b"] is before["b"]
    assert not fleet.engines["a"].is_ready


def test_unknown_engines_and_repeated_words_change_nothing(fleet):
    nowhere = Target("nowhere")
    assert (fleet.fail(nowhere, NOW_S), fleet.pause_full(nowhere, NOW_S), fleet.succeed(nowhere)) == (None, None, None)
    assert (fleet.set_ready("nowhere", True), fleet.set_process("nowhere", 1)) == (None, None)
    assert (fleet.set_reachable("a", False), fleet.set_models("a", {})) == (None, None)
    assert fleet.set_reachable("a", True) is fleet.engines["a"]


WRITERS = {
    "engines/fleet.py": {
        *("is_ready", "is_offered", "is_reachable", "failures", "ejected_until_s", "group", "models", "pid"),
        *("errors", "suspended_until_s", "trial"),
    },
    "engines/target_states.py": {"accepting", "step_time_model", "traffic_share", "ttft_factor"},
    "request_stats.py": {"retried", "failed", "finished", "arrivals", "prompt_tokens"},
}


@pytest.mark.parametrize("writer", WRITERS)
def test_each_piece_of_state_has_one_writer(writer):
    root = Path(moe_gateway.__file__).parent
    writers = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in (part for given in targets for part in getattr(given, "elts", [given])):
                is_own = isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self"
                if isinstance(target, ast.Attribute) and not is_own and target.attr in WRITERS[writer]:
                    writers.add(str(path.relative_to(root)))
    assert writers <= {writer}


def test_after_errors_an_engine_is_on_trial_until_whole_answers_have_forgiven_them(fleet):
    engine = fleet.engines["a"]
    for _ in range(ERRORS_TO_EJECT):
        fleet.err(A, NOW_S)
    later_s = NOW_S + 1.0
    fleet.begin_trial(A, 1, later_s)
    # A stream begins, and may yet end with an error.
    fleet.succeed(A)
    assert not engine.may_accept(later_s)
    fleet.complete(A)
    assert (engine.may_accept(later_s), engine.is_on_trial) == (True, False)
