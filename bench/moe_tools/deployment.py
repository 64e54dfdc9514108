"""A deployment on this machine, handled through the `moeserving` command as a user would."""

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_contract.input_errors import InputError, InvalidInput

COMMAND = Path(sys.executable).with_name("moeserving")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """`state_dir` None: where `moeserving` keeps its state by default."""

    name: str
    state_dir: Path | None = None

    def arguments(self, verb: str, *rest: str) -> list[str]:
        """The command line of a verb on this deployment."""
        place = ["--state-dir", str(self.state_dir)] if self.state_dir else []
        return [str(COMMAND), verb, self.name, *rest, *place]

    async def set(self, settings: Sequence[str]) -> None:
        """`moeserving set`; its own words where it refuses."""
        process = await asyncio.create_subprocess_exec(
            *self.arguments("set", *settings), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said, _ = await process.communicate()
        if process.returncode != 0:
            raise InvalidInput([InputError(f"moeserving set {self.name}", said.decode("utf-8", "replace").strip())])

    def down(self) -> int:
        """`moeserving down`; its exit status."""
        return subprocess.run(self.arguments("down"), check=False).returncode
