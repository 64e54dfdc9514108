"""The plan for a cluster: the objects that should exist for a resource, and what reaches running pods. Pure.

Called by the operator at each reconciliation and by `moeserving plan`. The objects stand in an order in which they can
be applied. What other controllers own is not in them: fields that they set, pods, EndpointSlices.

Invariant: equal arguments give equal plans.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moe_contract.gateway_config import Group
from moe_contract.input_errors import InputError, InvalidInput
from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api.autoscaling import AutoscalingMode
from moe_operator.api.model import WhenDeleted
from moe_operator.api.object_names import is_object_name
from moe_operator.api.pods import Update
from moe_operator.api.resource import MoEServing
from moe_operator.api.scheduling import engine_settings, request_settings
from moe_operator.api.units import canonical_quantity
from moe_operator.plan import pods
from moe_operator.plan.access import build_access
from moe_operator.plan.gateway_scale import build_gateway_scaler, plan_gateway_count
from moe_operator.plan.inference_pool import build_inference_pool
from moe_operator.plan.leader_worker_set import build_group_budgets, build_leader_worker_set
from moe_operator.plan.metadata import with_metadata
from moe_operator.plan.names import CANARY, ROTATED_AT, SCALE_IN, STABLE, Names
from moe_operator.plan.network import build_policies, build_services
from moe_operator.plan.one_node import find_one_node_claims, on_one_node
from moe_operator.plan.owners import build_owners
from moe_operator.plan.pods import Defaults
from moe_operator.plan.replicas import Count, Place, Scaled, count_replicas, keep_for_now, own_replicas
from moe_operator.plan.revision import Revision, at_revision, build_revision
from moe_operator.plan.roles import RoleWorkload, fixed_numbers, plan_role_workloads, role_numbers
from moe_operator.plan.written_settings import as_json

Object = dict[str, Any]
# Kubernetes keeps such fields in 32 bits.
MOST_SECONDS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What of the cluster a plan depends on.

    Attributes:
        uid: of the resource; None leaves out the owner of the children.
        namespace_uid: of its namespace; None where the operator may not read it.
        tokens: control tokens in force, the newest first.
        rotated_at: what the Secret says of its last rotation; empty before the first.
        stable: the revision of the stable engines; None before the first.
        replicas: wanted number of stable engines, as the autoscaler or the live object has it; None without either.
        role_replicas: engines of each fixed role, as the autoscaler or the live objects have them; empty without.
        first_replicas: number of stable engines of the planned kind of workload while another kind still serves; None
            where none does.
        scale_in: groups that the LeaderWorkerSet of the stable engines has for now, and the number that stays, while
            some of them end their streams; None while none does.
        has_groups: engines that span several nodes exist.
        scaled: workloads, by kind and name, whose number of replicas another manager (an autoscaler) set last.
        gateways: wanted number of gateways, as the live object has it; None without one.
        has_service_monitors: the cluster knows ServiceMonitors.
        one_node_claims: claims of users that one node alone can mount.
    """

    uid: str | None = None
    namespace_uid: str | None = None
    tokens: tuple[str, ...]
    rotated_at: str = ""
    stable: Revision | None = None
    replicas: int | None = None
    role_replicas: Mapping[EngineRole, int] = field(default_factory=dict)
    first_replicas: int | None = None
    scale_in: tuple[int, int] | None = None
    has_groups: bool = False
    scaled: Mapping[Place, Scaled] = field(default_factory=dict)
    gateways: int | None = None
    has_service_monitors: bool = False
    one_node_claims: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """What should be.

    Attributes:
        objects: in the order of application.
        replicas: stable engines.
        groups: Services of engines with their weights.
        agent: settings for running agents, by section (JSON values of `RequestSettings` and `ExpertSettings`).
        request: settings for running gateways (JSON values of `RequestSettings`).
        dispatch: settings for running gateways (JSON values of `EngineSettings`).
        engines: name of each workload of engines by revision; of fixed roles the one of their Service.
        roles: the workloads of engines of fixed roles; empty where roles are not fixed.
    """

    objects: tuple[Object, ...]
    replicas: int
    groups: tuple[Group, ...]
    agent: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    dispatch: Mapping[str, Any] = field(default_factory=dict)
    engines: Mapping[str, str] = field(default_factory=dict)
    roles: tuple[RoleWorkload, ...] = ()


