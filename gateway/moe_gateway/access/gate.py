"""The gate: whose request it is, and whether it is admitted. One for a gateway that has `auth`.

A connection asks `identify` for each request to a route that is not open, `look` while only its head is there, and
`admit` once its body is read. The
gateway calls `tick` once in a while, which reloads keys that were replaced, and `end` when a request has ended.

Invariant: a request that passed carries no credential any more, so that none reaches an engine or a log.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from moe_contract.access_config import Auth
from moe_contract.api_keys import read_keys
from moe_contract.input_errors import InvalidInput

from moe_gateway.access.credentials import split_credentials
from moe_gateway.access.denials import Denial, deny_caller, deny_over
from moe_gateway.access.folders import sign_folders
from moe_gateway.access.issuer import Issuer, KeysAwaited
from moe_gateway.access.key_table import Caller, KeyTable
from moe_gateway.access.metering import MeteredClient
from moe_gateway.access.priorities import apply_class
from moe_gateway.access.quotas import Lease, OverQuota, Quotas
from moe_gateway.access.stored_responses import refuse_fields
from moe_gateway.http.replies import RequestOutcome
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest, ClientSide
from moe_gateway.request.parsing import Parsed

RELOAD_PERIOD_S = 1.0
NO_KEY = "an API key is needed: `Authorization: Bearer KEY` or `x-api-key: KEY`"
WRONG_KEY = "the API key is not valid"

# Routes whose requests count for no quota.
_FREE = (Route.HEALTH, Route.MODEL, Route.MODELS)

log = logging.getLogger("moeserving.gateway")


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """An admitted request.

    Attributes:
        lease: its charge to the quota of its tenant.
        meter: counts the tokens of its answer; None where none are counted.
    """

    lease: Lease
    meter: MeteredClient | None


class Gate:
    """Keys, quotas and priorities.

    Args:
        settings: the section `auth`.
        clock: monotonic seconds.

    Raises:
        InvalidInput: the keys cannot be read.
    """

    def __init__(self, settings: Auth, clock: Callable[[], float]) -> None:
        self._folders = settings.key_dirs
        self._clock = clock
        self._quotas = Quotas(settings.quota)
        self._signature = sign_folders(self._folders)
        self._keys = KeyTable(read_keys(self._folders))
        self._refused: object = None
        self._looked_s = clock()
        self.issuer = None if settings.jwt is None else Issuer(settings.jwt, clock)

    def identify(self, request: ClientRequest) -> Denial | None:
        """Names the caller in the request and takes its credentials out, or says why it does not pass."""
        credentials, headers = split_credentials(request.headers)
        is_awaited = False
        for credential in credentials:
            caller = self._find(credential)
            if isinstance(caller, Caller):
                request.caller, request.headers = caller, headers
                return None
            is_awaited = is_awaited or caller is not None
        if is_awaited:
            message = "the keys of the issuer are not known yet"
            return Denial(outcome=RequestOutcome.ISSUER_UNKNOWN, message=message, retry_after_s=1)
        if credentials:
            return deny_caller(WRONG_KEY, b'Bearer realm="moeserving", error="invalid_token"')
        return deny_caller(NO_KEY, b'Bearer realm="moeserving"')

    def _find(self, credential: bytes) -> Caller | KeysAwaited | None:
        caller = self._keys.find(credential)
        if caller is not None or self.issuer is None:
            return caller
        found = self.issuer.find(credential)
        return self._keys.add_terms(found) if isinstance(found, Caller) else found

    def look(self, request: ClientRequest, route: Route) -> Denial | None:
        """Says why a request whose body has not come would not be admitted; takes nothing from its quota."""
        if route in _FREE or request.caller is None:
            return None
        over = self._quotas.look(request.caller, self._clock())
        return None if over is None else deny_over(over)

    def reserve(self, request: ClientRequest) -> Denial | None:
        """Counts a request among those of its tenant while its body is read, or says why it is not read."""
        assert request.caller is not None
        place = self._quotas.reserve(request.caller, self._clock())
        if isinstance(place, OverQuota):
            return deny_over(place)
        request.place = place
        return None

    def counts_tokens(self, caller: Caller) -> bool:
        """Whether the tenant of this caller has a quota of tokens, so that its answers have to be read."""
        return self._quotas.quota_of(caller).tokens_per_minute is not None

    def admit(
        self, request: ClientRequest, route: Route, parsed: Parsed, client: ClientSide, tokens: int
    ) -> tuple[Parsed, ClientSide] | Denial:
        """Charges the request to its tenant, and gives it the priority of its class.

        Args:
            request: from a caller that was identified.
            route: of the request; one without a job needs no computing and costs no tokens.
            parsed: its body.
            client: where its answer goes.
            tokens: of its prompt, as far as they are known.
        """
        caller = request.caller
        assert caller is not None
        has_job = route.has_job
        if request.place is not None:
            request.place.free()
        if route is Route.RESPONSES and (denial := refuse_fields(parsed, self._quotas.quota_of(caller))) is not None:
            return denial
        reserved = parsed.answer_tokens if has_job else 0
        lease = self._quotas.admit(caller, tokens if has_job else 0, self._clock(), answer_tokens=reserved)
        if isinstance(lease, OverQuota):
            return deny_over(lease)
        meter = MeteredClient(client, lease) if has_job and lease.use.tokens is not None else None
        request.admission = Admission(lease=lease, meter=meter)
        if has_job and caller.priority is not None:
            parsed = apply_class(request, route, parsed, caller.priority)
        return parsed, meter or client

    def end(self, admission: Admission, status: int) -> None:
        """A request that was admitted has ended, with this status; 499 is a client that left."""
        meter = admission.meter
        is_answer = status < 400 or status == 499
        tokens = 0 if meter is None else meter.count_tokens(is_answer=is_answer)
        admission.lease.end(tokens, self._clock())

    @property
    def tenant_names(self) -> dict[str, str]:
        """Names of the tenants that have keys, by their hash."""
        return self._keys.names

    def divide(self, gateways: int) -> None:
        """This number of gateways share the requests of all tenants."""
        self._quotas.divide(gateways, self._clock())

    def tick(self, now_s: float) -> None:
        """Reloads keys that were replaced; those in force stay where the new ones are not valid."""
        if now_s - self._looked_s < RELOAD_PERIOD_S:
            return
        self._looked_s = now_s
        signature = sign_folders(self._folders)
        if signature == self._signature:
            return
        try:
            self._keys = KeyTable(read_keys(self._folders))
        except InvalidInput as error:
            # They are read again, for the cause may be the process: too many open files. It is logged once.
            if self._refused != (refused := (signature, str(error))):
                log.error("keys were not reloaded, those before stay in force", extra={"reason": str(error)})
            self._refused = refused
            return
        self._signature = signature
        log.info("keys were reloaded", extra={"keys": len(self._keys)})
