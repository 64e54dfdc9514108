"""Who may use the gateway: the sections of its configuration for keys, tokens, quotas and TLS.

A folder of keys or of a certificate is a mounted Secret, or on one machine a folder with the same files.
"""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from moe_contract.sections import Section

Positive = Annotated[int, Field(ge=1)]


def check_jwks_url(url: str) -> str:
    """The address of a set of public keys: `https://`, or `http://` for a server that needs no protection.

    Raises:
        ValueError: it has another form.
    """
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username
    except ValueError:
        fits = False
    if not fits or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"an address such as https://login.example.com/keys is needed, got {url[:80]!r}")
    return url


class Quota(Section):
    """What one tenant may use; an absent bound is none.

    Attributes:
        requests_per_minute: requests a minute.
        tokens_per_minute: prompt and output tokens a minute.
        concurrency: requests at a time.
    """

    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    concurrency: Positive | None = None


class Jwt(Section):
    """Tokens of an OpenID Connect issuer, which are taken beside keys.

    Attributes:
        issuer: value of the claim `iss`.
        audience: value that the claim `aud` must have or hold.
        jwks_url: address of the issuer's public keys (JWKS).
        tenant_claim: claim that names the tenant.
    """

    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]
    jwks_url: Annotated[str, AfterValidator(check_jwks_url)]
    tenant_claim: Annotated[str, Field(min_length=1)] = "sub"


class Auth(Section):
    """Who may send requests.

    Attributes:
        key_dirs: folders of keys, one for each Secret.
        jwt: tokens of an issuer; None: keys alone.
        quota: of each tenant whose keys name none.
    """

    key_dirs: tuple[Path, ...] = ()
    jwt: Jwt | None = None
    quota: Quota = Quota()


class Tls(Section):
    """TLS on the port for clients.

    Attributes:
        cert_dir: folder with `tls.crt` (the certificate and its chain) and `tls.key`, in PEM.
        client_ca_dir: folder with `ca.crt`, the authorities that sign clients' certificates; None: clients need no
            certificate.
    """

    cert_dir: Path
    client_ca_dir: Path | None = None