def plan_cluster(resource: MoEServing, namespace: str, observed: Observed, defaults: Defaults) -> ClusterPlan:
    """The plan.

    Raises:
        InvalidInput: the resource asks for what a cluster cannot have.
    """
    _check(resource)
    names = Names(resource.metadata.name)
    wanted = build_revision(resource)
    stable = _stable_revision(resource, observed, wanted)
    count = plan_engine_count(resource, observed)
    roles = plan_role_workloads(resource, names, observed.scaled, observed.first_replicas, observed.role_replicas)
    has_canary = stable.digest != wanted.digest
    groups = _plan_groups(resource, names, has_canary)
    request = as_json(request_settings(resource.spec.scheduling.request, resource.spec.scheduling.engine))
    dispatch = as_json(engine_settings(resource.spec.scheduling.engine))
    engines = {STABLE: names.engine} | ({CANARY: names.canary} if has_canary else {})
    at_stable, canary = at_revision(resource, stable), resource.spec.engine.canary
    spans_nodes = observed.has_groups or max(map(_nodes, (resource, at_stable))) > 1
    has_monitors = observed.has_service_monitors
    objects: list[Object] = [
        _build_control(names, observed),
        _build_settings(resource, names, stable, groups),
        *build_access(names),
        *_build_cache(resource, names),
        *build_services(resource, names, engines),
        *build_inference_pool(resource, names, all_span_nodes=min(map(_nodes, (resource, at_stable))) > 1),
        *build_policies(resource, names, engines, defaults, spans_nodes, has_monitors),
        *build_group_budgets(at_stable, names, names.engine, count.replicas, has_groups=observed.has_groups),
        *_build_stable(at_stable, names, stable, count, roles, observed.one_node_claims, defaults),
    ]
    if has_canary and canary is not None:
        objects += _build_canary(resource, names, canary.replicas, wanted, observed, defaults)
    objects.append(_build_gateway(resource, names, observed, defaults))
    objects += build_gateway_scaler(resource, names)
    return ClusterPlan(
        objects=tuple(_finish(entry, resource, names, namespace, observed) for entry in objects),
        replicas=sum(row.count.replicas for row in roles) if roles else count.replicas,
        groups=groups,
        agent=pods.build_agent_settings(resource),
        request=request,
        dispatch=dispatch,
        engines=engines,
        roles=roles,
    )


def _build_stable(
    resource: MoEServing,
    names: Names,
    content: Revision,
    count: Count,
    roles: tuple[RoleWorkload, ...],
    claims: frozenset[str],
    defaults: Defaults,
) -> list[Object]:
    """The workload of the stable engines, or with fixed roles one for each; `claims` are those of one node alone."""
    if not roles:
        return [_build_engines(resource, names, STABLE, content, count, claims, defaults)]
    return [_build_engines(resource, names, STABLE, content, row.count, claims, defaults, row.role) for row in roles]


def _build_canary(
    resource: MoEServing, names: Names, replicas: int, wanted: Revision, observed: Observed, defaults: Defaults
) -> list[Object]:
    """The engines of the new revision: `replicas` in all, or with fixed roles of each role."""
    roles, kind = [*fixed_numbers(resource)] or [EngineRole.UNIFIED], _engines_kind(_nodes(resource))
    planned: list[Object] = []
    for role in roles:
        count = count_replicas((kind, names.of_role(role, CANARY)), replicas, observed.scaled)
        planned += build_group_budgets(resource, names, names.canary, count.replicas)
        planned.append(_build_engines(resource, names, CANARY, wanted, count, observed.one_node_claims, defaults, role))
    return planned


