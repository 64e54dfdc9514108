"""The pods of engines and gateways. Pure: from the resource and the operator's defaults to pod templates."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_contract.addresses import ANY
from moe_contract.agent_config import AgentConfig
from moe_contract.engine_process import (
    ADMIN_PORT,
    ADMIN_PORT_NAME,
    AGENT_PORT,
    AGENT_PORT_NAME,
    ENGINE_NOTICE_S,
    ENGINE_PORT,
    ENGINE_PORT_NAME,
    GATEWAY_NOTICE_S,
    HTTP_PORT,
    HTTP_PORT_NAME,
    KV_TRANSFER_PORT,
    engine_grace_s,
    gateway_grace_s,
)
from moe_contract.gateway_config import Discovery, GatewayConfig, Group
from moe_contract.input_errors import InputError, InvalidInput
from moe_contract.pod_identity import identity_variables
from moe_contract.routes import HEALTHZ, READYZ
from moe_contract.sections import Listen
from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api.engine import Runtime
from moe_operator.api.object_names import MOST_ANNOTATIONS, count_bytes
from moe_operator.api.pods import PodTemplate
from moe_operator.api.resource import MoEServing
from moe_operator.api.scheduling import engine_settings, expert_settings, request_settings
from moe_operator.api.units import canonical_quantity, duration_s, quantity_value
from moe_operator.plan import kv_offload
from moe_operator.plan.engine import Share, build_engine, kv_cache_bytes
from moe_operator.plan.gateway import (
    build_auth,
    build_continuation,
    build_cors,
    build_limits,
    build_tls,
    build_tracing,
    find_secrets,
)
from moe_operator.plan.inference_pool import build_picker, picker_ports
from moe_operator.plan.merge import merge_template
from moe_operator.plan.names import COMPONENT, CONFIG, REVISION, Names
from moe_operator.plan.one_node import on_one_node
from moe_operator.plan.own import SECRET_VOLUME, check_cache_path, check_gateway_token, find_clashes
from moe_operator.plan.pod_environment import (
    build_cache_variables,
    build_own_pod_variables,
    build_writable_mounts,
    build_writable_volumes,
    with_cluster_names,
)
from moe_operator.plan.pod_rules import find_broken_rules
from moe_operator.plan.role_override import at_role, role_template
from moe_operator.plan.roles import build_disaggregation, build_transfer
from moe_operator.plan.written_settings import as_json

CONFIG_DIR, CONTROL_DIR, SETTINGS_DIR = "/etc/moeserving", "/etc/moeserving-control", "/etc/moeserving-settings"
# The gateway's Secrets, each in a folder of its name.
SECRETS_DIR = "/etc/moeserving-secrets"
RUN_DIR = "/run/moeserving"
MODELS_DIR = "/var/lib/moeserving/models"

STARTUP_PERIOD_S = 5
# Of Kubernetes, for a probe that does not say.
PROBE_PERIOD_S, PROBE_FAILURES = 10, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What the operator was installed with.

    Attributes:
        engine_image: for the runtime `vllm`.
        engine_cpu_image: for the runtime `vllm-cpu`.
        gateway_image: of the gateway, which is the operator's own.
        pull_policy: of all of them; empty leaves it to Kubernetes.
        operator_namespace: where the operator runs; may reach the engines' agents. Empty: outside of the cluster.
    """

    engine_image: str = "moeserving/engine:0.1.0"
    engine_cpu_image: str = "moeserving/engine-cpu:0.1.0"
    gateway_image: str = "moeserving/gateway-operator:0.1.0"
    pull_policy: str = ""
    operator_namespace: str = "moeserving-system"


