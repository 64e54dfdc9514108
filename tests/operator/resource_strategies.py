"""Hypothesis strategies of MoEServing documents: valid ones over all fields, and mutations of them.

Used by the tests of the pure parts and by those against a real API server.
"""

from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

LETTERS, ALNUM = "abcdefghijklmnopqrstuvwxyz", "abcdefghijklmnopqrstuvwxyz0123456789"
Document = dict[str, Any]

names = st.builds(
    lambda first, middle, last: f"{first}{middle}{last}"[:63].rstrip("-"),
    st.sampled_from(LETTERS),
    st.text(ALNUM + "-", max_size=61),
    st.sampled_from(["", "z", "9"]),
)
object_names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
images = st.sampled_from(["registry.test/engine:1", "moeserving/engine-cpu@sha256:" + "0" * 64, "localhost:5000/a"])
durations = st.sampled_from(["1s", "90s", "1m30s", "1500ms", "24h", "0.5h"])
short_durations = st.sampled_from(["1s", "2500ms", "1m"])
flags = st.booleans()
# The API server reads what is applied as YAML, which has no control characters.
texts = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=12)


def section(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Document]:
    """Any part of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


template_metadata = section(
    labels=st.dictionaries(object_names, object_names, max_size=2),
    annotations=st.dictionaries(st.sampled_from(["team.test/owner", "note"]), texts, max_size=2),
)
volumes = st.lists(
    st.sampled_from(
        [
            {"name": "scratch", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1536Mi"}},
            {"name": "licence", "secret": {"secretName": "licence", "optional": True}},
        ]
    ),
    unique_by=lambda volume: volume["name"],
    max_size=2,
)


def containers(own: str) -> st.SearchStrategy[list[Document]]:
    """Changes of the operator's own container, and a side car."""
    shm = st.just([{"mountPath": "/dev/shm", "name": "shm", "readOnly": False}])
    changed = st.fixed_dictionaries(
        {"name": st.just(own)},
        optional={
            "resources": st.sampled_from(
                [
                    {"requests": {"cpu": "1500m", "ephemeral-storage": "0.5Gi"}},
                    {"limits": {"cpu": "1k", "ephemeral-storage": "1e3"}},
                    {"requests": {"cpu": 1}},
                ]
            ),
            "env": st.lists(
                st.sampled_from([{"name": "A", "value": "1"}, {"name": "B", "value": ""}]),
                unique_by=lambda entry: entry["name"],
            ),
            "securityContext": st.sampled_from([{"runAsUser": 1000}, {"capabilities": {"add": ["IPC_LOCK"]}}]),
            "imagePullPolicy": st.sampled_from(["Always", "Never", "IfNotPresent"]),
            "livenessProbe": st.just({"periodSeconds": 30}),
            "ports": st.just([{"containerPort": 9000}]),
            **({"volumeMounts": shm} if own == "engine" else {}),
        },
    )
    sidecar = st.sampled_from(
        [
            {"name": "log", "image": "log:1", "ports": [{"containerPort": 9100, "name": "logs"}]},
            {"name": "mesh", "image": "mesh:1", "args": ["--x"], "resources": {"limits": {"cpu": "0.1"}}},
        ]
    )
    return st.lists(st.one_of(changed, sidecar), unique_by=lambda entry: entry["name"], max_size=2)


def pod_templates(own: str) -> st.SearchStrategy[Document]:
    spec = section(
        nodeSelector=st.dictionaries(object_names, object_names, max_size=2),
        tolerations=st.lists(
            st.sampled_from(
                [
                    {"key": "nvidia.com/gpu", "operator": "Exists"},
                    {"key": "a", "value": "b", "effect": "NoSchedule"},
                    {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60},
                ]
            ),
            max_size=2,
        ),
        priorityClassName=object_names,
        runtimeClassName=object_names,
        terminationGracePeriodSeconds=st.integers(10, 900),
        hostNetwork=st.just(False),
        schedulerName=object_names,
        imagePullSecrets=st.lists(st.builds(lambda name: {"name": name}, object_names), max_size=2, unique_by=str),
        hostAliases=st.just([{"ip": "10.0.0.9", "hostnames": ["hub.test"]}]),
        topologySpreadConstraints=st.just(
            [
                {
                    "maxSkew": 1,
                    "topologyKey": "kubernetes.io/hostname",
                    "whenUnsatisfiable": "ScheduleAnyway",
                    "labelSelector": {"matchLabels": {"a": "b"}},
                }
            ]
        ),
        securityContext=st.sampled_from([{"fsGroup": 7}, {"supplementalGroups": [1, 2]}]),
        volumes=volumes,
        containers=containers(own),
    )
    return section(metadata=template_metadata, spec=spec)


