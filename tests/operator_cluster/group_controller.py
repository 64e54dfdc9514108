"""Stand-ins for what makes pods and lets them serve: the LeaderWorkerSet controller, Deployments', a kubelet, DNS.

The first does what the documentation of LeaderWorkerSet v0.10 (lws.sigs.k8s.io) says and no more: names, labels and
environment of pods, the headless Services, restart of a whole group, scale-in from the highest number, a surge, and the
set's status. Each does one round at each call of `step`; nothing happens between.
"""

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

from moe_contract.api_server import NOT_FOUND, ApiError, ApiServer, Kind
from moe_operator.kubernetes.kinds import DEPLOYMENT, EVENT, LEADER_WORKER_SET, POD
from moe_operator.plan.names import LWS_GROUP_INDEX, LWS_NAME, LWS_SIZE, LWS_WORKER_INDEX

Document = dict[str, Any]
SERVICE = Kind("", "v1", "Service", "services")
REVISION_KEY = "leaderworkerset.sigs.k8s.io/template-revision-hash"
OWNER = "test/owner"


class Namespace:
    """The objects of one namespace, with the calls that the stand-ins need."""

    def __init__(self, server: ApiServer, name: str) -> None:
        self.server, self.name = server, name

    async def list(self, kind: Kind, **labels: str) -> list[Document]:
        selector = ",".join(f"{label}={value}" for label, value in labels.items())
        return (await self.server.list(kind, self.name, selector)).items

    async def pods(self) -> dict[str, Document]:
        return {pod["metadata"]["name"]: pod for pod in await self.list(POD)}

    async def create(self, kind: Kind, name: str, spec: Document, **metadata: Any) -> None:
        body = {"apiVersion": kind.api_version, "kind": kind.name, "spec": spec}
        await self.server.create(kind, body | {"metadata": {"name": name, "namespace": self.name} | metadata})

    async def delete(self, kind: Kind, name: str) -> None:
        try:
            await self.server.delete(kind, self.name, name)
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise

    async def put_status(self, kind: Kind, name: str, status: Document) -> None:
        await self.server.merge(kind, self.name, name, {"status": status}, "stand-in", subresource="status")


def is_ready(pod: Mapping[str, Any]) -> bool:
    rows = pod.get("status", {}).get("conditions", [])
    return any(row["type"] == "Ready" and row["status"] == "True" for row in rows)


def is_restarted(pod: Mapping[str, Any]) -> bool:
    return any(row.get("restartCount", 0) for row in pod.get("status", {}).get("containerStatuses", []))


