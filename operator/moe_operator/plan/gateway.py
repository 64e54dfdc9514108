"""Parts of the gateway's configuration that one machine and a cluster share. Pure."""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_contract.access_config import Auth, Jwt, Quota, Tls
from moe_contract.gateway_config import ORIGIN_PATTERN, ContinuedStreams, Cors, Limits, Tracing

from moe_operator.api.gateway import GatewayContinuation
from moe_operator.api.resource import MoEServing
from moe_operator.api.units import duration_s, quantity_value
from moe_operator.plan.role_override import all_arguments


def build_limits(resource: MoEServing) -> Limits:
    """What one client may cost."""
    limits, hold = resource.spec.gateway.limits, resource.spec.gateway.hold
    return Limits(
        max_body_bytes=int(quantity_value(limits.max_body)),
        header_timeout_s=duration_s(limits.header_timeout),
        body_timeout_s=duration_s(limits.body_timeout),
        connect_timeout_s=duration_s(limits.connect_timeout),
        idle_timeout_s=duration_s(limits.idle_timeout),
        stream_head_after_s=duration_s(limits.stream_head_after),
        hold_requests=hold.requests,
        hold_timeout_s=duration_s(hold.timeout),
    )


def build_cors(resource: MoEServing) -> Cors:
    """The pages in browsers that may use the gateway: what the resource says, else its engine's arguments, else any."""
    origins = resource.spec.gateway.cors.allowed_origins
    if origins is None:
        origins = _engine_origins(all_arguments(resource))
    return Cors() if origins is None else Cors(allowed_origins=origins)


def _engine_origins(args: Sequence[str]) -> tuple[str, ...] | None:
    """The origins in vLLM's `--allowed-origins`, a list in JSON; None where they are not given or not readable."""
    flag = "--allowed-origins"
    values = [arg.partition("=")[2] for arg in args if arg.startswith(f"{flag}=")]
    values += [value for name, value in itertools.pairwise(args) if name == flag]
    try:
        origins = json.loads(values[-1]) if values else None
    except ValueError:
        return None
    if not isinstance(origins, list):
        return None
    is_usable = all(isinstance(origin, str) and re.fullmatch(ORIGIN_PATTERN, origin) for origin in origins)
    return tuple(origins) if is_usable else None


def build_tracing(resource: MoEServing) -> Tracing | None:
    """Where the gateway sends traces of requests."""
    tracing = resource.spec.gateway.tracing
    return None if tracing is None else Tracing(endpoint=tracing.endpoint, sample_ratio=tracing.sample_percent / 100)


def build_continuation(resource: MoEServing) -> ContinuedStreams | None:
    """Which streams go on at another engine when theirs fails."""
    if resource.spec.gateway.continuation is GatewayContinuation.NEVER:
        return None
    # vLLM parses the chats of some architectures (gpt-oss) whatever its arguments say, and a name does not show which.
    return ContinuedStreams(
        completions_by_prefix=not any(map(_may_change_sampling, all_arguments(resource))), chats_by_prefix=False
    )


def _may_change_sampling(arg: str) -> bool:
    """Whether an argument is one of `_SAMPLING_FLAGS`, or the beginning of one, which vLLM takes as well."""
    name = re.split(r"[=.+]", arg.replace("_", "-"), maxsplit=1)[0]
    return name.startswith("--") and any(flag.startswith(name) for flag in _SAMPLING_FLAGS)


# Flags of vLLM after which a token may depend on more than the tokens before it: penalties and limits for all requests,
# code of others, and a file that may hold such flags.
_SAMPLING_FLAGS = (
    "--override-generation-config",
    "--generation-config",
    "--logits-processors",
    "--middleware",
    "--config",
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