def plan_replicas(resource: MoEServing, observed: Observed) -> int:
    """Stable engines: the resource's number, or under autoscaling the present one within its bounds."""
    if numbers := role_numbers(resource, observed.role_replicas):
        return sum(numbers.values())
    replicas, autoscaling = resource.spec.engine.count, resource.spec.autoscaling
    if autoscaling is None:
        return replicas
    if autoscaling.mode is AutoscalingMode.INTERNAL and observed.replicas is not None:
        replicas = observed.replicas
    return min(autoscaling.max_replicas, max(autoscaling.min_replicas, replicas))


def plan_engine_count(resource: MoEServing, observed: Observed) -> Count:
    """The number of stable engines, and whether it is the resource's or another manager's."""
    planned, autoscaling = plan_replicas(resource, observed), resource.spec.autoscaling
    place = (_engines_kind(stable_nodes(resource, observed)), Names(resource.metadata.name).engine)
    if autoscaling is not None and autoscaling.mode is AutoscalingMode.INTERNAL:
        count = own_replicas(planned)
    else:
        count = count_replicas(place, planned, observed.scaled)
    if observed.scale_in is not None:
        present, goal = observed.scale_in
        kept = keep_for_now(count, present, observed.scaled.get(place))
        return replace(kept, annotations={**kept.annotations, SCALE_IN: str(goal)})
    if observed.first_replicas is None:
        return count
    # Another kind of workload still serves: the number grows with the engines that are ready.
    return replace(count, spec={"replicas": observed.first_replicas})


def _engines_kind(nodes: int) -> str:
    return "Deployment" if nodes == 1 else "LeaderWorkerSet"


def _check(resource: MoEServing) -> None:
    scheme, _, path = resource.spec.model.uri.partition("://")
    if scheme == "file" and not path.startswith("/"):
        message = f"an absolute folder in the container is needed in a cluster, got {resource.spec.model.uri!r}"
        raise InvalidInput([InputError("spec.model.uri", message)])
    claim = path.partition("/")[0]
    if scheme == "pvc" and not is_object_name(claim):
        message = "the name of a claim is needed, such as pvc://models/qwen3"
        raise InvalidInput([InputError("spec.model.uri", message + (f", got {claim!r:.80}" if claim else ""))])


def _stable_revision(resource: MoEServing, observed: Observed, wanted: Revision) -> Revision:
    """Under a canary the old revision stays; without one, or with all of the weight, the wanted one takes its place."""
    canary = resource.spec.engine.canary
    if canary is None or canary.weight == 100 or observed.stable is None:
        return wanted
    return observed.stable


def stable_nodes(resource: MoEServing, observed: Observed) -> int:
    """Nodes that a stable engine spans: under a canary those of the old revision."""
    return _nodes(at_revision(resource, _stable_revision(resource, observed, build_revision(resource))))


def _plan_groups(resource: MoEServing, names: Names, has_canary: bool) -> tuple[Group, ...]:
    canary = resource.spec.engine.canary
    if not has_canary or canary is None:
        return (Group(service=names.engine),)
    return (
        Group(service=names.engine, weight=100 - canary.weight),
        Group(service=names.canary, weight=canary.weight),
    )


def _build_control(names: Names, observed: Observed) -> Object:
    text = "".join(f"{token}\n" for token in observed.tokens)
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": names.control,
            **({"annotations": {ROTATED_AT: observed.rotated_at}} if observed.rotated_at else {}),
        },
        "type": "Opaque",
        "data": {"token": base64.b64encode(text.encode()).decode()},
    }


def _build_settings(resource: MoEServing, names: Names, stable: Revision, groups: tuple[Group, ...]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": names.settings},
        "data": {
            "request.json": pods.build_request_file(resource),
            "gateway.json": pods.build_gateway_file(resource, groups),
            "revision.json": stable.text,
        },
    }


def _build_cache(resource: MoEServing, names: Names) -> list[Object]:
    cache = resource.spec.model.cache
    if cache is None or cache.size is None:
        return []
    spec: Object = {
        "accessModes": [cache.access_mode.value],
        "resources": {"requests": {"storage": canonical_quantity(cache.size)}},
    }
    if cache.storage_class is not None:
        spec["storageClassName"] = cache.storage_class
    return [
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": names.cache}, "spec": spec},
    ]


