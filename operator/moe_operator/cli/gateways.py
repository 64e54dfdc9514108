"""The way to the gateways of a deployment: on this machine, or in a cluster through `kubectl port-forward`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_contract.engine_process import ADMIN_PORT
from moe_contract.page_keys import derive_page_key

from moe_operator.cli.place import find_folder, require_name
from moe_operator.experts.reach import Cluster, Forward, forward_port, get_objects, read_tokens
from moe_operator.local.failure import Failure
from moe_operator.local.record import GATEWAY
from moe_operator.local.start import require_running
from moe_operator.plan.names import COMPONENT, INSTANCE, Names


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachedGateways:
    """The gateways of a deployment within reach.

    Attributes:
        name: of the deployment.
        urls: of their admin ports, by the pod's name; on one machine by `gateway`.
        read_tokens: reads the control tokens, the newest first.
        describe_end: why the way to the gateway of a pod has ended for good; empty while there is one.
    """

    name: str
    urls: dict[str, str]
    read_tokens: Callable[[], tuple[str, ...]]
    describe_end: Callable[[str], str] = lambda pod: ""

    def page_key(self) -> str:
        """The key of the live page.

        Raises:
            Failure: there is no control token.
        """
        tokens = self.read_tokens()
        if not tokens:
            raise Failure(f"{self.name}: it has no control token, so no live page")
        return derive_page_key(tokens[0].encode())


@contextmanager
def reach_gateways(
    name: str | None, state_dir: Path | None, namespace: str | None, context: str | None
) -> Iterator[ReachedGateways]:
    """Yields the gateways of a deployment on this machine or in a cluster, while the block runs.

    Raises:
        InvalidInput: the deployment is not known.
        Failure: it does not run, or kubectl says why not.
    """
    if namespace is None and context is None:
        folder = find_folder(name, state_dir, in_cluster=True)
        url = require_running(folder).gateway.url
        yield ReachedGateways(
            name=folder.name, urls={GATEWAY: url}, read_tokens=lambda: tuple(folder.token.read_text("utf-8").split())
        )
        return
    cluster = Cluster(namespace=namespace, context=context)
    with forward_gateways(name, cluster) as forwards:
        ways = {forward.pod: forward for forward in forwards}
        yield ReachedGateways(
            name=name or "",
            urls={pod: way.url for pod, way in ways.items()},
            read_tokens=lambda: fetch_tokens(name or "", cluster),
            describe_end=lambda pod: ways[pod].describe_end() if ways[pod].has_ended() else "",
        )


def fetch_tokens(name: str, cluster: Cluster) -> tuple[str, ...]:
    """The control tokens of a deployment in a cluster, the newest first.

    Raises:
        Failure: kubectl says why not.
    """
    return read_tokens(get_objects(cluster, "secret", Names(name).control))


@contextmanager
def forward_gateways(name: str | None, cluster: Cluster) -> Iterator[list[Forward]]:
    """Yields the ways to the admin ports of a deployment's gateways in a cluster, while the block runs.

    Raises:
        InvalidInput: no deployment is named.
        Failure: none of its gateways runs, or kubectl says why not.
    """
    name = require_name(name)
    selector = f"{INSTANCE}={name},{COMPONENT}=gateway"
    pods = get_objects(cluster, "pods", "--selector", selector).get("items", [])
    running = [pod["metadata"]["name"] for pod in pods if pod.get("status", {}).get("phase") == "Running"]
    if not running:
        raise Failure(f"{name}: no gateway runs there; see `kubectl get moes {name}`")
    with ExitStack() as stack:
        yield [stack.enter_context(forward_port(cluster, pod, ADMIN_PORT)) for pod in sorted(running)]
