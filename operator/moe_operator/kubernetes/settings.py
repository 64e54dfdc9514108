"""The operator's own settings: command line and environment, as the Helm chart sets them."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moe_operator.kubernetes.leader import Terms
from moe_operator.kubernetes.rivals import FORMER_LEASE
from moe_operator.plan import Defaults

IMAGE_ENGINE, IMAGE_ENGINE_CPU = "MOESERVING_IMAGE_ENGINE", "MOESERVING_IMAGE_ENGINE_CPU"
IMAGE_GATEWAY, PULL_POLICY = "MOESERVING_IMAGE_GATEWAY", "MOESERVING_IMAGE_PULL_POLICY"
OWN_NAMESPACE = "MOESERVING_OPERATOR_NAMESPACE"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

WORKERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSettings:
    """How one operator runs.

    Attributes:
        namespaces: those that it serves; empty means all.
        own_namespace: where its Lease is.
        lease: name of its Lease, which the operators of one release share.
        identity: its name in the Lease.
        liveness_port: of `/healthz`.
        metrics_port: of `/metrics` and `/readyz`; 0 chooses a free one.
        workers: resources that are reconciled at a time; a quarter more may be when some of them changed. A pass
            mostly waits for the API server; one core makes the documents of all, so that more workers than keep it busy
            only make each pass take longer.
        resync_s: time between two lists of everything, which find what a watch lost.
        watch_s: length of one watch, after which it is opened anew.
        defaults: images and the like.
        terms: of the election.
    """

    namespaces: tuple[str, ...] = ()
    own_namespace: str = "default"
    lease: str = FORMER_LEASE
    identity: str = field(default_factory=socket.gethostname)
    liveness_port: int = 8080
    metrics_port: int = 8081
    workers: int = WORKERS
    resync_s: float = 600.0
    watch_s: int = 300
    defaults: Defaults = field(default_factory=Defaults)
    terms: Terms = field(default_factory=Terms)


def read_defaults(environment: Mapping[str, str], own_namespace: str) -> Defaults:
    """Defaults of a plan, with the images that the chart sets in the environment."""
    known = Defaults()
    return Defaults(
        engine_image=environment.get(IMAGE_ENGINE) or known.engine_image,
        engine_cpu_image=environment.get(IMAGE_ENGINE_CPU) or known.engine_cpu_image,
        gateway_image=environment.get(IMAGE_GATEWAY) or known.gateway_image,
        pull_policy=environment.get(PULL_POLICY, ""),
        operator_namespace=own_namespace,
    )


def read_own_namespace(environment: Mapping[str, str]) -> str:
    """Namespace of the operator: from the environment, else of its pod, else `default`."""
    if name := environment.get(OWN_NAMESPACE):
        return name
    return _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.is_file() else "default"
