"""What the end-to-end tests share: kubectl, a resource of their own, clients.

All traffic goes to the test cluster's own Services and pods.
"""

import asyncio
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from cluster_binaries import locate

ROOT = Path(__file__).parents[2]
OPERATOR_NAMESPACE = "moeserving-system"
READY_S = 420
# Longer than an engine has for its start, and its streams for their end.
STILL_S = 1260


@dataclass
class Kubectl:
    """kubectl against the cluster; JSON in and out."""

    cluster: Any
    namespace: str = "default"

    def __call__(self, *arguments: str, text: str | None = None) -> str:
        return str(self.cluster.kubectl("-n", self.namespace, *arguments, stdin=text))

    def get(self, *arguments: str) -> Any:
        return json.loads(self("get", *arguments, "-o", "json"))

    def items(self, kind: str, selector: str = "") -> list[Any]:
        return list(self.get(kind, *(["-l", selector] if selector else []))["items"])

    def apply(self, document: dict[str, Any]) -> None:
        self("apply", "-f", "-", text=yaml.safe_dump(document))


def helm(cluster: Any, *arguments: str) -> str:
    """Output of helm against the cluster."""
    command = [str(locate("helm")), "--kubeconfig", str(cluster.kubeconfig), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(what: str, look: Callable[[], Any], limit_s: float = 120.0, every_s: float = 0.5) -> Any:
    """The first true answer; fails with `what` after the limit."""
    end_s = time.monotonic() + limit_s
    while True:
        answer = look()
        if answer:
            return answer
        assert time.monotonic() < end_s, f"not within {limit_s:.0f} s: {what}"
        time.sleep(every_s)


def wait_while_moving(
    what: str, look: Callable[[], Any], see: Callable[[], Any], still_s: float = STILL_S, every_s: float = 3.0
) -> Any:
    """The first true answer of `look`; fails with `what` once nothing that `see` shows has changed for `still_s`."""
    seen, changed_s, began_s = see(), time.monotonic(), time.monotonic()
    while not (answer := look()):
        now_s = time.monotonic()
        if (shown := see()) != seen:
            seen, changed_s = shown, now_s
        still = now_s - changed_s
        assert still < still_s, (
            f"nothing moved for {still:.0f} s, {now_s - began_s:.0f} s after the start: {what}; {seen}"
        )
        time.sleep(every_s)
    return answer


@dataclass
class Serving:
    """A resource of a test's own, with the tiny model on real vLLM, mounted from this machine."""

    kubectl: Kubectl
    pod_template: dict[str, Any]
    model: Path
    name: str = "tiny"
    spec: dict[str, Any] = field(default_factory=dict)

    def document(self, **changes: Any) -> dict[str, Any]:
        """The resource: a small engine on the CPU; `changes` are laid over `spec`."""
        spec: dict[str, Any] = {
            "model": {"uri": f"file://{self.model}", "name": "tiny"},
            "engine": {
                "runtime": "vllm-cpu",
                "replicas": 1,
                "resources": {"cpu": "500m", "kvCacheMemory": "256Mi", "sharedMemory": "1Gi"},
                "args": ["--max-model-len=4096", "--max-num-seqs=64", "--dtype=float32", "--enforce-eager"],
                "startupTimeout": "10m",
                "drainTimeout": "3m",
                "podTemplate": self.pod_template,
            },
        }
        self.spec = _merge(self.spec or spec, changes)
        return {
            "apiVersion": "moeserving.dev/v1alpha1",
            "kind": "MoEServing",
            "metadata": {"name": self.name},
            "spec": self.spec,
        }

    def apply(self, **changes: Any) -> None:
        self.kubectl.apply(self.document(**changes))

    def resource(self) -> Any:
        return self.kubectl.get("moes", self.name)

    def condition(self, kind: str) -> Any:
        rows = self.resource().get("status", {}).get("conditions", [])
        return next((row for row in rows if row["type"] == kind), {})

    def wait_ready(self) -> None:
        self.kubectl("wait", "--for=condition=Ready", f"moes/{self.name}", f"--timeout={READY_S}s")

    def pods(self, component: str) -> list[Any]:
        selector = f"app.kubernetes.io/instance={self.name},app.kubernetes.io/component={component}"
        return [pod for pod in self.kubectl.items("pods", selector) if "deletionTimestamp" not in pod["metadata"]]

    def ready_engines(self) -> list[Any]:
        return [pod for pod in self.pods("engine") if is_ready(pod)]

    def see_engines(self) -> list[str]:
        """What changes while engines start and end: their pods, with what keeps them from a node."""
        shown = []
        selector = f"app.kubernetes.io/instance={self.name},app.kubernetes.io/component=engine"
        for pod in self.kubectl.items("pods", selector):
            status = pod["status"]
            rows = [f"{row['type']} {row['status']} {row.get('message', '')}" for row in status.get("conditions", [])]
            states = [(row["restartCount"], row["state"]) for row in status.get("containerStatuses", [])]
            ending = "deletionTimestamp" in pod["metadata"]
            shown.append(f"{pod['metadata']['name']} {'ends ' if ending else ''}{rows} {states}")
        return sorted(shown)

    def wait_for_engines(self, what: str, look: Callable[[], Any]) -> Any:
        """The first true answer; waits as long as engines start and end, which their own limits bound."""
        return wait_while_moving(what, look, self.see_engines)

    @property
    def url(self) -> str:
        """URL of the gateway's Service."""
        spec = self.kubectl.get("service", self.name)["spec"]
        return f"http://{spec['clusterIP']}:{spec['ports'][0]['port']}"


def is_ready(pod: Any) -> bool:
    return any(row["type"] == "Ready" and row["status"] == "True" for row in pod["status"].get("conditions", []))


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        inner = merged.get(name)
        merged[name] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return {name: value for name, value in merged.items() if value is not None}


async def chat(session: aiohttp.ClientSession, url: str, text: str, **options: Any) -> tuple[int, str]:
    """Status and whole answer of a chat; a stream's is its text of events."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 16, **options}
    timeout = aiohttp.ClientTimeout(total=600, sock_connect=10)
    async with session.post(f"{url}/v1/chat/completions", json=body, timeout=timeout) as answer:
        return answer.status, await answer.text()


def chat_once(url: str, text: str, **options: Any) -> tuple[int, str]:
    """One chat, from where no loop runs."""

    async def once() -> tuple[int, str]:
        async with aiohttp.ClientSession() as session:
            return await chat(session, url, text, **options)

    return asyncio.run(once())
