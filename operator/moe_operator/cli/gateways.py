"""The way to the gateways of a deployment: on this machine, or in a cluster through `kubectl port-forward`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

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
        describe_end: why the way to the gateway of a pod has ended; empty while there is one.
        refresh: looks which gateways there are now, opens and closes ways, and returns the URLs as they are then; None:
            they do not change. It waits for kubectl, and raises `Failure` where that says why not.
    """

    name: str
    urls: dict[str, str]
    read_tokens: Callable[[], tuple[str, ...]]
    describe_end: Callable[[str], str] = lambda pod: ""
    refresh: Callable[[], dict[str, str]] | None = None

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
    with GatewayWays(require_name(name), cluster) as ways:
        yield ReachedGateways(
            name=ways.name,
            urls=ways.refresh(),
            read_tokens=lambda: fetch_tokens(ways.name, cluster),
            describe_end=ways.describe_end,
            refresh=ways.refresh,
        )


class GatewayWays:
    """The ways to the admin ports of a deployment's gateways in a cluster, closed at the end of the block.

    Args:
        name: of the deployment.
        cluster: where it runs.
    """

    def __init__(self, name: str, cluster: Cluster) -> None:
        self.name, self._cluster = name, cluster
        self._ways: dict[str, tuple[Forward, ExitStack]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pod in [*self._ways]:
            self._close(pod)

    def refresh(self) -> dict[str, str]:
        """Opens a way to each gateway that runs, and closes those to gateways that are gone.

        Returns:
            The URLs by the pod's name.

        Raises:
            Failure: no gateway runs, or kubectl says why not.
        """
        running = find_gateways(self.name, self._cluster)
        for pod in [*self._ways]:
            if pod not in running or self._ways[pod][0].has_ended():
                self._close(pod)
        for pod in running:
            if pod not in self._ways:
                with ExitStack() as stack:
                    forward = stack.enter_context(forward_port(self._cluster, pod, ADMIN_PORT))
                    self._ways[pod] = forward, stack.pop_all()
        return {pod: forward.url for pod, (forward, _) in self._ways.items()}

    def describe_end(self, pod: str) -> str:
        """Why the way to a pod has ended; empty while there is one."""
        try:
            forward, _ = self._ways[pod]
            return forward.describe_end() if forward.has_ended() else ""
        except (KeyError, ValueError):
            # It was closed, perhaps by `refresh` in its thread just now.
            return f"the gateway {pod} is gone"

    def _close(self, pod: str) -> None:
        self._ways.pop(pod)[1].close()


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
    running = find_gateways(require_name(name), cluster)
    with ExitStack() as stack:
        yield [stack.enter_context(forward_port(cluster, pod, ADMIN_PORT)) for pod in running]


def find_gateways(name: str, cluster: Cluster) -> list[str]:
    """Names of the pods of a deployment's gateways that run and are not about to end.

    Raises:
        Failure: there is none, or kubectl says why not.
    """
    selector = f"{INSTANCE}={name},{COMPONENT}=gateway"
    pods = get_objects(cluster, "pods", "--selector", selector).get("items", [])
    running = [pod for pod in pods if pod.get("status", {}).get("phase") == "Running"]
    names = [pod["metadata"]["name"] for pod in running if not pod["metadata"].get("deletionTimestamp")]
    if not names:
        raise Failure(f"{name}: no gateway runs there; see `kubectl get moes {name}`")
    return sorted(names)