@st.composite
def models(draw: st.DrawFn) -> Document:
    scheme = draw(
        st.sampled_from(["hf://org/model", "file:///models/a", "pvc://claim/folder", "pvc://claim", "s3://b/a"])
    )
    model: Document = {"uri": scheme}
    model |= draw(section(name=st.sampled_from(["served", "Org/Model-1.0:q"])))
    if scheme.startswith("hf"):
        cache = st.one_of(
            st.builds(lambda path: {"path": path}, st.just("/cache")),
            st.fixed_dictionaries(
                {"path": st.just("/var/cache"), "size": st.sampled_from(["200Gi", "1.5Ti", "1000M", "0.5Gi"])},
                optional={
                    "storageClass": object_names,
                    "accessMode": st.sampled_from(["ReadWriteMany", "ReadWriteOnce"]),
                    "whenDeleted": st.sampled_from(["Retain", "Delete"]),
                },
            ),
            st.builds(lambda claim: {"path": "/cache", "claim": claim}, object_names),
        )
        secret = st.fixed_dictionaries({"name": object_names}, optional={"key": st.sampled_from(["token", "HF.key_1"])})
        model |= draw(section(revision=st.sampled_from(["main", "v1.0"]), tokenSecret=secret, cache=cache))
    return model


shapes = st.sampled_from(
    [
        {},
        {"tensor": 2},
        {"data": 4},
        {"tensor": 2, "data": 2, "expert": True},
        {"data": 16, "nodes": 2, "expert": True},
        {"tensor": 8, "nodes": 4},
    ]
)


@st.composite
def engines(draw: st.DrawFn, *, max_nodes: int = 64) -> Document:
    cpu_only = draw(flags)
    shape = draw(shapes.filter(lambda shape: shape.get("nodes", 1) <= max_nodes))
    resources = section(
        memory=st.sampled_from(["64Gi", "1.5Gi", "4000M", 17179869184]),
        sharedMemory=st.sampled_from(["64Mi", "0.5Gi", "16G"]),
        kvCacheMemory=st.sampled_from(["1Mi", "4Gi", "1.25G"]),
        **({"cpu": st.sampled_from([2, "500m", "2500m", "1.5"])} if cpu_only else {}),
        gpuResource=st.sampled_from(["nvidia.com/gpu", "amd.com/gpu"]),
    )
    engine = draw(
        section(
            image=images,
            replicas=st.integers(0, 256),
            resources=resources,
            args=st.lists(st.sampled_from(["--max-model-len=4096", "--seed", "1", "--é"]), max_size=3),
            env=st.dictionaries(st.sampled_from(["A", "_b", "NCCL_DEBUG"]), texts, max_size=2),
            startupTimeout=durations,
            livenessTimeout=durations,
            drainTimeout=st.sampled_from(["1s", "90s", "1500ms", "24h"]),
            update=st.sampled_from(["surge", "inPlace"]),
            canary=st.fixed_dictionaries({"weight": st.integers(0, 100)}, optional={"replicas": st.integers(1, 4)}),
            podTemplate=pod_templates("engine"),
        )
    )
    if cpu_only:
        engine["runtime"] = "vllm-cpu"
    elif shape.get("data", 1) % shape.get("nodes", 1) == 0:
        engine |= draw(section(kvOffload=st.builds(lambda cpu: {"cpu": cpu}, st.sampled_from(["64Mi", "1G", 2**30]))))
    if shape:
        engine["parallelism"] = shape
    return engine


