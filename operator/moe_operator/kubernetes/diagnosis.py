"""Problems of pods with their remedies. Pure: from pods and states of agents to findings.

The messages of the cluster stand in full behind ours, so that nothing is hidden. What stands in events alone is in
`event_problems.py`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from moe_contract.agent_state import AgentState

from moe_operator.api.reasons import Reason
from moe_operator.api.status import list_troubled_ranks
from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.exit_cause import explain_exit
from moe_operator.kubernetes.finding import LONGEST_MESSAGE, Finding, build_finding
from moe_operator.plan.names import COMPONENT, REVISION, ROLE, is_replica
from moe_operator.plan.pod_status import ENGINE, GATED, component_of, condition_of, is_live, is_over, is_ready, label_of

Document = dict[str, Any]

# Why a container waits, as the kubelet has it (k8s.io/kubernetes v1.34: images/types.go, cri-api errors).
IMAGE_REASONS = {
    "ErrImagePull",
    "ImagePullBackOff",
    "ErrImageNeverPull",
    "InvalidImageName",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
}
# These say nothing by themselves: events, or how the container ended before, say more.
_ON_ITS_WAY = {"", "ContainerCreating", "PodInitializing", "CrashLoopBackOff"}
# In messages of kubelets, about what a pod refers to.
NOT_FOUND = re.compile(r'\b(secret|configmap) "([^"]+)" not found', re.IGNORECASE)
_NO_SUCH_KEY = re.compile(r"couldn't find key \S* ?in (Secret|ConfigMap) (\S+)")
_TOO_FEW = re.compile(r"Insufficient ([^\s,.]+(?:\.[a-z]+)*/?[^\s,.]*)")
# Of the scheduler (k8s.io/kubernetes v1.34, pkg/scheduler/framework/plugins).
_NO_CLAIM = re.compile(r'persistentvolumeclaim "([^"]+)" not found')
_TAINT = re.compile(r"untolerated taint(?:\(s\))? \{([^}: ]+)")
# A scheduler looks at a pod within seconds; without one that answers to the pod's `schedulerName` nobody ever does.
UNSEEN_FOR = timedelta(seconds=60)
# A container that has run for so long since it was killed for its memory has recovered.
RECOVERED_AFTER = timedelta(minutes=10)


def find_problems(
    pods: Sequence[Document], states: States, now: datetime, workloads: Iterable[Document] = ()
) -> list[Finding]:
    """The findings over all pods that are not on their way out, the first pod of each reason.

    The newest pods come first: older ones may stay, with what was wrong then, until a newer one is ready.

    Args:
        pods: of the resource.
        states: of their agents and gateways.
        now: the time, for what lasts too long.
        workloads: of the resource; pods that are over are a problem while one of them lacks ready pods.
    """
    found: list[Finding] = []
    newest_first = sorted(sorted(pods, key=_name), key=_created, reverse=True)
    for pod in filter(is_live, newest_first):
        found += _scheduling(pod, now)
        found += _containers(pod, now)
        found += _engine(pod, states.engines.get(_name(pod)))
        found += _identity(pod, states)
    found += _over(newest_first, workloads)
    return first_of_each_reason(found)


def first_of_each_reason(findings: Iterable[Finding]) -> list[Finding]:
    """The findings without those that have reason and component of an earlier one."""
    found: dict[tuple[Reason, str], Finding] = {}
    for finding in findings:
        found.setdefault((finding.reason, finding.component), finding)
    return list(found.values())


def find_gated(pods: Sequence[Document]) -> list[str]:
    """Pods that a queueing system such as Kueue holds back, each with its gates, in words: a wait and no fault."""
    waits = []
    for pod in sorted(filter(is_live, pods), key=_name):
        scheduled = condition_of(pod, "PodScheduled") or {}
        if scheduled.get("reason") == GATED:
            gates = ", ".join(row["name"] for row in pod["spec"].get("schedulingGates") or ())
            waits.append(f"pod {_name(pod)} waits for {gates or 'its scheduling gates'}")
    return waits


def _name(pod: Document) -> str:
    return str(pod["metadata"]["name"])


def _created(pod: Document) -> str:
    return str(pod["metadata"].get("creationTimestamp", ""))


def _scheduling(pod: Document, now: datetime) -> Iterator[Finding]:
    scheduled = condition_of(pod, "PodScheduled")
    if scheduled is None:
        yield from _unseen(pod, now)
    elif scheduled.get("status") == "False" and scheduled.get("reason") != GATED:
        detail = scheduled.get("message", "")
        yield _finding(pod, Reason.UNSCHEDULABLE, _advise_scheduling(pod, detail), detail)


def _advise_scheduling(pod: Document, detail: str) -> str:
    """What keeps nodes from taking a pod, by the scheduler's message, and what to do about it."""
    section = f"spec.{component_of(pod) or ENGINE}"
    if absent := _NO_CLAIM.search(detail):
        return f"make the PersistentVolumeClaim {absent[1]}, which spec.model or {section}.podTemplate names"
    if "unbound immediate PersistentVolumeClaims" in detail:
        return "a claim of the pod has no volume yet; look at its storage class and its provisioner"
    if short := ", ".join(f"{name}: {count}" for name, count in _missing_resources(pod, detail)):
        return f"no node has {short} free; add nodes or ask for less, see {section}"
    if taints := [*dict.fromkeys(_TAINT.findall(detail))]:
        named = ", ".join(taints)
        return (
            f"nodes have the taint {named}, which the pod does not tolerate; see tolerations in {section}.podTemplate"
        )
    if "didn't match Pod's node affinity/selector" in detail:
        return f"no node has the labels that the pod asks for; see nodeSelector and affinity in {section}.podTemplate"
    return f"no node can take the pod; add nodes or ask for less, see {section}"


