"""The facts of the store that a plan depends on. Pure, but for a new token when there is none."""

import base64
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from moe_contract.api_server import Kind
from moe_contract.input_errors import InputError, InvalidInput
from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api.resource import MoEServing
from moe_operator.kubernetes.group_scale_in import begun_goal
from moe_operator.kubernetes.kinds import (
    CONFIG_MAP,
    DEPLOYMENT,
    LEADER_WORKER_SET,
    POD_MONITOR,
    SECRET,
    SERVICE_MONITOR,
)
from moe_operator.kubernetes.store import Key, Store
from moe_operator.plan import Observed
from moe_operator.plan.names import MANAGER, ROTATE, ROTATED_AT, Names
from moe_operator.plan.replicas import NOTE, Place, Scaled
from moe_operator.plan.revision import Revision, build_revision, parse_revision

Document = dict[str, Any]
# Pods see a changed Secret within the kubelet's sync period, a minute or two; until then the old token is good too.
TOKEN_OVERLAP = timedelta(minutes=10)


def read_observed(
    store: Store,
    key: Key,
    document: Document,
    resource: MoEServing,
    kinds: frozenset[Kind],
    now: datetime,
    namespace_uid: str | None = None,
) -> Observed:
    """Reads the facts that a plan of this resource needs from the store."""
    names = Names(resource.metadata.name)
    workload = engines_workload(store, key, names)
    settings = store.get(key, CONFIG_MAP, names.settings)
    text = (settings or {}).get("data", {}).get("revision.json")
    tokens, rotated_at = plan_tokens(store.get(key, SECRET, names.control), document, now)
    both = takes_over(store, key, names)
    gateway = store.get(key, DEPLOYMENT, names.gateway)
    return Observed(
        uid=document["metadata"]["uid"],
        namespace_uid=namespace_uid,
        tokens=tokens,
        rotated_at=rotated_at,
        stable=_read_stable(text, resource),
        replicas=_read_replicas(document, workload, both=both),
        role_replicas=_read_role_replicas(store, key, names),
        has_groups=any(kind == LEADER_WORKER_SET for kind, _ in store.children(key, (LEADER_WORKER_SET,))),
        scaled=find_scaled(live for _, live in store.children(key, (DEPLOYMENT, LEADER_WORKER_SET))),
        gateways=None if gateway is None else gateway.get("spec", {}).get("replicas"),
        has_service_monitors={SERVICE_MONITOR, POD_MONITOR} <= kinds,
    )


def _read_stable(text: str | None, resource: MoEServing) -> Revision | None:
    """The revision of the stable engines.

    Raises:
        InvalidInput: it stands there and is not valid for this release, and a canary would take its place.
    """
    wanted = build_revision(resource)
    if text == wanted.text:
        return wanted
    stable = None if text is None else parse_revision(text)
    canary = resource.spec.engine.canary
    if text and stable is None and canary is not None and canary.weight < 100:
        message = "this release cannot use the revision of the stable engines; set weight to 100 or remove the canary"
        raise InvalidInput([InputError("spec.engine.canary", message)])
    return stable


def engines_workload(store: Store, key: Key, names: Names) -> Document | None:
    """The workload of the stable engines, None when there is none."""
    return store.get(key, DEPLOYMENT, names.engine) or store.get(key, LEADER_WORKER_SET, names.engine)


def takes_over(store: Store, key: Key, names: Names) -> bool:
    """Whether several workloads have stable engines, so that none has all of them: of both kinds, or of each role."""
    if any(store.get(key, DEPLOYMENT, names.of_role(role)) for role in (EngineRole.PREFILL, EngineRole.DECODE)):
        return True
    return all(store.get(key, kind, names.engine) for kind in (DEPLOYMENT, LEADER_WORKER_SET))


def _read_replicas(document: Document, workload: Document | None, *, both: bool) -> int | None:
    """Wanted number of stable engines; where several workloads have them the status alone has it."""
    if both:
        replicas: int | None = document.get("status", {}).get("desiredReplicas")
        return replicas
    if workload is None:
        return None
    # While groups end their streams the set has more than are wanted.
    goal = begun_goal(workload)
    return goal if goal is not None else workload.get("spec", {}).get("replicas")


def _read_role_replicas(store: Store, key: Key, names: Names) -> dict[EngineRole, int]:
    """Wanted engines of each fixed role; empty while other engines still serve, which leave each role fewer for now."""
    live = {role: store.get(key, DEPLOYMENT, names.of_role(role)) for role in (EngineRole.PREFILL, EngineRole.DECODE)}
    if engines_workload(store, key, names) is not None:
        return {}
    return {role: found["spec"].get("replicas", 1) for role, found in live.items() if found is not None}


def plan_tokens(secret: Document | None, document: Document, now: datetime) -> tuple[tuple[str, ...], str]:
    """The control tokens that should be in force, the newest first, and the note of the last rotation.

    Another value of the resource's annotation `rotate-token` makes a new token; the old one stays good for a while.
    """
    wanted = document["metadata"].get("annotations", {}).get(ROTATE, "")
    if secret is None:
        return (secrets.token_urlsafe(32),), _note(wanted, now) if wanted else ""
    text = base64.b64decode(secret.get("data", {}).get("token", "")).decode(errors="replace")
    tokens = tuple(text.split()) or (secrets.token_urlsafe(32),)
    note = secret["metadata"].get("annotations", {}).get(ROTATED_AT, "")
    if wanted and note.rpartition(" ")[0] != wanted:
        return (secrets.token_urlsafe(32), tokens[0]), _note(wanted, now)
    if len(tokens) > 1 and now - _when(note, now) > TOKEN_OVERLAP:
        return tokens[:1], note
    return tokens, note


def _note(wanted: str, now: datetime) -> str:
    return f"{wanted} {now.astimezone(UTC).isoformat(timespec='seconds')}"


def _when(note: str, now: datetime) -> datetime:
    try:
        return datetime.fromisoformat(note.rpartition(" ")[2])
    except ValueError:
        return now - 2 * TOKEN_OVERLAP


def find_scaled(workloads: Iterable[Document]) -> dict[Place, Scaled]:
    """The workloads whose number of replicas another manager set last, by kind and name."""
    return {
        (live["kind"], live["metadata"]["name"]): Scaled(
            count=live["spec"].get("replicas", 1), note=(live["metadata"].get("annotations") or {}).get(NOTE)
        )
        for live in workloads
        if _is_scaled(live)
    }


def _is_scaled(workload: Document) -> bool:
    """Whether another manager than the operator set the number of replicas.

    It owns the number then. Nobody does once somebody has scaled the workload to zero: the scale subresource leaves a
    zero out, so the API server takes the field from its owner and gives it to nobody, whatever is set there later.
    """
    entries = workload["metadata"].get("managedFields")
    if entries is None:
        return False
    owners = [row.get("manager") for row in entries if "f:replicas" in row.get("fieldsV1", {}).get("f:spec", {})]
    return not owners or any(owner != MANAGER for owner in owners)