policies = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["pods", "percent"]),
            "value": st.integers(1, 10_000),
            "period": st.sampled_from(["1s", "15s", "30m"]),
        }
    ),
    max_size=3,
)
scaling = section(
    stabilizationWindow=st.sampled_from(["0s", "5m", "1h"]),
    policies=policies,
    selectPolicy=st.sampled_from(["max", "min", "disabled"]),
)
autoscaling = st.builds(
    lambda low, more, rest: {"minReplicas": low, "maxReplicas": min(256, max(1, low + more)), **rest},
    st.integers(0, 256),
    st.integers(0, 10),
    section(
        mode=st.sampled_from(["internal", "external"]),
        targets=section(
            queueWait=short_durations,
            kvUsage=st.floats(0.01, 1.0),
            ttft=short_durations,
            tokensPerSecond=st.floats(0.001, 1e9) | st.integers(1, 10**9),
        ),
        scaleUp=scaling,
        scaleDown=scaling,
        idleAfter=durations,
        interval=st.sampled_from(["500ms", "5s", "10m"]),
    ),
)
scheduling = section(
    request=section(
        policy=st.sampled_from(["sjf", "fcfs", "priority"]),
        ageingRate=st.floats(1e-3, 1e9) | st.integers(1, 10**9),
        ageingHorizon=st.sampled_from(["0s", "30s", "24h"]),
        priorityStep=st.sampled_from(["0s", "2s", "24h"]),
        fairnessHorizon=st.sampled_from(["0s", "10s", "24h"]),
    ),
    engine=section(
        policy=st.sampled_from(["predicted", "leastRequests", "roundRobin"]),
        stickiness=st.sampled_from(["0s", "100ms"]),
        staleAfter=st.sampled_from(["1ms", "2s"]),
        saturation=st.sampled_from(["1ms", "10s"]),
        targets=section(ttft=st.sampled_from(["1ms", "2s"]), interToken=st.sampled_from(["1ms", "24h"])),
    ),
    expert=section(
        mode=st.sampled_from(["off", "observe", "dryRun", "active"]),
        interval=st.integers(1, 10**9),
        window=st.integers(1, 10**9),
        moveBudget=st.integers(0, 10**9),
        maxStall=st.sampled_from(["1ms", "50ms", "1m"]),
        hysteresis=st.floats(0, 1000) | st.integers(0, 1000),
    ),
)
label_keys = st.sampled_from(["team", "team.test/owner", "kueue.x-k8s.io/queue-name", "app.kubernetes.io/part-of"])
labels = st.dictionaries(label_keys, st.sampled_from(["", "a", "A-1_b.c"]), max_size=2)
annotations = st.dictionaries(st.sampled_from(["team.test/owner", "note"]), texts, max_size=2)
services = st.one_of(
    section(
        type=st.sampled_from(["ClusterIP", "NodePort"]),
        port=st.integers(1, 65535),
        ipFamilyPolicy=st.sampled_from(["SingleStack", "PreferDualStack"]),
        labels=labels,
        annotations=annotations,
    ),
    st.fixed_dictionaries(
        {"type": st.just("LoadBalancer")},
        optional={
            "loadBalancerClass": st.sampled_from(["internal", "service.k8s.aws/nlb"]),
            "annotations": annotations,
        },
    ),
)
selectors = st.sampled_from(
    [{}, {"matchLabels": {"a": "b"}}, {"matchExpressions": [{"key": "a", "operator": "In", "values": ["b", "c"]}]}]
)
peers = st.lists(
    st.one_of(
        st.fixed_dictionaries({"podSelector": selectors}, optional={"namespaceSelector": selectors}),
        st.fixed_dictionaries({"namespaceSelector": selectors}),
        st.sampled_from(
            [
                {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}},
                {"ipBlock": {"cidr": "fd00::/8"}},
            ]
        ),
    ),
    max_size=2,
)
network_policies = section(enabled=flags, allowFrom=peers, metricsFrom=peers, meshPort=st.just(15008))
gateways = section(
    port=st.integers(1, 65535),
    replicas=st.integers(1, 64),
    image=images,
    service=services,
    podTemplate=pod_templates("gateway"),
    tenantHeader=st.sampled_from(["", "x-tenant"]),
    inferencePool=section(
        failureMode=st.sampled_from(["FailClose", "FailOpen"]), tls=flags, fallbacks=st.integers(0, 8)
    ),
    limits=section(
        maxBody=st.sampled_from(["1Ki", "1Gi", "1M"]),
        headerTimeout=st.sampled_from(["100ms", "10s"]),
        bodyTimeout=durations,
        connectTimeout=st.sampled_from(["10ms", "2s"]),
        idleTimeout=durations,
    ),
    hold=section(requests=st.integers(0, 1_000_000), timeout=durations),
)


