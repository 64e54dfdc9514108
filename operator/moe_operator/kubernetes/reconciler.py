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
from moe_contract.api_server import ApiError, Kind
from moe_contract.experts_state import ExpertsState
from moe_contract.input_errors import InvalidInput

from moe_operator.api import parse_resource
from moe_operator.api.autoscaling import AutoscalingMode
from moe_operator.api.reasons import Reason
from moe_operator.api.resource import MoEServing
from moe_operator.api.status import ConditionStatus
from moe_operator.api.units import duration_s
from moe_operator.autoscale.autoscaler import Outcome
from moe_operator.autoscale.signal import NOT_ASKED, States
from moe_operator.autoscale.source import Sources, with_outcome
from moe_operator.kubernetes.api import Api, NotLeading
from moe_operator.kubernetes.children import WORKLOADS, Applied, Children
from moe_operator.kubernetes.conditions import (
    DEGRADED,
    READY,
    ConditionInputs,
    build_conditions,
    changed_conditions,
    find_waker,
    is_serving,
    read_conditions,
    summarise,
)
from moe_operator.kubernetes.ending import FINALIZER, REFUSED_S, Ending
from moe_operator.kubernetes.event_recorder import EventRecorder
from moe_operator.kubernetes.failure import SEE_LOG, Parts, PassFailed, describe
from moe_operator.kubernetes.group_scale_in import GroupChanges, GroupDrains, begun_goal, with_scale_in
from moe_operator.kubernetes.groups import read_nodes, whole_replicas
from moe_operator.kubernetes.kinds import CHILDREN, INFERENCE_POOL, LEADER_WORKER_SET, POD, SERVING
from moe_operator.kubernetes.named_claims import NamedClaims
from moe_operator.kubernetes.namespaces import Namespaces
from moe_operator.kubernetes.notices import Notices, own_part
from moe_operator.kubernetes.observed import engines_workload, read_observed, takes_over
from moe_operator.kubernetes.other_autoscalers import OtherAutoscalers
from moe_operator.kubernetes.own_writes import keep_serving
from moe_operator.kubernetes.peers import Peer, build_change, differs, fetch_experts, find_peers, put_settings
from moe_operator.kubernetes.problems import ProblemFinder
from moe_operator.kubernetes.quiet import is_quiet
from moe_operator.kubernetes.report import build_status, numbers_due_s
from moe_operator.kubernetes.role_rollout import roll_in_turn
from moe_operator.kubernetes.rollouts import find_rollouts
from moe_operator.kubernetes.serving import GatewayEndpoints
from moe_operator.kubernetes.state_streams import StateStreams, numbers_interval_s
from moe_operator.kubernetes.store import Key, Store
from moe_operator.kubernetes.takeover import (
    Takeover,
    read_takeover,
    shrink_old_workload,
    with_old_workload,
    with_takeover,
)
from moe_operator.kubernetes.traffic import TrafficWatch, changes_unseen
from moe_operator.kubernetes.victims import mark_victims
from moe_operator.kubernetes.waits import find_remains
from moe_operator.plan import ClusterPlan, Defaults, Observed, plan_cluster
from moe_operator.plan.cluster import plan_engine_count, plan_replicas, stable_nodes
from moe_operator.plan.names import Names
from moe_operator.plan.role_override import has_templates

