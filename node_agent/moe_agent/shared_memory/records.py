"""The memory-mapped pages between an agent and its engine: layout, one writer, many readers.

`rank-N.page` is written by the scheduler of data-parallel rank N at every step and read by the agent; `control.page` is
written by the agent and read by every rank. `experts-N.page` is written by the worker of rank N, where there is an
expert group, and read by the rank's scheduler, which may be another process. `prefill-N.page` is written by the
scheduler of rank N at every step where ranks step together, and read by the schedulers of the other ranks. All sides
import this module, so it needs the standard library alone. Who writes a rank's page rings for the agent (`bell.py`).

Invariants: a page has one writer; it is put into place whole (renamed), so a reader never sees a page without header; a
sequence number is odd while its writer writes and rises by two at each write; a checksum over the body makes a torn
read visible on machines that reorder stores. A reader gets a whole body or `PageUnreadableError`, never a mixture.
"""

import mmap
import os
import struct
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from moe_scheduling.expert.decision import ExpertMode, ExpertSettings
from moe_scheduling.request.order import RequestPolicy, RequestSettings
from moe_scheduling.request.prefill_budget import RankLoad
from moe_scheduling.signals import EngineSignal, StepTime

from moe_agent.shared_memory.notifier import BellRope

MAGIC = b"MOESPAGE"
LAYOUT_VERSION = 8

_HEADER = struct.Struct("<8sII")
_SEQUENCE = struct.Struct("<Q")
_SEQUENCE_AT = _HEADER.size
_CHECKSUM = struct.Struct("<I")
_CHECKSUM_AT = _SEQUENCE_AT + _SEQUENCE.size
_BODY_AT = _CHECKSUM_AT + _CHECKSUM.size
# A writer holds the lock for about a microsecond, unless it is scheduled away within a write: then a reader sleeps.
_TRIES_WITHOUT_SLEEP = 20
_SLEEP_S = 0.0002

RANK_BODY = struct.Struct("<QdQQQQQQQQQ?7xdddddd")
CONTROL_BODY = struct.Struct("<Q16sddd???5xQdd16sQQQddQ")
PREFILL_BODY = struct.Struct("<dd" + 2 * "QQQ" + 2 * "dQQ" + "Qd")
_LOAD, _PART = 3, 3
EXPERT_BODY = struct.Struct("<Qdd")


class PageUnreadableError(Exception):
    """The page is absent, of another layout, or its writer died within a write."""


def rank_page_path(run_dir: Path, rank: int) -> Path:
    """Where rank `rank` publishes."""
    return run_dir / f"rank-{rank}.page"


def expert_page_path(run_dir: Path, rank: int) -> Path:
    """Where the worker of rank `rank` publishes what its expert group found."""
    return run_dir / f"experts-{rank}.page"


def prefill_page_path(run_dir: Path, rank: int) -> Path:
    """Where rank `rank` tells the other ranks of its group what it could prefill."""
    return run_dir / f"prefill-{rank}.page"


def control_page_path(run_dir: Path) -> Path:
    """Where the agent publishes the settings in force."""
    return run_dir / "control.page"


