"""Files of the repository that a program generates: the options `--write` and `--check`, and what each does.

Used by the generators behind `make generate` and `make verify`; no part of a running deployment.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The options of a generator.

    Attributes:
        write: whether files are written.
        check: whether they are compared.
        root: of the repository.
    """

    write: bool
    check: bool
    root: Path


def read_choice(
    arguments: Sequence[str] | None, *, program: str, description: str, root: Path = Path(), required: bool = True
) -> Choice:
    """Reads the options of a generator; wrong ones end the program with status 2.

    Args:
        arguments: of the command line; None: those of this process.
        program: as the user calls it.
        description: for its help.
        root: of the repository where `--root` is not given.
        required: whether one of the two options has to be given.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    choice = parser.add_mutually_exclusive_group(required=required)
    choice.add_argument("--write", action="store_true", help="write the generated files below --root")
    choice.add_argument("--check", action="store_true", help="compare the generated files below --root")
    parser.add_argument("--root", type=Path, default=root, help="root of the repository")
    given = parser.parse_args(arguments)
    return Choice(write=given.write, check=given.check, root=given.root)


def write_or_check(files: Mapping[Path, str], choice: Choice) -> int:
    """Writes the files, or names those that differ on stderr; the exit status is 1 where one does.

    Args:
        files: text of each by its path below the root.
        choice: what to do.
    """
    status = 0
    for path, text in files.items():
        whole = choice.root / path
        if choice.write:
            whole.parent.mkdir(parents=True, exist_ok=True)
            whole.write_text(text, encoding="utf-8")
        elif not whole.is_file() or whole.read_text(encoding="utf-8") != text:
            print(f"{path}: differs from its source; run `make generate`", file=sys.stderr)
            status = 1
    return status
