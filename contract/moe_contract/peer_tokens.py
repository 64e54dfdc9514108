"""How gateways show an engine that they are its deployment's own: a header derived from the control tokens.

The gateway adds the header to each request for an engine with an agent; an engine that is guarded answers those alone.
The value is an HMAC of a control token, so that whoever sees it cannot call a control route. All tokens of the file are
shown, and any of them is enough: files of a rotated Secret do not change everywhere at once.

A request that another proxy carries gets a signed value, `v1.EXPIRY.MAC`: good for the method and path of that request
alone, for a minute. A client of the endpoint picker sees it; it opens no other routes of an engine, nor later.
"""

import hmac
import os
import time
from collections.abc import Callable
from pathlib import Path

from moe_contract.control_tokens import parse_tokens

HEADER = "x-moeserving-peer"
# Names the file of control tokens to an engine that is guarded.
TOKENS_VARIABLE = "MOESERVING_PEER_TOKENS"
LOOK_PERIOD_S = 1.0
# How long a signed value is good; clocks of gateways and engines must not differ by more.
LIFETIME_S = 60
_PURPOSE = b"moeserving: gateway to engine"
_SIGNING_PURPOSE = b"moeserving: signs requests to engines"
_VERSION = b"v1"


def derive_peer_token(token: bytes) -> bytes:
    """The value that stands for a control token, 64 hex digits."""
    return hmac.digest(token, _PURPOSE, "sha256").hex().encode()


def sign_peer_request(key: bytes, method: bytes, path: bytes, expires_s: int) -> bytes:
    """The signed value of one request, good until this time since the epoch."""
    mac = hmac.digest(key, b"%d %b %b" % (expires_s, method, path), "sha256").hex().encode()
    return b"%b.%d.%b" % (_VERSION, expires_s, mac)


class PeerTokens:
    """The values in force, read anew when the file was replaced; while it cannot be read the last ones count.

    Args:
        path: of the control tokens.
        clock: monotonic seconds.
        wall: seconds since the epoch.

    Attributes:
        shown: the header's value, of all tokens; empty without one.
        head_end: the header's line and the blank line that ends a head.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float] = time.monotonic, *, wall: Callable[[], float] = time.time
    ) -> None:
        self._path = path
        self._clock = clock
        self._wall = wall
        self._signature: tuple[int, int] | None = None
        self._values: tuple[bytes, ...] = ()
        self._keys: tuple[bytes, ...] = ()
        self._looked_s = 0.0
        self.shown = b""
        self.head_end = b"\r\n"
        self._read()

    def refresh(self) -> None:
        """Looks at the file, once a second at most."""
        if self._clock() - self._looked_s >= LOOK_PERIOD_S:
            self._read()

    def allow(self, given: bytes) -> bool:
        """Whether the value of a header has a token that is in force."""
        self.refresh()
        shown = [value.strip() for value in given.split(b",")]
        return any(hmac.compare_digest(value, known) for value in shown for known in self._values)

    def sign(self, method: bytes, path: bytes) -> bytes:
        """The header's value for one request that another proxy carries; empty without a token.

        Args:
            method: of the request.
            path: as the engine gets it, without a query.
        """
        expires_s = int(self._wall()) + LIFETIME_S
        return b",".join(sign_peer_request(key, method, path, expires_s) for key in self._keys)

    def allow_request(self, given: bytes, method: bytes, path: bytes) -> bool:
        """Whether the value of a header was signed for this request and is still good."""
        self.refresh()
        now_s = self._wall()
        for value in map(bytes.strip, given.split(b",")):
            version, _, rest = value.partition(b".")
            expiry = rest.partition(b".")[0]
            if version != _VERSION or not expiry.isdigit() or len(expiry) > 15 or int(expiry) < now_s:
                continue
            signed = (sign_peer_request(key, method, path, int(expiry)) for key in self._keys)
            if any(hmac.compare_digest(value, known) for known in signed):
                return True
        return False

    def _read(self) -> None:
        self._looked_s = self._clock()
        try:
            status = os.stat(self._path)
            signature = status.st_ino, status.st_mtime_ns
            if signature == self._signature:
                return
            text = self._path.read_bytes()
        except OSError:
            return
        self._signature = signature
        tokens = parse_tokens(text)
        self._values = tuple(map(derive_peer_token, tokens))
        self._keys = tuple(hmac.digest(token, _SIGNING_PURPOSE, "sha256") for token in tokens)
        self.shown = b",".join(self._values)
        line = b"%b: %b\r\n" % (HEADER.encode(), self.shown) if self._values else b""
        self.head_end = line + b"\r\n"