class _Writer:
    """Owner of one page. `write_body` costs about two microseconds."""

    def __init__(self, path: Path, body: struct.Struct) -> None:
        size = _BODY_AT + body.size
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        with fresh.open("w+b") as file:
            file.write(_HEADER.pack(MAGIC, LAYOUT_VERSION, body.size).ljust(size, b"\0"))
            file.flush()
            self._map = mmap.mmap(file.fileno(), size)
        self._body = body
        self._sequence = 0
        self._fresh, self._path = fresh, path

    def put_in_place(self) -> None:
        """Makes the page visible under its name; called once, after the first body."""
        os.replace(self._fresh, self._path)

    def write_body(self, *values: Any) -> None:
        packed = self._body.pack(*values)
        number = self._sequence + 1
        self._sequence = number + 1
        _SEQUENCE.pack_into(self._map, _SEQUENCE_AT, number)
        self._map[_CHECKSUM_AT : _BODY_AT + len(packed)] = _CHECKSUM.pack(zlib.crc32(packed)) + packed
        _SEQUENCE.pack_into(self._map, _SEQUENCE_AT, number + 1)

    def close(self) -> None:
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class _Reader:
    """One mapping of one page; a page that is replaced by a new one needs a new reader."""

    def __init__(self, path: Path, body: struct.Struct) -> None:
        size = _BODY_AT + body.size
        self._path, self._body = path, body
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise PageUnreadableError(f"{path}: {error}") from error
        magic, version, body_bytes = _HEADER.unpack_from(self._map)
        if (magic, version, body_bytes) != (MAGIC, LAYOUT_VERSION, body.size):
            self._map.close()
            raise PageUnreadableError(
                f"{path}: layout {version} of {body_bytes} bytes; known: {LAYOUT_VERSION} of {body.size} bytes"
            )

    def sequence(self) -> int:
        """Changes with every write: the cheap way to see that there is something new."""
        number: int = _SEQUENCE.unpack_from(self._map, _SEQUENCE_AT)[0]
        return number

    def read_body(self, patience_s: float) -> tuple[Any, ...]:
        deadline_s = time.monotonic() + patience_s
        while True:
            for _ in range(_TRIES_WITHOUT_SLEEP):
                before = self.sequence()
                packed = self._map[_BODY_AT : _BODY_AT + self._body.size]
                checksum = _CHECKSUM.unpack_from(self._map, _CHECKSUM_AT)[0]
                if before % 2 == 0 and before == self.sequence() and checksum == zlib.crc32(packed):
                    return self._body.unpack(packed)
            if time.monotonic() >= deadline_s:
                raise PageUnreadableError(f"{self._path}: no whole read within {patience_s:g} s")
            time.sleep(_SLEEP_S)

    def close(self) -> None:
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """What a rank last published.

    Attributes:
        pid: process of the rank's scheduler.
        written_s: monotonic clock of the machine (`time.monotonic`, comparable between processes) at the write.
        config_version: version of the control page that the rank orders its queue by; 0 before it read one.
        signal: the engine's state.
    """

    pid: int
    written_s: float
    config_version: int
    signal: EngineSignal

    @property
    def idle(self) -> bool:
        """No request is known to the rank."""
        return self.signal.running == 0 and self.signal.waiting == 0


class RankPageWriter(_Writer):
    """The scheduler's side of `rank-N.page`; rings for the agent after each write."""

    def __init__(self, run_dir: Path, rank: int, state: RankState) -> None:
        super().__init__(rank_page_path(run_dir, rank), RANK_BODY)
        self._rope = BellRope(run_dir)
        signal = state.signal
        self.write(
            pid=state.pid,
            written_s=state.written_s,
            config_version=state.config_version,
            step=signal.step,
            running=signal.running,
            waiting=signal.waiting,
            waiting_prefill_tokens=signal.waiting_prefill_tokens,
            running_prefill_tokens=signal.running_prefill_tokens,
            decode_tokens=signal.decode_tokens,
            kv_usage=signal.kv_usage,
            preemptions=signal.preemptions,
            computed_tokens=signal.computed_tokens,
            step_time=signal.step_time,
            expert_balance=signal.expert_balance,
            expert_pressure=signal.expert_pressure,
        )
        self.put_in_place()
        self._rope.ring()

    def write(
        self,
        *,
        pid: int,
        written_s: float,
        config_version: int,
        step: int,
        running: int,
        waiting: int,
        waiting_prefill_tokens: int,
        running_prefill_tokens: int,
        decode_tokens: int,
        kv_usage: float,
        preemptions: int,
        computed_tokens: int,
        step_time: StepTime | None,
        expert_balance: float,
        expert_pressure: float,
    ) -> None:
        """Takes plain values: this runs at every engine step, and a frozen snapshot would cost more than the write."""
        fitted = step_time is not None
        self.write_body(
            pid,
            written_s,
            config_version,
            step,
            running,
            waiting,
            waiting_prefill_tokens,
            running_prefill_tokens,
            decode_tokens,
            preemptions,
            computed_tokens,
            fitted,
            kv_usage,
            step_time.base_s if step_time else 0.0,
            step_time.prefill_s if step_time else 0.0,
            step_time.decode_s if step_time else 0.0,
            expert_balance,
            expert_pressure,
        )
        self._rope.ring()


