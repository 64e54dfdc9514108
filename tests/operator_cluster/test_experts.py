"""Experts in a cluster: fields checked by the API server, status by what an agent says, settings that reach it."""

import base64
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cluster_api import ApiCluster, free_ports
from cluster_problem import ClusterProblem
from fresh_operator import FreshOperator, conditions, fetch_serving, started, writes
from moe_contract.agent_config import AgentConfig, EngineConfig
from moe_contract.pod_identity import identity_variables
from moe_contract.sections import Listen
from moe_operator.kubernetes.kinds import DEPLOYMENT, SECRET, SERVING
from moe_operator.kubernetes.store import Key
from moe_scheduling.expert.decision import ExpertSettings
from serving_documents import serving

Document = dict[str, Any]
FAKE = str(Path(__file__).parents[1] / "operator" / "fake_peer.py")
SPREAD: Document = {"engine": {"parallelism": {"data": 2, "expert": True}}}
TIMEOUT_S = 60.0


def apply(cluster: ApiCluster, namespace: str, document: Document) -> str:
    return cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(document))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"scheduling": {"expert": {"redundantExperts": 2}}},
            "copies of experts need engine.parallelism.expert",
        ),
        ({**SPREAD, "scheduling": {"expert": {"mode": "on"}}}, "Unsupported value"),
        ({**SPREAD, "scheduling": {"expert": {"maxStall": "2m"}}}, "a duration from 1ms to 1m is needed"),
        ({**SPREAD, "scheduling": {"expert": {"interval": 0}}}, "greater than or equal to 1"),
        ({"engine": {"args": ["--eplb-config.use_async=false"]}}, "an option that the deployment sets"),
        ({"engine": {"args": ["--enable_eplb"]}}, "an option that the deployment sets"),
    ],
)
def test_the_api_server_refuses_what_the_command_line_refuses(
    serving_cluster: ApiCluster, namespace: str, sections: Document, words: str
) -> None:
    with pytest.raises(ClusterProblem, match=words):
        apply(serving_cluster, namespace, serving(**sections))


def test_experts_may_be_spread_on_the_cpu_and_have_copies(serving_cluster: ApiCluster, namespace: str) -> None:
    engine = {**SPREAD["engine"], "runtime": "vllm-cpu"}
    document = serving(engine=engine, scheduling={"expert": {"mode": "off", "redundantExperts": 2}})
    assert "created" in apply(serving_cluster, namespace, document)


@contextmanager
def fake_agent(folder: Path, token: str) -> Iterator[int]:
    """An agent with an expert group; its port."""
    (port,) = free_ports(1)
    (folder / "token").write_text(token)
    config = AgentConfig(
        name="fake",
        run_dir=folder,
        listen=Listen(port=port),
        token_file=folder / "token",
        engine=EngineConfig(port=1, model="m", served_name="m", data_parallel=2, expert_parallel=True),
    )
    path = folder / "agent.json"
    path.write_text(config.model_dump_json())
    process = subprocess.Popen([sys.executable, FAKE, "agent", "--config", str(path)], stdout=subprocess.DEVNULL)
    try:
        give_up_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < give_up_s:
            with suppress(OSError):
                state(port)
                break
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def state(port: int) -> Document:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/v1/state", timeout=5) as answer:
        document: Document = json.load(answer)
    return document


def add_pod(cluster: ApiCluster, namespace: str, port: int, identity: Path) -> None:
    """A pod of the resource that runs and is reached at this machine; the file gets its name and uid."""
    labels = {
        "app.kubernetes.io/managed-by": "moeserving",
        "app.kubernetes.io/instance": "tiny",
        "app.kubernetes.io/component": "engine",
        "moeserving.dev/revision": "stable",
    }
    ports = [{"name": "agent", "containerPort": port}]
    container = {"name": "engine", "image": "e:1", "ports": ports, "env": identity_variables()}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "tiny-engine-x", "labels": labels},
        "spec": {"serviceAccountName": "tiny-engine", "containers": [container]},
    }
    apply(cluster, namespace, pod)
    made = json.loads(cluster.kubectl("get", "-n", namespace, "pod/tiny-engine-x", "-o", "json"))["metadata"]
    identity.write_text(json.dumps({"name": made["name"], "uid": made["uid"]}))
    lives = {"status": {"phase": "Running", "podIP": "127.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]}}
    cluster.kubectl("patch", "-n", namespace, "pod/tiny-engine-x", "--subresource=status", "-p", json.dumps(lives))


async def served(operator: FreshOperator, namespace: str) -> tuple[Key, str]:
    """The resource, made real, and its control token."""
    document = serving(**SPREAD)
    made = await operator.api.create(SERVING, document | {"metadata": {"name": "tiny", "namespace": namespace}})
    operator.store.put(SERVING, made)
    key = Key(namespace, "tiny")
    await operator.settle(key)
    secret = await operator.api.get(SECRET, namespace, "tiny-control")
    assert secret is not None
    return key, base64.b64decode(secret["data"]["token"]).decode()


def events(cluster: ApiCluster, namespace: str) -> list[tuple[str, str]]:
    rows = json.loads(cluster.kubectl("get", "events", "-n", namespace, "-o", "json"))["items"]
    return [(row["reason"], row["type"]) for row in rows if row["message"].startswith("ExpertsBalanced")]


async def test_the_status_has_what_the_agent_says_and_the_mode_reaches_it_without_a_new_pod(
    serving_cluster: ApiCluster, namespace: str, tmp_path: Path
) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key, token = await served(operator, namespace)
        live = await fetch_serving(operator.api, key) or {}
        assert conditions(live)["ExpertsBalanced"]["reason"] == "NotRecorded"
        with fake_agent(tmp_path, token) as port:
            add_pod(serving_cluster, namespace, port, tmp_path / "agent.json.pod")
            await operator.relist()
            await operator.settle(key)
            live = await fetch_serving(operator.api, key) or {}
            experts = live["status"]["experts"]
            assert (experts["engine"], experts["mode"], experts["balance"]) == ("tiny-engine-x", "dryRun", 1.6)
            assert (experts["placementVersion"], experts["lastDecision"]["outcome"]) == (7, "dryRun")
            assert conditions(live)["ExpertsBalanced"]["reason"] == "DryRunWouldMove"
            assert "1.6" in serving_cluster.kubectl("get", "moes", "tiny", "-n", namespace)
            generation = await template_generation(operator, key)

            await operator.api.merge(SERVING, *key, {"spec": {"scheduling": {"expert": {"mode": "active"}}}})
            await operator.relist()
            await operator.settle(key)
            assert state(port)["config"]["expert"] == asdict(ExpertSettings()) | {"mode": "active"}
            assert await template_generation(operator, key) == generation
            before = writes(operator.api)
            for _ in range(3):
                await operator.reconciler.reconcile(key)
            assert writes(operator.api) == before, "numbers alone are no reason to write"
    assert events(serving_cluster, namespace) == [("DryRunWouldMove", "Normal")]


async def template_generation(operator: FreshOperator, key: Key) -> int:
    found = await operator.api.get(DEPLOYMENT, key.namespace, "tiny-engine")
    assert found is not None
    return int(found["metadata"]["generation"])
