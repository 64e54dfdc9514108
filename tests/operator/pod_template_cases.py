"""Pod templates whose types are right and which the API server refuses, or takes, as a whole pod.

The cases are judged by `moeserving validate` (test_pod_rules.py) and by a real API server (test_pod_types.py).
"""

from typing import Any

Document = dict[str, Any]


def engine(**fields: Any) -> Document:
    """A change of the operator's own container."""
    return {"spec": {"containers": [{"name": "engine", **fields}]}}


def side(kind: str = "containers", **fields: Any) -> Document:
    """A container of the user's own."""
    return {"spec": {kind: [{"name": "side", "image": "side:1", **fields}]}}


def volume(**source: Any) -> Document:
    """A volume of the user's own."""
    return {"spec": {"volumes": [{"name": "mine", **source}]}}


def env(**value: Any) -> Document:
    return engine(env=[{"name": "A", **value}])


def toleration(**fields: Any) -> Document:
    return {"spec": {"tolerations": [fields]}}


def node_term(**requirement: Any) -> Document:
    terms = [{"matchExpressions": [requirement]}]
    return {
        "spec": {
            "affinity": {
                "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
            }
        }
    }


def spread(**fields: Any) -> Document:
    usual = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
    chosen = {name: value for name, value in (usual | fields).items() if value is not None}
    return {"spec": {"topologySpreadConstraints": [chosen]}}


def resources(**parts: Any) -> Document:
    return engine(resources=parts)


SLEEP = {"lifecycle": {"preStop": {"sleep": {"seconds": 60}}}}
AT_ITS_END = {"preStop": {"$patch": "replace", "exec": {"command": ["a"]}}}
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"