def build_engine_template(
    resource: MoEServing,
    names: Names,
    defaults: Defaults,
    revision: str,
    digest: str,
    role: EngineRole = EngineRole.UNIFIED,
) -> dict[str, Any]:
    """The template of one engine's pods; with several nodes leader and workers have the same."""
    own_template, own_path = role_template(resource, role)
    resource = at_role(resource, role)
    engine = resource.spec.engine
    labels = names.labels("engine", revision, role)
    _check_cache(resource)
    base = {
        "metadata": {
            "labels": labels,
            "annotations": {CONFIG: _dump(_agent_config(resource, role)), f"{REVISION}-digest": digest},
        },
        "spec": {
            "serviceAccountName": names.engine,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": engine_grace_s(duration_s(engine.drain_timeout)),
            "containers": [_engine_container(resource, defaults)],
            "volumes": _engine_volumes(resource, names),
        },
    }
    merged = _merged(base, engine.pod_template, "spec.engine.podTemplate", _fields_of_variables(resource))
    merged = _merged(merged, own_template, own_path, _fields_of_variables(resource))
    _check_size(merged, "spec.engine", "env, args and the annotations of podTemplate")
    return on_one_node(merged, names.labels("engine")) if resource.spec.model.keeps_one_node else merged


def planned_startup_s(resource: MoEServing) -> int:
    """Longest time (seconds) that the operator's own startup probe gives an engine."""
    return _startup_tries(resource) * STARTUP_PERIOD_S


def startup_s(template: Mapping[str, Any], container: str) -> int:
    """Longest time (seconds) that the startup probe of a container gives it; 0 without one."""
    found = next(row for row in template["spec"]["containers"] if row["name"] == container)
    probe = found.get("startupProbe")
    if probe is None:
        return 0
    period_s, failures = probe.get("periodSeconds", PROBE_PERIOD_S), probe.get("failureThreshold", PROBE_FAILURES)
    return int(probe.get("initialDelaySeconds", 0) + period_s * failures)


def build_agent_config(resource: MoEServing, role: EngineRole = EngineRole.UNIFIED) -> AgentConfig:
    """The agent's file: what only a start can change, and nothing of a pod or of what can change while it runs."""
    return _agent_config(at_role(resource, role), role)


def _agent_config(resource: MoEServing, role: EngineRole) -> AgentConfig:
    transfer = build_transfer(resource, role, KV_TRANSFER_PORT)
    engine = build_engine(resource, host=ANY, port=ENGINE_PORT, share=_share(resource), transfer=transfer)
    return AgentConfig(
        run_dir=Path(RUN_DIR),
        listen=Listen(host=ANY, port=AGENT_PORT),
        token_file=Path(CONTROL_DIR, "token"),
        settings_file=Path(SETTINGS_DIR, "request.json"),
        engine=engine.model_copy(update={"model": _model_argument(resource, engine.model)}),
    )


def _model_argument(resource: MoEServing, argument: str) -> str:
    uri = resource.spec.model.uri
    if not uri.startswith("pvc://"):
        return argument
    _, _, folder = uri.removeprefix("pvc://").partition("/")
    return f"{MODELS_DIR}/{folder}".rstrip("/")