def _unseen(pod: Document, now: datetime) -> Iterator[Finding]:
    """A pod that no scheduler has looked at."""
    created = parse_time(_created(pod))
    waits = pod.get("status", {}).get("phase") == "Pending" and not pod["spec"].get("nodeName")
    if waits and created is not None and now - created > UNSEEN_FOR:
        scheduler = pod["spec"].get("schedulerName", "default-scheduler")
        advice = f"no scheduler has looked at the pod; does {scheduler} run?"
        yield _finding(pod, Reason.UNSCHEDULABLE, advice, "")


def parse_time(text: Any) -> datetime | None:
    """A time of the API server; None where it is none."""
    try:
        found = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo is not None else None


def _missing_resources(pod: Document, detail: str) -> Iterator[tuple[str, str]]:
    for name in dict.fromkeys(match[1] for match in _TOO_FEW.finditer(detail)):
        for container in pod["spec"]["containers"]:
            requests = container.get("resources", {}).get("requests", {})
            if name in requests:
                yield name, requests[name]


def _containers(pod: Document, now: datetime) -> Iterator[Finding]:
    status = pod.get("status", {})
    images = {container["name"]: container.get("image", "") for container in pod["spec"]["containers"]}
    for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        yield from _waiting(pod, container, images.get(container["name"], container.get("image", "")))
        last = container.get("lastState", {}).get("terminated", {})
        if _is_short_of_memory(container, now):
            yield _finding(pod, Reason.OUT_OF_MEMORY, _more_memory(pod, container["name"]), "OOMKilled")
        elif last and not container.get("ready") and container.get("restartCount", 0) > 0:
            # Between two tries it runs for a moment: until it is ready once, it is no better.
            code = last.get("exitCode", "?")
            advice = f"the container {container['name']} ends again and again (status {code}); see its log"
            yield _finding(pod, Reason.CRASH_LOOPING, advice, last.get("message", ""))


def _waiting(pod: Document, container: Document, image: str) -> Iterator[Finding]:
    """Why a container is not started."""
    waiting = container.get("state", {}).get("waiting", {})
    reason, detail = waiting.get("reason", ""), waiting.get("message", "")
    if reason in IMAGE_REASONS:
        advice = f"the image {image} cannot be pulled; check its name, the registry and imagePullSecrets"
        yield _finding(pod, Reason.IMAGE_CANNOT_BE_PULLED, advice, f"{reason}: {detail}")
    elif reason == "CreateContainerConfigError":
        yield _misconfigured(pod, detail)
    elif reason not in _ON_ITS_WAY:
        # Whatever a newer kubelet calls it: what only passes has a name above.
        advice = "the container cannot be started"
        yield _finding(pod, Reason.CONTAINER_CANNOT_START, advice, f"{reason}: {detail}")


