"""How far an engine's start is, as its agent says: the row of a status, and the words for people. Pure."""

from datetime import datetime, timedelta

from moe_contract.agent_state import AgentState

from moe_operator.api.status import EngineStatus, StartStatus


def build_start(state: AgentState, now: datetime) -> StartStatus | None:
    """The start of an engine; None where it does not start, and where its agent does not say how far it is."""
    start = state.start
    if start is None:
        return None
    since = (now - timedelta(seconds=start.age_s)).replace(microsecond=0)
    return StartStatus(phase=start.phase[:256], progress=start.progress[:256], since=since)


def describe_phase(engine: EngineStatus) -> str:
    """`loading weights 3 of 8 files`, `ready`: how far an engine is, in words."""
    return str(engine.phase) if engine.start is None else f"{engine.start.phase} {engine.start.progress}".rstrip()


def describe_start(engine: EngineStatus) -> str:
    """`moe-engine-0: loading weights 3 of 8 files, since 14:02:10 UTC`; of an engine that starts."""
    since = "" if engine.start is None else f", since {engine.start.since:%H:%M:%S} UTC"
    return f"{engine.name}: {describe_phase(engine)}{since}"
