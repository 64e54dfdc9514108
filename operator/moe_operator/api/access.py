"""Sections `spec.gateway.auth` and `spec.gateway.tls`: who may use the gateway, how much, and over TLS."""

from typing import Annotated, ClassVar

from moe_contract.access_config import check_jwks_url
from pydantic import AfterValidator, Field

from moe_operator.api.object_names import Name
from moe_operator.api.section import Count, Rule, Section

_Text = Annotated[str, Field(min_length=1, max_length=1024)]
_Bound = Annotated[Count, Field(ge=1, le=1_000_000_000)]


class GatewayQuota(Section):
    """What one tenant may use, of all gateways together; a request beyond it is refused with 429 and `Retry-After`."""

    requests_per_minute: _Bound | None = Field(default=None, description="Requests a minute. Absent: no bound.")
    tokens_per_minute: _Bound | None = Field(
        default=None, description="Prompt and output tokens a minute. Absent: no bound."
    )
    concurrency: _Bound | None = Field(default=None, description="Requests at a time. Absent: no bound.")


class GatewayJwt(Section):
    """Tokens of an OpenID Connect issuer, which are taken beside keys."""

    issuer: _Text = Field(description="The claim `iss` of its tokens, such as `https://login.example.com`.")
    audience: _Text = Field(description="What the claim `aud` must be or hold.")
    jwks_url: Annotated[
        str, Field(max_length=1024, json_schema_extra={"pattern": r"^https?://[^\s]+$"}), AfterValidator(check_jwks_url)
    ] = Field(description="Address of its public keys (JWKS); they are fetched anew each five minutes.")
    tenant_claim: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        default="sub", description="Claim that names the tenant."
    )


class GatewayAuth(Section):
    """Who may send requests. Absent: everyone who reaches the gateway."""

    secrets: Annotated[tuple[Name, ...], Field(max_length=16)] = Field(
        default=(),
        description="Secrets with API keys. An entry's name is the tenant, its text keys, one a line, or a JSON object "
        "`{keys, tenant, priority, quota}`. Changes of a Secret take effect without a restart.",
    )
    jwt: GatewayJwt | None = None
    quota: GatewayQuota = GatewayQuota()

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="secrets",
            message="Secrets with keys, a jwt or both are needed",
            cel="(has(self.secrets) && self.secrets.size() > 0) || has(self.jwt)",
            holds=lambda auth: bool(auth.secrets) or auth.jwt is not None,
        ),
    )


class GatewayTls(Section):
    """TLS on the port for clients. Changes of the Secrets take effect without a restart."""

    secret_name: Name = Field(
        description="Secret with `tls.crt` and `tls.key` (type `kubernetes.io/tls`, such as cert-manager's)."
    )
    client_ca_secret: Name | None = Field(
        default=None,
        description="Secret whose `ca.crt` has the authorities of clients: each needs a certificate of theirs (mTLS). "
        "Absent: clients need none.",
    )
