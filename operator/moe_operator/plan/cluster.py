"""The plan for a cluster: the objects that should exist for a resource, and what reaches running pods. Pure.

Called by the operator at each reconciliation and by `moeserving plan`. The objects stand in an order in which they can
be applied. What other controllers own is not in them: fields that they set, pods, EndpointSlices.

Invariant: equal arguments give equal plans.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_contract.gateway_config import Group
from moe_contract.input_errors import InputError, InvalidInput

from moe_operator.api.autoscaling import AutoscalingMode
from moe_operator.api.pods import Update
from moe_operator.api.resource import MoEServing
from moe_operator.api.scheduling import engine_settings, request_settings
from moe_operator.api.units import canonical_quantity
from moe_operator.plan import pods
from moe_operator.plan.access import build_access
from moe_operator.plan.gateway_scale import build_gateway_scaler, plan_gateway_count
from moe_operator.plan.names import ROTATED_AT, Names
from moe_operator.plan.network import build_policies, build_services
from moe_operator.plan.owners import build_owners
from moe_operator.plan.pods import Defaults
from moe_operator.plan.replicas import Count, Place, Scaled, count_replicas, own_replicas
from moe_operator.plan.revision import Revision, at_revision, build_revision

Object = dict[str, Any]
STABLE, CANARY = "stable", "canary"


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
        scaled: workloads, by kind and name, whose number of replicas another manager (an autoscaler) set last.
        gateways: wanted number of gateways, as the live object has it; None without one.
        has_service_monitors: the cluster knows ServiceMonitors.
    """

    uid: str | None = None
    namespace_uid: str | None = None
    tokens: tuple[str, ...]
    rotated_at: str = ""
    stable: Revision | None = None
    replicas: int | None = None
    scaled: Mapping[Place, Scaled] = field(default_factory=dict)
    gateways: int | None = None
    has_service_monitors: bool = False


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
        engines: name of each workload of engines by revision.
    """

    objects: tuple[Object, ...]
    replicas: int
    groups: tuple[Group, ...]
    agent: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    dispatch: Mapping[str, Any] = field(default_factory=dict)
    engines: Mapping[str, str] = field(default_factory=dict)


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
    has_canary = stable.digest != wanted.digest
    groups = _plan_groups(resource, names, has_canary)
    request = pods.as_json(request_settings(resource.spec.scheduling.request))
    dispatch = pods.as_json(engine_settings(resource.spec.scheduling.engine))
    engines = {STABLE: names.engine} | ({CANARY: names.canary} if has_canary else {})
    objects: list[Object] = [
        _build_control(names, observed),
        _build_settings(resource, names, stable, groups),
        *build_access(names),
        *_build_cache(resource, names),
        *build_services(resource, names, engines),
        *build_policies(resource, names, engines, defaults, has_service_monitors=observed.has_service_monitors),
        _build_engines(at_revision(resource, stable), names, STABLE, stable, count, defaults),
    ]
    canary = resource.spec.engine.canary
    if has_canary and canary is not None:
        place = (_engines_kind(resource), names.canary)
        beside = count_replicas(place, canary.replicas, observed.scaled)
        objects.append(_build_engines(resource, names, CANARY, wanted, beside, defaults))
    objects.append(_build_gateway(resource, names, observed, defaults))
    objects += build_gateway_scaler(resource, names)
    return ClusterPlan(
        objects=tuple(_finish(entry, resource, names, namespace, observed) for entry in objects),
        replicas=count.replicas,
        groups=groups,
        agent=pods.build_agent_settings(resource),
        request=request,
        dispatch=dispatch,
        engines=engines,
    )


def plan_replicas(resource: MoEServing, observed: Observed) -> int:
    """Stable engines: the resource's number, or under autoscaling the present one within its bounds."""
    replicas, autoscaling = resource.spec.engine.replicas, resource.spec.autoscaling
    if autoscaling is None:
        return replicas
    if autoscaling.mode is AutoscalingMode.INTERNAL and observed.replicas is not None:
        replicas = observed.replicas
    return min(autoscaling.max_replicas, max(autoscaling.min_replicas, replicas))


def plan_engine_count(resource: MoEServing, observed: Observed) -> Count:
    """The number of stable engines, and whether it is the resource's or another manager's."""
    planned, autoscaling = plan_replicas(resource, observed), resource.spec.autoscaling
    if autoscaling is not None and autoscaling.mode is AutoscalingMode.INTERNAL:
        return own_replicas(planned)
    place = (_engines_kind(resource), Names(resource.metadata.name).engine)
    return count_replicas(place, planned, observed.scaled)


def _engines_kind(resource: MoEServing) -> str:
    return "Deployment" if resource.spec.engine.parallelism.nodes == 1 else "LeaderWorkerSet"


def _check(resource: MoEServing) -> None:
    scheme, _, path = resource.spec.model.uri.partition("://")
    if scheme == "file" and not path.startswith("/"):
        message = f"an absolute folder in the container is needed in a cluster, got {resource.spec.model.uri!r}"
        raise InvalidInput([InputError("spec.model.uri", message)])
    if scheme == "pvc" and not path.partition("/")[0]:
        raise InvalidInput([InputError("spec.model.uri", "the name of a claim is needed, such as pvc://models/qwen3")])


def _stable_revision(resource: MoEServing, observed: Observed, wanted: Revision) -> Revision:
    """Under a canary the old revision stays; without one, or with all of the weight, the wanted one takes its place."""
    canary = resource.spec.engine.canary
    if canary is None or canary.weight == 100 or observed.stable is None:
        return wanted
    return observed.stable


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
    defaults: Defaults,
) -> Object:
    name = names.engine if revision == STABLE else names.canary
    template = pods.build_engine_template(resource, names, defaults, revision, content.digest)
    labels = names.labels("engine", revision)
    metadata = {"name": name, "labels": labels, "annotations": dict(count.annotations)}
    surge, away = (1, 0) if resource.spec.engine.update is Update.SURGE else (0, 1)
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": away}}
    nodes = resource.spec.engine.parallelism.nodes
    if nodes == 1:
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                **count.spec,
                "selector": {"matchLabels": names.labels("engine", revision)},
                "strategy": rolling,
                "progressDeadlineSeconds": 2
                * template["spec"]["containers"][0]["startupProbe"]["failureThreshold"]
                * 5,
                "template": template,
            },
        }
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": metadata,
        "spec": {
            **count.spec,
            "startupPolicy": "LeaderCreated",
            "rolloutStrategy": {"type": "RollingUpdate", "rollingUpdateConfiguration": rolling["rollingUpdate"]},
            "leaderWorkerTemplate": {
                "size": nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": template,
                "workerTemplate": template,
            },
        },
    }


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
    metadata = entry["metadata"]
    labels = {**names.labels(), **metadata.get("labels", {})}
    owned = build_owners(entry, resource.metadata.name, namespace, observed.uid, observed.namespace_uid)
    annotations = {**metadata.get("annotations", {}), **owned.pop("annotations", {})}
    noted = {"annotations": annotations} if annotations else {}
    return {**entry, "metadata": {**metadata, "namespace": namespace, "labels": labels, **noted, **owned}}


__all__ = ["CANARY", "STABLE", "ClusterPlan", "Defaults", "Observed", "plan_cluster", "plan_replicas"]