class RankPageReader(_Reader):
    """The agent's side of `rank-N.page`."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        super().__init__(rank_page_path(run_dir, rank), RANK_BODY)

    def read(self, patience_s: float = 0.25) -> RankState:
        body = self.read_body(patience_s)
        pid, written_s, version, step, running, waiting, waiting_prefill, running_prefill, decode = body[:9]
        preemptions, computed, fitted, kv_usage, base_s, prefill_s, decode_s, balance, pressure = body[9:]
        return RankState(
            pid=pid,
            written_s=written_s,
            config_version=version,
            signal=EngineSignal(
                step=step,
                running=running,
                waiting=waiting,
                waiting_prefill_tokens=waiting_prefill,
                running_prefill_tokens=running_prefill,
                decode_tokens=decode,
                kv_usage=kv_usage,
                preemptions=preemptions,
                computed_tokens=computed,
                step_time=StepTime(base_s=base_s, prefill_s=prefill_s, decode_s=decode_s) if fitted else None,
                expert_balance=balance,
                expert_pressure=pressure,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """The settings in force and their version, which rises by one at each change and starts at 1.

    Attributes:
        version: of all that is here.
        request: order of the waiting queue.
        expert: what is done about the placement of experts; without effect where there is no expert group.
        directive: version of the newest directive about experts; 0 before the first.
    """

    version: int
    request: RequestSettings
    expert: ExpertSettings = field(default_factory=ExpertSettings)
    directive: int = 0


class ControlPageWriter(_Writer):
    """The agent's side of `control.page`."""

    def __init__(self, run_dir: Path, control: Control) -> None:
        super().__init__(control_page_path(run_dir), CONTROL_BODY)
        self.write(control)
        self.put_in_place()

    def write(self, control: Control) -> None:
        request, expert = control.request, control.expert
        self.write_body(
            control.version,
            request.policy.value.encode(),
            request.ageing_rate,
            request.ageing_horizon_s,
            request.priority_step_s,
            request.yield_prefills,
            request.cut_prefills,
            request.defer_scheduling,
            request.kv_growth_blocks,
            request.fairness_horizon_s,
            request.output_weight,
            expert.mode.value.encode(),
            expert.interval_steps,
            expert.window_steps,
            expert.move_budget,
            expert.max_stall_s,
            expert.hysteresis,
            control.directive,
        )


