"""Any valid resource becomes real and then costs nothing; any invalid one is refused or told."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fresh_operator import FreshOperator, conditions, fetch_serving, started, writes
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy
from lightkube import ApiError
from moe_operator.api import parse_resource
from moe_operator.kubernetes.kinds import SERVING
from moe_operator.kubernetes.store import Key
from moe_scheduling.problems import InvalidInput
from resource_strategies import documents, mutated

VALID, INVALID = 200, 500
AT_A_TIME = 4
Document = dict[str, Any]


def examples(strategy: SearchStrategy[Document], count: int) -> list[Document]:
    """So many documents, the same at each run."""
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


@pytest.mark.timeout(600)
async def test_every_valid_resource_becomes_real_and_a_new_operator_then_writes_nothing(
    kubeconfig: Path, namespace: str
) -> None:
    chosen = with_names_of_their_own(examples(documents(max_nodes=1), VALID))
    assert len(chosen) == VALID
    lanes = [chosen[lane::AT_A_TIME] for lane in range(AT_A_TIME)]
    await asyncio.gather(*(make_real(kubeconfig, namespace, lane) for lane in lanes))
    async with started(kubeconfig, namespace) as another:
        for document in chosen:
            await another.reconciler.reconcile(Key(namespace, document["metadata"]["name"]))
            assert writes(another.api) == {}, document
