"""The way to the agents of a deployment that runs: on this machine, or in a cluster through `kubectl`.

kubectl knows how to reach a cluster wherever its user does, with the credentials of that user. A forwarded port enters
the pod itself, so the NetworkPolicy that closes the agents' port to others need not be opened for it.
"""

import base64
import json
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO, Any

from moe_contract.engine_process import AGENT_PORT_NAME

from moe_operator.local.failure import Failure
from moe_operator.local.folder import Folder
from moe_operator.local.observation import name_engine
from moe_operator.local.start import require_running
from moe_operator.plan.names import COMPONENT, INSTANCE, LWS_WORKER_INDEX, Names

KUBECTL = "kubectl"
_ANSWER_TIMEOUT_S = 30.0
# The loopback address of the machine's first family; with both kubectl has a line for each.
_FORWARDING = re.compile(r"Forwarding from (127\.0\.0\.1:\d+|\[::1\]:\d+)")

Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """One agent that can be asked."""

    engine: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """A deployment within reach.

    Attributes:
        name: of the deployment.
        agents: of its engines.
        tokens: control tokens, the newest first.
    """

    name: str
    agents: tuple[Agent, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Namespace and context for kubectl; None leaves each to the user's own configuration."""

    namespace: str | None = None
    context: str | None = None

    def command(self, *words: str) -> list[str]:
        """Returns the command line of kubectl for this cluster."""
        namespace = [] if self.namespace is None else ["--namespace", self.namespace]
        context = [] if self.context is None else ["--context", self.context]
        return [KUBECTL, *namespace, *context, *words]


def reach_local(folder: Folder) -> Reached:
    """A deployment on this machine.

    Raises:
        Failure: it does not run.
    """
    record = require_running(folder)
    agents = (Agent(engine=name_engine(record, index), url=row.url) for index, row in enumerate(record.agents))
    return Reached(name=folder.name, agents=tuple(agents), tokens=tuple(folder.token.read_text("utf-8").split()))


@contextmanager
def reach_cluster(name: str, cluster: Cluster) -> Iterator[Reached]:
    """A deployment in a cluster, while the block runs.

    Raises:
        Failure: kubectl is missing or says why not, or no engine runs.
    """
    names = Names(name)
    selector = f"{INSTANCE}={name},{COMPONENT}=engine"
    pods = find_engines(get_objects(cluster, "pods", "--selector", selector).get("items", []))
    if not pods:
        raise Failure(f"{name}: no engine runs there; see `kubectl get moes {name}`")
    tokens = read_tokens(get_objects(cluster, "secret", names.control))
    with ExitStack() as forwards:
        agents = [
            Agent(engine=pod, url=forwards.enter_context(forward_port(cluster, pod, port)).url)
            for pod, port in pods.items()
        ]
        yield Reached(name=name, agents=tuple(agents), tokens=tokens)


def find_engines(pods: Sequence[Document]) -> dict[str, int]:
    """Name and agent's port of each pod that runs the first rank of an engine, by name. Pure."""
    found = {}
    for pod in pods:
        metadata = pod["metadata"]
        running = pod.get("status", {}).get("phase") == "Running" and "deletionTimestamp" not in metadata
        leads = metadata.get("labels", {}).get(LWS_WORKER_INDEX, "0") == "0"
        port = next(iter(_agent_ports(pod)), None)
        if running and leads and port is not None:
            found[metadata["name"]] = port
    return dict(sorted(found.items()))


def _agent_ports(pod: Document) -> Iterator[int]:
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", []):
            if port.get("name") == AGENT_PORT_NAME:
                yield int(port["containerPort"])


def read_tokens(secret: Document) -> tuple[str, ...]:
    """The control tokens of a Secret. Pure."""
    return tuple(base64.b64decode(secret.get("data", {}).get("token", "")).decode(errors="replace").split())


def get_objects(cluster: Cluster, *words: str) -> Document:
    """Returns the answer of `kubectl get`.

    Raises:
        Failure: kubectl is missing, says why not, or gives no answer.
    """
    command = cluster.command("get", *words, "--output", "json")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise _missing() from None
    except subprocess.TimeoutExpired:
        raise Failure(f"kubectl gave no answer within {_ANSWER_TIMEOUT_S:g} s") from None
    if done.returncode:
        raise Failure(f"kubectl: {_last_line(done.stderr)}")
    document: Document = json.loads(done.stdout)
    return document


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """A way to a port of a pod that kubectl keeps open."""

    pod: str
    url: str
    process: "subprocess.Popen[str]"
    errors: IO[str]

    def has_ended(self) -> bool:
        """Whether kubectl has ended, as it does some time after the pod has."""
        return self.process.poll() is not None

    def describe_end(self) -> str:
        """Why it ended, in the last words of kubectl."""
        return f"kubectl: the way to the pod {self.pod} has ended: {_read_last_line(self.errors)}"


@contextmanager
def forward_port(cluster: Cluster, pod: str, port: int) -> Iterator[Forward]:
    """The way to a pod's port while the block runs.

    Raises:
        Failure: kubectl is missing or says why not.
    """
    command = cluster.command("port-forward", "--address", "localhost", f"pod/{pod}", f":{port}")
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        except FileNotFoundError:
            raise _missing() from None
        try:
            assert process.stdout is not None
            match = _FORWARDING.match(process.stdout.readline())
            # kubectl writes a line for each connection; one that nobody reads would stop it in the end.
            threading.Thread(target=_drain, args=(process.stdout,), daemon=True).start()
            if match is None:
                process.kill()
                process.wait()
                raise Failure(f"kubectl: no way to the pod {pod}: {_read_last_line(errors)}")
            yield Forward(pod=pod, url=f"http://{match[1]}", process=process, errors=errors)
        finally:
            process.kill()
            process.wait()


def _drain(output: IO[str]) -> None:
    with output:
        for _ in output:
            pass


def _read_last_line(errors: IO[str]) -> str:
    errors.seek(0)
    return _last_line(errors.read())


def _missing() -> Failure:
    return Failure("kubectl is missing: it is the way to the agents in a cluster")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]
