"""Any valid resource becomes real and then costs nothing; any invalid one is refused, or reported by a condition."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_api import ApiCluster
from foreign_kinds import INFERENCE_POOLS, installed
from fresh_operator import FreshOperator, conditions, fetch_serving, started, writes
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy
from moe_contract.api_server import ApiError
from moe_contract.input_errors import InvalidInput
from moe_operator.api import parse_resource
from moe_operator.kubernetes.kinds import SERVING
from moe_operator.kubernetes.store import Key
from resource_strategies import documents, mutated
from serving_documents import serving

VALID = [40, pytest.param(200, marks=pytest.mark.long)]
INVALID = [100, pytest.param(500, marks=pytest.mark.long)]
AT_A_TIME = 4
Document = dict[str, Any]


def examples(strategy: SearchStrategy[Document], count: int) -> list[Document]:
    """Returns `count` documents, the same at each run."""
    found: list[Document] = []

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(strategy)
    def collect(document: Document) -> None:
        found.append(json.loads(json.dumps(document)))

    collect()
    return found


def with_names_of_their_own(documents: list[Document]) -> list[Document]:
    """A name that was seen before gets its number put first."""
    seen: set[str] = set()
    for number, document in enumerate(documents):
        name = document["metadata"]["name"]
        document["metadata"]["name"] = f"r{number}-{name}"[:63].rstrip("-") if name in seen else name
        seen.add(document["metadata"]["name"])
    return documents


async def create(operator: FreshOperator, namespace: str, document: Document) -> Key:
    metadata = document["metadata"] | {"namespace": namespace}
    made = await operator.api.create(SERVING, document | {"metadata": metadata})
    operator.store.put(SERVING, made)
    return Key(namespace, metadata["name"])


async def make_real(kubeconfig: Path, namespace: str, documents: list[Document]) -> None:
    """One operator, one resource after the other."""
    async with started(kubeconfig, namespace) as operator:
        for document in documents:
            key = await create(operator, namespace, document)
            await operator.settle(key)
            degraded = conditions(await fetch_serving(operator.api, key) or {})["Degraded"]
            assert degraded["status"] == "False", (document, degraded)


@pytest.fixture
def pools(serving_cluster: ApiCluster) -> Iterator[None]:
    """The cluster has the Gateway API's `InferencePool`, as a resource may ask for one."""
    with installed(serving_cluster, INFERENCE_POOLS):
        yield


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("pools")
@pytest.mark.parametrize("count", VALID)
async def test_every_valid_resource_becomes_real_and_a_new_operator_then_writes_nothing(
    kubeconfig: Path, namespace: str, count: int
) -> None:
    chosen = with_names_of_their_own(examples(documents(max_nodes=1), count))
    assert len(chosen) == count
    parts = [chosen[part::AT_A_TIME] for part in range(AT_A_TIME)]
    await asyncio.gather(*(make_real(kubeconfig, namespace, part) for part in parts))
    async with started(kubeconfig, namespace) as another:
        for document in chosen:
            await another.reconciler.reconcile(Key(namespace, document["metadata"]["name"]))
            assert writes(another.api) == {}, document


def is_valid(document: Document) -> bool:
    try:
        parse_resource(document)
    except InvalidInput:
        return False
    return True


async def refused(operator: FreshOperator, document: Document) -> int:
    """Creates it as kubectl does, with an unknown field as an error; the status of the refusal, 0 when it was taken."""
    try:
        await operator.api.server.create(SERVING, document, strict=True)
    except ApiError as error:
        return error.status or -1
    return 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", INVALID)
async def test_every_invalid_resource_is_refused_by_the_api_server_or_reported_by_a_condition(
    kubeconfig: Path, namespace: str, count: int
) -> None:
    chosen = [document for document in examples(mutated(), 2 * count) if not is_valid(document)][:count]
    assert len(chosen) == count
    outcomes: Counter[str] = Counter()
    async with started(kubeconfig, namespace) as operator:
        for document in with_names_of_their_own(chosen):
            metadata = document["metadata"] | {"namespace": namespace}
            refusal = await refused(operator, document | {"metadata": metadata})
            assert refusal in (0, 400, 422), document
            outcomes["refused" if refusal else "reported"] += 1
            if not refusal:
                await assert_reported(operator, Key(namespace, document["metadata"]["name"]))
    assert outcomes["refused"] > 0.9 * count, f"the schema says too little: {outcomes}"


async def assert_reported(operator: FreshOperator, key: Key) -> None:
    operator.store.put(SERVING, await fetch_serving(operator.api, key) or {})
    assert await operator.reconciler.reconcile(key) is None
    live = await fetch_serving(operator.api, key) or {}
    assert conditions(live)["Degraded"]["reason"] == "InvalidSpec", live
    assert operator.children(key) == {}, "nothing is made of what is invalid"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"model": {"uri": "pvc:///folder"}},
            "spec.model.uri: the name of a claim is needed, such as pvc://models/qwen3",
        ),
        (
            {"model": {"uri": "file://folder"}},
            "spec.model.uri: an absolute folder in the container is needed in a cluster, got 'file://folder'",
        ),
    ],
)
async def test_an_error_that_only_a_plan_finds_is_reported_by_a_condition(
    kubeconfig: Path, namespace: str, spec: Document, message: str
) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await create(operator, namespace, serving(**spec))
        await assert_reported(operator, key)
        assert conditions(await fetch_serving(operator.api, key) or {})["Degraded"]["message"] == message
