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


def mount(**fields: Any) -> Document:
    return engine(volumeMounts=[{"name": "tmp", "mountPath": "/x", **fields}])


def dns(**fields: Any) -> Document:
    return {"spec": {"dnsConfig": fields}}


def pod_security(**fields: Any) -> Document:
    return {"spec": {"securityContext": fields}}


def own_claim(**spec: Any) -> Document:
    return volume(ephemeral={"volumeClaimTemplate": {"spec": spec}})


def node_field(**requirement: Any) -> Document:
    found = node_term(key="a", operator="Exists")
    required = found["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    required["nodeSelectorTerms"] = [{"matchFields": [requirement]}]
    return found


STORAGE = {"requests": {"storage": "1Gi"}}
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
    ({"spec": {"activeDeadlineSeconds": 0}}, "activeDeadlineSeconds: the pods of a workload have none"),
    ({"spec": {"nodeName": "/dev/shm"}}, "nodeName: the name of an object is needed, got '/dev/shm'"),
    ({"spec": {"activeDeadlineSeconds": 60}}, "activeDeadlineSeconds: the pods of a workload have none"),
    (
        {"spec": {"terminationGracePeriodSeconds": 30, **side(**SLEEP)["spec"]}},
        "terminationGracePeriodSeconds: 30 is shorter than the pause of 60 s before the end of side",
    ),
    ({"spec": {"dnsPolicy": "None"}}, "dnsConfig: nameservers are needed for the dnsPolicy None"),
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
    (resources(limits={"a b/c": "1"}), "containers[0].resources.limits.a b/c: a domain, '/' and up to 63 letters"),
    (resources(limits={f"a.b/{'x' * 64}": "1"}), "containers[0].resources.limits.a.b/xxxx"),
    (resources(limits={"requests.a/b": "1"}), "containers[0].resources.limits.requests.a/b: a domain, '/' and up to"),
    (resources(limits={"hugepages-2Mi": "4Mi"}), "containers[0].resources: hugepages-2Mi needs cpu or memory beside"),
    (
        resources(limits={"hugepages-2Mi": "3Mi", "memory": "1Gi"}),
        "containers[0].resources.limits.hugepages-2Mi: a multiple of 2Mi is needed, got 3Mi",
    ),
    (volume(emptyDir={"sizeLimit": "-1"}), "volumes[0].emptyDir.sizeLimit: an amount of 0 or more is needed, got -1"),
    # Names, keys and paths.
    (engine(env=[{"name": "A=B", "value": "c"}]), "containers[0].env[0].name: the name of a variable has no '='"),
    (
        engine(envFrom=[{"prefix": "A=", "configMapRef": {"name": "a"}}]),
        "containers[0].envFrom[0].prefix: the name of a variable has no '='",
    ),
    (
        env(valueFrom={"secretKeyRef": {"name": "A_b", "key": "a"}}),
        "containers[0].env[0].valueFrom.secretKeyRef.name: the name of an object is needed, got 'A_b'",
    ),
    (
        env(valueFrom={"configMapKeyRef": {"name": "a", "key": "a b"}}),
        "containers[0].env[0].valueFrom.configMapKeyRef.key: the key of an entry is letters",
    ),
    (
        env(valueFrom={"secretKeyRef": {"name": "a", "key": ".."}}),
        "containers[0].env[0].valueFrom.secretKeyRef.key: the",
    ),
    (
        env(valueFrom={"fieldRef": {"fieldPath": "status.podIp"}}),
        "containers[0].env[0].valueFrom.fieldRef.fieldPath: unknown 'status.podIp'; known: metadata.name, ",
    ),
    (
        env(valueFrom={"fieldRef": {"fieldPath": "metadata.labels"}}),
        "containers[0].env[0].valueFrom.fieldRef.fieldPath: unknown 'metadata.labels'; known: metadata.name, ",
    ),
    (
        env(valueFrom={"fieldRef": {"fieldPath": "metadata.labels['a b']"}}),
        "containers[0].env[0].valueFrom.fieldRef.fieldPath: a key is up to 63 letters",
    ),
    (
        env(valueFrom={"resourceFieldRef": {"resource": "limits.gpu"}}),
        "containers[0].env[0].valueFrom.resourceFieldRef.resource: unknown 'limits.gpu'; known: limits.cpu, ",
    ),
    (
        env(valueFrom={"resourceFieldRef": {"resource": "limits.cpu", "divisor": "3"}}),
        "containers[0].env[0].valueFrom.resourceFieldRef.divisor: unknown '3'; known: 1, 1m",
    ),
    (
        volume(downwardAPI={"items": [{"path": "a", "fieldRef": {"fieldPath": "status.podIP"}}]}),
        "volumes[0].downwardAPI.items[0].fieldRef.fieldPath: unknown 'status.podIP'; known: metadata.annotations, ",
    ),
    (
        volume(downwardAPI={"items": [{"path": "a", "resourceFieldRef": {"resource": "limits.cpu"}}]}),
        "volumes[0].downwardAPI.items[0].resourceFieldRef: containerName is needed",
    ),
    (
        engine(startupProbe={"httpGet": {"port": "8080"}}),
        "containers[0].startupProbe.httpGet.port: a number stands without quotes, got '8080'",
    ),
    (
        engine(startupProbe={"httpGet": {"httpHeaders": [{"name": "a b", "value": "c"}]}}),
        "containers[0].startupProbe.httpGet.httpHeaders[0].name: the name of a header is letters",
    ),
    (
        side(ports=[{"name": "a", "containerPort": 1}, {"name": "a", "containerPort": 2}]),
        "containers[0].ports: the name",
    ),
    (
        side(ports=[{"containerPort": 1, "hostPort": 5}, {"containerPort": 2, "hostPort": 5}]),
        "containers: hostPort 5 of side is taken by another port of the pod",
    ),
    (mount(subPath="../a"), "containers[0].volumeMounts[0].subPath: a path within the volume is needed"),
    (mount(subPath="/a"), "containers[0].volumeMounts[0].subPath: a path within the volume is needed"),
    (mount(mountPropagation="Bidirectional"), "containers[0].volumeMounts: Bidirectional at /x needs a privileged"),
    (mount(recursiveReadOnly="Enabled"), "containers[0].volumeMounts[0].recursiveReadOnly: goes with readOnly alone"),
    (volume(hostPath={"path": "/a/../b"}), "volumes[0].hostPath.path: a path without '..' is needed, got '/a/../b'"),
    (
        volume(configMap={"name": "a", "items": [{"key": "a", "path": "../b"}]}),
        "volumes[0].configMap.items[0].path: a path within the volume is needed",
    ),
    (
        volume(secret={"secretName": "a", "items": [{"key": "a", "path": "..b"}]}),
        "volumes[0].secret.items[0].path: a path that does not begin with '..' is needed",
    ),
    (
        own_claim(accessModes=["ReadWriteOnce"]),
        "volumes[0].ephemeral.volumeClaimTemplate.spec.resources.requests: storage",
    ),
    (own_claim(resources=STORAGE), "volumes[0].ephemeral.volumeClaimTemplate.spec: accessModes is needed"),
    (
        own_claim(accessModes=["RWO"], resources=STORAGE),
        "volumes[0].ephemeral.volumeClaimTemplate.spec.accessModes: unknown 'RWO'; known: ReadOnlyMany, ",
    ),
    ({"spec": {"nodeSelector": {"a b": "c"}}}, "nodeSelector.a b: a key is up to 63 letters"),
    ({"spec": {"nodeSelector": {"a": "b c"}}}, "nodeSelector.a: a value of a label is up to 63 letters"),
    (toleration(key="a b", operator="Exists"), "tolerations[0].key: a key is up to 63 letters"),
    (toleration(key="a", value="b c"), "tolerations[0].value: a value of a label is up to 63 letters"),
    (node_term(key="a b", operator="Exists"), "affinity.nodeAffinity."),
    (node_field(key="metadata.labels", operator="In", values=["a"]), "affinity.nodeAffinity."),
    (node_field(key="metadata.name", operator="In", values=["a", "b"]), "affinity.nodeAffinity."),
    (node_field(key="metadata.name", operator="Exists"), "affinity.nodeAffinity."),
    (
        {
            "spec": {
                "affinity": {"podAffinity": {PREFERRED: [{"weight": 1, "podAffinityTerm": {"topologyKey": "a b"}}]}}
            }
        },
        f"affinity.podAffinity.{PREFERRED}[0].podAffinityTerm.topologyKey: a key is up to 63 letters",
    ),
    (
        spread(labelSelector={"matchLabels": {"a": "b c"}}),
        "topologySpreadConstraints[0].labelSelector.matchLabels.a: a v",
    ),
    (spread(minDomains=2), "topologySpreadConstraints[0].minDomains: goes with DoNotSchedule alone"),
    (spread(matchLabelKeys=["a"]), "topologySpreadConstraints[0].matchLabelKeys: goes with a labelSelector alone"),
    ({"spec": {"hostAliases": [{"ip": "1.2.3.4", "hostnames": ["A b"]}]}}, "hostAliases[0].hostnames[0]: a host name"),
    ({"spec": {"schedulingGates": [{"name": "a b"}]}}, "schedulingGates[0].name: a key is up to 63 letters"),
    ({"spec": {"readinessGates": [{"conditionType": "a b"}]}}, "readinessGates[0].conditionType: a key is up to 63"),
    # The resolver, kernel parameters, groups, and namespaces of the host.
    (dns(nameservers=["1.1.1.1"] * 4), "dnsConfig.nameservers: at most 3 are taken, got 4"),
    (dns(searches=["a b"]), "dnsConfig.searches[0]: a domain in small letters is needed, got 'a b'"),
    (dns(options=[{"value": "1"}]), "dnsConfig.options[0]: name is needed"),
    (
        {"spec": {"dnsPolicy": "None", **dns(searches=["a"])["spec"]}},
        "dnsConfig: nameservers are needed for the dnsPol",
    ),
    (pod_security(supplementalGroups=[-1]), "securityContext.supplementalGroups[0]: a number from 0 to 2147483647 is"),
    (pod_security(sysctls=[{"name": "a b", "value": "1"}]), "securityContext.sysctls[0].name: the name of a kernel"),
    (pod_security(sysctls=[{"name": "net.a", "value": "1"}] * 2), "securityContext.sysctls: 'net.a' stands twice"),
    (
        {"spec": {"hostNetwork": True, **pod_security(sysctls=[{"name": "net.a", "value": "1"}])["spec"]}},
        "securityContext.sysctls: net.a is the node's own with hostNetwork",
    ),
    (
        {"spec": {"hostIPC": True, **pod_security(sysctls=[{"name": "kernel.shmmax", "value": "1"}])["spec"]}},
        "securityContext.sysctls: kernel.shmmax is the node's own with hostIPC",
    ),
    ({"spec": {"hostUsers": False, "hostPID": True}}, "hostUsers: false does not go with hostPID"),
    ({"spec": {"shareProcessNamespace": True, "hostPID": True}}, "shareProcessNamespace: does not go with hostPID"),
    (
        engine(securityContext={"procMount": "Unmasked"}),
        "containers: procMount Unmasked of engine needs hostUsers: false",
    ),
    (
        side("initContainers", restartPolicy="Always", lifecycle={"preStop": {"sleep": {"seconds": 9999}}}),
        "terminationGracePeriodSeconds: 143 is shorter than the pause of 9999 s before the end of side",
    ),
]

