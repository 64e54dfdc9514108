"""Kinds of others, and their installation in a cluster for some tests.

They stand here as their documentation has them, what this product does not use left out: LeaderWorkerSet of
lws.sigs.k8s.io v0.10 (v0.7 says no `observedGeneration`), monitors of the Prometheus operator v0.85, InferencePool
of the Gateway API Inference Extension v1.0.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import yaml
from cluster_api import ApiCluster
from cluster_problem import ClusterProblem
from operator_process import eventually

Document = dict[str, Any]
ANY = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
COUNT = {"type": "integer", "format": "int32"}
EITHER = {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}


def an_object(**fields: Document) -> Document:
    return {"type": "object", "properties": fields}


def one_of(*values: str) -> Document:
    return {"type": "string", "enum": list(values)}


SETS = an_object(
    spec=an_object(
        replicas=COUNT | {"default": 1},
        startupPolicy=one_of("LeaderCreated", "LeaderReady") | {"default": "LeaderCreated"},
        rolloutStrategy=an_object(
            type=one_of("RollingUpdate") | {"default": "RollingUpdate"},
            rollingUpdateConfiguration=an_object(
                partition=COUNT | {"default": 0},
                maxUnavailable=EITHER | {"default": 1},
                maxSurge=EITHER | {"default": 0},
            ),
        ),
        leaderWorkerTemplate=an_object(
            size=COUNT | {"default": 1},
            restartPolicy=one_of("Default", "RecreateGroupOnPodRestart", "None") | {"default": "None"},
            leaderTemplate=ANY,
            workerTemplate=ANY,
        )
        | {"required": ["workerTemplate"]},
        networkConfig=an_object(subdomainPolicy=one_of("Shared", "UniquePerReplica")),
    )
    | {"required": ["leaderWorkerTemplate"]},
    status=an_object(
        conditions={"type": "array", "items": ANY},
        replicas=COUNT,
        readyReplicas=COUNT,
        updatedReplicas=COUNT,
        hpaPodSelector={"type": "string"},
        observedGeneration={"type": "integer", "format": "int64"},
    ),
)


def endpoints() -> Document:
    endpoint = an_object(port={"type": "string"}, path={"type": "string"}, interval={"type": "string"})
    return {"type": "array", "items": endpoint}


SELECTOR = an_object(matchLabels={"type": "object", "additionalProperties": {"type": "string"}})
MONITORS = {
    "ServiceMonitor": an_object(spec=an_object(selector=SELECTOR, endpoints=endpoints())),
    "PodMonitor": an_object(spec=an_object(selector=SELECTOR, podMetricsEndpoints=endpoints())),
}


def crd(group: str, kind: str, schema: Document, **more: Any) -> Document:
    plural = f"{kind.lower()}s"
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {"group": group, "scope": "Namespaced", "names": names, "versions": [version | more]},
    }


def port() -> Document:
    number = COUNT | {"minimum": 1, "maximum": 65535}
    return an_object(number=number) | {"required": ["number"]}


LABELS = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}}
POOL = an_object(
    spec=an_object(
        selector=an_object(matchLabels=LABELS) | {"required": ["matchLabels"]},
        targetPorts={"type": "array", "items": port(), "minItems": 1, "maxItems": 8},
        endpointPickerRef=an_object(
            group={"type": "string", "maxLength": 253, "default": ""},
            kind={"type": "string", "minLength": 1, "maxLength": 63, "default": "Service"},
            name={"type": "string", "minLength": 1, "maxLength": 253},
            port=port(),
            failureMode=one_of("FailOpen", "FailClose") | {"default": "FailClose"},
        )
        | {"required": ["name"]},
    )
    | {"required": ["endpointPickerRef", "selector", "targetPorts"]},
    status=an_object(parents={"type": "array", "items": ANY}),
) | {"required": ["spec"]}

SCALE = {
    "specReplicasPath": ".spec.replicas",
    "statusReplicasPath": ".status.replicas",
    "labelSelectorPath": ".status.hpaPodSelector",
}
LEADER_WORKER_SETS = crd(
    "leaderworkerset.x-k8s.io", "LeaderWorkerSet", SETS, subresources={"status": {}, "scale": SCALE}
)
INFERENCE_POOLS = crd("inference.networking.k8s.io", "InferencePool", POOL, subresources={"status": {}})
# Groups below k8s.io are Kubernetes' own, and the API server asks for the place of their approval.
INFERENCE_POOLS["metadata"]["annotations"] = {
    "api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/gateway-api-inference-extension"
}
PROMETHEUS = [crd("monitoring.coreos.com", kind, schema) for kind, schema in MONITORS.items()]


@contextlib.contextmanager
def installed(cluster: ApiCluster, *crds: Document) -> Iterator[None]:
    """These kinds, until the end of the block."""
    names = [f"crd/{row['metadata']['name']}" for row in crds]
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(crds))
    try:
        eventually(lambda: all(serves(cluster, row["spec"]["names"]["plural"]) for row in crds), "they are served")
        yield
    finally:
        cluster.kubectl("delete", *names)


def serves(cluster: ApiCluster, plural: str) -> bool:
    try:
        cluster.kubectl("get", plural, "-A")
    except ClusterProblem:
        return False
    return True