def _is_short_of_memory(container: Document, now: datetime) -> bool:
    """Whether a container was killed for its memory, and has not run for long since."""
    if container.get("state", {}).get("terminated", {}).get("reason") == "OOMKilled":
        return True
    last = container.get("lastState", {}).get("terminated", {})
    ended = parse_time(last.get("finishedAt"))
    has_recovered = container.get("ready") and (ended is None or now - ended >= RECOVERED_AFTER)
    return last.get("reason") == "OOMKilled" and not has_recovered


def _more_memory(pod: Document, container: str) -> str:
    component = component_of(pod)
    if (component, container) == (ENGINE, ENGINE):
        return "raise spec.engine.resources.memory or serve with less"
    return f"raise resources.limits.memory of the container {container} in spec.{component}.podTemplate"


def _misconfigured(pod: Document, detail: str) -> Finding:
    """A container that lacks what its variables refer to, or that its node may not start so."""
    absent, key = NOT_FOUND.search(detail), _NO_SUCH_KEY.search(detail)
    named = absent or key
    is_secret = named is not None and named[1].lower() == "secret"
    kind = "Secret" if is_secret else "ConfigMap"
    fields = "spec.model.tokenSecret or a podTemplate" if is_secret else "a podTemplate"
    reason = Reason.SECRET_MISSING if is_secret else Reason.CONTAINER_CANNOT_START
    if absent:
        return _finding(pod, reason, f"make the {kind} {absent[2]}, which {fields} names", detail)
    if key:
        return _finding(pod, reason, f"add the key to the {kind}, or name another one", detail)
    return _finding(pod, reason, "correct the pod's configuration", detail)


def _engine(pod: Document, state: AgentState | None) -> Iterator[Finding]:
    """What an agent says of a rank that keeps its engine from going on, or of an engine that ended and is not back."""
    if state is not None and state.troubled_ranks:
        advice = "an engine does not go on, and new requests are sent to others; see docs/agent.md, Ranks"
        named = [f"rank {row.rank}: {row.message}" for row in list_troubled_ranks(state)]
        more = len(state.troubled_ranks) - len(named)
        detail = "; ".join([*named, *([f"and {more} more"] if more else [])])
        yield _finding(pod, Reason.RANK_FAILED, advice, detail)
    if state is None or state.phase in ("ready", "draining", "stopped") or not state.engine.last_exit:
        return
    cause = explain_exit(state.engine.last_exit)
    yield _finding(pod, cause.reason, cause.advice, state.engine.last_exit)


def _identity(pod: Document, states: States) -> Iterator[Finding]:
    """A pod that its kubelet calls ready, and at whose address another one answers."""
    if _name(pod) in states.strangers and is_ready(pod):
        advice = (
            "the answer does not carry this pod's uid, so it is not accepted and no settings are sent; use an image of "
            "this release, or look for another pod at the address"
        )
        yield _finding(pod, Reason.IDENTITY_MISMATCH, advice, str(pod["status"].get("podIP", "")))


def _over(newest_first: Sequence[Document], workloads: Iterable[Document]) -> Iterator[Finding]:
    """The newest pod that is over of each workload which has fewer ready pods than it asks for."""
    for workload in workloads:
        labels = workload["metadata"].get("labels") or {}
        own = [pod for pod in newest_first if _is_of(pod, labels)]
        ready = sum(is_ready(pod) and is_replica(pod["metadata"].get("labels") or {}) for pod in own)
        short = ready < workload.get("spec", {}).get("replicas", 1)
        over = next(filter(is_over, own), None) if short else None
        if over is not None:
            status = over["status"]
            advice = f"a pod ended as {status.get('reason') or status['phase']} and its place is not filled yet"
            yield _finding(over, Reason.POD_FAILED, advice, status.get("message", ""))


def _is_of(pod: Document, labels: Document) -> bool:
    return all(label_of(pod, name) == labels.get(name, "") for name in (COMPONENT, REVISION, ROLE))


def _finding(pod: Document, reason: Reason, advice: str, detail: str) -> Finding:
    name = _name(pod)
    return build_finding(reason, advice, where=f"pod {name}", detail=detail, component=component_of(pod), pod=name)


__all__ = ["LONGEST_MESSAGE", "Finding", "find_gated", "find_problems", "first_of_each_reason", "parse_time"]
