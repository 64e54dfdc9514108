"""Which calls go by a proxy of the environment (`HTTP_PROXY`, `HTTPS_PROXY`), and which never do. Pure.

Calls within a cluster, to the API server, agents, gateways and engines, never do: a proxy cannot reach them, and a
variable that is set for downloads must not cut them off. An aiohttp session reads no proxy unless it is asked to
(`trust_env`), so peers need nothing; here is what other clients need.
"""

from collections.abc import Iterable, Mapping
from ipaddress import ip_address

from moe_contract.addresses import LOOPBACK, LOOPBACK_IPV6, is_address

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_WITHOUT = ("no_proxy", "NO_PROXY")
_LOCAL_NAMES = ("localhost", LOOPBACK, LOOPBACK_IPV6)
# Domains of Services; a cluster with another domain than `cluster.local` still has `svc` in a Service's name.
_CLUSTER_DOMAINS = (".svc", ".cluster.local")


def is_local(host: str) -> bool:
    """Whether a host is this machine."""
    return host == "localhost" or (is_address(host) and ip_address(host).is_loopback)


def is_within_cluster(host: str) -> bool:
    """Whether a host is this machine, a Service by its name, or a private address."""
    if is_address(host):
        return ip_address(host).is_private
    return "." not in host or host.endswith(_CLUSTER_DOMAINS) or ".svc." in host


def with_direct_hosts(environment: Mapping[str, str], hosts: Iterable[str]) -> dict[str, str]:
    """The environment in which this machine, Services and `hosts` are reached without a proxy, where one is set."""
    if not any(environment.get(form) for name in _PROXIES for form in (name, name.upper())):
        return dict(environment)
    known = next((environment[name] for name in _WITHOUT if environment.get(name)), "")
    listed = [part.strip() for part in known.split(",") if part.strip()]
    if "*" in listed:
        return dict(environment)
    wanted = (*_LOCAL_NAMES, *_CLUSTER_DOMAINS, *(host for host in hosts if host))
    text = ",".join(dict.fromkeys((*listed, *wanted)))
    return {**environment, **dict.fromkeys(_WITHOUT, text)}
