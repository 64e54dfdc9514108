"""What is wrong with pods, in words that say what to do."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from moe_operator.api.status import list_troubled_ranks
from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.diagnosis import LONGEST_MESSAGE, find_gated, find_problems
from pods import agent, pod, states

Document = dict[str, Any]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def unscheduled(message: str, **requests: str) -> Document:
    found = pod(ready=False)
    found["spec"]["containers"][0]["resources"] = {"requests": requests}
    found["status"]["conditions"].append({"type": "PodScheduled", "status": "False", "message": message})
    return found


def with_container(field: str = "containerStatuses", **status: Any) -> Document:
    found = pod(ready=False)
    found["status"][field] = [{"name": "engine", "image": "sha256:1", "ready": False, "restartCount": 0} | status]
    return found


def waiting(reason: str, message: str = "detail") -> Document:
    return {"state": {"waiting": {"reason": reason, "message": message}}}


def ended(reason: str = "Error", **more: Any) -> Document:
    return {"lastState": {"terminated": {"reason": reason, "exitCode": 1} | more}, "restartCount": 2}


GPUS = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. preemption: 0/2 nodes are available"


@pytest.mark.parametrize(
    ("found", "reason", "advice"),
    [
        (
            unscheduled(GPUS, **{"nvidia.com/gpu": "8", "cpu": "1"}),
            "Unschedulable",
            "no node has nvidia.com/gpu: 8 free; add nodes or ask for less, see spec.engine",
        ),
        (
            unscheduled("1 Insufficient cpu, 1 Insufficient memory.", cpu="4", memory="64Gi"),
            "Unschedulable",
            "no node has cpu: 4, memory: 64Gi free",
        ),
        (
            unscheduled("0/1 nodes are available: 1 node(s) had untolerated taint {nvidia.com/gpu: present}."),
            "Unschedulable",
            "nodes have the taint nvidia.com/gpu, which the pod does not tolerate; see tolerations in spec.engine.pod",
        ),
        (
            unscheduled("0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector."),
            "Unschedulable",
            "no node has the labels that the pod asks for; see nodeSelector and affinity in spec.engine.podTemplate",
        ),
        (
            unscheduled('0/1 nodes are available: persistentvolumeclaim "models" not found. not found'),
            "Unschedulable",
            "make the PersistentVolumeClaim models, which spec.model or spec.engine.podTemplate names",
        ),
        (
            unscheduled("0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found"),
            "Unschedulable",
            "a claim of the pod has no volume yet; look at its storage class and its provisioner",
        ),
        (
            unscheduled("0/2 nodes are available: 2 Too many pods."),
            "Unschedulable",
            "no node can take the pod; add nodes or ask for less, see spec.engine",
        ),
        *(
            (
                with_container(**waiting(reason)),
                "ImageCannotBePulled",
                "the image registry.test/it:1 cannot be pulled; check its name, the registry and imagePullSecrets",
            )
            for reason in ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName")
        ),
        (
            with_container("initContainerStatuses", name="setup", **waiting("ImagePullBackOff")),
            "ImageCannotBePulled",
            "the image sha256:1 cannot be pulled",
        ),
        (
            with_container(**waiting("CreateContainerConfigError", 'secret "hub" not found')),
            "SecretMissing",
            "make the Secret hub, which spec.model.tokenSecret or a podTemplate names",
        ),
        (
            with_container(**waiting("CreateContainerConfigError", "couldn't find key token in Secret ns/hub")),
            "SecretMissing",
            "add the key to the Secret, or name another one",
        ),
        *(
            (with_container(**waiting(reason)), "ContainerCannotStart", "the container cannot be started")
            for reason in ("PreStartHookError", "PostStartHookError", "SomethingNew")
        ),
        *(
            (with_container(**waiting(reason)), "ImageCannotBePulled", "the image registry.test/it:1 cannot be pulled")
            for reason in ("RegistryUnavailable", "SignatureValidationFailed")
        ),
        (
            with_container(**waiting("CreateContainerConfigError", 'configmap "my-secret" not found')),
            "ContainerCannotStart",
            "make the ConfigMap my-secret, which a podTemplate names",
        ),
        (
            with_container(**waiting("CreateContainerConfigError", "couldn't find key a in ConfigMap ns/secrets")),
            "ContainerCannotStart",
            "add the key to the ConfigMap, or name another one",
        ),
        *(
            (
                with_container(**waiting("CreateContainerConfigError", message)),
                "ContainerCannotStart",
                "correct the pod's configuration",
            )
            for message in (
                "failed to sync secret cache: timed out waiting for the condition",
                "container has runAsNonRoot and image will run as root",
            )
        ),
        (
            with_container(**waiting("RunContainerError", "exec: no such file")),
            "ContainerCannotStart",
            "the container cannot be started",
        ),
        (with_container(**ended("OOMKilled")), "OutOfMemory", "raise spec.engine.resources.memory or serve with less"),
        (
            with_container("initContainerStatuses", name="setup", state={"terminated": {"reason": "OOMKilled"}}),
            "OutOfMemory",
            "raise resources.limits.memory of the container setup in spec.engine.podTemplate",
        ),
        (
            with_container(**ended(message="boom", exitCode=3)),
            "CrashLooping",
            "the container engine ends again and again (status 3); see its log",
        ),
    ],
)  # fmt: skip
def test_a_pod_that_cannot_run_says_why_and_what_to_do(found: Document, reason: str, advice: str) -> None:
    (finding,) = find_problems([found], States(), NOW)
    assert finding.reason == reason
    assert finding.message.startswith(advice), finding.message
    assert finding.pod == "tiny-engine-a"
    assert "tiny-engine-a" in finding.message


@pytest.mark.parametrize(
    ("last_exit", "reason", "advice"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory",
            "OutOfMemory",
            "the engine ran out of memory; lower --max-model",
        ),
        ("No available memory for the cache blocks", "OutOfMemory", "the engine ran out of memory"),
        ("ended by signal 9", "OutOfMemory", "the engine was killed, as when memory runs out"),
        ("OSError: org/x is not a valid model identifier", "ModelNotFound", "the model cannot be loaded"),
        ("GatedRepoError: 401 Client Error", "ModelNotFound", "the model cannot be loaded"),
        ("ValueError: unrecognised argument", "EngineFailing", "vLLM ends before it is ready"),
        ("rank 1: its process has ended", "RankFailed", "a rank of the engine failed"),
        ("rank 1: its process has ended: MemoryError", "OutOfMemory", "the engine ran out of memory"),
    ],
)
def test_an_engine_that_ended_says_how(last_exit: str, reason: str, advice: str) -> None:
    state = agent("backoff", engine={"restarts": 1, "last_exit": last_exit})
    (finding,) = find_problems([pod(ready=False)], states({"tiny-engine-a": state}), NOW)
    assert finding.reason == reason
    assert finding.message.startswith(advice)
    assert last_exit in finding.message, "the words of the engine stand in full"


def test_ranks_for_which_the_others_wait_are_named_while_the_engine_runs() -> None:
    rows = [{"rank": 0}, {"rank": 1, "trouble": "suspended"}, {"rank": 3, "trouble": "of_a_newer_agent"}]
    state = agent("ready", ranks=rows)
    (finding,) = find_problems([pod()], states({"tiny-engine-a": state}), NOW)
    assert (finding.reason, finding.pod, finding.component) == ("RankFailed", "tiny-engine-a", "engine")
    assert "rank 1: its process is suspended; rank 3: of_a_newer_agent" in finding.message
    assert state.notable != agent("ready", ranks=[{"rank": 0}]).notable


def test_of_hundreds_of_ranks_the_first_are_named_and_the_others_counted() -> None:
    state = agent("ready", ranks=[{"rank": rank, "trouble": "silent"} for rank in range(256)])
    (finding,) = find_problems([pod()], states({"tiny-engine-a": state}), NOW)
    assert finding.message.endswith("; and 248 more)")
    assert [row.rank for row in list_troubled_ranks(state)] == [*range(8)]


@pytest.mark.parametrize("phase", ["ready", "draining", "stopped"])
def test_an_engine_that_runs_again_is_no_finding(phase: str) -> None:
    state = agent(phase, engine={"restarts": 1, "last_exit": "CUDA out of memory"})
    assert find_problems([pod()], states({"tiny-engine-a": state}), NOW) == []


@pytest.mark.parametrize(
    "found",
    [
        pod(),
        pod(ready=False),
        with_container(**waiting("ContainerCreating")),
        with_container(**(ended() | {"ready": True})),
        with_container(**(ended() | {"restartCount": 0})),
        unscheduled(GPUS) | {"metadata": pod(ending=True)["metadata"]},
    ],
    ids=["ready", "not yet", "creating", "came back", "first", "ending"],
)  # fmt: skip
def test_what_is_well_or_on_its_way_is_no_finding(found: Document) -> None:
    assert find_problems([found], States(), NOW) == []


def test_a_reason_is_reported_once_by_the_first_pod_and_a_long_message_is_cut() -> None:
    long = with_container(**waiting("ErrImagePull", "x" * 5000))
    other = with_container(**waiting("ErrImagePull")) | {"metadata": pod("tiny-engine-b")["metadata"]}
    (finding,) = find_problems([other, long], States(), NOW)
    assert finding.pod == "tiny-engine-a"
    assert len(finding.message) == LONGEST_MESSAGE


def test_the_newest_pod_is_reported_first() -> None:
    old = with_container(**waiting("ImagePullBackOff"))
    new = with_container(**waiting("CreateContainerConfigError", 'secret "absent" not found'))
    old["metadata"] |= {"name": "a", "creationTimestamp": "2026-01-01T00:00:00Z"}
    new["metadata"] |= {"name": "b", "creationTimestamp": "2026-01-01T00:01:00Z"}
    reasons = [finding.reason for finding in find_problems([old, new], States(), NOW)]
    assert reasons == ["SecretMissing", "ImageCannotBePulled"]


def test_pods_without_any_status_are_no_finding() -> None:
    bare: Document = {"metadata": {"name": "x"}, "spec": {"containers": [{"name": "engine"}]}}
    assert find_problems([bare], States(), NOW) == []


def gated(*gates: str) -> Document:
    found = pod(ready=False, phase="Pending")
    found["status"]["conditions"].append({"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"})
    found["spec"]["schedulingGates"] = [{"name": gate} for gate in gates]
    return found


def test_a_pod_that_a_queue_holds_back_is_a_wait_and_no_finding() -> None:
    found = gated("kueue.x-k8s.io/admission", "mine")
    assert find_problems([found], States(), NOW) == []
    assert find_gated([found, pod("b")]) == ["pod tiny-engine-a waits for kueue.x-k8s.io/admission, mine"]
    assert find_gated([pod(), gated() | {"metadata": pod(ending=True)["metadata"]}]) == []


@pytest.mark.parametrize(
    ("age", "node", "phase", "count"),
    [(61, "", "Pending", 1), (59, "", "Pending", 0), (999, "n", "Pending", 0), (999, "", "Running", 0)],
)
def test_a_pod_that_no_scheduler_looks_at_is_reported_after_a_minute(
    age: int, node: str, phase: str, count: int
) -> None:
    found = pod(ready=False, phase=phase)
    found["metadata"]["creationTimestamp"] = (NOW - timedelta(seconds=age)).isoformat()
    found["spec"] |= {"schedulerName": "bin-packer"} | ({"nodeName": node} if node else {})
    findings = find_problems([found], States(), NOW)
    assert len(findings) == count
    assert all("does bin-packer run?" in row.message and row.reason == "Unschedulable" for row in findings)


def over(name: str, created: str, reason: str = "Evicted") -> Document:
    found = pod(name, phase="Failed", ready=False)
    found["metadata"]["creationTimestamp"] = created
    found["status"] |= {"reason": reason, "message": "The node was low on resource: memory."}
    return found


@pytest.mark.parametrize("reason", ["Evicted", "NodeLost", "UnexpectedAdmissionError", "OutOfcpu", "Terminated"])
def test_a_pod_that_is_over_is_reported_while_its_place_is_empty(reason: str) -> None:
    workload = {"metadata": {"name": "tiny-engine", "labels": pod()["metadata"]["labels"]}, "spec": {"replicas": 1}}
    first, second = over("a", "2026-01-01T00:00:00Z"), over("b", "2026-01-01T00:00:09Z", reason)
    (finding,) = find_problems([first, second, pod("c", ready=False)], States(), NOW, [workload])
    assert (finding.reason, finding.pod, finding.component) == ("PodFailed", "b", "engine")
    assert finding.message.startswith(f"a pod ended as {reason} and its place is not filled yet (pod b: The node was")
    assert find_problems([first, second, pod("c")], States(), NOW, [workload]) == []
    assert find_problems([first, second], States(), NOW, [workload | {"spec": {"replicas": 0}}]) == []
    front = pod("g", "gateway")
    assert [row.pod for row in find_problems([first, front], States(), NOW, [workload])] == ["a"], (
        "a gateway is no engine"
    )


def test_a_pod_at_whose_address_another_answers_is_reported_once_it_is_ready() -> None:
    strangers = States(strangers=frozenset({"tiny-engine-a"}))
    (finding,) = find_problems([pod()], strangers, NOW)
    assert (finding.reason, finding.pod) == ("IdentityMismatch", "tiny-engine-a")
    assert find_problems([pod(ready=False)], strangers, NOW) == []


@pytest.mark.parametrize(("minutes", "is_found"), [(1, True), (9, True), (10, False), (60 * 24, False)])
def test_a_container_that_was_killed_for_its_memory_recovers(minutes: int, is_found: bool) -> None:
    finished = (NOW - timedelta(minutes=minutes)).isoformat().replace("+00:00", "Z")
    end = {"lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137, "finishedAt": finished}}}
    found = with_container(**end, restartCount=1)
    assert [row.reason for row in find_problems([found], States(), NOW)] == ["OutOfMemory"], "it is not ready"
    found["status"]["containerStatuses"][0] |= {"ready": True, "state": {"running": {}}}
    assert [row.reason for row in find_problems([found], States(), NOW)] == ["OutOfMemory"] * is_found


def test_what_a_gateway_lacks_is_sought_in_the_section_of_gateways() -> None:
    killed = pod("tiny-gateway-a", "gateway", ready=False)
    killed["status"]["containerStatuses"] = [{"name": "gateway", "ready": False} | ended("OOMKilled")]
    (finding,) = find_problems([killed], States(), NOW)
    assert finding.message.startswith(
        "raise resources.limits.memory of the container gateway in spec.gateway.podTemplate"
    )
    unplaced = pod("tiny-gateway-a", "gateway", ready=False)
    unplaced["status"]["conditions"].append({"type": "PodScheduled", "status": "False", "message": "0/1 nodes"})
    (finding,) = find_problems([unplaced], States(), NOW)
    assert "see spec.gateway" in finding.message
