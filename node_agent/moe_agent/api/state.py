"""The agent's snapshot, one JSON document of the supervisor, the ranks' pages and the settings in force. Pure."""

from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from moe_agent.shared_memory.control_record import Control
from moe_agent.shared_memory.rank_record import RankState
from moe_agent.supervisor.supervisor import Phase, Supervisor


def build_snapshot(
    name: str, model: str, supervisor: Supervisor, control: Control, ranks: dict[int, RankState], now_s: float
) -> dict[str, Any]:
    """The document of `GET /v1/state`; `now_s` is the monotonic clock of the machine."""
    ready = supervisor.phase is Phase.READY
    return {
        "name": name,
        "phase": supervisor.phase.value,
        "accepting": supervisor.accepting,
        "engine": {
            "url": supervisor.url,
            "model": model,
            "pid": supervisor.pid,
            "restarts": supervisor.restarts,
            "last_exit": supervisor.last_exit,
            "max_model_len": supervisor.max_model_len,
        },
        "config": {
            "version": control.version,
            "request": _fields(control.request),
            "expert": _fields(control.expert),
        },
        "ranks": [
            {"rank": rank, "age_s": signal_age_s(state, ready, now_s), **_fields(state.signal)}
            for rank, state in sorted(ranks.items())
        ],
    }


def signal_age_s(state: RankState, ready: bool, now_s: float) -> float:
    """How old a rank's page is. An idle rank makes no steps, so its page stays true while its engine is ready."""
    return 0.0 if ready and state.idle else max(0.0, now_s - state.written_s)


def _fields(values: Any) -> dict[str, Any]:
    """As `dataclasses.asdict`, which copies each value deeply and takes ten times as long; made at each step."""
    made = {}
    for name in _names(values.__class__):
        value = getattr(values, name)
        made[name] = _fields(value) if is_dataclass(value) else value
    return made


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))
