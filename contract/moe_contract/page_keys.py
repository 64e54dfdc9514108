"""The page key of a deployment: it opens the live page, which only shows, and no control route.

It is derived from a control token, so that whoever holds the token can open the page, and a browser that holds the key
can change nothing. The command line derives it, the gateway checks it against each token of its file.
"""

import hmac
from pathlib import Path

from moe_contract.control_tokens import BEARER, parse_tokens

_PURPOSE = b"moeserving: opens the live page"


def derive_page_key(token: bytes) -> str:
    """The key that stands for a control token, 64 hex digits."""
    return hmac.digest(token, _PURPOSE, "sha256").hex()


class PageKeys:
    """Checks `Authorization` headers; the file is read at each check, because tokens are rotated meanwhile.

    Args:
        path: of the control tokens.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def allow(self, authorization: str) -> bool:
        """Whether an `Authorization` header carries a page key; never while the file cannot be read."""
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != BEARER.lower():
            return False
        try:
            known = [derive_page_key(token).encode() for token in parse_tokens(self._path.read_bytes())]
        except OSError:
            return False
        key = given.strip().encode(errors="replace")
        return any(hmac.compare_digest(key, row) for row in known)
