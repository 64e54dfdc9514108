"""`moeserving drain`: has one engine take nothing new, waits until its streams have ended, and `--undo`."""

import asyncio
import time
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Annotated

import aiohttp
import typer
from moe_contract.agent_state import AgentState
from moe_contract.clients import AgentClient, PeerError, Refused
from moe_contract.input_errors import InputError, InvalidInput, unknown_choice
from moe_contract.quantities import describe_time
from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api import parse_resource
from moe_operator.api.crd import GROUP, PLURAL
from moe_operator.api.units import duration_s
from moe_operator.cli.experts import reach
from moe_operator.cli.place import Context, Name, Namespace, StateDir, errors_shown, find_folder
from moe_operator.experts.reach import Agent, Cluster, Reached, get_objects
from moe_operator.local.failure import Failure
from moe_operator.local.record import load_record
from moe_operator.plan.names import INSTANCE
from moe_operator.progress import ProgressLine, estimate_left_s, stderr_line

_LOOK_EVERY_S = 0.25
DRAINING, STOPPED = "draining", "stopped"
# Answers of an agent whose version has no way back from a drain.
_UNKNOWN_ROUTE = (404, 405)
# An agent that is busy may be silent for a moment.
_MOST_SILENT = 20


def drain(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="Its name in `top` or `status`.")],
    name: Name = None,
    state_dir: StateDir = None,
    namespace: Namespace = None,
    context: Context = None,
    undo: Annotated[bool, typer.Option("--undo", help="Have a drained engine serve again.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also the last engine that takes requests, or of its role.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended its streams.")] = True,
) -> None:
    """Empty one engine without losing a stream: it takes nothing new, ends its streams, then stops."""
    with errors_shown():
        if name is None and not (namespace is None and context is None):
            name = find_deployment(engine, Cluster(namespace=namespace, context=context))
    with errors_shown(), reach(name, state_dir, namespace, context) as reached:
        if undo:
            asyncio.run(resume_engine(reached, engine))
        else:
            limit_s = find_limit_s(reached.name, state_dir, namespace, context)
            asyncio.run(drain_engine(reached, engine, limit_s, force=force, wait=wait))


def find_deployment(pod: str, cluster: Cluster) -> str | None:
    """The deployment of a pod, by its label; None for a pod of another kind.

    Raises:
        Failure: kubectl says why not.
    """
    labels = get_objects(cluster, "pod", pod)["metadata"].get("labels", {})
    return None if INSTANCE not in labels else str(labels[INSTANCE])


def find_limit_s(name: str, state_dir: Path | None, namespace: str | None, context: str | None) -> float | None:
    """The time that streams of a drained engine have; None where it cannot be read."""
    if namespace is None and context is None:
        record = load_record(find_folder(name, state_dir))
        return None if record is None else record.drain_timeout_s
    try:
        document = get_objects(Cluster(namespace=namespace, context=context), f"{PLURAL}.{GROUP}", name)
        return duration_s(parse_resource(document).spec.engine.drain_timeout)
    except (Failure, InvalidInput):
        return None


async def drain_engine(reached: Reached, engine: str, limit_s: float | None, *, force: bool, wait: bool) -> None:
    """Drains one engine and says how far it is.

    Args:
        reached: the deployment.
        engine: its name.
        limit_s: time that streams have (`engine.drainTimeout`); None where it is not known.
        force: whether the last engine that takes requests, of all or of its role, is drained.
        wait: whether to wait for the end.

    Raises:
        InvalidInput: the engine is not known, or no other one takes requests, or none of its role.
        Failure: its agent refuses or gives no answer.
    """
    async with aiohttp.ClientSession() as session:
        agent, states = await _find(session, reached, engine)
        check_drain(engine, states, force=force)
        state = states[engine]
        if state is not None and state.phase == STOPPED:
            typer.echo(f"{engine}: is drained already; `moeserving drain {engine} --undo` has it serve again")
            return
        client = AgentClient(session, agent.url)
        await _call(engine, client.drain(reached.tokens))
        if not wait:
            typer.echo(f"{engine}: drains, {count_requests(state)} requests left; `moeserving top` shows it")
            return
        line = stderr_line()
        try:
            await _wait_drained(engine, client, count_requests(state), limit_s, line)
        finally:
            line.close()


async def resume_engine(reached: Reached, engine: str) -> None:
    """Has a drained engine serve again.

    Raises:
        InvalidInput: the engine is not known, or not drained.
        Failure: its agent refuses or gives no answer.
    """
    async with aiohttp.ClientSession() as session:
        agent, states = await _find(session, reached, engine)
        state = states[engine]
        if state is not None and state.phase not in (DRAINING, STOPPED):
            raise InvalidInput([InputError("ENGINE", f"{engine} is not drained: its phase is {state.phase}")])
        await _call(engine, AgentClient(session, agent.url).resume(reached.tokens))
    when = "once its streams have ended" if state is not None and state.phase == DRAINING else "now"
    typer.echo(f"{engine}: starts again {when}; `moeserving top` shows when it is ready")


