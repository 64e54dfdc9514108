"""Whether the files of a folder were replaced: what a reload of keys and certificates looks at, once a second.

The kubelet replaces the content of a mounted Secret as a whole, by a link (`..data`) that then names another folder. On
one machine the files themselves are replaced or written.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from moe_contract.api_keys import CURRENT

Signature = tuple[object, ...]


def sign_folders(folders: Iterable[Path]) -> Signature:
    """A value that differs once a file of these folders was replaced; a folder that can't be read has one too."""
    return tuple(_sign(folder) for folder in folders)


def _sign(folder: Path) -> object:
    try:
        return os.readlink(folder / CURRENT)
    except OSError:
        pass
    try:
        return tuple(sorted(_sign_file(path) for path in folder.iterdir()))
    except OSError as error:
        return error.errno


def _sign_file(path: Path) -> tuple[str, int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        return path.name, 0, 0, -(error.errno or 1)
    return path.name, status.st_mtime_ns, status.st_ino, status.st_size
