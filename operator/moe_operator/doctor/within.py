"""What works within the cluster, as far as pods that are there show it: pulls of images, DNS, Prometheus. Pure.

No pod is made to try it, so that nothing but rights to read is needed; where no pod shows it, that is said.
"""

from collections.abc import Iterator, Sequence

from moe_contract.api_server import ApiError, Document

from moe_operator.api.autoscaling import AutoscalingMode
from moe_operator.doctor.check import Check, note, ok, problem
from moe_operator.kubernetes.conditions import LIMITED, read_conditions
from moe_operator.kubernetes.diagnosis import IMAGE_REASONS
from moe_operator.plan.pod_status import is_over, is_ready

DNS_NAMESPACE, DNS_SELECTOR = "kube-system", "k8s-app=kube-dns"
_MOST = 3


def check_images(pods: Sequence[Document] | ApiError) -> Check:
    """Whether the nodes can pull the images of the pods here."""
    name = "images"
    if isinstance(pods, ApiError):
        return note(name, f"not known: {pods}", "ask somebody who may list pods")
    pods = _still_running(pods)
    if failed := list(dict.fromkeys(_find_failed(pods))):
        more = f" and {len(failed) - _MOST} more" if len(failed) > _MOST else ""
        advice = "check the name, the registry, and `imagePullSecrets` of the pod template"
        return problem(name, f"cannot be pulled: {'; '.join(failed[:_MOST])}{more}", advice)
    pulled = {row["image"] for pod in pods for row in _containers(pod) if row.get("imageID")}
    if not pulled:
        return note(name, "no pod of ours has pulled one yet, so it is not known whether they can be pulled")
    return ok(name, f"{len(pulled)} were pulled by nodes for {len(pods)} pods")


def _still_running(pods: Sequence[Document]) -> list[Document]:
    """The pods but for those that are over: evicted ones stay objects for a while."""
    return [pod for pod in pods if not is_over(pod)]


def _containers(pod: Document) -> list[Document]:
    status = pod.get("status", {})
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _find_failed(pods: Sequence[Document]) -> Iterator[str]:
    for pod in pods:
        for row in _containers(pod):
            waiting = row.get("state", {}).get("waiting") or {}
            if waiting.get("reason") in IMAGE_REASONS:
                yield f"{row.get('image')} ({waiting['reason']} of {pod['metadata']['name']})"


def check_dns(pods: Sequence[Document] | ApiError) -> Check:
    """Whether the pods of the cluster's DNS are ready."""
    name, place = "cluster DNS", f"{DNS_NAMESPACE}, {DNS_SELECTOR}"
    if isinstance(pods, ApiError):
        return note(name, f"not known: {pods}", f"ask somebody who may list pods of {DNS_NAMESPACE}")
    pods = _still_running(pods)
    if not pods:
        return note(name, f"not known: there are no pods of the usual one ({place})")
    ready = sum(map(is_ready, pods))
    finding = f"{ready} of {len(pods)} pods are ready ({place}); no name was resolved, which needs a pod"
    if not ready:
        advice = (
            f"`kubectl -n {DNS_NAMESPACE} describe pods -l {DNS_SELECTOR}`; without it downloads and Prometheus fail"
        )
        return problem(name, finding, advice)
    return ok(name, finding) if ready == len(pods) else note(name, finding)


def check_prometheus(servings: Sequence[Document]) -> list[Check]:
    """Whether the operator gets answers of the Prometheus that a resource names, by its condition."""
    return [check for row in servings for check in _check_prometheus(row)]


def _check_prometheus(serving: Document) -> Iterator[Check]:
    spec, name = serving.get("spec", {}), f"Prometheus of {serving['metadata']['name']}"
    url = ((spec.get("metrics") or {}).get("prometheus") or {}).get("url")
    if not url:
        return
    condition, autoscaling = read_conditions(serving).get(LIMITED), spec.get("autoscaling")
    if condition is None or autoscaling is None or autoscaling.get("mode") == AutoscalingMode.EXTERNAL:
        yield note(name, f"nothing reads {url} yet, so it is not known whether it answers")
    elif "Prometheus" in condition.message:
        yield problem(name, condition.message, f"check {url} from the operator's pod, and NetworkPolicies on the way")
    else:
        yield ok(name, f"the operator reads {url}")
