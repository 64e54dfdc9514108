"""Shared-memory records: derived layouts, whole reads under a busy writer, refusal of files that are no record."""

import subprocess
import sys
from dataclasses import dataclass, make_dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.shared_memory.control_record import Control, ControlRecordReader, ControlRecordWriter
from moe_agent.shared_memory.expert_record import NOT_ASKED, ExpertRecordReader, ExpertRecordWriter, ExpertState
from moe_agent.shared_memory.layout import Layout
from moe_agent.shared_memory.rank_record import RankRecordReader, RankRecordWriter, RankState, rank_record_path
from moe_agent.shared_memory.seqlock import RecordUnreadableError, RecordWriter
from moe_scheduling.expert.decision import ExpertMode, ExpertSettings
from moe_scheduling.request.order import RequestPolicy, RequestSettings
from moe_scheduling.signals import EngineSignal, StepTime

# Writes records in which each number is the step, as fast as it can.
HAMMER = """
import sys, time
from pathlib import Path
from moe_agent.shared_memory.rank_record import RankRecordWriter, RankState
from moe_scheduling.signals import EngineSignal, StepTime

def numbered(step):
    number = float(step)
    line = StepTime(base_s=number, prefill_s=number, decode_s=number)
    signal = EngineSignal(step=step, running=step, waiting=step, waiting_prefill_tokens=step,
                          running_prefill_tokens=step, decode_tokens=step, kv_usage=number, preemptions=step,
                          computed_tokens=step, step_time=line, expert_balance=number, expert_pressure=number)
    return RankState(pid=step, written_s=number, config_version=step, signal=signal)

with RankRecordWriter(Path(sys.argv[1]), 0, numbered(0)) as writer:
    print("ready", flush=True)
    step, end_s = 0, time.monotonic() + 2.0
    while time.monotonic() < end_s:
        step += 1
        writer.write(numbered(step))
"""

SIGNAL = EngineSignal(
    step=17,
    running=3,
    waiting=2,
    waiting_prefill_tokens=1234,
    running_prefill_tokens=99,
    scheduled_prefill_tokens=66,
    busy_s=0.03,
    step_tokens=8192,
    decode_tokens=2,
    kv_usage=0.25,
    preemptions=4,
    computed_tokens=5678,
    step_time=StepTime(base_s=0.01, prefill_s=0.0001, decode_s=0.002, decode_root_s=0.003, prefill_base_s=0.04),
    expert_balance=1.5,
    expert_pressure=0.75,
)


def state(signal: EngineSignal = SIGNAL) -> RankState:
    return RankState(pid=42, written_s=12.5, config_version=3, signal=signal)


@pytest.mark.parametrize("signal", [SIGNAL, EngineSignal()])
def test_what_a_rank_writes_is_read(tmp_path, signal):
    with RankRecordWriter(tmp_path, 1, state(signal)), RankRecordReader(tmp_path, 1) as reader:
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
    with ControlRecordWriter(tmp_path, control), ControlRecordReader(tmp_path) as reader:
        assert reader.read() == control


@pytest.mark.parametrize("mode", ExpertMode)
def test_the_settings_of_experts_and_the_directive_are_read(tmp_path, mode):
    expert = ExpertSettings(
        mode=mode, interval_steps=7, window_steps=5, move_budget=3, max_stall_s=0.25, hysteresis=0.5
    )
    control = Control(version=9, request=RequestSettings(), expert=expert, directive=4)
    with ControlRecordWriter(tmp_path, control), ControlRecordReader(tmp_path) as reader:
        assert reader.read() == control


@pytest.mark.parametrize("config_version", [3, NOT_ASKED])
def test_what_a_worker_knows_of_its_expert_group_is_read(tmp_path, config_version):
    found = ExpertState(config_version=config_version, balance=1.5, pressure=0.5)
    with ExpertRecordWriter(tmp_path, 1, ExpertState()) as writer, ExpertRecordReader(tmp_path, 1) as reader:
        assert reader.read() == ExpertState(config_version=0, balance=1.0, pressure=1.0)
        writer.write(found)
        assert reader.read() == found
    assert [path.name for path in tmp_path.iterdir()] == ["experts-1.record"]


def test_the_sequence_changes_with_each_write(tmp_path):
    control = Control(version=1, request=RequestSettings())
    with ControlRecordWriter(tmp_path, control) as writer, ControlRecordReader(tmp_path) as reader:
        before = reader.sequence()
        assert reader.sequence() == before
        writer.write(control)
        assert reader.sequence() != before


