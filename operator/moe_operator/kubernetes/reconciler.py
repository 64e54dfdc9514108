"""One pass over one resource: observe, decide, apply, report. Called by workers, one at a time for each resource.

Level-based: what is done follows from what is, never from which event came, so that a pass can be cut anywhere and the
next one goes on from there. A pass over what is as it should be writes nothing.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
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
from moe_operator.autoscale.autoscaler import Outcome
from moe_operator.autoscale.signal import States
from moe_operator.autoscale.source import Sources
from moe_operator.kubernetes.api import Api, NotLeading
from moe_operator.kubernetes.children import WORKLOADS, Applied, Children
from moe_operator.kubernetes.conditions import (
    ConditionInputs,
    build_conditions,
    changed_conditions,
    is_bad,
    read_conditions,
)
from moe_operator.kubernetes.diagnosis import find_problems
from moe_operator.kubernetes.events import build_event
from moe_operator.kubernetes.failure import SEE_LOG, Parts, PassFailed, describe
from moe_operator.kubernetes.kinds import EVENT, LEADER_WORKER_SET, POD, SERVING
from moe_operator.kubernetes.observed import engines_workload, read_observed
from moe_operator.kubernetes.peers import Peer, differs, fetch_experts, fetch_states, find_peers, put_settings
from moe_operator.kubernetes.report import build_status
from moe_operator.kubernetes.store import Key, Store
from moe_operator.kubernetes.victims import mark_victims
from moe_operator.plan import ClusterPlan, Defaults, Observed, plan_cluster
from moe_operator.plan.cluster import plan_replicas
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
    """

    def __init__(
        self,
        api: Api,
        store: Store,
        session: aiohttp.ClientSession,
        defaults: Defaults,
        kinds: Callable[[], frozenset[Kind]],
    ) -> None:
        self._api, self._store, self._session, self._defaults = api, store, session, defaults
        self._children = Children(api, store, self._say_kept)
        self._sources = Sources(session)
        self._kinds = kinds

    async def reconcile(self, key: Key) -> float | None:
        """One pass; the time after which the next is wanted, None when only a change calls for one.

        Raises:
            Exception: the pass failed, and the status says so unless the API server is away; it is to be tried again.
        """
        document = self._store.serving(key)
        if document is None:
            self._sources.forget(key)
            return None
        try:
            return await self._pass(key, document)
        except (NotLeading, PassFailed):
            raise
        except Exception as error:
            await self._report_failure(key, describe(error), States(), {})
            raise

    async def _pass(self, key: Key, document: Document) -> float | None:
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
        parts = Parts()
        pods = self._store.of(key, POD)
        peers = find_peers(pods)
        states, experts = await parts.run("asking engines and gateways", self._ask(peers, resource), (States(), {}))
        now = datetime.now(UTC)
        try:
            observed = read_observed(self._store, key, document, resource, self._kinds(), now)
            as_it_is = Outcome(replicas=plan_replicas(resource, observed), reason="failed", limited=None)
            deciding = self._sources.decide(key, resource, observed, pods, states)
            outcome = await parts.run("autoscaling", deciding, as_it_is)
            plan = plan_cluster(resource, key.namespace, replace(observed, replicas=outcome.replicas), self._defaults)
        except InvalidInput as error:
            return await self._report_invalid(key, document, str(error))
        except Exception as error:
            log.exception("%s: planning failed", key)
            await self._report_failure(key, f"planning: {describe(error)}", states, experts)
            raise PassFailed(f"planning: {describe(error)}") from error
        current = Pass(
            key=key,
            document=document,
            resource=resource,
            observed=observed,
            pods=pods,
            states=states,
            experts=experts,
        )
        try:
            applied, late = await self._carry_out(current, plan, peers, parts)
        except ApiError as error:
            await self._report_failure(key, describe(error), states, experts)
            raise PassFailed(describe(error)) from error
        status_after_s = await self._report(current, plan, applied, outcome.limited, parts.problems)
        if parts.problems:
            raise PassFailed("; ".join(parts.problems))
        return self._next_s(current, applied, late, status_after_s)

    async def _carry_out(
        self, current: Pass, plan: ClusterPlan, peers: list[Peer], parts: Parts
    ) -> tuple[Applied, bool]:
        """Makes the plan real, each part whatever becomes of the others; whether a peer is late with its settings."""
        key, uid = current.key, current.document["metadata"]["uid"]
        victims = mark_victims(self._api, self._store, key, plan, current.pods, current.states)
        await parts.run("marking engines that may go", victims, None)
        applied = await parts.run(
            "applying objects", self._children.apply(key, plan.objects, self._kinds(), uid), Applied()
        )
        if not applied.refused and not parts.problems:
            pruned = await parts.run("deleting objects", self._children.prune(key, plan.objects, uid), True)
            applied.waiting |= pruned
        late = await parts.run("giving settings", self._push_settings(plan, peers, current), True)
        return applied, late

    async def _ask(self, peers: list[Peer], resource: MoEServing) -> tuple[States, dict[str, ExpertsState]]:
        """What agents and gateways say of themselves, and engines of their experts where they have a group."""
        if not resource.spec.engine.parallelism.expert:
            return await fetch_states(self._session, peers), {}
        states, experts = await asyncio.gather(fetch_states(self._session, peers), fetch_experts(self._session, peers))
        return states, experts

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
        self,
        current: Pass,
        plan: ClusterPlan,
        applied: Applied,
        limited: tuple[str, str] | None,
        problems: Sequence[str],
    ) -> float:
        names = Names(current.key.name)
        inputs = ConditionInputs(
            refused="; ".join(applied.refused),
            failed=_failed(problems),
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

    async def _report_failure(
        self, key: Key, problem: str, states: States, experts: Mapping[str, ExpertsState]
    ) -> None:
        """Says in the status that a pass failed; where that cannot be written either, the log has both."""
        document = self._store.serving(key)
        if document is None:
            return
        try:
            inputs = ConditionInputs(failed=_failed([problem]), desired=self._live_replicas(key))
            await self._write_status(key, document, Names(key.name), inputs, self._store.of(key, POD), states, experts)
        except NotLeading:
            raise
        except Exception as error:
            log.warning("%s: the status does not say that a pass failed: %r", key, error)

    async def _say_kept(self, key: Key, claim: str) -> None:
        """Posts an event about a claim that outlives what it was made for."""
        document = self._store.serving(key)
        if document is not None:
            message = f"PersistentVolumeClaim {claim} is kept; when what it holds is of no more use: " + (
                f"kubectl delete pvc {claim} -n {key.namespace}"
            )
            await self._create_event(build_event(document, "ClaimKept", message, "Normal"))

    async def _report_paused(self, key: Key, document: Document, resource: MoEServing) -> float | None:
        pods = self._store.of(key, POD)
        states, experts = await self._ask(find_peers(pods), resource)
        inputs = ConditionInputs(
            paused=True,
            desired=self._live_replicas(key),
            findings=find_problems(pods, states),
            has_experts=resource.spec.engine.parallelism.expert,
        )
        await self._write_status(key, document, Names(key.name), inputs, pods, states, experts)
        return STEADY_S if pods else None

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
        return SOON_S if inputs.rolling or inputs.ready < inputs.desired or inputs.findings else STEADY_S

    async def _post_event(self, document: Document, condition: Condition) -> None:
        message = condition.message or f"{condition.status.value} ({condition.reason})"
        kind = "Warning" if is_bad(condition) else "Normal"
        await self._create_event(build_event(document, condition.reason, f"{condition.type}: {message}", kind))

    async def _create_event(self, event: Document) -> None:
        """Posts an event; one that is refused, as in a namespace that ends, fails no pass: the status says it all."""
        try:
            await self._api.create(EVENT, event)
        except ApiError as error:
            log.warning("no event %s: %s", event["reason"], error)

    def _next_s(self, current: Pass, applied: Applied, late: bool, status_after_s: float) -> float | None:
        autoscaling = current.resource.spec.autoscaling
        if autoscaling is not None and autoscaling.mode is AutoscalingMode.INTERNAL:
            return min(status_after_s, duration_s(autoscaling.interval))
        if applied.waiting or late:
            return SOON_S
        if applied.refused:
            return REFUSED_S
        return status_after_s if current.pods else None

    async def _end(self, key: Key, document: Document) -> float | None:
        """The gateway ends first, so that no new request comes; then the engines; then all else."""
        self._sources.forget(key)
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


def _failed(problems: Sequence[str]) -> str:
    return f"{'; '.join(problems)} ({SEE_LOG})" if problems else ""


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