Document = dict[str, Any]
# While something is on its way, and while all is well but not every change comes by itself.
SOON_S, STEADY_S = 2.0, 15.0
# While time alone can make something a finding.
RIPENS_S = 10.0

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
        blind_spot: why the objects of a namespace are not known; empty where they are.
        streams: of the states of agents and gateways; None opens some of its own, whose changes call nobody.
    """

    def __init__(
        self,
        api: Api,
        store: Store,
        session: aiohttp.ClientSession,
        defaults: Defaults,
        kinds: Callable[[], frozenset[Kind]],
        blind_spot: Callable[[str], str] = lambda namespace: "",
        streams: StateStreams | None = None,
    ) -> None:
        self._api, self._store, self._session, self._defaults = api, store, session, defaults
        self._events = EventRecorder(api)
        self._children = Children(api, store, self._say_kept)
        self._problems = ProblemFinder(api, store)
        self._endpoints = GatewayEndpoints(api)
        self._namespaces, self._claims = Namespaces(api), NamedClaims(api)
        self._notices, self._blind_spot = Notices(api, store, self._events.record), blind_spot
        self._ending = Ending(api, store, self._children, self._namespaces, self._notices, blind_spot)
        self._sources, self._others = Sources(session), OtherAutoscalers(api)
        self._streams = StateStreams(session, lambda *_: None) if streams is None else streams
        self._groups, self._traffic = GroupDrains(api, store), TrafficWatch()
        self._kinds = kinds

    async def reconcile(self, key: Key) -> float | None:
        """One pass; the time after which the next is wanted, None when only a change calls for one.

        Raises:
            Exception: the pass failed, and the status says so unless the API server is away; it is to be tried again.
        """
        document = self._store.serving(key)
        if document is None:
            self._forget(key)
            return await self._ending.sweep(key)
        try:
            return await self._pass(key, document)
        except (NotLeading, PassFailed):
            raise
        except Exception as error:
            await self._report_failure(key, describe(error), NOT_ASKED, {})
            raise

    async def _pass(self, key: Key, document: Document) -> float | None:
        if "deletionTimestamp" in document["metadata"]:
            self._forget(key)
            return await self._ending.run(key, document)
        self._ending.forget(key)
        try:
            resource = parse_resource(_without_server_fields(document))
        except InvalidInput as error:
            return await self._report_invalid(key, document, str(error))
        if problem := self._blind_spot(key.namespace):
            self._streams.forget(key)
            return await self._report_blind(document, problem)
        await self._hold_on(document)
        if resource.spec.paused:
            return await self._report_paused(key, document, resource)
        return await self._make_real(key, document, resource)

    def _forget(self, key: Key) -> None:
        for part in (self._sources, self._streams, self._problems, self._endpoints, self._groups, self._traffic):
            part.forget(key)
        self._namespaces.forget(key.namespace)
        self._claims.forget(key.namespace)
        self._others.forget(key.namespace)

    async def _make_real(self, key: Key, document: Document, resource: MoEServing) -> float | None:
        parts = Parts()
        pods = self._store.of(key, POD)
        peers = find_peers(pods)
        asking = self._ask(key, peers, resource)
        states, experts = await parts.run("asking engines and gateways", asking, (NOT_ASKED, {}))
        now = datetime.now(UTC)
        try:
            place = await self._namespaces.fetch_uid(key.namespace)
            observed = read_observed(self._store, key, document, resource, self._kinds(), now, place)
            as_it_is = Outcome(replicas=plan_replicas(resource, observed), reason="failed", limited=None)
            whole = whole_replicas(pods, read_nodes(document))
            deciding = self._sources.decide(key, resource, observed, pods, states, whole)
            outcome = await parts.run("autoscaling", deciding, as_it_is)
            looking = self._others.judge(key.namespace, resource, outcome)
            outcome = await parts.run("looking for other autoscalers", looking, outcome)
            observed = with_outcome(observed, outcome)
            takeover = read_takeover(self._store, key, resource, observed, pods, self._kinds())
            changes = self._plan_groups(key, resource, observed, takeover, pods, states)
            observed = with_scale_in(observed, changes)
            plan = plan_cluster(resource, key.namespace, with_takeover(observed, takeover), self._defaults)
            workloads = [live for _, live in self._store.children(key, WORKLOADS)]
            if claims := await self._claims.find_one_node(key.namespace, key.name, plan.objects, workloads):
                observed = replace(observed, one_node_claims=claims)
                takeover = read_takeover(self._store, key, resource, observed, pods, self._kinds())
                plan = plan_cluster(resource, key.namespace, with_takeover(observed, takeover), self._defaults)
            plan = roll_in_turn(plan, workloads)
        except InvalidInput as error:
            return await self._report_invalid(key, document, str(error))
        except Exception as error:
            log.exception("%s: planning failed", key)
            await self._report_failure(key, f"planning: {describe(error)}", states, experts)
            raise PassFailed(f"planning: {describe(error)}") from error
        current = Pass(
            key=key, document=document, resource=resource, observed=observed, pods=pods, states=states, experts=experts
        )
        try:
            applied, late = await self._carry_out(current, plan, peers, takeover, changes, parts)
        except ApiError as error:
            await self._report_failure(key, describe(error), states, experts)
            raise PassFailed(describe(error)) from error
        moves = [*([] if takeover is None else [takeover.text]), *([] if changes is None else changes.texts)]
        status_after_s = await self._report(current, plan, applied, outcome.limited, moves, parts.problems)
        if parts.problems:
            raise PassFailed("; ".join(parts.problems))
        return self._next_s(current, applied, late, status_after_s)

    async def _carry_out(
        self,
        current: Pass,
        plan: ClusterPlan,
        peers: list[Peer],
        takeover: Takeover | None,
        changes: GroupChanges | None,
        parts: Parts,
    ) -> tuple[Applied, bool]:
        """Makes the plan real, each part whatever becomes of the others; whether a peer is late with its settings."""
        key, uid = current.key, current.document["metadata"]["uid"]
        victims = mark_victims(self._api, self._store, key, plan, current.pods, current.states)
        await parts.run("marking engines that may go", victims, None)
        is_templated = has_templates(current.resource)
        applying = self._children.apply(key, plan.objects, self._kinds(), uid, has_templates=is_templated)
        applied = await parts.run("applying objects", applying, Applied())
        if not applied.refused and not parts.problems:
            pruning = self._children.prune(key, with_old_workload(plan.objects, takeover), uid)
            applied.waiting |= await parts.run("deleting objects", pruning, True)
            shrinking = shrink_old_workload(self._api, self._store, key, takeover, current.pods, current.states)
            await parts.run("ending engines of the old kind of workload", shrinking, None)
        draining = self._groups.carry_out(key, changes, peers, current.observed.tokens)
        await parts.run("draining groups", draining, None)
        late = await parts.run("giving settings", self._push_settings(plan, peers, current), True)
        return applied, late

    def _plan_groups(
        self,
        key: Key,
        resource: MoEServing,
        observed: Observed,
        takeover: Takeover | None,
        pods: Sequence[Document],
        states: States,
    ) -> GroupChanges | None:
        """The changes of the groups; None where there are none, or where a takeover goes on."""
        live = self._store.get(key, LEADER_WORKER_SET, Names(key.name).engine)
        if live is None or takeover is not None or stable_nodes(resource, observed) == 1:
            self._groups.forget(key)
            return None
        return self._groups.plan(key, live, plan_engine_count(resource, observed), pods, states)

    async def _ask(
        self, key: Key, peers: list[Peer], resource: MoEServing
    ) -> tuple[States, dict[str, ExpertsState]]:  # fmt: skip
        """What agents and gateways say of themselves, and engines of their experts where they have a group."""
        states = self._streams.fetch(key, peers, numbers_interval_s(resource))
        if not resource.spec.engine.parallelism.expert:
            return await states, {}
        said, experts = await asyncio.gather(states, fetch_experts(self._session, peers))
        return said, {pod: state for pod, state in experts.items() if pod not in said.strangers}

    async def _hold_on(self, document: Document) -> None:
        """Takes the finalizer, so that a deletion waits until the streams have ended."""
        if FINALIZER not in document["metadata"].get("finalizers", []):
            answer = await self._api.apply(SERVING, own_part(document, [FINALIZER]))
            keep_serving(self._store, self._api.own, answer)

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
        states = current.states
        behind = [
            (peer, build_change(settings, peer, states)) for peer, settings in wanted if differs(settings, peer, states)
        ]
        answers = await asyncio.gather(
            *(put_settings(peer, settings, current.observed.tokens) for peer, settings in behind)
        )
        for (peer, _), problem in zip(behind, answers, strict=True):
            log.log(logging.WARNING if problem else logging.INFO, "settings for %s: %s", peer.pod, problem or "taken")
        return any(answers)

    async def _report(
        self,
        current: Pass,
        plan: ClusterPlan,
        applied: Applied,
        limited: tuple[Reason, str] | None,
        moves: Sequence[str],
        failures: Sequence[str],
    ) -> float:
        names = Names(current.key.name)
        problems = await self._problems.find(current.key, current.pods, current.states, read_nodes(current.document))
        inputs = ConditionInputs(
            refused="; ".join([*applied.refused, *applied.overdue(), *_other_missing(applied)]),
            failed=_failed(failures),
            missing_kinds=tuple(applied.missing),
            desired=plan.replicas,
            desired_roles={row.role: row.count.replicas for row in plan.roles},
            rolling=(
                *find_rollouts(self._store, current.key),
                *moves,
                *self._find_remains(current.key),
            ),
            findings=problems.findings,
            gated=problems.gated,
            disrupted=problems.disrupted,
            limited=limited,
            has_experts=current.resource.spec.engine.parallelism.expert,
        )
        after_s = await self._write_status(
            current.key, current.document, names, inputs, current.pods, current.states, current.experts
        )
        return min(after_s, RIPENS_S) if problems.ripens else after_s

    def _find_remains(self, key: Key) -> list[str]:
        return find_remains(live for _, live in self._store.children(key, CHILDREN))

    async def _report_invalid(self, key: Key, document: Document, problem: str) -> float | None:
        """Nothing is touched: what runs goes on."""
        self._streams.forget(key)
        inputs = ConditionInputs(invalid=problem, desired=self._live_replicas(key))
        await self._write_status(key, document, Names(key.name), inputs, self._store.of(key, POD), NOT_ASKED, {})
        return None

    async def _report_blind(self, document: Document, problem: str) -> float:
        """Nothing is touched: what is not seen may be running."""
        message = f"the operator cannot read the objects of this namespace: {problem}"
        verdicts = {
            READY: (ConditionStatus.UNKNOWN, Reason.NOT_PERMITTED, message),
            DEGRADED: (ConditionStatus.TRUE, Reason.NOT_PERMITTED, message),
        }
        await self._notices.write(document, verdicts, datetime.now(UTC))
        return REFUSED_S

    async def _report_failure(
        self, key: Key, problem: str, states: States, experts: Mapping[str, ExpertsState]
    ) -> None:
        """Says in the status that a pass failed; where that cannot be written either, the log has both.

        Where the rest of the status cannot be computed the condition alone says it.
        """
        document = self._store.serving(key)
        if document is None:
            return
        said = _failed([problem])
        try:
            inputs = ConditionInputs(failed=said, desired=self._live_replicas(key))
            try:
                await self._write_status(
                    key, document, Names(key.name), inputs, self._store.of(key, POD), states, experts
                )
            except (ApiError, NotLeading):
                raise
            except Exception:
                log.exception("%s: no status but for the failure", key)
                verdict = (ConditionStatus.TRUE, Reason.RECONCILE_ERROR, said)
                await self._notices.write(document, {DEGRADED: verdict}, datetime.now(UTC))
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
            await self._events.note(document, "ClaimKept", message)

    async def _report_paused(self, key: Key, document: Document, resource: MoEServing) -> float | None:
        pods = self._store.of(key, POD)
        states, experts = await self._ask(key, find_peers(pods), resource)
        problems = await self._problems.find(key, pods, states, read_nodes(document))
        inputs = ConditionInputs(
            paused=True,
            desired=self._live_replicas(key),
            findings=problems.findings,
            gated=problems.gated,
            disrupted=problems.disrupted,
            has_experts=resource.spec.engine.parallelism.expert,
        )
        after_s = await self._write_status(key, document, Names(key.name), inputs, pods, states, experts)
        next_s = self._without_looking(key, resource, pods, states, after_s) if pods else None
        return None if next_s is None else max(next_s, STEADY_S)

    def _live_replicas(self, key: Key) -> int:
        """Engines that the workload asks for, whatever the resource says by now."""
        names = Names(key.name)
        if takes_over(self._store, key, names):
            # Neither workload has all of them: the status alone knows the number.
            known = (self._store.serving(key) or {}).get("status", {}).get("desiredReplicas")
            if known is not None:
                return int(known)
        workload = engines_workload(self._store, key, names) or {}
        goal = begun_goal(workload)
        return goal if goal is not None else int(workload.get("spec", {}).get("replicas", 0))

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
        inputs = self._traffic.judge(inputs, key, document, states, before)
        endpoint = await self._endpoints.has_ready(key, names.service, pods)
        inputs = replace(inputs, endpoint=endpoint, waker=find_waker(document))
        status, inputs = build_status(document, names, key.namespace, inputs, pods, states, experts)
        conditions = build_conditions(inputs, before, now)
        rows = [row.model_dump(mode="json", by_alias=True, exclude_none=True) for row in conditions]
        wanted = status | {"summary": summarise(conditions), "conditions": rows}
        if wanted != document.get("status"):
            for condition in changed_conditions(before, conditions):
                await self._events.record(document, condition)
            header = own_part(document, None)
            header["metadata"].pop("uid")
            answer = await self._api.apply(SERVING, {**header, "status": wanted}, subresource="status")
            keep_serving(self._store, self._api.own, answer)
        unsettled = inputs.rolling or inputs.ready < inputs.desired or inputs.findings
        # What comes from gateways and EndpointSlices brings no pass by itself.
        unseen = inputs.gateways and inputs.ready and not is_serving(inputs)
        if unsettled or unseen or not inputs.endpoint:
            return SOON_S
        return STEADY_S + numbers_due_s(wanted, now)

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
            return min(status_after_s, STEADY_S)
        if not current.pods:
            return None
        return self._without_looking(current.key, current.resource, current.pods, current.states, status_after_s)

    def _without_looking(
        self, key: Key, resource: MoEServing, pods: Sequence[Document], states: States, after_s: float
    ) -> float | None:
        """The time until the next pass: where every change comes by itself none is made only to look for one."""
        by_itself = self._streams.is_pushed(key) and not changes_unseen(resource)
        if after_s < STEADY_S or not by_itself or not is_quiet(pods, states):
            return min(after_s, STEADY_S)
        return after_s if after_s > STEADY_S else None


def _other_missing(applied: Applied) -> list[str]:
    """Kinds without a reason of their own that the plan needs and the operator cannot read, in words."""
    others = (name for name in applied.missing if name not in (LEADER_WORKER_SET.name, INFERENCE_POOL.name))
    return [f"{name}: the cluster lacks this kind, or the operator the right to read it" for name in others]


def _failed(failures: Sequence[str]) -> str:
    return f"{'; '.join(failures)} ({SEE_LOG})" if failures else ""


def _without_server_fields(document: Document) -> Document:
    """The resource as a person writes it: of the metadata what the model knows, and no status."""
    known = ("name", "namespace", "labels", "annotations")
    metadata = {name: value for name, value in document["metadata"].items() if name in known}
    return {name: value for name, value in document.items() if name != "status"} | {"metadata": metadata}
