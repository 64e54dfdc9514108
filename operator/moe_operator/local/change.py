"""Changes the policies of a running deployment: `moeserving set`. A change takes effect as a whole, or not at all.

The files change first, so that a process which restarts meanwhile starts with the change; then the control routes are
called. When one refuses or does not answer, files and the others are put back.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from moe_contract.agent_config import AgentConfig
from moe_contract.clients import AgentClient, GatewayClient, PeerError
from moe_contract.input_errors import InputError, InvalidInput

from moe_operator.api import MoEServing, dump_resource, load_resource, parse_resource, resource_document, set_field
from moe_operator.local.failure import Failure
from moe_operator.local.folder import Folder, held, write_whole
from moe_operator.local.record import GATEWAY, ProcessRecord, Record
from moe_operator.local.start import build_configs, require_running, site_of
from moe_operator.plan import LocalPlan, plan_local, ports_needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A change of one process, and the way back."""

    row: ProcessRecord
    body: dict[str, Any]
    undo: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """What holds now; `changed` is false when it held before."""

    resource: MoEServing
    changed: bool


def apply_changes(folder: Folder, assignments: Sequence[str]) -> Changed:
    """Applies `PATH=VALUE`s.

    Raises:
        InvalidInput: an assignment is not valid, or needs a restart.
        Failure: the deployment does not run, or a process did not take the change.
    """
    with held(_existing(folder).change_lock):
        record = require_running(folder)
        present = load_resource(folder.resource)
        wanted = plan_change(present, assignments, folder, record)
        before, after = (plan_for(resource, folder, record) for resource in (present, wanted))
        files = [_files(folder, *pair) for pair in ((present, before), (wanted, after))]
        token = folder.token.read_text("utf-8").strip()
        calls = build_calls(record, before, after)
        asyncio.run(_apply(calls, token, lambda: _write(files[1]), lambda: _write(files[0])))
        return Changed(resource=wanted, changed=wanted != present)


def plan_change(present: MoEServing, assignments: Sequence[str], folder: Folder, record: Record) -> MoEServing:
    """The changed resource. Pure.

    Raises:
        InvalidInput: as `apply_changes`; the assignment to blame is named.
    """
    live, document = plan_for(present, folder, record), resource_document(present)
    for assignment in assignments:
        document = set_field(document, assignment)
        if not is_live(live, parse_resource(document), folder, record):
            path = f"spec.{assignment.partition('=')[0]}"
            how = f"change the file, then `moeserving down {folder.name}` and `moeserving up -f FILE`"
            raise InvalidInput([InputError(path, f"cannot change while it runs; {how}")])
    return parse_resource(document)


def is_live(present: LocalPlan, wanted: MoEServing, folder: Folder, record: Record) -> bool:
    """Whether processes that run can take the change: nothing but the policies of their configuration differs."""
    if wanted.spec.engine.count != len(present.agents) or ports_needed(wanted) != len(record.site.ports):
        return False
    plan = plan_for(wanted, folder, record)
    kept = {"request": present.agents[0].request, "expert": present.agents[0].expert}
    agents = tuple(agent.model_copy(update=kept) for agent in plan.agents)
    policies = {"dispatch": present.gateway.dispatch, "request": present.gateway.request}
    return agents == present.agents and plan.gateway.model_copy(update=policies) == present.gateway


def plan_for(resource: MoEServing, folder: Folder, record: Record) -> LocalPlan:
    """The plan on the machine as it was when the deployment started."""
    return plan_local(resource, site_of(folder, record.site))


def build_calls(record: Record, before: LocalPlan, after: LocalPlan) -> tuple[Call, ...]:
    """The control calls, agents first. Settings go as a whole, so that a call repairs what an earlier one missed."""
    agents = [
        Call(row=row, body=_agent_settings(new), undo=_agent_settings(old))
        for row, old, new in zip(record.agents, before.agents, after.agents, strict=True)
    ]
    old, new = (
        {"dispatch": asdict(plan.gateway.dispatch), "request": asdict(plan.gateway.request)} for plan in (before, after)
    )
    return (*agents, Call(row=record.gateway, body=new, undo=old))


def _agent_settings(agent: AgentConfig) -> dict[str, Any]:
    return {"request": asdict(agent.request), "expert": asdict(agent.expert)}


async def _apply(calls: Sequence[Call], token: str, write: Callable[[], None], put_back: Callable[[], None]) -> None:
    async with aiohttp.ClientSession() as session:

        async def send(bodies: Sequence[dict[str, Any]]) -> list[str]:
            pairs = zip(calls, bodies, strict=True)
            return await asyncio.gather(*(put_config(session, call, body, token) for call, body in pairs))

        undo = [call.undo for call in calls]
        try:
            write()
            answers = await send([call.body for call in calls])
        except BaseException:  # a full disk, a Ctrl-C
            put_back()
            await send(undo)
            raise
        if any(answers):
            put_back()
            # Also to those that refused: one that timed out may have taken it.
            undone = await send(undo)
            raise Failure(explain_refusal(calls, answers, undone))


def explain_refusal(calls: Sequence[Call], answers: Sequence[str], undone: Sequence[str]) -> str:
    """Why a change was not made, from what each process answered to it and to its undoing (empty: it did so). Pure."""
    why = "; ".join(filter(None, answers))
    rows = zip(calls, answers, undone, strict=True)
    kept = [call.row.name for call, answer, undo in rows if not answer and undo]
    if not kept:
        return f"nothing was changed: {why}"
    return f"{why}; {', '.join(kept)} took the change and could not be put back: set the value again once all answer"


async def put_config(session: aiohttp.ClientSession, call: Call, body: Mapping[str, Any], token: str) -> str:
    """Calls the control route of a process; why it failed, empty when it did not."""
    client = GatewayClient if call.row.name == GATEWAY else AgentClient
    try:
        await client(session, call.row.url).put_settings(body, (token,))
    except PeerError as error:
        return f"{call.row.name} {error}"
    return ""


def _existing(folder: Folder) -> Folder:
    require_running(folder)
    return folder


def _files(folder: Folder, resource: MoEServing, plan: LocalPlan) -> dict[Path, str]:
    return {**build_configs(folder, plan), folder.resource: dump_resource(resource)}


def _write(files: Mapping[Path, str]) -> None:
    for path, text in files.items():
        write_whole(path, text)
