"""The control tokens of a deployment, one a line of a file, any of which opens a control route.

The agent and the gateway check each control request with them. The file is read at each check, because tokens are
rotated while the process runs; while it cannot be read, every request is refused.
"""

import hmac
from pathlib import Path

from moe_contract.documents import read_file
from moe_contract.input_errors import InputError, InvalidInput

BEARER = "Bearer"


class ControlTokens:
    """Checks `Authorization` headers against a token file; without a file it allows none.

    Raises:
        InvalidInput: the file cannot be read, or has no token.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None and not parse_tokens(read_file(path, "token_file")):
            raise InvalidInput([InputError("token_file", f"{path} is empty")])

    def allow(self, authorization: str) -> bool:
        """Whether an `Authorization` header carries a token of the file."""
        scheme, _, given = authorization.partition(" ")
        if self._path is None or scheme.lower() != BEARER.lower():
            return False
        try:
            known = parse_tokens(self._path.read_bytes())
        except OSError:
            return False
        token = given.strip().encode(errors="replace")
        return any(hmac.compare_digest(token, row) for row in known)


def parse_tokens(text: bytes) -> list[bytes]:
    """The tokens of a file's text; blank lines are skipped."""
    return [token for line in text.splitlines() if (token := line.strip())]


def authorization(token: str) -> dict[str, str]:
    """The HTTP header that carries a token."""
    return {"Authorization": f"{BEARER} {token}"}
