"""A change that a person makes while a pass writes the status is not lost, whatever the watch shows of it."""

from pathlib import Path
from typing import Any

from fresh_operator import started
from moe_contract.api_server import Document, Kind
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import SERVING
from moe_operator.kubernetes.store import Key
from serving_documents import serving


class Interrupted(Api):
    """Somebody scales the resource just before its status is written for the first time."""

    is_due = True

    async def apply(self, kind: Kind, document: Document, *, subresource: str = "", **options: Any) -> Document:
        if subresource and self.is_due:
            self.is_due = False
            metadata = document["metadata"]
            patch = {"spec": {"engine": {"replicas": 3}}}
            await self.server.merge(SERVING, metadata["namespace"], metadata["name"], patch, "somebody")
        return await super().apply(kind, document, subresource=subresource, **options)


async def test_a_change_before_the_write_of_the_status_brings_a_pass(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        interrupted = Interrupted(operator.api.server)
        operator.reconciler._api = interrupted
        brought: list[Key] = []
        interrupted.own.on_change = brought.append
        document = serving()
        made = await operator.api.create(
            SERVING, document | {"metadata": document["metadata"] | {"namespace": namespace}}
        )
        operator.store.put(SERVING, made)
        key = Key(namespace, "tiny")
        await operator.reconciler.reconcile(key)
        assert brought == [key]
        await operator.settle(key)
        assert operator.children(key)["Deployment", "tiny-engine"]["spec"]["replicas"] == 3