# The API server takes these in a workload, and no pod of it ever runs.
IN_VAIN: list[tuple[Document, str]] = [
    (engine(image=" a:1"), "containers[0].image: a name without spaces around it is needed, got ' a:1'"),
    (spread(topologyKey="a b"), "topologySpreadConstraints[0].topologyKey: a key is up to 63 letters"),
    *(
        (volume(emptyDir={"medium": medium}), f"volumes[0].emptyDir.medium: unknown '{medium}'; known: HugePages, ")
        for medium in ("memory", "tmpfs", "hugepages")
    ),
]

TAKEN: list[Document] = [
    {"spec": {"nodeName": "a.b", "ephemeralContainers": []}},
    engine(env=[{"name": "1 a.b-c", "value": "d"}]),
    engine(envFrom=[{"prefix": "A_", "secretRef": {"name": "a.b"}}, {"configMapRef": {"name": "a"}}]),
    env(valueFrom={"secretKeyRef": {"name": "a.b", "key": ".dockerconfigjson"}}),
    env(valueFrom={"fieldRef": {"fieldPath": "metadata.annotations['A.b/C']"}}),
    env(valueFrom={"fieldRef": {"fieldPath": "status.hostIPs"}}),
    env(valueFrom={"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}),
    env(valueFrom={"resourceFieldRef": {"resource": "requests.memory", "divisor": "1Mi"}}),
    volume(downwardAPI={"items": [{"path": "a/b", "fieldRef": {"fieldPath": "metadata.labels"}}]}),
    volume(emptyDir={"sizeLimit": "0", "medium": "HugePages"}),
    own_claim(accessModes=["ReadWriteOncePod"], resources=STORAGE),
    mount(subPath="a/b..c", mountPropagation="HostToContainer"),
    mount(readOnly=True, recursiveReadOnly="IfPossible"),
    engine(startupProbe={"httpGet": {"port": "agent", "httpHeaders": [{"name": "X-A1", "value": ""}]}}),
    side(ports=[{"containerPort": 1, "hostPort": 5}, {"containerPort": 2, "hostPort": 5, "protocol": "UDP"}]),
    {"spec": {"nodeSelector": {"a.b/C_d": "", "x": "1.0-A"}}},
    node_field(key="metadata.name", operator="NotIn", values=["a"]),
    spread(labelSelector={"matchLabels": {"a": "b"}}, matchLabelKeys=["pod-template-hash"]),
    dns(nameservers=["1.1.1.1"] * 3, searches=["svc.cluster.local", "a.", "_b.c"], options=[{"name": "ndots"}]),
    pod_security(supplementalGroups=[0, 2**31 - 1], sysctls=[{"name": "net/ipv4.a_b", "value": "1"}]),
    {"spec": {"hostUsers": False, **engine(securityContext={"procMount": "Unmasked"})["spec"]}},
    {"spec": {"schedulingGates": [{"name": "a.b/c"}], "readinessGates": [{"conditionType": "a.b/C"}]}},
    resources(limits={"hugepages-2Mi": "4Mi", "cpu": "1"}),
    side("initContainers", restartPolicy="Always", lifecycle={"preStop": {"sleep": {"seconds": 143}}}),
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