class ControlPageReader(_Reader):
    """A rank's side of `control.page`."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(control_page_path(run_dir), CONTROL_BODY)

    def read(self, patience_s: float = 0.0) -> Control:
        """By default with the patience of an engine step: none."""
        body = self.read_body(patience_s)
        version, policy, ageing_rate, ageing_horizon_s, priority_step_s = body[:5]
        yield_prefills, cut_prefills, defer_scheduling, kv_growth_blocks = body[5:9]
        fairness_horizon_s, output_weight, mode, interval_steps, window_steps, move_budget = body[9:15]
        max_stall_s, hysteresis, directive = body[15:]
        return Control(
            version=version,
            request=RequestSettings(
                policy=RequestPolicy(policy.rstrip(b"\0").decode()),
                ageing_rate=ageing_rate,
                ageing_horizon_s=ageing_horizon_s,
                priority_step_s=priority_step_s,
                yield_prefills=yield_prefills,
                cut_prefills=cut_prefills,
                defer_scheduling=defer_scheduling,
                kv_growth_blocks=kv_growth_blocks,
                fairness_horizon_s=fairness_horizon_s,
                output_weight=output_weight,
            ),
            expert=ExpertSettings(
                mode=ExpertMode(mode.rstrip(b"\0").decode()),
                interval_steps=interval_steps,
                window_steps=window_steps,
                move_budget=move_budget,
                max_stall_s=max_stall_s,
                hysteresis=hysteresis,
            ),
            directive=directive,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertState:
    """What a rank knows of its expert group.

    Attributes:
        config_version: version of the control page that the group is in step with; 0 before it read one.
        balance: max / mean of the tokens over the group's ranks.
        pressure: tokens of this rank / the mean of the group's ranks.
    """

    config_version: int = 0
    balance: float = 1.0
    pressure: float = 1.0


class ExpertPageWriter(_Writer):
    """The worker's side of `experts-N.page`."""

    def __init__(self, run_dir: Path, rank: int, state: ExpertState) -> None:
        super().__init__(expert_page_path(run_dir, rank), EXPERT_BODY)
        self.write(state)
        self.put_in_place()

    def write(self, state: ExpertState) -> None:
        self.write_body(state.config_version, state.balance, state.pressure)


class ExpertPageReader(_Reader):
    """The scheduler's side of `experts-N.page`."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        super().__init__(expert_page_path(run_dir, rank), EXPERT_BODY)

    def read(self, patience_s: float = 0.0) -> ExpertState:
        """By default with the patience of an engine step: none."""
        config_version, balance, pressure = self.read_body(patience_s)
        return ExpertState(config_version=config_version, balance=balance, pressure=pressure)


class StepPart(NamedTuple):
    """What a rank put into a step that it planned at `planned_s`."""

    planned_s: float = 0.0
    prefill_tokens: int = 0
    decoding: int = 0


class PrefillState(NamedTuple):
    """What a rank last told the other ranks of its group.

    Attributes:
        written_s: monotonic clock of the machine at the write.
        decided_s: the same when the rank last planned a step.
        before: its load at that moment, before the step took from it.
        after: its load since then.
        parts: of its last two steps, the newest first: of a step that this rank plans late, others know the one before.
        turn: number of the step that it planned last, in a count that all ranks share; it never falls.
        next_s: when it will plan the one after, as far as it knows; 0 where it does not.
    """

    written_s: float
    decided_s: float
    before: RankLoad
    after: RankLoad
    parts: tuple[StepPart, StepPart] = (StepPart(), StepPart())
    turn: int = 0
    next_s: float = 0.0


class PrefillPageWriter(_Writer):
    """A rank's side of its own `prefill-N.page`."""

    def __init__(self, run_dir: Path, rank: int, state: PrefillState) -> None:
        super().__init__(prefill_page_path(run_dir, rank), PREFILL_BODY)
        self.write(state)
        self.put_in_place()

    def write(self, state: PrefillState) -> None:
        newest, older = state.parts
        self.write_body(
            state.written_s, state.decided_s, *state.before, *state.after, *newest, *older, state.turn, state.next_s
        )


class PrefillPageReader(_Reader):
    """A rank's side of another rank's `prefill-N.page`."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        super().__init__(prefill_page_path(run_dir, rank), PREFILL_BODY)

    def read(self, patience_s: float = 0.0) -> PrefillState:
        """By default with the patience of an engine step: none."""
        written_s, decided_s, *values, turn, next_s = self.read_body(patience_s)
        before, after = RankLoad(*values[:_LOAD]), RankLoad(*values[_LOAD : 2 * _LOAD])
        newest, older = StepPart(*values[2 * _LOAD : 2 * _LOAD + _PART]), StepPart(*values[2 * _LOAD + _PART :])
        return PrefillState(written_s, decided_s, before, after, (newest, older), turn, next_s)
