"""The key that a measured server asks of its clients: from a file, else from the environment as OpenAI's clients do."""

import os
from pathlib import Path

from moe_contract.input_errors import InputError, InvalidInput

VARIABLE = "OPENAI_API_KEY"


def read_api_key(path: Path | None) -> str:
    """The key in a file, or in `OPENAI_API_KEY` where no file is named; empty for no key.

    Raises:
        InvalidInput: the file cannot be read, or its content can be no key.
    """
    if path is None:
        where, key = VARIABLE, os.environ.get(VARIABLE, "").strip()
        if not key:
            return ""
    else:
        where = f"--api-key-file {path}"
        try:
            key = path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput([InputError(where, f"cannot be read: {error}")]) from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidInput([InputError(where, "a key is needed, printable ASCII without spaces, on one line")])
    return key
