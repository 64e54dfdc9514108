"""Prefill and decode apart on a real node: fixed roles and `auto`, scaled, rolled and evicted under load."""

import json
from typing import Any

import pytest
from deployed import Serving, wait_for
from test_on_a_node import Load

pytestmark = pytest.mark.timeout(3600)
# Several engines start at the same time, on the CPUs of one.
START_S = 900
ROLE = "moeserving.dev/role"
# A prompt that is worth a transfer.
REPEATS = 40
FIXED = {"mode": "fixed", "prefill": 1, "decode": 1}


def engines(serving: Serving, role: str) -> dict[str, Any]:
    """Pods of the engines of a role that are ready and not about to end, by uid."""
    ready = serving.ready_engines()
    return {pod["metadata"]["uid"]: pod for pod in ready if pod["metadata"]["labels"].get(ROLE, "") == role}


def is_transferring(serving: Serving) -> bool:
    return bool(serving.condition("Disaggregated").get("reason") == "Transferring")


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
    serving.apply(engine={"replicas": None, "roles": FIXED})
    wait_for(
        "an engine of each role is ready", lambda: engines(serving, "prefill") and engines(serving, "decode"), START_S
    )
    wait_for("it serves", lambda: serving.condition("Ready").get("status") == "True")
    with Load(serving.url, clients=2, repeats=REPEATS) as load:
        wait_for("KV blocks travel", lambda: is_transferring(serving), 180)

        serving.apply(engine={"roles": {"decode": 2}})
        wait_for("there are two decode engines", lambda: len(engines(serving, "decode")) == 2, START_S)
        rows = {row["role"]: row for row in serving.resource()["status"]["roles"]}
        assert (rows["prefill"]["desiredReplicas"], rows["decode"]["desiredReplicas"]) == (1, 2)

        before = {role: set(engines(serving, role)) for role in ("prefill", "decode")}
        serving.apply(engine={"roles": {"overrides": {"decode": {"env": {"OF_THIS_ROLE": "1"}}}}})
        wait_for(
            "both decode engines are new",
            lambda: len(found := engines(serving, "decode")) == 2 and not before["decode"] & set(found),
            START_S,
        )
        assert set(engines(serving, "prefill")) == before["prefill"]

        victim, pod = next(iter(engines(serving, "decode").items()))
        evict(serving, pod)
        wait_for(
            "another one takes its place",
            lambda: len(found := engines(serving, "decode")) == 2 and victim not in found,
            START_S,
        )
        wait_for("KV blocks travel again", lambda: is_transferring(serving), 180)
    answered(load)


def test_engines_that_are_alike_exchange_blocks_while_they_are_scaled_rolled_and_drained(serving: Serving) -> None:
    serving.apply(engine={"replicas": 2, "roles": {"mode": "auto"}})
    wait_for("two engines are ready", lambda: len(engines(serving, "")) == 2, START_S)
    wait_for("it serves", lambda: serving.condition("Ready").get("status") == "True")
    assert serving.condition("Disaggregated")["reason"] in ("NoTransfers", "Transferring")
    with Load(serving.url, clients=2, repeats=REPEATS) as load:
        serving.apply(engine={"replicas": 3})
        wait_for("a third one is ready", lambda: len(engines(serving, "")) == 3, START_S)
        serving.apply(engine={"replicas": 2})
        wait_for("two stay", lambda: len(engines(serving, "")) == 2, 240)

        before = set(engines(serving, ""))
        serving.apply(engine={"env": {"NEW": "1"}})
        wait_for("both are new", lambda: len(found := engines(serving, "")) == 2 and not before & set(found), START_S)
        victim, pod = next(iter(engines(serving, "").items()))
        evict(serving, pod)
        wait_for(
            "another one takes its place",
            lambda: len(found := engines(serving, "")) == 2 and victim not in found,
            START_S,
        )
    answered(load)
