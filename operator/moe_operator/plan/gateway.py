"""Parts of the gateway's configuration that one machine and a cluster share. Pure."""

from collections.abc import Callable
from pathlib import Path

from moe_contract.access_config import Auth, Jwt, Quota, Tls
from moe_contract.gateway_config import Limits

from moe_operator.api.resource import MoEServing
from moe_operator.api.units import duration_s, quantity_value


def build_limits(resource: MoEServing) -> Limits:
    """What one client may cost."""
    limits, hold = resource.spec.gateway.limits, resource.spec.gateway.hold
    return Limits(
        max_body_bytes=int(quantity_value(limits.max_body)),
        header_timeout_s=duration_s(limits.header_timeout),
        body_timeout_s=duration_s(limits.body_timeout),
        connect_timeout_s=duration_s(limits.connect_timeout),
        idle_timeout_s=duration_s(limits.idle_timeout),
        hold_requests=hold.requests,
        hold_timeout_s=duration_s(hold.timeout),
    )


def find_secrets(resource: MoEServing) -> tuple[str, ...]:
    """The Secrets that a gateway reads, each once, in the order of their fields."""
    auth, tls = resource.spec.gateway.auth, resource.spec.gateway.tls
    names = [*(auth.secrets if auth else ()), *((tls.secret_name, tls.client_ca_secret) if tls else ())]
    return tuple(dict.fromkeys(name for name in names if name is not None))


def build_auth(resource: MoEServing, folder_of: Callable[[str], Path]) -> Auth | None:
    """Who may send requests; `folder_of` says where the files of a Secret are."""
    auth = resource.spec.gateway.auth
    if auth is None:
        return None
    return Auth(
        key_dirs=tuple(folder_of(name) for name in dict.fromkeys(auth.secrets)),
        jwt=None if auth.jwt is None else Jwt(**auth.jwt.model_dump(by_alias=False)),
        quota=Quota(**auth.quota.model_dump(by_alias=False)),
    )


def build_tls(resource: MoEServing, folder_of: Callable[[str], Path]) -> Tls | None:
    """TLS for clients; `folder_of` says where the files of a Secret are."""
    tls = resource.spec.gateway.tls
    if tls is None:
        return None
    return Tls(
        cert_dir=folder_of(tls.secret_name),
        client_ca_dir=None if tls.client_ca_secret is None else folder_of(tls.client_ca_secret),
    )