def check_drain(engine: str, states: Mapping[str, AgentState | None], *, force: bool) -> None:
    """Refuses to drain the last engine that takes requests, of all or of its fixed role. Pure.

    Raises:
        InvalidInput: no other engine, or none of its role, takes requests, and `force` is not given.
    """
    if force:
        return
    others = [state for name, state in states.items() if name != engine and state is not None and state.accepting]
    role, state = find_fixed_role(states[engine]), states[engine]
    last = ""
    if not others:
        last = "the last engine that takes requests"
    elif role and state is not None and state.accepting and role not in map(find_fixed_role, others):
        last = f"the last engine of the role {role} that takes requests"
    if last:
        message = f"{engine} is {last}; nothing was changed (--force drains it all the same)"
        raise InvalidInput([InputError("ENGINE", message)])


def find_fixed_role(state: AgentState | None) -> str:
    """`prefill` or `decode` for an engine that has this role alone; empty for any other. Pure."""
    transfer = None if state is None else state.kv_transfer
    return "" if transfer is None or transfer.role is EngineRole.UNIFIED else transfer.role.value


def count_requests(state: AgentState | None) -> int:
    """Requests that an engine has. Pure."""
    return 0 if state is None else sum(rank.running + rank.waiting for rank in state.ranks)


def describe_drain(engine: str, left: int, most: int, elapsed_s: float, limit_s: float | None = None) -> str:
    """`a-engine-0: drains, 3 of 8 requests left after 12 s, about 7 s to go, at most 108 s`. Pure."""
    if not left:
        return f"{engine}: no request left, the engine stops ({describe_time(elapsed_s)})"
    to_go = estimate_left_s(most - left, most, elapsed_s)
    rest = "" if to_go is None else f", about {describe_time(to_go)} to go"
    bound = "" if limit_s is None else f", at most {describe_time(max(0.0, limit_s - elapsed_s))}"
    return f"{engine}: drains, {left} of {most} requests left after {describe_time(elapsed_s)}{rest}{bound}"


async def _wait_drained(engine: str, client: AgentClient, most: int, limit_s: float | None, line: ProgressLine) -> None:
    """Until the engine has stopped.

    Raises:
        Failure: its agent is silent for some seconds, or has begun anew.
    """
    began_s, silent, left = time.monotonic(), 0, most
    while True:
        try:
            state = await client.state()
            silent = 0
        except PeerError as error:
            silent += 1
            if silent > _MOST_SILENT:
                raise Failure(f"{engine}: its agent {error}; it was asked to drain") from None
            await asyncio.sleep(_LOOK_EVERY_S)
            continue
        elapsed_s = time.monotonic() - began_s
        if state.phase == STOPPED:
            line.close()
            typer.echo(f"{engine}: drained after {describe_time(elapsed_s)}{describe_cut(left, elapsed_s, limit_s)}")
            typer.echo(f"`moeserving drain {engine} --undo` has it serve again")
            return
        if state.phase != DRAINING:
            raise Failure(f"{engine}: no longer drains: its phase is {state.phase}")
        left = count_requests(state)
        most = max(most, left)
        line.show(describe_drain(engine, left, most, elapsed_s, limit_s), phase=f"{left > 0}")
        await asyncio.sleep(_LOOK_EVERY_S)


def describe_cut(left: int, elapsed_s: float, limit_s: float | None) -> str:
    """What the limit cut: the requests of the last look, where the time was over. Pure."""
    if not left or limit_s is None or elapsed_s < limit_s:
        return ", no stream was cut"
    return f", {left} requests were cut: engine.drainTimeout is {describe_time(limit_s)}"


async def _find(
    session: aiohttp.ClientSession, reached: Reached, engine: str
) -> tuple[Agent, dict[str, AgentState | None]]:
    """The agent of an engine, and the states of all engines; None for one whose agent gives no answer."""
    agents = {agent.engine: agent for agent in reached.agents}
    if engine not in agents:
        raise InvalidInput([unknown_choice("ENGINE", engine, agents)])
    states = await asyncio.gather(*(_state_or_none(session, agent) for agent in reached.agents))
    return agents[engine], dict(zip(agents, states, strict=True))


async def _state_or_none(session: aiohttp.ClientSession, agent: Agent) -> AgentState | None:
    try:
        return await AgentClient(session, agent.url).state()
    except PeerError:
        return None


async def _call(engine: str, call: Awaitable[None]) -> None:
    """Waits for a control call and turns its errors into failures that name the engine."""
    try:
        await call
    except Refused as error:
        if error.status in _UNKNOWN_ROUTE:
            how = "delete its pod, or restart the deployment"
            raise Failure(f"{engine}: its agent is of a version that cannot undo a drain; {how}") from None
        raise Failure(f"{engine} {error}") from None
    except PeerError as error:
        raise Failure(f"{engine}: its agent {error}") from None
