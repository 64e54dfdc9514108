"""Pods of groups, as the LeaderWorkerSet controller v0.10 (lws.sigs.k8s.io) makes and labels them."""

from typing import Any

from moe_operator.plan.names import LWS_GROUP_INDEX, LWS_NAME, LWS_SIZE, LWS_WORKER_INDEX, REVISION, REVISION_DIGEST
from pods import pod

Document = dict[str, Any]
SET = "tiny-engine"


def group_pod(index: int, worker: int, *, size: int = 2, digest: str = "new", uid: str = "", **more: Any) -> Document:
    """The pod of a group: the leader is worker 0; the other keywords are those of `pods.pod`."""
    name = f"{SET}-{index}" + (f"-{worker}" if worker else "")
    labels = {LWS_NAME: SET, LWS_GROUP_INDEX: str(index), LWS_WORKER_INDEX: str(worker)}
    made = pod(name, **more, **labels)
    if worker:
        del made["metadata"]["labels"][REVISION]
    made["metadata"] |= {"uid": uid or f"{name}-uid", "annotations": {LWS_SIZE: str(size), REVISION_DIGEST: digest}}
    return made


def group(index: int, *, size: int = 2, **more: Any) -> list[Document]:
    """All pods of a group."""
    return [group_pod(index, worker, size=size, **more) for worker in range(size)]