class GroupController:
    """The LeaderWorkerSet controller."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._templates: dict[str, Document] = {}

    async def step(self) -> None:
        sets = {live["metadata"]["name"]: live for live in await self._namespace.list(LEADER_WORKER_SET)}
        for pod in await self._namespace.list(POD):
            if (owner := pod["metadata"]["labels"].get(LWS_NAME)) is not None and owner not in sets:
                await self._namespace.delete(POD, pod["metadata"]["name"])
        for service in await self._namespace.list(SERVICE):
            if (owner := service["metadata"].get("labels", {}).get(LWS_NAME)) is not None and owner not in sets:
                await self._namespace.delete(SERVICE, service["metadata"]["name"])
        for live in sets.values():
            await self._step_set(live)

    async def _step_set(self, live: Document) -> None:
        # A revision is the pods' templates and the network's policy.
        template = live["spec"]["leaderWorkerTemplate"]
        content = {"network": live["spec"].get("networkConfig", {})} | template
        revision = sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        self._templates[revision] = content
        await self._restart_groups(live)
        groups = await self._groups(live)
        wanted = live["spec"].get("replicas", 1)
        outdated = [index for index, pods in groups.items() if index < wanted and _revision(pods) != revision]
        surge = live["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"].get("maxSurge", 0)
        settled = not outdated and all(_is_whole(groups.get(index), template) for index in range(wanted))
        count = wanted if settled else max(wanted + (surge if outdated else 0), min(len(groups), wanted + surge))
        for index in [index for index in groups if index >= count]:
            await self._end(groups.pop(index))
        if outdated and all(_is_whole(groups.get(index), template) for index in range(max(outdated) + 1, count)):
            # The next group is made anew once all above it are.
            await self._end(groups.pop(max(outdated)))
        for index in range(count):
            await self._make_group(live, index, groups.get(index, []), revision)
        await self._report(live, revision)

    async def _groups(self, live: Document) -> dict[int, list[Document]]:
        found: dict[int, list[Document]] = {}
        for pod in await self._namespace.list(POD, **{LWS_NAME: live["metadata"]["name"]}):
            found.setdefault(int(pod["metadata"]["labels"][LWS_GROUP_INDEX]), []).append(pod)
        return found

    async def _restart_groups(self, live: Document) -> None:
        """`RecreateGroupOnPodRestart`: a started container, or a worker that went, takes the whole group along."""
        for index, pods in (await self._groups(live)).items():
            template = self._templates[_revision(pods)]
            failed = [pod for pod in pods if is_restarted(pod)]
            lost = _leader(pods) is None or (_has_been_whole(pods) and len(pods) < template["size"])
            if failed or lost:
                await self._end(pods)
                await self._post_event(live, f"deleted leader pod to recreate group {index}")

    async def _post_event(self, live: Document, message: str) -> None:
        metadata = live["metadata"]
        involved = {"apiVersion": LEADER_WORKER_SET.api_version, "kind": LEADER_WORKER_SET.name}
        names = {name: metadata[name] for name in ("name", "namespace", "uid")}
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
            "involvedObject": involved | names,
            "reason": "RecreateGroupOnPodRestart",
            "message": message,
            "type": "Normal",
        }
        await self._namespace.server.create(EVENT, body)

    async def _end(self, pods: list[Document]) -> None:
        for pod in pods:
            await self._namespace.delete(POD, pod["metadata"]["name"])
            if pod["metadata"]["labels"][LWS_WORKER_INDEX] == "0":
                # The Service of the group is the leader's: it goes with it.
                await self._delete_own_service(pod["metadata"]["name"])

    async def _delete_own_service(self, name: str) -> None:
        for service in await self._namespace.list(SERVICE):
            metadata = service["metadata"]
            if metadata["name"] == name and metadata.get("annotations", {}).get(OWNER) == name:
                await self._namespace.delete(SERVICE, name)

    async def _make_group(self, live: Document, index: int, pods: list[Document], revision: str) -> None:
        name, template = live["metadata"]["name"], self._templates[_revision(pods) or revision]
        leader = f"{name}-{index}"
        unique = template["network"].get("subdomainPolicy") == "UniquePerReplica"
        subdomain = leader if unique else name
        own = {LWS_NAME: name} | ({LWS_GROUP_INDEX: str(index)} if unique else {})
        services = {row["metadata"]["name"] for row in await self._namespace.list(SERVICE)}
        if subdomain not in services:
            # Only where there is none of that name, whosever it is.
            spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": own}
            annotations = {OWNER: subdomain}
            await self._namespace.create(SERVICE, subdomain, spec, labels={LWS_NAME: name}, annotations=annotations)
        present = {pod["metadata"]["name"] for pod in pods}
        for worker in range(template["size"]):
            pod = leader if worker == 0 else f"{leader}-{worker}"
            if pod not in present:
                await self._make_pod(live, template, _revision(pods) or revision, index, worker, pod, subdomain)

    async def _make_pod(
        self, live: Document, template: Document, revision: str, index: int, worker: int, pod: str, subdomain: str
    ) -> None:
        name = live["metadata"]["name"]
        own = template["leaderTemplate" if worker == 0 else "workerTemplate"]
        labels = own["metadata"]["labels"] | {
            LWS_NAME: name,
            LWS_GROUP_INDEX: str(index),
            LWS_WORKER_INDEX: str(worker),
            REVISION_KEY: revision,
            "leaderworkerset.sigs.k8s.io/group-key": sha256(f"{name}-{index}".encode()).hexdigest()[:40],
        }
        environment = [
            {"name": "LWS_LEADER_ADDRESS", "value": f"{name}-{index}.{subdomain}.{self._namespace.name}"},
            {"name": "LWS_GROUP_SIZE", "value": str(template["size"])},
            {"name": "LWS_WORKER_INDEX", "value": str(worker)},
        ]
        containers = [row | {"env": [*environment, *row.get("env", [])]} for row in own["spec"]["containers"]]
        spec = own["spec"] | {"containers": containers, "hostname": pod, "subdomain": subdomain}
        annotations = own["metadata"].get("annotations", {}) | {LWS_SIZE: str(template["size"])}
        await self._namespace.create(POD, pod, spec, labels=labels, annotations=annotations)

    async def _report(self, live: Document, revision: str) -> None:
        groups, wanted = await self._groups(live), live["spec"].get("replicas", 1)
        template = live["spec"]["leaderWorkerTemplate"]
        whole = {index for index, pods in groups.items() if _is_whole(pods, template)}
        updated = {index for index, pods in groups.items() if _revision(pods) == revision}
        available = {index for index in whole & updated if index < wanted}
        kinds = {"Available": len(available) == wanted, "Progressing": len(available) != wanted}
        if any(index not in updated for index in groups if index < wanted):
            kinds["UpdateInProgress"] = True
        await self._namespace.put_status(
            LEADER_WORKER_SET,
            live["metadata"]["name"],
            {
                "replicas": len(groups),
                "readyReplicas": len(whole),
                "updatedReplicas": len(updated),
                "hpaPodSelector": f"{LWS_NAME}={live['metadata']['name']},{LWS_WORKER_INDEX}=0",
                "observedGeneration": live["metadata"]["generation"],
                "conditions": [_condition(kind, holds=holds) for kind, holds in kinds.items()],
            },
        )


def _condition(kind: str, *, holds: bool) -> Document:
    reasons = {"Available": "AllGroupsReady", "Progressing": "GroupsProgressing", "UpdateInProgress": "GroupsUpdating"}
    return {"type": kind, "status": "True" if holds else "False", "reason": reasons[kind], "message": ""}


def _leader(pods: list[Document]) -> Document | None:
    return next((pod for pod in pods if pod["metadata"]["labels"][LWS_WORKER_INDEX] == "0"), None)


def _revision(pods: list[Document]) -> str:
    return str(pods[0]["metadata"]["labels"][REVISION_KEY]) if pods else ""


def _is_whole(pods: list[Document] | None, template: Document) -> bool:
    return bool(pods) and len(pods or ()) == template["size"] and all(map(is_ready, pods or ()))


def _has_been_whole(pods: list[Document]) -> bool:
    return any(is_ready(pod) for pod in pods)


class SingleController:
    """The controllers of Deployments: pods by the template, without a rolling update."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace, self._number = namespace, 0

    async def step(self) -> None:
        live = {row["metadata"]["name"]: row for row in await self._namespace.list(DEPLOYMENT)}
        pods: dict[str, list[Document]] = {name: [] for name in live}
        for pod in await self._namespace.list(POD):
            owner = pod["metadata"].get("annotations", {}).get(OWNER)
            if owner in live:
                pods[owner].append(pod)
            elif owner is not None:
                await self._namespace.delete(POD, pod["metadata"]["name"])
        for name, row in live.items():
            await self._step_one(name, row, pods[name])

    async def _step_one(self, name: str, live: Document, pods: list[Document]) -> None:
        wanted, template = live["spec"]["replicas"], live["spec"]["template"]
        for pod in pods[wanted:]:
            await self._namespace.delete(POD, pod["metadata"]["name"])
        for _ in range(len(pods), wanted):
            self._number += 1
            metadata = template["metadata"]
            annotations = metadata.get("annotations", {}) | {OWNER: name}
            pod = f"{name}-s{self._number}"
            await self._namespace.create(POD, pod, template["spec"], labels=metadata["labels"], annotations=annotations)
        ready = sum(map(is_ready, pods[:wanted]))
        counts = {"replicas": wanted, "updatedReplicas": wanted, "readyReplicas": ready}
        await self._namespace.put_status(
            DEPLOYMENT, name, counts | {"observedGeneration": live["metadata"]["generation"]}
        )


