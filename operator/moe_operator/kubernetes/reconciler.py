"""One pass over one resource: observe, decide, apply, report. Called by workers, one at a time for each resource.

Level-based: what is done follows from what is, never from which event came, so that a pass can be cut anywhere and the
next one goes on from there. A pass over what is as it should be writes nothing.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import aiohttp
from moe_contract.api_server import CONFLICT, NOT_FOUND, ApiError, Kind
from moe_contract.experts_state import ExpertsState
from moe_contract.input_errors import InvalidInput

from moe_operator.api import parse_resource
from moe_operator.api.autoscaling import AutoscalingMode
from moe_operator.api.resource import API_VERSION, KIND, MoEServing
from moe_operator.api.status import Condition
from moe_operator.api.units import duration_s
from moe_operator.autoscale.signal import States
from moe_operator.autoscale.source import Sources
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.children import WORKLOADS, Applied, Children
from moe_operator.kubernetes.conditions import (
    ConditionInputs,
    build_conditions,
    changed_conditions,
    is_bad,
    read_conditions,
)
from moe_operator.kubernetes.diagnosis import find_problems
from moe_operator.kubernetes.kinds import EVENT, LEADER_WORKER_SET, POD, SERVING
from moe_operator.kubernetes.observed import engines_workload, read_observed
from moe_operator.kubernetes.peers import Peer, differs, fetch_experts, find_peers, put_settings
from moe_operator.kubernetes.report import build_status, numbers_due_s
from moe_operator.kubernetes.state_streams import StateStreams, numbers_interval_s
from moe_operator.kubernetes.store import Key, Store
from moe_operator.kubernetes.victims import mark_victims
from moe_operator.plan import ClusterPlan, Defaults, Observed, plan_cluster
from moe_operator.plan.names import COMPONENT, GROUP, Names

Document = dict[str, Any]
FINALIZER = f"{GROUP}/drain"
# While something is on its way, and while all is well but pods want to be looked at.
SOON_S, STEADY_S = 2.0, 15.0
# What was refused may be taken later without a change of ours: a quota is raised, a stranger's object goes.
REFUSED_S = 30.0

log = logging.getLogger("moeserving.operator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """The facts of one pass over a resource."""

    key: Key
    document: Document
    resource: MoEServing
    observed: Observed
    pods: list[Document]
    states: States
    experts: Mapping[str, ExpertsState]


class Reconciler:
    """Makes one resource after the other real.

    Args:
        api: for every change.
        store: the cluster as it was last seen.
        session: for calls to agents and gateways.
        defaults: images and the like.
        kinds: those that the cluster has now.
        streams: of the states of agents and gateways; None opens some of its own, whose changes call nobody.
    """

    def __init__(
        self,
        api: Api,
        store: Store,
        session: aiohttp.ClientSession,
        defaults: Defaults,
        kinds: Callable[[], frozenset[Kind]],
        streams: StateStreams | None = None,
    ) -> None:
        self._api, self._store, self._session, self._defaults = api, store, session, defaults
        self._children = Children(api, store)
        self._sources = Sources(session)
        self._streams = StateStreams(session, lambda *_: None) if streams is None else streams
        self._kinds = kinds

    async def reconcile(self, key: Key) -> float | None:
        """One pass; the time after which the next is wanted, None when only a change calls for one."""
        document = self._store.serving(key)
        if document is None:
            self._sources.forget(key)
            self._streams.forget(key)
            return None
        if "deletionTimestamp" in document["metadata"]:
            return await self._end(key, document)
        try:
            resource = parse_resource(_without_server_fields(document))
        except InvalidInput as error:
            return await self._report_invalid(key, document, str(error))
        await self._hold_on(document)
        if resource.spec.paused:
            return await self._report_paused(key, document, resource)
        return await self._make_real(key, document, resource)

    async def _make_real(self, key: Key, document: Document, resource: MoEServing) -> float | None:
        pods = self._store.of(key, POD)
        peers = find_peers(pods)
        states, experts = await self._ask(key, peers, resource)
        now = datetime.now(UTC)
        observed = read_observed(self._store, key, document, resource, self._kinds(), now)
        current = Pass(
            key=key,
            document=document,
            resource=resource,
            observed=observed,
            pods=pods,
            states=states,
            experts=experts,
        )
        outcome = await self._sources.decide(key, resource, observed, pods, states)
        try:
            plan = plan_cluster(resource, key.namespace, replace(observed, replicas=outcome.replicas), self._defaults)
        except InvalidInput as error:
            return await self._report_invalid(key, document, str(error))
        await mark_victims(self._api, self._store, key, plan, pods, states)
        uid = document["metadata"]["uid"]
        applied = await self._children.apply(key, plan.objects, self._kinds(), uid)
        if not applied.refused:
            applied.waiting |= await self._children.prune(key, plan.objects, uid)
        late = await self._push_settings(plan, peers, current)
        status_after_s = await self._report(current, plan, applied, outcome.limited)
        return self._next_s(current, applied, late, status_after_s)

    async def _ask(
        self, key: Key, peers: list[Peer], resource: MoEServing
    ) -> tuple[States, dict[str, ExpertsState]]:  # fmt: skip
        """What agents and gateways say of themselves, and engines of their experts where they have a group."""
        states = self._streams.fetch(key, peers, numbers_interval_s(resource))
        if not resource.spec.engine.parallelism.expert:
            return await states, {}
        return await asyncio.gather(states, fetch_experts(self._session, peers))

    async def _hold_on(self, document: Document) -> None:
        """Takes the finalizer, so that a deletion waits until the streams have ended."""
        if FINALIZER not in document["metadata"].get("finalizers", []):
            self._store.put(SERVING, await self._api.apply(SERVING, _own(document, [FINALIZER])))

    async def _push_settings(self, plan: ClusterPlan, peers: list[Peer], current: Pass) -> bool:
        """Gives running engines and gateways the settings that they do not have; whether one did not take them."""
        gateway = {
            "request": dict(plan.request),
            "dispatch": dict(plan.dispatch),
            "groups": [group.model_dump(mode="json") for group in plan.groups],
        }
        wanted = [
            (peer, plan.agent if peer.component == "engine" else gateway)
            for peer in peers
            if peer.pod in current.states
        ]
        behind = [(peer, settings) for peer, settings in wanted if differs(settings, peer, current.states)]
        answers = await asyncio.gather(
            *(put_settings(self._session, peer, settings, current.observed.tokens) for peer, settings in behind)
        )
        for (peer, _), problem in zip(behind, answers, strict=True):
            log.log(logging.WARNING if problem else logging.INFO, "settings for %s: %s", peer.pod, problem or "taken")
        return any(answers)

    async def _report(
        self, current: Pass, plan: ClusterPlan, applied: Applied, limited: tuple[str, str] | None
    ) -> float:
        names = Names(current.key.name)
        inputs = ConditionInputs(
            refused="; ".join(applied.refused),
            missing_kind=next(iter(applied.missing), ""),
            desired=plan.replicas,
            rolling=tuple(_rolling(self._store, current.key)),
            findings=find_problems(current.pods, current.states),
            limited=limited,
            has_experts=current.resource.spec.engine.parallelism.expert,
        )
        return await self._write_status(
            current.key, current.document, names, inputs, current.pods, current.states, current.experts
        )

    async def _report_invalid(self, key: Key, document: Document, problem: str) -> float | None:
        """Nothing is touched: what runs goes on."""
        inputs = ConditionInputs(invalid=problem, desired=self._live_replicas(key))
        await self._write_status(key, document, Names(key.name), inputs, self._store.of(key, POD), States(), {})
        return None

    async def _report_paused(self, key: Key, document: Document, resource: MoEServing) -> float | None:
        pods = self._store.of(key, POD)
        states, experts = await self._ask(key, find_peers(pods), resource)
        inputs = ConditionInputs(
            paused=True,
            desired=self._live_replicas(key),
            findings=find_problems(pods, states),
            has_experts=resource.spec.engine.parallelism.expert,
        )
        after_s = await self._write_status(key, document, Names(key.name), inputs, pods, states, experts)
        return self._without_looking(key, resource, max(after_s, STEADY_S)) if pods else None

    def _live_replicas(self, key: Key) -> int:
        """Engines that the workload asks for, whatever the resource says by now."""
        workload = engines_workload(self._store, key, Names(key.name)) or {}
        return int(workload.get("spec", {}).get("replicas", 0))

    async def _write_status(
        self,
        key: Key,
        document: Document,
        names: Names,
        inputs: ConditionInputs,
        pods: list[Document],
        states: States,
        experts: Mapping[str, ExpertsState],
    ) -> float:
        now = datetime.now(UTC)
        before = read_conditions(document)
        status, inputs = build_status(document, names, key.namespace, inputs, pods, states, experts)
        conditions = build_conditions(inputs, before, now)
        wanted = status | {"conditions": [row.model_dump(mode="json", by_alias=True) for row in conditions]}
        if wanted != document.get("status"):
            header = _own(document, None)
            header["metadata"].pop("uid")
            self._store.put(SERVING, await self._api.apply(SERVING, {**header, "status": wanted}, subresource="status"))
            for condition in changed_conditions(before, conditions):
                await self._post_event(document, condition)
        if inputs.rolling or inputs.ready < inputs.desired or inputs.findings:
            return SOON_S
        return STEADY_S + numbers_due_s(wanted, now)

    async def _post_event(self, document: Document, condition: Condition) -> None:
        metadata, now = document["metadata"], datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        message = condition.message or f"{condition.status.value} ({condition.reason})"
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{metadata['name']}.{secrets.token_hex(8)}", "namespace": metadata["namespace"]},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": metadata["uid"],
            },
            "reason": condition.reason,
            "message": f"{condition.type}: {message}"[:1000],
            "type": "Warning" if is_bad(condition) else "Normal",
            "source": {"component": "moeserving-operator"},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        await self._api.create(EVENT, event)

    def _next_s(self, current: Pass, applied: Applied, late: bool, status_after_s: float) -> float | None:
        autoscaling = current.resource.spec.autoscaling
        if autoscaling is not None and autoscaling.mode is AutoscalingMode.INTERNAL:
            return min(status_after_s, duration_s(autoscaling.interval))
        if applied.waiting or late:
            return SOON_S
        if applied.refused:
            return REFUSED_S
        if len(current.observed.tokens) > 1:
            # The old token ends by time alone.
            return STEADY_S
        return self._without_looking(current.key, current.resource, status_after_s) if current.pods else None

    def _without_looking(self, key: Key, resource: MoEServing, after_s: float) -> float | None:
        """The time until the next pass: where every change is pushed none is made only to look for one."""
        if resource.spec.engine.parallelism.expert or not self._streams.is_pushed(key):
            return min(after_s, STEADY_S)
        if after_s == STEADY_S:
            return None
        return max(after_s, STEADY_S)

    async def _end(self, key: Key, document: Document) -> float | None:
        """The gateway ends first, so that no new request comes; then the engines; then all else."""
        self._sources.forget(key)
        self._streams.forget(key)
        if FINALIZER not in document["metadata"].get("finalizers", []):
            return None
        for component in ("gateway", "engine"):
            await self._end_component(key, component)
            if any(pod["metadata"].get("labels", {}).get(COMPONENT) == component for pod in self._store.of(key, POD)):
                return SOON_S
        if await self._children.prune(key, (), document["metadata"]["uid"]):
            return 0.1
        try:
            await self._api.apply(SERVING, _own(document, []))
        except ApiError as error:
            # Gone already: its uid is no longer there.
            if error.status not in (NOT_FOUND, CONFLICT):
                raise
        self._store.remove(SERVING, document)
        return None

    async def _end_component(self, key: Key, component: str) -> None:
        for kind, live in self._store.children(key, WORKLOADS):
            ours = live["metadata"].get("labels", {}).get(COMPONENT) == component
            if ours and "deletionTimestamp" not in live["metadata"]:
                await self._children.delete(kind, live)


def _own(document: Document, finalizers: list[str] | None) -> Document:
    """The resource as the operator applies it: what stands in it is the operator's."""
    metadata = document["metadata"]
    # The uid keeps an apply from making anew what was deleted meanwhile.
    own = {name: metadata[name] for name in ("name", "namespace", "uid")}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": own | ({} if finalizers is None else {"finalizers": finalizers}),
    }


def _without_server_fields(document: Document) -> Document:
    """The resource as a person writes it: of the metadata what the model knows, and no status."""
    known = ("name", "namespace", "labels", "annotations")
    metadata = {name: value for name, value in document["metadata"].items() if name in known}
    return {name: value for name, value in document.items() if name != "status"} | {"metadata": metadata}


def _rolling(store: Store, key: Key) -> list[str]:
    """Workloads of which not all pods are of the newest template yet."""
    rolling = []
    for _, live in store.children(key, WORKLOADS):
        spec, status = live.get("spec", {}), live.get("status", {})
        wanted, updated = spec.get("replicas", 1), status.get("updatedReplicas", 0)
        if _is_unseen(live) or updated < wanted or status.get("replicas", 0) > updated:
            rolling.append(f"{live['metadata']['name']}: {updated} of {wanted} pods are up to date")
    return rolling


def _is_unseen(workload: Document) -> bool:
    """Whether its controller has not looked at the newest template; that of LeaderWorkerSets up to v0.7 never says."""
    status = workload.get("status", {})
    if "observedGeneration" not in status:
        return not (workload["kind"] == LEADER_WORKER_SET.name and status.get("conditions"))
    return bool(status["observedGeneration"] < workload["metadata"].get("generation", 0))