# Each with the beginning of what is said, below `spec.engine.podTemplate.spec`.
REFUSED: list[tuple[Document, str]] = [
    # Needed fields.
    (volume(persistentVolumeClaim={}), "volumes[0].persistentVolumeClaim: claimName is needed"),
    (volume(hostPath={"type": "Directory"}), "volumes[0].hostPath: path is needed"),
    (volume(nfs={"server": "a"}), "volumes[0].nfs: path is needed"),
    (volume(secret={}), "volumes[0].secret: secretName is needed"),
    (volume(configMap={"items": [{"key": "a"}], "name": "a"}), "volumes[0].configMap.items[0]: path is needed"),
    (env(valueFrom={"secretKeyRef": {"name": "a"}}), "containers[0].env[0].valueFrom.secretKeyRef: key is needed"),
    (engine(envFrom=[{"secretRef": {}}]), "containers[0].envFrom[0].secretRef: name is needed"),
    (side(livenessProbe={"exec": {}}), "containers[0].livenessProbe.exec: command is needed"),
    (side(readinessProbe={"httpGet": {"path": "/"}}), "containers[0].readinessProbe.httpGet: port is needed"),
    (spread(topologyKey=None), "topologySpreadConstraints[0]: topologyKey is needed"),
    (spread(whenUnsatisfiable=""), "topologySpreadConstraints[0]: whenUnsatisfiable is needed"),
    (
        {"spec": {"affinity": {"podAffinity": {PREFERRED: [{"weight": 1, "podAffinityTerm": {}}]}}}},
        f"affinity.podAffinity.{PREFERRED}[0].podAffinityTerm: topologyKey is needed",
    ),
    # Closed sets.
    (engine(imagePullPolicy="always"), "containers[0].imagePullPolicy: unknown 'always'; known: Always, IfNotPresent"),
    (toleration(operator="Exist"), "tolerations[0].operator: unknown 'Exist'; known: Equal, Exists, Gt, Lt"),
    (toleration(key="a", effect="NoSched"), "tolerations[0].effect: unknown 'NoSched'; known: NoExecute, NoSchedule"),
    ({"spec": {"dnsPolicy": "clusterFirst"}}, "dnsPolicy: unknown 'clusterFirst'; known: ClusterFirst, "),
    (volume(hostPath={"path": "/a", "type": "Dir"}), "volumes[0].hostPath.type: unknown 'Dir'; known: BlockDevice, "),
    (node_term(key="a", operator="in", values=["b"]), "affinity.nodeAffinity."),
    # Ranges and forms.
    (
        side(ports=[{"containerPort": 70000}]),
        "containers[0].ports[0].containerPort: a number from 1 to 65535 is needed",
    ),
    (engine(startupProbe={"periodSeconds": -5}), "containers[0].startupProbe.periodSeconds: a number of 0 or more is"),
    (spread(maxSkew=0), "topologySpreadConstraints[0].maxSkew: a number of 1 or more is needed, got 0"),
    (
        {"spec": {"affinity": {"nodeAffinity": {PREFERRED: [{"weight": 0, "preference": {}}]}}}},
        f"affinity.nodeAffinity.{PREFERRED}[0].weight: a number from 1 to 100 is needed, got 0",
    ),
    (
        {"spec": {"securityContext": {"fsGroup": -1}}},
        "securityContext.fsGroup: a number from 0 to 2147483647 is needed",
    ),
    (
        volume(secret={"secretName": "a", "defaultMode": 777}),
        "volumes[0].secret.defaultMode: a number from 0 to 511 is",
    ),
    (
        side(ports=[{"containerPort": 1, "name": "metrics_port"}]),
        "containers[0].ports[0].name: at most 15 small letters",
    ),
    (
        {"spec": {"containers": [{"name": "My_side", "image": "a"}]}},
        "containers[0].name: at most 63 small letters, dig",
    ),
    ({"spec": {"volumes": [{"name": "a.b", "emptyDir": {}}]}}, "volumes[0].name: at most 63 small letters, digits and"),
    ({"spec": {"priorityClassName": "High"}}, "priorityClassName: the name of an object is needed, got 'High'"),
    ({"spec": {"hostAliases": [{"ip": "hub"}]}}, "hostAliases[0].ip: an IP address is needed, got 'hub'"),
    ({"spec": {"hostAliases": [{"ip": "1.2.3"}]}}, "hostAliases[0].ip: an IP address is needed, got '1.2.3'"),
    ({"spec": {"terminationGracePeriodSeconds": -1}}, "terminationGracePeriodSeconds: -1 is shorter than the pause"),
    # Fields that exclude each other, or need each other.
    (volume(emptyDir={}, hostPath={"path": "/a"}), "volumes[0]: emptyDir and hostPath exclude each other"),
    (
        env(value="a", valueFrom={"fieldRef": {"fieldPath": "metadata.name"}}),
        "containers[0].env[0]: value and valueFrom exclude each other",
    ),
    (
        env(valueFrom={}),
        "containers[0].env[0].valueFrom: one of configMapKeyRef, fieldRef, fileKeyRef, resourceFieldRef",
    ),
    (
        side(volumeMounts=[{"name": "tmp", "mountPath": "/a", "subPath": "a", "subPathExpr": "b"}]),
        "containers[0].volumeMounts[0]: subPath and subPathExpr exclude each other",
    ),
    (
        side(livenessProbe={"exec": {"command": ["a"]}, "tcpSocket": {"port": 1}}),
        "containers[0].livenessProbe: one of exec, grpc, httpGet, tcpSocket is needed, got exec and tcpSocket",
    ),
    (toleration(effect="NoSchedule"), "tolerations[0].operator: without a key Exists is needed"),
    (toleration(key="a", operator="Exists", value="b"), "tolerations[0].value: goes with the operator Equal alone"),
    (
        toleration(key="a", operator="Exists", effect="NoSchedule", tolerationSeconds=1),
        "tolerations[0].tolerationSeconds: goes with the effect NoExecute alone",
    ),
    (
        toleration(key="a", operator="Exists", tolerationSeconds=1),
        "tolerations[0].effect: NoExecute is needed beside tolerationSeconds",
    ),
    (
        node_term(key="a", operator="In"),
        "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0]"
        ".values: a value is needed for In",
    ),
    (node_term(key="a", operator="Exists", values=["b"]), "affinity.nodeAffinity."),
    (node_term(key="a", operator="Gt", values=["1", "2"]), "affinity.nodeAffinity."),
    (spread(labelSelector={"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}), "topologySpread"),
    (
        engine(securityContext={"privileged": True}),
        "containers[0].securityContext.privileged: set allowPrivilegeEscalation to true beside it",
    ),
    (
        engine(securityContext={"seccompProfile": {"type": "Localhost"}}),
        "containers[0].securityContext.seccompProfile: localhostProfile is needed for the type Localhost",
    ),
    (
        side(livenessProbe={"exec": {"command": ["a"]}, "successThreshold": 2}),
        "containers[0].livenessProbe.successThreshold: only 1 goes with this probe",
    ),
    (
        side(readinessProbe={"exec": {"command": ["a"]}, "terminationGracePeriodSeconds": 2}),
        "containers[0].readinessProbe.terminationGracePeriodSeconds: ends no container",
    ),
    (
        side("initContainers", readinessProbe={"exec": {"command": ["a"]}}),
        "initContainers: readinessProbe of side needs the restartPolicy Always",
    ),
    ({"spec": {"restartPolicy": "OnFailure"}}, "restartPolicy: the pods of a workload have Always"),
    ({"spec": {"activeDeadlineSeconds": 60}}, "activeDeadlineSeconds: the pods of a workload have none"),
    (
        {"spec": {"terminationGracePeriodSeconds": 30, **side(**SLEEP)["spec"]}},
        "terminationGracePeriodSeconds: 30 is shorter than the pause of 60 s before the end of side",
    ),
    ({"spec": {"dnsPolicy": "None"}}, "dnsConfig: is needed for the dnsPolicy None"),
    (
        {"spec": {"hostNetwork": True, **side(ports=[{"containerPort": 1, "hostPort": 2}])["spec"]}},
        "containers: hostPort 2: on the host's network that of side is 1",
    ),
    # Amounts.
    (
        resources(requests={"memory": "64Gi"}, limits={"memory": "32Gi"}),
        "containers[0].resources.requests.memory: 64Gi is not at most its limit, 32Gi",
    ),
    (
        resources(requests={"rdma/hca": "1"}, limits={"rdma/hca": "2"}),
        "containers[0].resources.requests.rdma/hca: 1 is not as much as its limit, 2",
    ),
    (resources(requests={"rdma/hca": "1"}), "containers[0].resources.requests.rdma/hca: a limit of the same amount is"),
    (resources(limits={"rdma/hca": "500m"}), "containers[0].resources.limits.rdma/hca: a whole number is needed"),
    (resources(limits={"cpu": "-1"}), "containers[0].resources.limits.cpu: an amount of 0 or more is needed, got -1"),
    (resources(limits={"gpu": "1"}), "containers[0].resources.limits.gpu: unknown resource; known: cpu, memory, eph"),
]

TAKEN: list[Document] = [
    volume(),
    volume(persistentVolumeClaim={"claimName": "a"}),
    volume(projected={"sources": [{"secret": {"name": "a"}}, {"serviceAccountToken": {"path": "a"}}]}),
    env(value="", valueFrom={"fieldRef": {"fieldPath": "metadata.name"}}),
    engine(startupProbe={"periodSeconds": 0}, imagePullPolicy=""),
    engine(startupProbe={"httpGet": {"path": "/other"}}),
    engine(livenessProbe={"httpGet": {"httpHeaders": [{"name": "a"}]}}),
    engine(securityContext={"privileged": True, "allowPrivilegeEscalation": True}),
    engine(securityContext={"capabilities": {"add": ["IPC_LOCK"]}}),
    engine(lifecycle={"preStop": {"sleep": {"seconds": 0}}}),
    side("initContainers", restartPolicy="Always", startupProbe={"exec": {"command": ["a"]}}),
    side(ports=[{"containerPort": 1, "hostPort": 0, "name": "a-b-2"}]),
    toleration(operator="Exists"),
    toleration(key="a", operator="Equal", value="b", effect=""),
    toleration(key="a", operator="Exists", effect="NoExecute", tolerationSeconds=0),
    node_term(key="a", operator="NotIn", values=["b", "c"]),
    node_term(key="a", operator="Lt", values=["1"]),
    spread(minDomains=2, whenUnsatisfiable="DoNotSchedule"),
    resources(requests={"memory": "1024Mi", "cpu": ".5"}, limits={"memory": "1Gi", "cpu": "1e0"}),
    resources(limits={"rdma/hca": "1", "hugepages-2Mi": "4Mi"}, requests={"memory": "1Gi", "hugepages-2Mi": "4096Ki"}),
    {"spec": {"terminationGracePeriodSeconds": 60, **side(**SLEEP)["spec"]}},
    {"spec": {"dnsPolicy": "None", "dnsConfig": {"nameservers": ["fd00::1"]}}},
    {"spec": {"securityContext": {"runAsUser": 2**31 - 1, "sysctls": [{"name": "net.a", "value": ""}]}}},
    {"spec": {"hostname": "a", "priorityClassName": "a.b", "restartPolicy": "Always"}},
    {"spec": {"terminationGracePeriodSeconds": -1, **engine(lifecycle=AT_ITS_END)["spec"]}},
    resources(requests={"kubernetes.io/batch-cpu": "1500m", "a.kubernetes.io/b": "2"}),
    resources(requests={"kubernetes.io/batch-cpu": "2"}, limits={"kubernetes.io/batch-cpu": "3"}),
    {"spec": {"hostAliases": [{"ip": "10.00.0.010"}, {"ip": "0.0.0.0"}, {"ip": "::ffff:1.2.3.4"}]}},
    {"spec": {"dnsConfig": {"nameservers": ["10.0.0.01", "fd00::0001"]}}},
    {"spec": {"securityContext": {"seccompProfile": {"type": "Localhost", "localhostProfile": ""}}}},
    {"spec": {"hostNetwork": True, **side("initContainers", ports=[{"containerPort": 1, "hostPort": 2}])["spec"]}},
]
