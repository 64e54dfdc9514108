"""The pages between agent and engine: whole reads under a hammering writer, refusals of what is no page."""

import subprocess
import sys

import pytest
from moe_agent.shared_memory.records import (
    Control,
    ControlPageReader,
    ControlPageWriter,
    ExpertPageReader,
    ExpertPageWriter,
    ExpertState,
    PageUnreadableError,
    RankPageReader,
    RankPageWriter,
    RankState,
    rank_page_path,
)
from moe_scheduling.expert.decision import ExpertMode, ExpertSettings
from moe_scheduling.request.order import RequestPolicy, RequestSettings
from moe_scheduling.signals import EngineSignal, StepTime

# Writes pages in which each number is the step, as fast as it can.
HAMMER = """
import sys, time
from pathlib import Path
from moe_agent.shared_memory.records import RankPageWriter, RankState
from moe_scheduling.signals import EngineSignal, StepTime

zero = StepTime(base_s=0.0, prefill_s=0.0, decode_s=0.0)
first = RankState(pid=0, written_s=0.0, config_version=0,
                  signal=EngineSignal(step_time=zero, expert_balance=0.0, expert_pressure=0.0))
with RankPageWriter(Path(sys.argv[1]), 0, first) as writer:
    print("ready", flush=True)
    step, end_s = 0, time.monotonic() + 2.0
    while time.monotonic() < end_s:
        step += 1
        number = float(step)
        writer.write(pid=step, written_s=number, config_version=step, step=step, running=step, waiting=step,
                     waiting_prefill_tokens=step, running_prefill_tokens=step, decode_tokens=step, kv_usage=number,
                     preemptions=step, computed_tokens=step,
                     step_time=StepTime(base_s=number, prefill_s=number, decode_s=number),
                     expert_balance=number, expert_pressure=number)
"""

SIGNAL = EngineSignal(
    step=17,
    running=3,
    waiting=2,
    waiting_prefill_tokens=1234,
    running_prefill_tokens=99,
    decode_tokens=2,
    kv_usage=0.25,
    preemptions=4,
    computed_tokens=5678,
    step_time=StepTime(base_s=0.01, prefill_s=0.0001, decode_s=0.002),
    expert_balance=1.5,
    expert_pressure=0.75,
)


def state(signal: EngineSignal = SIGNAL) -> RankState:
    return RankState(pid=42, written_s=12.5, config_version=3, signal=signal)


@pytest.mark.parametrize("signal", [SIGNAL, EngineSignal()])
def test_what_a_rank_writes_is_read(tmp_path, signal):
    with RankPageWriter(tmp_path, 1, state(signal)), RankPageReader(tmp_path, 1) as reader:
        assert reader.read() == state(signal)


@pytest.mark.parametrize("policy", RequestPolicy)
def test_what_the_agent_writes_is_read(tmp_path, policy):
    request = RequestSettings(
        policy=policy,
        ageing_rate=7.0,
        ageing_horizon_s=3.0,
        priority_step_s=1.5,
        yield_prefills=False,
        cut_prefills=False,
        defer_scheduling=False,
        kv_growth_blocks=4,
        fairness_horizon_s=6.0,
    )
    control = Control(version=9, request=request)
    with ControlPageWriter(tmp_path, control), ControlPageReader(tmp_path) as reader:
        assert reader.read() == control


@pytest.mark.parametrize("mode", ExpertMode)
def test_the_settings_of_experts_and_the_directive_are_read(tmp_path, mode):
    expert = ExpertSettings(
        mode=mode, interval_steps=7, window_steps=5, move_budget=3, max_stall_s=0.25, hysteresis=0.5
    )
    control = Control(version=9, request=RequestSettings(), expert=expert, directive=4)
    with ControlPageWriter(tmp_path, control), ControlPageReader(tmp_path) as reader:
        assert reader.read() == control


def test_what_a_worker_knows_of_its_expert_group_is_read(tmp_path):
    found = ExpertState(config_version=3, balance=1.5, pressure=0.5)
    with ExpertPageWriter(tmp_path, 1, ExpertState()) as writer, ExpertPageReader(tmp_path, 1) as reader:
        assert reader.read() == ExpertState(config_version=0, balance=1.0, pressure=1.0)
        writer.write(found)
        assert reader.read() == found
    assert [path.name for path in tmp_path.iterdir()] == ["experts-1.page"]


def test_the_sequence_changes_with_each_write(tmp_path):
    control = Control(version=1, request=RequestSettings())
    with ControlPageWriter(tmp_path, control) as writer, ControlPageReader(tmp_path) as reader:
        before = reader.sequence()
        assert reader.sequence() == before
        writer.write(control)
        assert reader.sequence() != before


def test_a_page_of_a_new_writer_takes_the_place_of_the_old(tmp_path):
    new = state(EngineSignal(step=99))
    with RankPageWriter(tmp_path, 0, state()), RankPageWriter(tmp_path, 0, new), RankPageReader(tmp_path, 0) as reader:
        assert reader.read() == new
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0.page"]


@pytest.mark.parametrize("content", [None, b"", b"short", b"X" * 4096])
def test_what_is_no_page_is_refused_by_its_path(tmp_path, content):
    path = rank_page_path(tmp_path, 0)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PageUnreadableError, match=r"rank-0\.page"):
        RankPageReader(tmp_path, 0)


def test_a_page_whose_writer_died_within_a_write_is_refused(tmp_path):
    with RankPageWriter(tmp_path, 0, state()):
        path = rank_page_path(tmp_path, 0)
        raw = bytearray(path.read_bytes())
        raw[16] += 1
        path.write_bytes(raw)
        with RankPageReader(tmp_path, 0) as reader, pytest.raises(PageUnreadableError, match="no whole read"):
            reader.read()


def numbered(step: int) -> RankState:
    number = float(step)
    return RankState(
        pid=step,
        written_s=number,
        config_version=step,
        signal=EngineSignal(
            step=step,
            running=step,
            waiting=step,
            waiting_prefill_tokens=step,
            running_prefill_tokens=step,
            decode_tokens=step,
            kv_usage=number,
            preemptions=step,
            computed_tokens=step,
            step_time=StepTime(base_s=number, prefill_s=number, decode_s=number),
            expert_balance=number,
            expert_pressure=number,
        ),
    )


def test_no_read_is_torn_while_another_process_writes(tmp_path):
    steps = []
    with subprocess.Popen([sys.executable, "-c", HAMMER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "ready\n"
        with RankPageReader(tmp_path, 0) as reader:
            while writer.poll() is None:
                found = reader.read(patience_s=10.0)
                assert found == numbered(found.signal.step)
                steps.append(found.signal.step)
    assert writer.returncode == 0
    assert steps == sorted(steps)
    assert len(set(steps)) > 10, "the reader met the writer at work"


def test_the_pages_need_neither_vllm_nor_torch():
    modules = "moe_agent.shared_memory.records, moe_agent.vllm"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'vllm'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