def test_a_record_of_a_new_writer_takes_the_place_of_the_old(tmp_path):
    new = state(EngineSignal(step=99))
    with (
        RankRecordWriter(tmp_path, 0, state()),
        RankRecordWriter(tmp_path, 0, new),
        RankRecordReader(tmp_path, 0) as reader,
    ):
        assert reader.read() == new
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0.record"]


@pytest.mark.parametrize("content", [None, b"", b"short", b"X" * 4096])
def test_a_file_that_is_no_record_is_refused_by_its_path(tmp_path, content):
    path = rank_record_path(tmp_path, 0)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecordUnreadableError, match=r"rank-0\.record"):
        RankRecordReader(tmp_path, 0)


def test_a_record_whose_writer_died_within_a_write_is_refused(tmp_path):
    with RankRecordWriter(tmp_path, 0, state()):
        path = rank_record_path(tmp_path, 0)
        raw = bytearray(path.read_bytes())
        raw[16] += 1
        path.write_bytes(raw)
        with RankRecordReader(tmp_path, 0) as reader, pytest.raises(RecordUnreadableError, match="no whole read"):
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
        with RankRecordReader(tmp_path, 0) as reader:
            while writer.poll() is None:
                found = reader.read(patience_s=10.0)
                assert found == numbered(found.signal.step)
                steps.append(found.signal.step)
    assert writer.returncode == 0
    assert steps == sorted(steps)
    assert len(set(steps)) > 10, "the reader met the writer at work"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    number: int = 0
    share: float = 0.0


class Pair(NamedTuple):
    first: int
    second: Inner


@dataclass(frozen=True, kw_only=True)
class Everything:
    number: int
    share: float
    flag: bool
    colour: Colour
    inner: Inner
    maybe: Inner | None
    parts: tuple[Pair, Pair]


numbers = st.integers(-(2**63), 2**63 - 1)
inners = st.builds(Inner, number=numbers, share=st.floats(allow_nan=False))
pairs = st.builds(Pair, numbers, inners)


@given(
    st.builds(
        Everything,
        number=numbers,
        share=st.floats(allow_nan=False),
        flag=st.booleans(),
        colour=st.sampled_from(Colour),
        inner=inners,
        maybe=st.none() | inners,
        parts=st.tuples(pairs, pairs),
    )
)
def test_a_layout_gives_back_what_it_packed(value):
    layout = Layout(Everything)
    packed = layout.pack(value)
    assert len(packed) == layout.size
    assert layout.unpack(packed) == value


def test_any_object_with_the_fields_can_be_packed():
    layout = Layout(Inner)
    assert layout.unpack(layout.pack(SimpleNamespace(number=3, share=0.5))) == Inner(3, 0.5)


def variant(*fields: Any) -> Layout[Any]:
    return Layout(make_dataclass("Variant", fields))


def test_layouts_of_other_names_types_or_orders_have_other_digests():
    layouts = [
        variant(("a", int), ("b", int)),
        variant(("b", int), ("a", int)),
        variant(("a", int), ("c", int)),
        variant(("a", int), ("b", float)),
        variant(("a", int), ("b", Colour)),
        variant(("a", int), ("b", Enum("Colour", [("RED", "red"), ("BLUE", "green")]))),
        variant(("a", int), ("b", Inner)),
        variant(("a", int), ("b", Inner | None)),
        variant(("a", int)),
    ]
    assert len({layout.digest for layout in layouts}) == len(layouts)
    assert variant(("a", int)).digest == variant(("a", int)).digest


@pytest.mark.parametrize("kind", [str, list[int], int | str | None, dict])
def test_a_field_of_no_fixed_size_is_refused(kind):
    with pytest.raises(TypeError, match="no layout for"):
        variant(("a", kind))


def test_a_record_of_another_layout_is_refused(tmp_path):
    path = rank_record_path(tmp_path, 0)
    with (
        RecordWriter(path, Layout(Inner), Inner()),
        pytest.raises(RecordUnreadableError, match=r"rank-0\.record: layout \w{8} of 16 bytes; known: layout \w{8} of"),
    ):
        RankRecordReader(tmp_path, 0)


def test_the_records_need_neither_vllm_nor_torch():
    modules = "moe_agent.shared_memory.rank_record, moe_agent.shared_memory.control_record, moe_agent.vllm"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'vllm'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
