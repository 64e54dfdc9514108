"""The condition `TargetsMet` on a real API server: absent without bounds, by what gateways measured, without writes."""

from pathlib import Path
from typing import Any

from fresh_operator import FreshOperator, change, fetch_conditions, served, started, writes
from moe_operator.kubernetes.store import Key
from serving_documents import serving
from stand_in_peers import Peers, peers_listening

BOUNDS = {"engine": {"targets": {"ttft": "500ms", "interToken": None}}}


async def look(operator: FreshOperator, key: Key) -> Any:
    """The condition after a pass that asks the gateways anew."""
    operator.reconciler._streams.forget(key)
    await operator.relist()
    await operator.settle(key)
    return (await fetch_conditions(operator, key)).get("TargetsMet")


def measure(peers: Peers, address: str, bucket: int, count: int) -> None:
    peers.further[address] = {"ttft": {"bound_s": 0.5, "counts": [[bucket, count]]}}


async def test_bounds_are_judged_by_what_all_gateways_measured(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator, peers_listening() as peers:
        key = await served(operator, namespace, serving())
        first = await peers.make(operator.api, key, "gateway", "g-a")
        second = await peers.make(operator.api, key, "gateway", "g-b")
        assert await look(operator, key) is None

        await change(operator, key, scheduling=BOUNDS)
        found = await look(operator, key)
        assert (found["status"], found["reason"]) == ("Unknown", "NoTraffic")

        measure(peers, first, -3, 95)
        found = await look(operator, key)
        assert (found["status"], found["reason"]) == ("True", "WithinTargets")

        measure(peers, second, 16, 50)
        found = await look(operator, key)
        assert (found["status"], found["reason"]) == ("False", "TargetsMissed")
        assert "within 1s, bound 500ms (needed: more engines, or a longer" in found["message"]
        before = writes(operator.api)
        measure(peers, second, 17, 50)
        await look(operator, key)
        assert writes(operator.api) == before, "other numbers wait for their time"

        await change(operator, key, scheduling={"engine": {"targets": None}})
        assert await look(operator, key) is None
