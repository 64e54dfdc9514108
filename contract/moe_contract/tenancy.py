"""The tenant of a request, and its priority, as a part of its id: written by the gateway, read by the engine's plugin.

The gateway adds `.t` and 8 hex digits to the id that it sends to an engine; vLLM puts its own text before and after.
A tenant is these digits; the anonymous tenant, of requests without the header, is the empty string. Where the key of a
request has a priority class, `p` and the priority follow. An id of a client that has such a suffix gets one even where
tenants are not distinguished. For `/v1/responses` vLLM 0.32 takes the id from the body,
where the client chose it: these requests count as the anonymous tenant's, and their priority is the one in the body.

Invariants: nothing that a client wrote is in the suffix; the last suffix of an id counts.
"""

import re
from hashlib import blake2b

from moe_scheduling.request.fairness import ANONYMOUS_TENANT

# The header that names the tenant, as the Gateway API Inference Extension has it; and what such names look like, in
# lower case (a token of RFC 9110, 5.6.2), the empty one for no header.
DEFAULT_HEADER = "x-gateway-inference-fairness-id"
HEADER_PATTERN = r"^[0-9a-z!#$%&'*+.^_`|~-]{0,64}$"
# Of one connection, or written by the gateway itself: they do not go from a client to an engine and name no tenant. Nor
# does an offer to take compressed answers, which the gateway could not read.
NOT_FORWARDED = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-data-parallel-rank",
        "x-request-id",
    }
)
_MARK = ".t"
_MARK_BYTES = _MARK.encode()
_DIGITS = 8
_HEX = frozenset("0123456789abcdef")
# Of the anonymous tenant, where an id that a client chose could be read as another tenant's.
_OF_NOBODY = "0" * _DIGITS
_PRIORITY = re.compile(r"p(-?\d{1,20})(?=-|\Z)", re.ASCII)
# vLLM puts it after the id of a request of `/v1/responses`, and after no id that comes from a header.
_AFTER_BODYS_ID = "_"


def check_tenant_header(name: str) -> str:
    """The name of a header in lower case that can name a tenant, or nothing.

    Raises:
        ValueError: it is something else.
    """
    if re.fullmatch(HEADER_PATTERN, name) is None:
        raise ValueError(f"the name of a header in lower case is needed, or nothing, got {name[:80]!r}")
    if name in NOT_FORWARDED:
        kept = ", ".join(sorted(NOT_FORWARDED))
        raise ValueError(f"{name} cannot name a tenant: the gateway takes none of {kept} over")
    return name


def hash_tenant(name: bytes) -> str:
    """The tenant of this name, which may be any bytes; an empty name is the anonymous tenant's."""
    return blake2b(name, digest_size=_DIGITS // 2).hexdigest() if name else ANONYMOUS_TENANT


def sign_request_id(request_id: bytes, tenant: str, priority: int | None = None) -> bytes:
    """The id for the engine; with a priority where the request's key has a class."""
    if priority is not None:
        return b"%b.t%bp%d" % (request_id, (tenant or _OF_NOBODY).encode(), priority)
    if tenant:
        return b"%b.t%b" % (request_id, tenant.encode())
    return b"%b.t%b" % (request_id, _OF_NOBODY.encode()) if _MARK_BYTES in request_id else request_id


def tenant_of(request_id: str) -> str:
    """The tenant in an engine's request id, such as `cmpl-ID.t1a2b3c4d-0-9f8e7d6c`."""
    _, mark, rest = request_id.rpartition(_MARK)
    tenant = rest[:_DIGITS]
    if not mark or len(tenant) < _DIGITS or tenant == _OF_NOBODY or not _HEX.issuperset(tenant):
        return ANONYMOUS_TENANT
    if _AFTER_BODYS_ID in rest:
        return ANONYMOUS_TENANT
    return tenant


def priority_of(request_id: str) -> int | None:
    """The priority in an engine's request id, such as `transcribe-ID.t1a2b3c4dp10-9f8e7d6c`; None: it has none."""
    _, mark, rest = request_id.rpartition(_MARK)
    if not mark or rest[_DIGITS : _DIGITS + 1] != "p" or not _HEX.issuperset(rest[:_DIGITS]) or _AFTER_BODYS_ID in rest:
        return None
    found = _PRIORITY.match(rest, _DIGITS)
    return None if found is None else int(found[1])
