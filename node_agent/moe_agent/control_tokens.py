"""Who may use the control routes: the tokens of a file, one a line, of which any counts.

Made by `moe_agent.app`, asked by the HTTP server at each control request. The file is read anew each time, because the
tokens are rotated under a running agent; one that cannot be read lets nobody in.
"""

import hmac
from pathlib import Path

from moe_contract.input_errors import InputError, InvalidInput

from moe_agent.parsing import read_file


class ControlTokens:
    """See the module.

    Raises:
        InvalidInput: the file cannot be read, or has no token.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not parse_tokens(read_file(path, "token_file")):
            raise InvalidInput([InputError("token_file", f"{path} is empty")])

    def allow(self, authorization: str) -> bool:
        """Whether an `Authorization` header names a token."""
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return False
        try:
            known = parse_tokens(self._path.read_bytes())
        except OSError:
            return False
        token = given.strip().encode(errors="replace")
        return any(hmac.compare_digest(token, row) for row in known)


def parse_tokens(text: bytes) -> list[bytes]:
    """The tokens of a file; blank lines are none."""
    return [token for line in text.splitlines() if (token := line.strip())]
