"""A file in shared memory by which the soak steers a mock engine, and the engine reports its steps.

It works while the engine is suspended and costs the engine a read, not a connection. The soak writes the mode, the
engine the rest.
"""

import mmap
import struct
from enum import IntEnum
from pathlib import Path

_MODE = struct.Struct("<Q")
_STEPS = struct.Struct("<QQ")
_STEPS_AT = 8
_BYTES = 64


class EngineMode(IntEnum):
    """How a mock engine answers.

    `NORMAL`: as vLLM does. `SLOW`: its steps take 20 times as long. `HANG`: its server lives, its core makes no step.
    `FAIL`: status 500 at once. `STREAM_ERROR`: an error as the first event of a stream of status 200. `FULL`: status
    503. `NO_HTTP`: bytes that are no HTTP. `BAD_CHUNKS`: a head, then no chunk. `EMPTY`: streams without a token or an
    end, and answers that are cut before their body. `CUT`: streams are cut after their first tokens. `REFUSE`: nothing
    listens on the port, and connections are reset.
    """

    NORMAL = 0
    SLOW = 1
    HANG = 2
    FAIL = 3
    STREAM_ERROR = 4
    FULL = 5
    NO_HTTP = 6
    BAD_CHUNKS = 7
    EMPTY = 8
    CUT = 9
    REFUSE = 10


class EnginePage:
    """The page of one engine, kept in a file that both sides map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.write_bytes(bytes(_BYTES))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _BYTES)

    @property
    def mode(self) -> EngineMode:
        """How the engine answers from now on."""
        return EngineMode(_MODE.unpack_from(self._memory)[0])

    @mode.setter
    def mode(self, mode: EngineMode) -> None:
        _MODE.pack_into(self._memory, 0, mode)

    def report(self, step: int, running: int) -> None:
        """Writes the number of the newest step and of the running requests."""
        _STEPS.pack_into(self._memory, _STEPS_AT, step, running)

    def read_steps(self) -> tuple[int, int]:
        """The number of the newest step, and of the running requests."""
        step, running = _STEPS.unpack_from(self._memory, _STEPS_AT)
        return step, running

    def close(self) -> None:
        """Unmaps the file from memory."""
        self._memory.close()