class Kubelet:
    """Gives pods an address and makes them ready: a leader once each of its workers has found it by its name.

    Args:
        namespace: of the pods.
        loads: whether a pod has loaded its model.
    """

    def __init__(self, namespace: Namespace, loads: Callable[[str], bool] = lambda _: True) -> None:
        self._namespace, self.loads, self._number = namespace, loads, 0

    async def step(self) -> None:
        for name, pod in (await self._namespace.pods()).items():
            address = pod.get("status", {}).get("podIP")
            if address is None:
                self._number += 1
                address = f"127.3.{self._number // 250}.{self._number % 250 + 1}"
            ready = {"type": "Ready", "status": "True" if await self._is_ready(pod) else "False"}
            status = {"phase": "Running", "podIP": address, "conditions": [ready]}
            if {**pod.get("status", {}), **status} != pod.get("status"):
                await self._namespace.put_status(POD, name, status)

    async def _is_ready(self, pod: Document) -> bool:
        metadata = pod["metadata"]
        if not self.loads(metadata["name"]):
            return False
        if metadata["labels"].get(LWS_WORKER_INDEX) != "0":
            return True
        pods = await self._namespace.pods()
        workers = [f"{metadata['name']}-{number}" for number in range(1, int(metadata["annotations"][LWS_SIZE]))]
        for worker in workers:
            if worker not in pods or not self.loads(worker):
                return False
            found = await resolve(self._namespace, environment(pods[worker])["LWS_LEADER_ADDRESS"])
            if found is None or found != pods[metadata["name"]].get("status", {}).get("podIP"):
                return False
        return True


def environment(pod: Document) -> dict[str, str]:
    """The variables of the pod's first container that have a value of their own."""
    return {row["name"]: row["value"] for row in pod["spec"]["containers"][0].get("env", []) if "value" in row}


def endpoints(service: Document, pods: Mapping[str, Document]) -> list[str]:
    """The pods whose addresses a headless Service publishes, by the rules of the EndpointSlice controller."""
    spec = service["spec"]
    found = []
    for name, pod in sorted(pods.items()):
        selected = spec["selector"].items() <= pod["metadata"].get("labels", {}).items()
        if selected and "podIP" in pod.get("status", {}) and (is_ready(pod) or spec.get("publishNotReadyAddresses")):
            found.append(name)
    return found


async def resolve(namespace: Namespace, name: str) -> str | None:
    """The address of `HOSTNAME.SUBDOMAIN.NAMESPACE`, as a cluster's DNS has it; None is NXDOMAIN."""
    hostname, subdomain, place = name.split(".")
    if place != namespace.name:
        return None
    pods = await namespace.pods()
    for service in await namespace.list(SERVICE):
        if service["metadata"]["name"] != subdomain or service["spec"].get("clusterIP") != "None":
            continue
        for pod in endpoints(service, pods):
            spec = pods[pod]["spec"]
            if spec.get("hostname") == hostname and spec.get("subdomain") == subdomain:
                return str(pods[pod]["status"]["podIP"])
    return None
