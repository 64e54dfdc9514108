"""Problems of pods with their remedies. Pure: from pods and states of agents to findings.

The messages of the cluster stand in full behind ours, so that nothing is hidden.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_contract.agent_state import AgentState

from moe_operator.autoscale.signal import States

Document = dict[str, Any]

_IMAGE_REASONS = {"ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError"}
_MODEL_MISSING = re.compile(
    r"not a valid model identifier|RepositoryNotFound|Repository Not Found|GatedRepo|401 Client Error|404 Client Error"
    r"|does not appear to have a file|Can't load the configuration|LocalEntryNotFound|Invalid repository ID"
    r"|No such file or directory|couldn't connect|cannot find the requested files",
    re.IGNORECASE,
)
_MEMORY = re.compile(r"out of memory|OutOfMemory|OOM|No available memory for the cache blocks", re.IGNORECASE)
_KILLED = re.compile(r"signal 9|SIGKILL|status 137")
_TOO_FEW = re.compile(r"Insufficient ([^\s,.]+(?:\.[a-z]+)*/?[^\s,.]*)")
LONGEST_MESSAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One problem of a pod.

    Attributes:
        reason: in one word, for the condition.
        message: the problem and its remedy.
        pod: where it was seen.
    """

    reason: str
    message: str
    pod: str


def find_problems(pods: Sequence[Document], states: States) -> list[Finding]:
    """The findings over all pods that are not on their way out, the first pod of each reason.

    The newest pods come first: older ones may stay, with what was wrong then, until a newer one is ready.
    """
    found: dict[str, Finding] = {}
    for pod in sorted(sorted(pods, key=_name), key=_created, reverse=True):
        if "deletionTimestamp" in pod["metadata"]:
            continue
        for finding in (
            *_scheduling(pod),
            *_containers(pod),
            *_engine(pod, states.engines.get(pod["metadata"]["name"])),
        ):
            found.setdefault(finding.reason, finding)
    return list(found.values())


def _name(pod: Document) -> str:
    return str(pod["metadata"]["name"])


def _created(pod: Document) -> str:
    return str(pod["metadata"].get("creationTimestamp", ""))


def _scheduling(pod: Document) -> Iterator[Finding]:
    for condition in pod.get("status", {}).get("conditions", []):
        if condition.get("type") != "PodScheduled" or condition.get("status") != "False":
            continue
        detail = condition.get("message", "")
        short = ", ".join(f"{name}: {count}" for name, count in _missing_resources(pod, detail))
        advice = f"no node has {short} free" if short else "no node can take the pod"
        yield _finding(pod, "Unschedulable", f"{advice}; add nodes or ask for less, see spec.engine", detail)


def _missing_resources(pod: Document, detail: str) -> Iterator[tuple[str, str]]:
    for name in dict.fromkeys(match[1] for match in _TOO_FEW.finditer(detail)):
        for container in pod["spec"]["containers"]:
            requests = container.get("resources", {}).get("requests", {})
            if name in requests:
                yield name, requests[name]


def _containers(pod: Document) -> Iterator[Finding]:
    status = pod.get("status", {})
    images = {container["name"]: container.get("image", "") for container in pod["spec"]["containers"]}
    for container in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
        waiting = container.get("state", {}).get("waiting", {})
        reason, detail = waiting.get("reason", ""), waiting.get("message", "")
        image = images.get(container["name"], container.get("image", ""))
        if reason in _IMAGE_REASONS:
            advice = f"the image {image} cannot be pulled; check its name, the registry and imagePullSecrets"
            yield _finding(pod, "ImageCannotBePulled", advice, f"{reason}: {detail}")
        elif reason == "CreateContainerConfigError":
            secret = "secret" in detail.lower()
            advice = (
                "make the Secret that spec.model.tokenSecret names" if secret else "correct the pod's configuration"
            )
            yield _finding(pod, "SecretMissing" if secret else "ContainerCannotStart", advice, detail)
        elif reason in ("CreateContainerError", "RunContainerError"):
            yield _finding(pod, "ContainerCannotStart", "the container cannot be started", f"{reason}: {detail}")
        last = container.get("lastState", {}).get("terminated", {})
        if last.get("reason") == "OOMKilled":
            yield _finding(pod, "OutOfMemory", "raise spec.engine.resources.memory or serve with less", "OOMKilled")
        elif last and not container.get("ready") and container.get("restartCount", 0) > 0:
            # Between two tries it runs for a moment: until it is ready once, it is no better.
            code = last.get("exitCode", "?")
            advice = f"the container {container['name']} ends again and again (status {code}); see its log"
            yield _finding(pod, "CrashLooping", advice, last.get("message", ""))


def _engine(pod: Document, state: AgentState | None) -> Iterator[Finding]:
    """What an agent says of an engine that ended and has not come back."""
    if state is None or state.phase in ("ready", "draining", "stopped"):
        return
    last_exit = state.engine.last_exit
    if not last_exit:
        return
    if _MEMORY.search(last_exit):
        advice = "the engine ran out of memory; lower --max-model-len or spec.engine.resources.kvCacheMemory"
        yield _finding(pod, "OutOfMemory", advice, last_exit)
    elif _KILLED.search(last_exit):
        yield _finding(pod, "OutOfMemory", "the engine was killed, as when memory runs out; raise the limit", last_exit)
    elif _MODEL_MISSING.search(last_exit):
        advice = "the model cannot be loaded; check spec.model.uri, its revision and spec.model.tokenSecret"
        yield _finding(pod, "ModelNotFound", advice, last_exit)
    else:
        yield _finding(pod, "EngineFailing", "vLLM ends before it is ready; see the pod's log", last_exit)


def _finding(pod: Document, reason: str, advice: str, detail: str) -> Finding:
    message = (
        f"{advice} (pod {pod['metadata']['name']}: {detail})" if detail else f"{advice} (pod {pod['metadata']['name']})"
    )
    return Finding(reason=reason, message=message[:LONGEST_MESSAGE], pod=pod["metadata"]["name"])
