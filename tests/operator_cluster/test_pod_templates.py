"""Pod templates on their way from a file to the pods."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_api import ApiCluster
from fresh_operator import fetch, fetch_conditions, fetch_serving, served, started
from moe_operator.kubernetes.kinds import CLAIM, DEPLOYMENT
from moe_operator.kubernetes.store import Key
from serving_documents import serving

Document = dict[str, Any]


def with_probe(probe: Any, section: str = "engine") -> Document:
    return serving(**{section: {"podTemplate": {"spec": {"containers": [{"name": section, "startupProbe": probe}]}}}})


def apply(cluster: ApiCluster, namespace: str, folder: Path, document: Document, *options: str) -> None:
    file = folder / "serving.yaml"
    file.write_text(yaml.safe_dump(document))
    cluster.kubectl("apply", "-n", namespace, "-f", file, *options)


@pytest.mark.parametrize("section", ["engine", "gateway"])
@pytest.mark.parametrize("options", [(), ("--server-side",)], ids=["client", "server"])
async def test_a_probe_that_is_taken_away_by_a_directive_is_gone_however_it_is_applied(
    serving_cluster: ApiCluster, namespace: str, tmp_path: Path, options: tuple[str, ...], section: str
) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = Key(namespace, "tiny")
        for probe in ({"failureThreshold": 7}, {"$patch": "delete"}):
            apply(serving_cluster, namespace, tmp_path, with_probe(probe, section), *options)
            await operator.relist()
            await operator.settle(key)
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"
        deployment = await fetch(operator, DEPLOYMENT, key, f"tiny-{section}")
        assert "startupProbe" not in deployment["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(("options", "survives"), [((), False), (("--server-side",), True)], ids=["client", "server"])
async def test_a_null_survives_a_change_by_server_side_apply_alone(
    serving_cluster: ApiCluster, namespace: str, tmp_path: Path, options: tuple[str, ...], survives: bool
) -> None:
    """This is what docs/operations.md says, and why it recommends the directive."""
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        for probe in ({"failureThreshold": 7}, None):
            apply(serving_cluster, namespace, tmp_path, with_probe(probe), *options)
        live = await fetch_serving(operator.api, Key(namespace, "tiny")) or {}
        container = live["spec"]["engine"]["podTemplate"]["spec"]["containers"][0]
        assert ("startupProbe" in container) is survives


async def test_engines_that_share_a_disk_of_one_node_ask_for_one_node(kubeconfig: Path, namespace: str) -> None:
    """The scheduler does not run here; the API server takes the affinity as it is planned."""
    cache = {"path": "/cache", "size": "1Gi", "accessMode": "ReadWriteOnce"}
    term = {"topologyKey": "zone", "labelSelector": {"matchLabels": {"a": "b"}}}
    affinity = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    document = serving(
        model={"uri": "hf://org/tiny", "cache": cache},
        engine={"replicas": 2, "podTemplate": {"spec": {"affinity": affinity}}},
    )
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, document)
        spec = (await fetch(operator, DEPLOYMENT, key, "tiny-engine"))["spec"]
        assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
        theirs, ours = spec["template"]["spec"]["affinity"]["podAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]
        assert theirs == term
        assert ours["topologyKey"] == "kubernetes.io/hostname"
        selector, labels = ours["labelSelector"]["matchLabels"], spec["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
        assert "moeserving.dev/revision" not in selector, "a canary shares the disk too"


async def test_the_access_mode_of_a_claim_that_exists_is_looked_up(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        for name, mode in (("once", "ReadWriteOnce"), ("many", "ReadWriteMany")):
            claim = {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": name, "namespace": namespace},
                "spec": {"accessModes": [mode], "resources": {"requests": {"storage": "1Gi"}}},
            }
            await operator.api.server.create(CLAIM, claim)
            model = {"uri": "hf://org/tiny", "cache": {"path": "/cache", "claim": name}}
            key = await served(operator, namespace, serving(name=name, model=model, engine={"replicas": 2}))
            spec = (await fetch(operator, DEPLOYMENT, key, f"{name}-engine"))["spec"]
            assert ("affinity" in spec["template"]["spec"]) is (name == "once")
            assert spec["strategy"]["rollingUpdate"]["maxSurge"] == int(name == "many")