def _build_engines(
    resource: MoEServing,
    names: Names,
    revision: str,
    content: Revision,
    count: Count,
    one_node_claims: frozenset[str],
    defaults: Defaults,
    role: EngineRole = EngineRole.UNIFIED,
) -> Object:
    name = names.of_role(role, revision)
    labels = names.labels("engine", revision, role)
    template = pods.build_engine_template(resource, names, defaults, revision, content.digest, role)
    keeps_one_node = resource.spec.model.keeps_one_node
    if _mounts_one_node_claim(resource, one_node_claims):
        template = template if keeps_one_node else on_one_node(template, names.labels("engine"))
        keeps_one_node = True
    metadata = {"name": name, "labels": labels, "annotations": dict(count.annotations)}
    # A new engine beside the old ones would have to find room on their one node.
    can_surge = resource.spec.engine.update is Update.SURGE and not keeps_one_node
    surge, away = (1, 0) if can_surge else (0, 1)
    steps = {"maxSurge": surge, "maxUnavailable": away}
    if _nodes(resource) == 1:
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                **count.spec,
                "selector": {"matchLabels": labels},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": steps},
                "progressDeadlineSeconds": plan_progress_deadline_s(resource, template),
                "template": template,
            },
        }
    return build_leader_worker_set(resource, metadata, template, count.spec, steps)


def _mounts_one_node_claim(resource: MoEServing, one_node_claims: frozenset[str]) -> bool:
    """Whether the engines mount a claim that one node alone can mount.

    Raises:
        InvalidInput: they do, and an engine spans several nodes.
    """
    mounted = find_one_node_claims(resource, one_node_claims)
    if mounted and _nodes(resource) > 1:
        message = f"one node alone can mount the claim {min(mounted)}; engines on several nodes need ReadWriteMany"
        raise InvalidInput([InputError("spec.engine.parallelism.nodes", message)])
    return bool(mounted)


def _nodes(resource: MoEServing) -> int:
    return resource.spec.engine.parallelism.nodes


def plan_progress_deadline_s(resource: MoEServing, template: Object) -> int:
    """Seconds after which an update of the engines counts as stuck: twice what a start may take.

    A pod template may give the start more time than the resource does, or none at all.
    """
    start_s = max(pods.planned_startup_s(resource), pods.startup_s(template, "engine"))
    return min(MOST_SECONDS, 2 * max(1, start_s))


def _build_gateway(resource: MoEServing, names: Names, observed: Observed, defaults: Defaults) -> Object:
    count = plan_gateway_count(resource, names, observed)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": names.gateway,
            "labels": names.labels("gateway"),
            "annotations": dict(count.annotations),
        },
        "spec": {
            **count.spec,
            "selector": {"matchLabels": names.labels("gateway")},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": pods.build_gateway_template(resource, names, defaults),
        },
    }


def _finish(entry: Object, resource: MoEServing, names: Names, namespace: str, observed: Observed) -> Object:
    entry = with_metadata(entry, resource)
    metadata = entry["metadata"]
    labels = {**metadata.get("labels", {}), **names.labels()}
    # A claim without an owner outlives its resource.
    is_owned = entry["kind"] != "PersistentVolumeClaim" or _ends_with_claim(resource)
    uid = observed.uid if is_owned else None
    owned = build_owners(entry, resource.metadata.name, namespace, uid, observed.namespace_uid)
    annotations = {**metadata.get("annotations", {}), **owned.pop("annotations", {})}
    noted = {"annotations": annotations} if annotations else {}
    return {**entry, "metadata": {**metadata, "namespace": namespace, "labels": labels, **noted, **owned}}


def _ends_with_claim(resource: MoEServing) -> bool:
    cache = resource.spec.model.cache
    return cache is not None and cache.when_deleted is WhenDeleted.DELETE


__all__ = ["CANARY", "STABLE", "ClusterPlan", "Defaults", "Observed", "plan_cluster", "plan_replicas", "stable_nodes"]
