"""Prefill and decode apart on a real node: fixed roles and `auto`, scaled, rolled and evicted under load."""

import json
from collections.abc import Collection
from typing import Any

import pytest
from deployed import Serving, wait_for
from test_on_a_node import Load

# Ten engines start, some beside others, on the CPUs of one.
pytestmark = pytest.mark.timeout(7200)
# So little that four engines find room on a node of two CPUs: two decode engines, one that takes over, and the other's.
# Where other work takes the processors, a start can last for ten minutes.
SHARE = {"resources": {"cpu": "100m"}, "startupTimeout": "20m"}
# Clients leave time for the engines that start.
PAUSE_S = 0.5
ROLE = "moeserving.dev/role"
# A prompt that is worth a transfer.
REPEATS = 40
FIXED = {"mode": "fixed", "prefill": 1, "decode": 1}


def engines(serving: Serving, role: str) -> dict[str, Any]:
    """Pods of the engines of a role that are ready and not about to end, by uid."""
    ready = serving.ready_engines()
    return {pod["metadata"]["uid"]: pod for pod in ready if pod["metadata"]["labels"].get(ROLE, "") == role}


def are_there(serving: Serving, role: str, number: int, without: Collection[str] = ()) -> bool:
    """Whether exactly this number of engines of a role is ready, none of them among these uids."""
    found = engines(serving, role)
    return len(found) == number and not found.keys() & set(without)


def is_transferring(serving: Serving) -> bool:
    return bool(serving.condition("Disaggregated").get("reason") == "Transferring")


def may_exchange(serving: Serving) -> bool:
    """Whether two engines fit each other. Whether a request is split is the gateway's choice, by its prediction."""
    return serving.condition("Disaggregated").get("reason") in ("NoTransfers", "Transferring")


def evict(serving: Serving, pod: Any) -> None:
    """Asks for the pod's eviction, as a drain of its node does."""
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": namespace}}
    path = f"/api/v1/namespaces/{namespace}/pods/{name}/eviction"
    serving.kubectl("create", "--raw", path, "-f", "-", text=json.dumps(body))


def answered(load: Load) -> None:
    """Each request of the load got its whole answer."""
    assert len(load.statuses) > 10
    assert set(load.statuses) == {200}
    assert load.broken == []


def test_fixed_roles_are_scaled_rolled_and_drained_under_load(serving: Serving) -> None:
    serving.apply(engine={"replicas": None, "roles": FIXED, **SHARE})
    serving.wait_for_engines(
        "an engine of each role is ready",
        lambda: are_there(serving, "prefill", 1) and are_there(serving, "decode", 1),
    )
    wait_for("it serves", lambda: serving.condition("Ready").get("status") == "True")
    with Load(serving.url, clients=2, repeats=REPEATS, pause_s=PAUSE_S) as load:
        wait_for("KV blocks travel", lambda: is_transferring(serving), 180)

        serving.apply(engine={"roles": {"decode": 2}})
        serving.wait_for_engines("there are two decode engines", lambda: are_there(serving, "decode", 2))
        rows = {row["role"]: row for row in serving.resource()["status"]["roles"]}
        assert (rows["prefill"]["desiredReplicas"], rows["decode"]["desiredReplicas"]) == (1, 2)

        before = {role: set(engines(serving, role)) for role in ("prefill", "decode")}
        serving.apply(engine={"roles": {"overrides": {"decode": {"env": {"OF_THIS_ROLE": "1"}}}}})
        serving.wait_for_engines(
            "both decode engines are new", lambda: are_there(serving, "decode", 2, without=before["decode"])
        )
        assert set(engines(serving, "prefill")) == before["prefill"]

        victim, pod = next(iter(engines(serving, "decode").items()))
        evict(serving, pod)
        serving.wait_for_engines("another one takes its place", lambda: are_there(serving, "decode", 2, {victim}))
        wait_for("KV blocks travel again", lambda: is_transferring(serving), 180)
    answered(load)


def test_engines_that_may_exchange_blocks_are_scaled_rolled_and_drained_under_load(serving: Serving) -> None:
    serving.apply(engine={"replicas": 2, "roles": {"mode": "auto"}, **SHARE})
    serving.wait_for_engines("two engines are ready", lambda: are_there(serving, "", 2))
    wait_for("it serves", lambda: serving.condition("Ready").get("status") == "True")
    wait_for("they may exchange blocks", lambda: may_exchange(serving))
    with Load(serving.url, clients=2, repeats=REPEATS, pause_s=PAUSE_S) as load:
        serving.apply(engine={"replicas": 3})
        serving.wait_for_engines("a third one is ready", lambda: are_there(serving, "", 3))
        serving.apply(engine={"replicas": 2})
        serving.wait_for_engines("two stay", lambda: are_there(serving, "", 2))

        before = set(engines(serving, ""))
        serving.apply(engine={"env": {"NEW": "1"}})
        serving.wait_for_engines("both are new", lambda: are_there(serving, "", 2, without=before))
        wait_for("the new ones may exchange blocks", lambda: may_exchange(serving))
        victim, pod = next(iter(engines(serving, "").items()))
        evict(serving, pod)
        serving.wait_for_engines("another one takes its place", lambda: are_there(serving, "", 2, {victim}))
        wait_for("so may the one in its place", lambda: may_exchange(serving))
    answered(load)
