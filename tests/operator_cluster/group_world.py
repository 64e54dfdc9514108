"""A resource of engines over several nodes, its operator, and the stand-ins of all others, which act in turn."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from cluster_api import ApiCluster
from foreign_kinds import LEADER_WORKER_SETS, installed
from fresh_operator import FreshOperator, conditions, fetch, fetch_serving, served, started
from group_controller import SERVICE, GroupController, Kubelet, Namespace, SingleController, endpoints
from moe_operator.kubernetes.kinds import SERVING
from moe_operator.kubernetes.serving import ENDPOINT_SLICE
from moe_operator.kubernetes.store import Key
from serving_documents import serving
from stand_in_peers import endpoint_slice

Document = dict[str, Any]
ROUNDS = 40
SET = "tiny-engine"
TWO_NODES = {"parallelism": {"data": 2, "nodes": 2, "expert": True}}


class World:
    """An operator, and the stand-ins of all others, which act one after the other."""

    def __init__(self, operator: FreshOperator, namespace: str) -> None:
        self.operator, self.namespace = operator, Namespace(operator.api.server, namespace)
        self.key = Key(namespace, "tiny")
        self.groups, self.singles = GroupController(self.namespace), SingleController(self.namespace)
        self.kubelet = Kubelet(self.namespace)

    async def others(self) -> None:
        for part in (self.groups, self.singles, self.kubelet):
            await part.step()

    async def round(self) -> None:
        await self.others()
        await self.operator.relist()
        await self.operator.reconciler.reconcile(self.key)

    async def rounds(self, count: int) -> None:
        for _ in range(count):
            await self.round()

    async def until(self, holds: Callable[[Document], bool], what: str) -> None:
        """Rounds until the status is so, at most `ROUNDS`."""
        for _ in range(ROUNDS):
            await self.round()
            status = await self.status()
            if holds(status):
                return
        raise AssertionError(f"never: {what}: {conditions({'status': status})}")

    async def status(self) -> Document:
        status: Document = (await fetch_serving(self.operator.api, self.key) or {}).get("status", {})
        return status

    async def verdict(self, kind: str) -> tuple[str, str]:
        row = conditions({"status": await self.status()})[kind]
        return row["status"], row["reason"]

    async def serving_pods(self) -> list[str]:
        """Those to which gateways send."""
        service = await fetch(self.operator, SERVICE, self.key, SET)
        return endpoints(service, await self.namespace.pods())

    async def change(self, **spec: Any) -> None:
        await self.operator.api.merge(SERVING, *self.key, {"spec": spec})

    async def nodes(self, count: int) -> None:
        await self.change(engine={"parallelism": {"nodes": count}})


def is_complete(status: Document) -> bool:
    rows = conditions({"status": status})
    return bool(rows) and rows["Ready"]["status"] == "True" and rows["Progressing"]["reason"] == "Complete"


@contextlib.asynccontextmanager
async def world(cluster: ApiCluster, namespace: str, **engine: Any) -> AsyncIterator[World]:
    """A resource of these engines that is complete."""
    with installed(cluster, LEADER_WORKER_SETS):
        async with started(cluster.kubeconfig, namespace) as operator:
            made = World(operator, namespace)
            await served(operator, namespace, serving(engine=TWO_NODES | engine))
            await operator.api.create(ENDPOINT_SLICE, endpoint_slice(made.key, "tiny-gateway-0", "tiny"))
            await made.until(is_complete, "it serves")
            yield made
