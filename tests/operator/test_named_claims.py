"""Access modes of claims that exist, as the operator looks them up."""

from typing import Any

import pytest
from moe_contract.api_server import ApiError
from moe_operator.kubernetes.kinds import CLAIM, Kind
from moe_operator.kubernetes.named_claims import NamedClaims
from test_roles import of_kind, plan, resource

MODES: dict[str, list[str]] = {
    "one": ["ReadWriteOnce"],
    "pod": ["ReadWriteOncePod"],
    "many": ["ReadWriteMany"],
    "both": ["ReadWriteOnce", "ReadWriteMany"],
    "read": ["ReadWriteOnce", "ReadOnlyMany"],
    "none": [],
    "tiny-cache": ["ReadWriteOnce"],
}


class FakeApi:
    """Claims by name; counts the reads."""

    def __init__(self, status: int | None = None) -> None:
        self.status = status
        self.read: list[str] = []

    async def get(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None:
        assert (kind, namespace) == (CLAIM, "ns")
        self.read.append(name)
        if self.status is not None:
            raise ApiError(self.status, "refused")
        return {"spec": {"accessModes": MODES[name]}} if name in MODES else None


def objects(*claims: str) -> list[dict[str, Any]]:
    volumes = [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in claims]
    return [{"kind": "Deployment", "spec": {"template": {"spec": {"volumes": volumes}}}}]


async def test_a_claim_is_for_one_node_where_none_of_its_modes_allows_several() -> None:
    found = await NamedClaims(FakeApi()).find_one_node("ns", "tiny", objects(*MODES, "missing"))
    assert found == {"one", "pod"}


async def test_modes_are_read_once_and_a_missing_claim_each_time() -> None:
    api = FakeApi()
    claims = NamedClaims(api)
    for _ in range(2):
        assert await claims.find_one_node("ns", "tiny", objects("one", "missing")) == {"one"}
    assert api.read == ["missing", "one", "missing"]
    claims.forget("ns")
    await claims.find_one_node("ns", "tiny", objects("one"))
    assert api.read[-1] == "one"


async def test_without_claims_nothing_is_read() -> None:
    api = FakeApi()
    assert await NamedClaims(api).find_one_node("ns", "tiny", [{"kind": "Service", "spec": {}}]) == frozenset()
    assert api.read == []


async def test_without_the_right_to_read_claims_the_resource_counts() -> None:
    assert await NamedClaims(FakeApi(403)).find_one_node("ns", "tiny", objects("one")) == frozenset()


async def test_another_failure_is_one_of_the_pass() -> None:
    with pytest.raises(ApiError):
        await NamedClaims(FakeApi(500)).find_one_node("ns", "tiny", objects("one"))


@pytest.mark.parametrize("roles", [None, {"mode": "fixed", "prefill": 1, "decode": 2}])
async def test_running_engines_stay_as_they_are_and_new_ones_keep_to_one_node(roles: dict[str, Any] | None) -> None:
    wanted = resource(roles, model={"uri": "hf://o/a", "cache": {"path": "/c", "claim": "one"}})
    claims = NamedClaims(FakeApi())
    for one_node in (frozenset[str](), frozenset({"one"})):
        objects = plan(wanted, one_node_claims=one_node).objects
        workloads = list(of_kind(plan(wanted, one_node_claims=one_node), "Deployment").values())
        assert await claims.find_one_node("ns", "a", objects, workloads) == one_node
    assert await claims.find_one_node("ns", "a", objects, []) == {"one"}


async def test_a_claim_of_gateways_alone_says_nothing_of_engines() -> None:
    wanted = resource(model={"uri": "pvc://one/m"})
    gateway = of_kind(plan(wanted), "Deployment")["a-gateway"]
    gateway["spec"]["template"]["spec"]["volumes"].append({"persistentVolumeClaim": {"claimName": "one"}})
    assert await NamedClaims(FakeApi()).find_one_node("ns", "a", plan(wanted).objects, [gateway]) == {"one"}


async def test_engines_of_several_nodes_that_run_are_not_refused() -> None:
    wanted = resource(None, {"parallelism": {"data": 2, "nodes": 2}}, model={"uri": "pvc://one/m"})
    groups = of_kind(plan(wanted), "LeaderWorkerSet")["a-engine"]
    assert await NamedClaims(FakeApi()).find_one_node("ns", "a", plan(wanted).objects, [groups]) == frozenset()
