"""Variables that Kubernetes derives from the names of Services, and an environment without them. Pure.

With `enableServiceLinks`, the default of a pod, the kubelet sets variables for each Service of the namespace: for one
named `vllm` `VLLM_SERVICE_HOST`, `VLLM_SERVICE_PORT`, `VLLM_SERVICE_PORT_HTTP`, `VLLM_PORT=tcp://ADDRESS:80` and
`VLLM_PORT_80_TCP` with `_ADDR`, `_PORT` and `_PROTO`. Programs take them for settings of their own: vLLM reads
`VLLM_PORT`, torch `MASTER_PORT`, Ray `RAY_*`.

A variable that a person set on purpose stays: a Service is recognised by the address in `NAME_PORT` or
`NAME_PORT_80_TCP`, and only the variables of such a name are taken out.
"""

import re
from collections.abc import Mapping

_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+:\d{1,5}", re.IGNORECASE)
_LINK = re.compile(r"(?P<name>\w+?)_PORT(_\d{1,5}_(TCP|UDP|SCTP))?")
_PART = r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d{1,5}_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
# The API server's own address, which the kubelet sets whatever the pod says and clients in the pod look for.
_API_SERVER = "KUBERNETES"
_OF_CLIENTS = {f"{_API_SERVER}_SERVICE_{part}" for part in ("HOST", "PORT", "PORT_HTTPS")}


def without_service_links(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that name Services, but for the address of the API server."""
    links = {
        name: found["name"]
        for name, value in environment.items()
        if _ADDRESS.fullmatch(value) and (found := _LINK.fullmatch(name))
    }
    of_a_service = re.compile(f"({'|'.join(sorted(set(links.values())))})_{_PART}")
    return {
        name: value
        for name, value in environment.items()
        if name in _OF_CLIENTS or not (name in links or of_a_service.fullmatch(name))
    }
