"""The API server's own bound: a client that knows beforehand what it writes, and does nothing but write it.

It applies the objects that the plan of each resource has, its finalizer and a status, as the operator has to, with a
number of calls in flight. It neither reads nor compares, and plans before the clock starts.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_contract.api_server import ApiServer
from moe_operator.api import parse_resource
from moe_operator.api.resource import API_VERSION, KIND
from moe_operator.kubernetes.difference import with_digest
from moe_operator.kubernetes.kinds import SERVING, kind_of
from moe_operator.plan import Defaults, Observed, plan_cluster

from moe_lab.reconciling.process import cpu_s

Document = dict[str, Any]
_MANAGER = "bound"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The run of the bare client.

    Attributes:
        seconds: for all writes.
        writes: number of calls.
        in_flight: calls at a time.
        client_cpu_s: CPU seconds of the client.
        server_cpu_s: of API server and etcd.
    """

    seconds: float
    writes: int
    in_flight: int
    client_cpu_s: float
    server_cpu_s: float


async def measure_bound(
    server: ApiServer, servings: Sequence[Document], in_flight: int, processes: Iterable[int]
) -> Bound:  # fmt: skip
    """Writes all that an operator has to write for these resources, which exist."""
    works = [_plan_writes(serving) for serving in servings]
    processes = tuple(processes)
    gate = asyncio.Semaphore(in_flight)

    async def write(work: list[tuple[Document, str]]) -> None:
        # The objects of one resource follow one another, as those of one pass.
        async with gate:
            for document, subresource in work:
                kind = SERVING if document["kind"] == KIND else kind_of(document)
                await server.apply(kind, document, _MANAGER, subresource=subresource)

    started_s, own_s, others_s = time.monotonic(), time.process_time(), cpu_s(processes)
    await asyncio.gather(*map(write, works))
    return Bound(
        seconds=time.monotonic() - started_s,
        writes=sum(map(len, works)),
        in_flight=in_flight,
        client_cpu_s=time.process_time() - own_s,
        server_cpu_s=cpu_s(processes) - others_s,
    )


def _plan_writes(serving: Document) -> list[tuple[Document, str]]:
    metadata = {name: serving["metadata"][name] for name in ("name", "namespace")}
    resource = parse_resource({"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": serving["spec"]})
    observed = Observed(uid=serving["metadata"]["uid"], tokens=("token",))
    plan = plan_cluster(resource, metadata["namespace"], observed, Defaults())
    header = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata}
    held = {**header, "metadata": {**metadata, "finalizers": ["moeserving.dev/bound"]}}
    status = {"observedGeneration": 1, "replicas": 0, "readyReplicas": 0, "desiredReplicas": 1, "engines": []}
    return [
        (held, ""),
        *((with_digest(entry), "") for entry in plan.objects),
        ({**header, "status": status}, "status"),
    ]