def _share(resource: MoEServing) -> Share:
    engine = resource.spec.engine
    ranks = engine.parallelism.ranks // engine.parallelism.nodes
    if engine.runtime is Runtime.VLLM:
        return Share(kv_cache_bytes=kv_cache_bytes(resource, 0, ranks))
    cpu, memory = engine.resources.cpu, engine.resources.memory
    threads = None if cpu is None else max(1, int(quantity_value(cpu)) // ranks)
    if memory is None and engine.resources.kv_cache_memory is None:
        return Share(threads=threads)
    return Share(threads=threads, kv_cache_bytes=kv_cache_bytes(resource, int(quantity_value(memory or "0")), ranks))


def _engine_container(resource: MoEServing, defaults: Defaults) -> dict[str, Any]:
    engine = resource.spec.engine
    default = defaults.engine_image if engine.runtime is Runtime.VLLM else defaults.engine_cpu_image
    return _with_pull_policy(defaults) | {
        "name": "engine",
        "image": engine.image or default,
        "command": ["moeserving", "agent", "--config", f"{CONFIG_DIR}/agent.json"],
        "ports": [
            {"name": ENGINE_PORT_NAME, "containerPort": ENGINE_PORT, "protocol": "TCP"},
            {"name": AGENT_PORT_NAME, "containerPort": AGENT_PORT, "protocol": "TCP"},
        ],
        "env": _engine_env(resource),
        "resources": _engine_resources(resource),
        # The agent itself starts an engine anew that takes too long; the probe gives it the time for a second try.
        "startupProbe": _probe(READYZ, AGENT_PORT_NAME, STARTUP_PERIOD_S, _startup_tries(resource)),
        # Gateways learn of a drain from the agent at once; this probe must not take a busy node for a draining one.
        "readinessProbe": _probe(READYZ, AGENT_PORT_NAME, 1, 3, timeout_s=3),
        "livenessProbe": _probe(HEALTHZ, AGENT_PORT_NAME, 10, 6),
        "lifecycle": {"preStop": {"sleep": {"seconds": ENGINE_NOTICE_S}}},
        "securityContext": {"allowPrivilegeEscalation": False, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumeMounts": _engine_mounts(resource),
    }


def _startup_tries(resource: MoEServing) -> int:
    return math.ceil(2 * duration_s(resource.spec.engine.startup_timeout) / STARTUP_PERIOD_S) + 6


def _engine_env(resource: MoEServing) -> list[dict[str, Any]]:
    variables = [*build_own_pod_variables(), *build_cache_variables()]
    if (secret := resource.spec.model.token_secret) is not None:
        token = {"secretKeyRef": {"name": secret.name, "key": secret.key}}
        variables.append({"name": "HF_TOKEN", "valueFrom": token})
    return variables


def _engine_resources(resource: MoEServing) -> dict[str, Any]:
    engine = resource.spec.engine
    requests: dict[str, str] = {}
    limits: dict[str, str] = {}
    if engine.runtime is Runtime.VLLM:
        count = str(engine.parallelism.ranks // engine.parallelism.nodes)
        requests[engine.resources.gpu_resource] = limits[engine.resources.gpu_resource] = count
    if engine.resources.cpu is not None:
        requests["cpu"] = canonical_quantity(engine.resources.cpu)
    if engine.resources.memory is not None:
        requests["memory"] = limits["memory"] = canonical_quantity(engine.resources.memory)
    elif (tier := kv_offload.memory_request(resource)) is not None:
        requests["memory"] = tier
    return {name: part for name, part in (("requests", requests), ("limits", limits)) if part}


def _engine_volumes(resource: MoEServing, names: Names) -> list[dict[str, Any]]:
    model = resource.spec.model
    volumes = [
        *_control_volumes(names, "agent.json"),
        {"name": "run", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": kv_offload.shared_memory(resource)}},
        *build_writable_volumes(),
    ]
    if model.uri.startswith("pvc://"):
        claim = model.uri.removeprefix("pvc://").partition("/")[0]
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
    if model.cache is not None:
        kept = model.cache.claim or (names.cache if model.cache.size else None)
        source: dict[str, Any] = {"persistentVolumeClaim": {"claimName": kept}} if kept else {"emptyDir": {}}
        volumes.append({"name": "cache", **source})
    return volumes


def _engine_mounts(resource: MoEServing) -> list[dict[str, Any]]:
    model = resource.spec.model
    mounts = [
        *_control_mounts(),
        {"name": "run", "mountPath": RUN_DIR},
        {"name": "shm", "mountPath": "/dev/shm"},
        *build_writable_mounts(),
    ]
    if model.uri.startswith("pvc://"):
        mounts.append({"name": "models", "mountPath": MODELS_DIR, "readOnly": True})
    if model.cache is not None:
        mounts.append({"name": "cache", "mountPath": model.cache.path})
    return mounts


def build_gateway_template(resource: MoEServing, names: Names, defaults: Defaults) -> dict[str, Any]:
    """The template of the gateways' pods, fit for the Pod Security Standard `restricted`."""
    gateway = resource.spec.gateway
    container = _with_pull_policy(defaults) | {
        "name": "gateway",
        "image": gateway.image or defaults.gateway_image,
        "command": ["moeserving", "gateway", "--config", f"{CONFIG_DIR}/gateway.json"],
        "ports": [
            {"name": HTTP_PORT_NAME, "containerPort": HTTP_PORT, "protocol": "TCP"},
            {"name": ADMIN_PORT_NAME, "containerPort": ADMIN_PORT, "protocol": "TCP"},
            *picker_ports(resource),
        ],
        "env": identity_variables(),
        "startupProbe": _probe(HEALTHZ, ADMIN_PORT_NAME, 1, 120, timeout_s=3),
        "readinessProbe": _probe(READYZ, ADMIN_PORT_NAME, 1, 3, timeout_s=3),
        "livenessProbe": _probe(HEALTHZ, ADMIN_PORT_NAME, 10, 3),
        "lifecycle": {"preStop": {"sleep": {"seconds": GATEWAY_NOTICE_S}}},
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [*_control_mounts(), *_secret_mounts(resource), {"name": "tmp", "mountPath": "/tmp"}],
    }
    base = {
        "metadata": {
            "labels": names.labels("gateway"),
            "annotations": {CONFIG: _dump(build_gateway_config(resource, names))},
        },
        "spec": {
            "serviceAccountName": names.gateway,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": gateway_grace_s(duration_s(resource.spec.engine.drain_timeout)),
            "securityContext": {
                # Which user is the image's business, or the cluster's: OpenShift assigns one to each namespace.
                "runAsNonRoot": True,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [
                *_control_volumes(names, "gateway.json"),
                *_secret_volumes(resource),
                {"name": "tmp", "emptyDir": {}},
            ],
        },
    }
    return _checked_gateway(_merged(base, gateway.pod_template, "spec.gateway.podTemplate", {}))


def _checked_gateway(template: dict[str, Any]) -> dict[str, Any]:
    _check_size(template, "spec.gateway", "the annotations of podTemplate")
    if problems := [*check_gateway_token(template["spec"], "spec.gateway.podTemplate.spec")]:
        raise InvalidInput(problems)
    return template


def build_gateway_config(resource: MoEServing, names: Names) -> GatewayConfig:
    """The gateway's file; the policies and the groups of engines are in the settings."""
    return GatewayConfig(
        listen=Listen(host=ANY, port=HTTP_PORT),
        admin=Listen(host=ANY, port=ADMIN_PORT),
        token_file=Path(CONTROL_DIR, "token"),
        settings_file=Path(SETTINGS_DIR, "gateway.json"),
        model=resource.spec.model.served_name,
        discovery=Discovery(ranks=resource.spec.engine.parallelism.data, gateways=names.service),
        limits=build_limits(resource),
        cors=build_cors(resource),
        tracing=build_tracing(resource),
        continuation=build_continuation(resource),
        tenant_header=resource.spec.gateway.tenant_header,
        auth=build_auth(resource, _secret_folder),
        tls=build_tls(resource, _secret_folder),
        endpoint_picker=build_picker(resource),
        disaggregation=build_disaggregation(resource),
        ui=resource.spec.gateway.ui.enabled,
    )


def _secret_folder(name: str) -> Path:
    return Path(SECRETS_DIR, name)


def build_request_file(resource: MoEServing) -> str:
    """What agents lay over their file at the start."""
    return json.dumps(build_agent_settings(resource), sort_keys=True)


def build_agent_settings(resource: MoEServing) -> dict[str, Any]:
    """Settings for agents that run. Those of experts only where there is a group; others keep their defaults."""
    scheduling = resource.spec.scheduling
    settings = {"request": as_json(request_settings(scheduling.request, scheduling.engine))}
    if resource.spec.engine.parallelism.expert:
        settings["expert"] = as_json(expert_settings(scheduling.expert))
    return settings


def build_gateway_file(resource: MoEServing, groups: tuple[Group, ...]) -> str:
    """What gateways lay over their file at the start."""
    settings = {
        "dispatch": as_json(engine_settings(resource.spec.scheduling.engine)),
        "request": as_json(request_settings(resource.spec.scheduling.request, resource.spec.scheduling.engine)),
        "groups": [group.model_dump(mode="json") for group in groups],
    }
    return json.dumps(settings, sort_keys=True)


def _dump(config: AgentConfig | GatewayConfig) -> str:
    return json.dumps(config.model_dump(mode="json", exclude_defaults=True), sort_keys=True)


def _merged(base: dict[str, Any], patch: PodTemplate, path: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """The base with the patch laid over; `InvalidInput` where that removes a part that the operator needs."""
    if not patch:
        return base
    merged = merge_template(base, patch)
    clashes = [*find_clashes(base, patch, merged, path, fields)]
    clashes += find_broken_rules(patch.get("spec") or {}, merged.get("spec") or {}, f"{path}.spec")
    if clashes:
        raise InvalidInput(sorted(clashes))
    metadata = merged.setdefault("metadata", {})
    # Selectors, and the file that the container reads, are the operator's own.
    for part, own in (("labels", base["metadata"]["labels"]), ("annotations", base["metadata"]["annotations"])):
        metadata[part] = {**metadata.get(part, {}), **own}
    return merged | {"spec": with_cluster_names(merged["spec"])}


def _check_size(template: Mapping[str, Any], path: str, parts: str) -> None:
    """The settings of what a pod starts are an annotation of it, beside those of the user."""
    if (count := count_bytes(template["metadata"]["annotations"])) > MOST_ANNOTATIONS:
        message = f"{parts} take {count} bytes of the {MOST_ANNOTATIONS} that a pod's annotations can have"
        raise InvalidInput([InputError(path, message)])


def _check_cache(resource: MoEServing) -> None:
    cache = resource.spec.model.cache
    others = [row for row in _engine_mounts(resource) if row["name"] != "cache"]
    if cache is not None and (problems := [*check_cache_path(cache.path, others)]):
        raise InvalidInput(problems)


def _fields_of_variables(resource: MoEServing) -> dict[str, str]:
    """The field that sets each variable of an engine that a field sets."""
    model, resources = resource.spec.model, resource.spec.engine.resources
    fields = {
        "HF_TOKEN": (model.token_secret, "spec.model.tokenSecret"),
        "HF_HUB_CACHE": (model.cache, "spec.model.cache.path"),
        "OMP_NUM_THREADS": (resources.cpu, "spec.engine.resources.cpu"),
    }
    return {name: field for name, (value, field) in fields.items() if value is not None}


def _with_pull_policy(defaults: Defaults) -> dict[str, Any]:
    return {"imagePullPolicy": defaults.pull_policy} if defaults.pull_policy else {}


def _probe(path: str, port: str, period_s: int, failures: int, *, timeout_s: int = 5) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period_s,
        "failureThreshold": failures,
        "timeoutSeconds": timeout_s,
    }


def _control_volumes(names: Names, file: str) -> list[dict[str, Any]]:
    item = {"path": file, "fieldRef": {"fieldPath": f"metadata.annotations['{CONFIG}']"}}
    return [
        {"name": "config", "downwardAPI": {"items": [item]}},
        {"name": "control", "secret": {"secretName": names.control}},
        {"name": "settings", "configMap": {"name": names.settings}},
    ]


def _control_mounts() -> list[dict[str, Any]]:
    return [
        {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True},
        {"name": "control", "mountPath": CONTROL_DIR, "readOnly": True},
        {"name": "settings", "mountPath": SETTINGS_DIR, "readOnly": True},
    ]


def _secret_volumes(resource: MoEServing) -> list[dict[str, Any]]:
    # Names of Secrets may be longer than those of volumes.
    return [
        {"name": f"{SECRET_VOLUME}{index}", "secret": {"secretName": name}}
        for index, name in enumerate(find_secrets(resource))
    ]


def _secret_mounts(resource: MoEServing) -> list[dict[str, Any]]:
    return [
        {"name": f"{SECRET_VOLUME}{index}", "mountPath": str(_secret_folder(name)), "readOnly": True}
        for index, name in enumerate(find_secrets(resource))
    ]


__all__ = [
    "COMPONENT",
    "Defaults",
    "build_agent_config",
    "build_agent_settings",
    "build_engine_template",
    "build_gateway_config",
    "build_gateway_file",
    "build_gateway_template",
    "build_request_file",
]
