"""The turns of a group that a core publishes, at vLLM's own loop."""

import inspect
from types import SimpleNamespace

from moe_agent.shared_memory.turn_record import TurnRecords, TurnState
from moe_agent.vllm.lockstep_turns import TurnPublisher, publish_turns
from moe_agent.vllm.prefill_group import WAVE_TURNS
from moe_tools.modelless import foreign_warnings

with foreign_warnings():
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc


class Core:
    def __init__(self, turns):
        self.scheduler = SimpleNamespace(turns=turns)
        self.current_wave, self.step_counter = 0, 0
        self.stepped = 0

    def _process_engine_step(self):
        self.stepped += 1
        return True


publish_turns(Core)


def test_a_core_publishes_each_turn_when_it_begins_it_and_once(tmp_path):
    now = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    core = Core(TurnPublisher(tmp_path, 1, lambda: next(now)))
    records = TurnRecords(tmp_path, range(3))
    assert records.read() == {1: TurnState(-1, 1.0)}
    seen = []
    for wave, step in ((0, 0), (0, 0), (0, 1), (2, 0)):
        core.current_wave, core.step_counter = wave, step
        assert core._process_engine_step() is True
        seen.append(records.read()[1])
    assert seen == [
        TurnState(0, 2.0),
        TurnState(0, 2.0),
        TurnState(1, 3.0),
        TurnState(2 * WAVE_TURNS, 4.0),
    ]
    assert core.stepped == 4
    records.remove()
    assert records.read() == {}
    assert list(tmp_path.iterdir()) == []


def test_a_core_whose_scheduler_has_no_turns_only_steps():
    core = Core(None)
    core._process_engine_step()
    core.scheduler = object()
    core._process_engine_step()
    assert core.stepped == 2


def test_a_class_is_made_to_publish_once():
    first = Core._process_engine_step
    publish_turns(Core)
    assert Core._process_engine_step is first


def test_vllm_counts_turns_and_calls_the_hook_in_each_of_them():
    """What `publish_turns` replaces, and what it reads."""
    assert "_process_engine_step" not in vars(DPEngineCoreProc)
    for core_class in (EngineCoreProc, DPEngineCoreProc):
        _, loop = inspect.getsource(core_class).split("def run_busy_loop")
        assert "self._process_engine_step()" in loop
    source = inspect.getsource(DPEngineCoreProc)
    assert "self.current_wave += 1" in source
    assert "self.step_counter += 1" in source
    assert loop.index("self._process_engine_step()") < loop.index("self.execute_dummy_batch()")
