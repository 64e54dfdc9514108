"""The folder of a tiny model: made once, whole or not at all, found again the second time.

A model is made in a folder beside the wanted one and renamed at the end, so that what carries the wanted name is
complete. A lock beside it keeps two makers apart.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_contract.input_errors import InputError, InvalidInput

from moe_tools.tiny.corpus import Corpus, read_corpus
from moe_tools.tiny.settings import MANIFEST, TinySettings, read_report, write_manifest


def ensure_tiny_model(
    directory: Path,
    *,
    settings: TinySettings | None = None,
    show_progress: bool = True,
    read_text: Callable[[], Corpus] = read_corpus,
) -> Path:
    """Returns `directory` with a complete model in it, made now from `read_text()` unless it is there.

    Raises:
        InvalidInput: the folder holds something else, or cannot be made.
    """
    settings = settings or TinySettings()
    directory = directory.absolute()
    if is_ready(directory, settings):
        return directory
    refuse_foreign(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            if not is_ready(directory, settings):
                _make(directory, settings, show_progress, read_text)
    except OSError as error:
        raise InvalidInput(
            [InputError(str(directory), f"cannot make the model here: {error.strerror or error}")]
        ) from error
    return directory


def is_ready(directory: Path, settings: TinySettings) -> bool:
    """Whether the folder holds a complete model of these settings."""
    manifest = read_report(directory)
    return manifest is not None and manifest.get("fingerprint") == settings.fingerprint


def refuse_foreign(directory: Path) -> None:
    """A folder that is neither empty nor a tiny model is never written over."""
    if directory.is_dir():
        foreign = not (directory / MANIFEST).exists() and any(directory.iterdir())
    else:
        foreign = directory.exists()
    if foreign:
        raise InvalidInput([InputError(str(directory), "holds something other than a tiny model; name a new folder")])


def _make(directory: Path, settings: TinySettings, show_progress: bool, read_text: Callable[[], Corpus]) -> None:
    from moe_tools.tiny.progress import shown_progress
    from moe_tools.tiny.training import make_model

    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with shown_progress(enabled=show_progress) as progress:
            report = make_model(partial, settings, read_text, progress)
        write_manifest(partial, settings, report)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with directory.with_name(f".{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
