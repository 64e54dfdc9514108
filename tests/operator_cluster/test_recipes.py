"""Recipes of docs/clusters.md, labels and annotations against a real API server."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fresh_operator import FreshOperator, conditions, fetch_serving, started, writes
from moe_contract.api_server import ApiError
from moe_operator.kubernetes.kinds import DEPLOYMENT, SERVING
from moe_operator.kubernetes.store import Key
from serving_documents import serving

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"
Document = dict[str, Any]
RECIPES = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)]
# A Service of two families needs a cluster of two; LeaderWorkerSets need their kind.
HERE = [recipe for recipe in RECIPES if recipe["metadata"]["name"] != "dual" and "'nodes': 2" not in str(recipe)]


async def create(operator: FreshOperator, namespace: str, document: Document) -> Key:
    made = await operator.api.server.create(
        SERVING, document | {"metadata": document["metadata"] | {"namespace": namespace}}, strict=True
    )
    operator.store.put(SERVING, made)
    return Key(namespace, document["metadata"]["name"])


@pytest.mark.parametrize("recipe", HERE, ids=lambda recipe: recipe["metadata"]["name"])
async def test_a_recipe_becomes_real_and_then_costs_nothing(kubeconfig: Path, namespace: str, recipe: Document) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await create(operator, namespace, recipe)
        await operator.settle(key)
        degraded = conditions(await fetch_serving(operator.api, key) or {})["Degraded"]
        assert degraded["status"] == "False", degraded
    async with started(kubeconfig, namespace) as another:
        await another.reconciler.reconcile(key)
        assert writes(another.api) == {}


def with_labels(document: Document) -> None:
    document["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "other", "team": "b"}
    document["spec"]["commonMetadata"] = {"labels": {"cost-center": "7"}, "annotations": {"note": "b \U0001f600"}}


def without_labels(document: Document) -> None:
    document["metadata"]["labels"] = {}
    del document["spec"]["commonMetadata"]


@pytest.mark.parametrize("change", [with_labels, without_labels])
async def test_other_labels_reach_the_objects_and_restart_no_pod(
    kubeconfig: Path, namespace: str, change: Callable[[Document], None]
) -> None:
    common = {"labels": {"cost-center": "1", "gone": "x"}, "annotations": {"note": "a"}}
    document = serving(commonMetadata=common)
    document["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "serving", "team": "a"}
    async with started(kubeconfig, namespace) as operator:
        key = await create(operator, namespace, document)
        await operator.settle(key)
        before = {row["metadata"]["name"]: row for row in operator.store.of(key, DEPLOYMENT)}
        live = await fetch_serving(operator.api, key) or {}
        changed = copy.deepcopy(live)
        change(changed)
        operator.store.put(SERVING, await operator.api.server.replace(SERVING, changed))
        await operator.settle(key)
        after = {row["metadata"]["name"]: row for row in operator.store.of(key, DEPLOYMENT)}
    wanted = changed["metadata"]["labels"] | changed["spec"].get("commonMetadata", {}).get("labels", {})
    for name, row in after.items():
        labels = row["metadata"]["labels"]
        expected = {key: value for key, value in wanted.items() if "kueue" not in key or name.endswith("engine")}
        assert expected.items() <= labels.items()
        wanted_note = changed["spec"].get("commonMetadata", {}).get("annotations", {}).get("note")
        assert row["metadata"]["annotations"].get("note") == wanted_note
        assert "gone" not in labels, "what is no longer asked for is taken away"
        assert row["spec"]["template"] == before[name]["spec"]["template"]


@pytest.mark.parametrize(
    "section",
    [
        {"commonMetadata": {"labels": {"moeserving.dev/revision": "mine"}}},
        {"commonMetadata": {"labels": {"app.kubernetes.io/instance": "mine"}}},
        {"commonMetadata": {"labels": {"a b": "c"}}},
        {"commonMetadata": {"labels": {"a": "c d"}}},
        {"commonMetadata": {"annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"}}},
        {"metrics": {"labels": {"kubernetes.io/service-name": "mine"}}},
        {"gateway": {"service": {"labels": {"app.kubernetes.io/component": "mine"}}}},
        {"gateway": {"service": {"loadBalancerClass": "internal"}}},
        {"networkPolicy": {"allowFrom": [{}]}},
        {"networkPolicy": {"allowFrom": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}},
        {"networkPolicy": {"metricsFrom": [{"podSelector": {"matchExpressions": [{"key": "a", "operator": "Is"}]}}]}},
        {"networkPolicy": {"meshPort": 0}},
    ],
)
async def test_what_is_not_a_users_to_set_is_refused_by_the_api_server(
    kubeconfig: Path, namespace: str, section: Document
) -> None:
    async with started(kubeconfig, namespace) as operator:
        with pytest.raises(ApiError) as caught:
            await create(operator, namespace, serving(**section))
    assert caught.value.status == 422
