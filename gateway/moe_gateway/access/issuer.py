"""Tokens of an OpenID Connect issuer (JWT), checked by PyJWT with the issuer's public keys.

The keys are fetched at the start, each few minutes, and when a token names one that is not known. A token is checked
once: what came out is remembered until it ends.

Invariant: only asymmetric algorithms are taken, so that a public key is never used as a shared secret.
"""

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import aiohttp
import jwt
import orjson
from moe_contract.access_config import Jwt

from moe_gateway.access.key_table import Caller, build_caller

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
REFRESH_PERIOD_S = 300.0
# After a failure, and for keys that are not known: anyone can name one.
RETRY_PERIOD_S = 10.0
FETCH_TIMEOUT_S = 5.0
LARGEST_JWKS_BYTES = 1024 * 1024
REMEMBERED_TOKENS = 10_000
# Clocks of issuers may differ from this machine's by so much.
LEEWAY_S = 30.0

log = logging.getLogger("moeserving.gateway")


class KeysAwaited:
    """The key of a token is being fetched: the request should come again."""


AWAITED = KeysAwaited()


class Issuer:
    """Checks tokens.

    Args:
        settings: issuer, audience, address of the keys, claim of the tenant.
        clock: monotonic seconds.
    """

    def __init__(self, settings: Jwt, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._document: object = None
        self._keys: Mapping[str | None, jwt.PyJWK] = {}
        self._fetched_s: float | None = None
        self._wanted = asyncio.Event()
        # By the hash of a token: its caller, and when it ends.
        self._checked: OrderedDict[bytes, tuple[Caller, float]] = OrderedDict()

    def find(self, token: bytes) -> Caller | KeysAwaited | None:
        """The caller of a token; None for one that is not valid."""
        now_s, digest = self._clock(), sha256(token).digest()
        known = self._checked.get(digest)
        if known is not None and now_s < known[1]:
            return known[0]
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            return None
        key = self._keys.get(header.get("kid"))
        if key is None:
            return self._await_keys(now_s)
        claims = self._decode(token, key)
        if claims is None:
            return None
        return self._remember(digest, claims, now_s)

    def _await_keys(self, now_s: float) -> KeysAwaited | None:
        if self._fetched_s is not None and now_s - self._fetched_s < RETRY_PERIOD_S:
            return None
        self._wanted.set()
        return AWAITED

    def _decode(self, token: bytes, key: jwt.PyJWK) -> dict[str, Any] | None:
        settings = self._settings
        try:
            return jwt.decode(
                token,
                key,
                algorithms=[name for name in ALGORITHMS if name == key.algorithm_name],
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.InvalidTokenError:
            return None

    def _remember(self, digest: bytes, claims: Mapping[str, Any], now_s: float) -> Caller | None:
        tenant = claims.get(self._settings.tenant_claim)
        if not isinstance(tenant, str) or not tenant:
            return None
        caller = build_caller(tenant)
        self._checked[digest] = caller, now_s + float(claims["exp"]) + LEEWAY_S - time.time()
        if len(self._checked) > REMEMBERED_TOKENS:
            self._checked.popitem(last=False)
        return caller

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Keeps the keys fresh until it is cancelled."""
        while True:
            is_fetched = await self._fetch(session)
            self._wanted.clear()
            if not is_fetched:
                await asyncio.sleep(RETRY_PERIOD_S)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_PERIOD_S):
                    await self._wanted.wait()

    async def _fetch(self, session: aiohttp.ClientSession) -> bool:
        """Fetches the keys; those before stay where that fails."""
        try:
            document = await self._get(session)
            keys = read_jwks(document)
        except (aiohttp.ClientError, TimeoutError, ValueError, jwt.PyJWTError) as error:
            log.warning("the keys of the issuer were not fetched", extra={"reason": str(error) or type(error).__name__})
            return False
        if document != self._document:
            log.info("new keys of the issuer", extra={"keys": len(keys)})
            # A key may have been withdrawn: what it signed counts no more.
            self._checked.clear()
            self._document, self._keys = document, keys
        self._fetched_s = self._clock()
        return True

    async def _get(self, session: aiohttp.ClientSession) -> object:
        timeout = aiohttp.ClientTimeout(total=FETCH_TIMEOUT_S)
        async with session.get(self._settings.jwks_url, timeout=timeout) as answer:
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            try:
                await answer.content.readexactly(LARGEST_JWKS_BYTES)
            except asyncio.IncompleteReadError as whole:
                return orjson.loads(whole.partial)
        raise ValueError(f"more than {LARGEST_JWKS_BYTES} bytes")


def read_jwks(document: object) -> dict[str | None, jwt.PyJWK]:
    """The public keys of a JWKS by their ids; those of other kinds and uses are left out.

    Raises:
        ValueError: it is no JWKS, or has no key that can be used.
    """
    rows = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise ValueError("not a JWKS: a JSON object with a list `keys` is needed")
    found: dict[str | None, jwt.PyJWK] = {}
    for row in rows:
        if not isinstance(row, dict) or row.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK(row)
        except jwt.PyJWTError:
            continue
        if key.algorithm_name in ALGORITHMS:
            found[key.key_id] = key
    if not found:
        raise ValueError("the JWKS has no key for signatures")
    return found