role_overrides = section(
    resources=section(memory=st.just("8Gi"), kvCacheMemory=st.just("1Gi"), gpuResource=st.just("test/gpu")),
    args=st.sampled_from([["--max-num-seqs=8"], []]),
    env=st.sampled_from([{"ROLE": "own"}, {}]),
    podTemplate=st.sampled_from([{"spec": {"priorityClassName": "high"}}, {}]),
)
role_sections = st.none() | st.one_of(
    st.builds(lambda mode: {"mode": mode}, st.sampled_from(["unified", "auto"])),
    st.builds(
        lambda prefill, decode: {"mode": "fixed", "prefill": prefill, "decode": decode},
        st.integers(1, 9),
        st.integers(1, 9),
    ),
    st.builds(
        lambda prefill, decode: {
            "mode": "fixed",
            "prefill": 1,
            "decode": 2,
            "overrides": {"prefill": prefill, "decode": decode},
        },
        role_overrides,
        role_overrides,
    ),
)


def _with_roles(spec: Document, roles: Document | None) -> None:
    """Puts roles into a specification, and takes away what cannot stand beside them."""
    engine = spec.get("engine", {})
    if roles is None or engine.get("parallelism", {}).get("nodes", 1) > 1:
        return
    spec["engine"] = engine | {"roles": roles}
    if roles["mode"] == "fixed":
        spec.pop("autoscaling", None)
        spec["engine"].pop("replicas", None)


@st.composite
def documents(draw: st.DrawFn, *, max_nodes: int = 64) -> Document:
    """Strategy of valid resource documents."""
    spec = {"model": draw(models())} | draw(
        section(
            engine=engines(max_nodes=max_nodes),
            scheduling=scheduling,
            gateway=gateways,
            autoscaling=autoscaling,
            metrics=section(
                serviceMonitor=flags,
                prometheus=st.just({"url": "http://127.0.0.1:1"}),
                labels=labels,
                annotations=annotations,
            ),
            networkPolicy=network_policies,
            commonMetadata=section(labels=labels, annotations=annotations),
            disruption=section(maxUnavailable=st.sampled_from(["0", "1", "25%", "100%", "999", 1])),
            paused=st.just(False),
        )
    )
    if spec.get("engine", {}).get("parallelism", {}).get("nodes", 1) > 1:
        spec["model"].get("cache", {}).pop("accessMode", None)
    if spec.get("engine", {}).get("parallelism", {}).get("expert") and draw(flags):
        spec.setdefault("scheduling", {}).setdefault("expert", {})["redundantExperts"] = draw(st.integers(0, 4096))
    _with_roles(spec, draw(role_sections))
    metadata = {"name": draw(names)} | draw(
        section(
            labels=st.dictionaries(object_names, object_names, max_size=2),
            annotations=st.dictionaries(st.sampled_from(["a.test/b", "note"]), texts, max_size=2),
        )
    )
    return {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": metadata, "spec": spec}


JUNK = [
    None,
    True,
    -1,
    0,
    1.5,
    10**12,
    "",
    " ",
    "x",
    "-5m",
    "10",
    "1d",
    "4 Gi",
    "1e400",
    "\n",
    [],
    ["x", 3],
    {},
    {"x": 1},
]


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything below a value."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place] * bool(place) + [found for key, child in below for found in places(child, (*place, key))]


@st.composite
def mutated(draw: st.DrawFn) -> Document:
    """A valid resource with one to three places of its `spec` made otherwise; it may be valid still."""
    document = deepcopy(draw(documents()))
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(places({"spec": document["spec"]})))
        parent = document
        for name in parents:
            parent = parent[name]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                parent[last] = deepcopy(draw(st.sampled_from(JUNK)))
            case "remove":
                del parent[last]
            case "add" if isinstance(parent, dict):
                parent["unknownField"] = deepcopy(draw(st.sampled_from(JUNK)))
        document.setdefault("spec", {})
        if not isinstance(document["spec"], dict) or not places({"spec": document["spec"]}):
            break
    return document
