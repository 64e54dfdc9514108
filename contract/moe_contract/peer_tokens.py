"""How gateways show an engine that they are its deployment's own: a header derived from the control tokens.

The gateway adds the header to each request for an engine with an agent; an engine that is guarded answers those alone.
The value is an HMAC of a control token, so that whoever sees it cannot call a control route. All tokens of the file are
shown, and any of them is enough: files of a rotated Secret do not change everywhere at once.
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
_PURPOSE = b"moeserving: gateway to engine"


def derive_peer_token(token: bytes) -> bytes:
    """The value that stands for a control token, 64 hex digits."""
    return hmac.digest(token, _PURPOSE, "sha256").hex().encode()


class PeerTokens:
    """The values in force, read anew when the file was replaced; while it cannot be read the last ones count.

    Attributes:
        shown: the header's value, of all tokens; empty without one.
        head_end: the header's line and the blank line that ends a head.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._signature: tuple[int, int] | None = None
        self._values: tuple[bytes, ...] = ()
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
        self._values = tuple(map(derive_peer_token, parse_tokens(text)))
        self.shown = b",".join(self._values)
        line = b"%b: %b\r\n" % (HEADER.encode(), self.shown) if self._values else b""
        self.head_end = line + b"\r\n"
