"""A record in a memory-mapped file, guarded by a sequence lock: one writer, any number of readers, no waiting.

Used by every record of this package. Needs the standard library alone, since engine and agent both import it.

Invariants: a record has one writer; its file appears whole, header and first value included (it is renamed into
place); the sequence number is odd while the writer writes and rises by two at each write; a checksum over the body
makes a torn read visible on machines that reorder stores. A reader gets a whole value or `RecordUnreadableError`.
"""

import mmap
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Generic, Self, TypeVar

from moe_agent.shared_memory.layout import Layout

T = TypeVar("T")

MAGIC = b"MOESRECD"

_HEADER = struct.Struct("<8sII")
_SEQUENCE = struct.Struct("<Q")
_SEQUENCE_AT = _HEADER.size
_CHECKSUM = struct.Struct("<I")
_CHECKSUM_AT = _SEQUENCE_AT + _SEQUENCE.size
_BODY_AT = _CHECKSUM_AT + _CHECKSUM.size
# A writer holds the lock for about a microsecond, unless it is scheduled away within a write: then a reader sleeps.
_TRIES_WITHOUT_SLEEP = 20
_SLEEP_S = 0.0002


class RecordUnreadableError(Exception):
    """The record is absent, of another layout, or its writer died within a write."""


class RecordWriter(Generic[T]):
    """The one writer of a record. A write takes about two microseconds.

    Args:
        path: the record's file; an older one is replaced.
        layout: that of the value.
        first: the value that the record begins with.
    """

    def __init__(self, path: Path, layout: Layout[T], first: T) -> None:
        size = _BODY_AT + layout.size
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        with fresh.open("w+b") as file:
            file.write(_HEADER.pack(MAGIC, layout.digest, layout.size).ljust(size, b"\0"))
            file.flush()
            self._map = mmap.mmap(file.fileno(), size)
        self._pack, self._end = layout.pack, size
        self._sequence = 0
        self.write(first)
        os.replace(fresh, path)

    def write(self, value: T) -> None:
        """Replaces the value; `value` is any object that the layout can pack."""
        packed = self._pack(value)
        number = self._sequence + 1
        self._sequence = number + 1
        _SEQUENCE.pack_into(self._map, _SEQUENCE_AT, number)
        self._map[_CHECKSUM_AT : self._end] = _CHECKSUM.pack(zlib.crc32(packed)) + packed
        _SEQUENCE.pack_into(self._map, _SEQUENCE_AT, number + 1)

    def close(self) -> None:
        """Unmaps the record; its file stays."""
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class RecordReader(Generic[T]):
    """A reader of one file; a record that a new writer replaced needs a new reader.

    Args:
        path: the record's file.
        layout: that of the value.
        patience_s: how long a read waits for a writer that was interrupted within a write, in seconds.

    Raises:
        RecordUnreadableError: there is no such record, or it has another layout.
    """

    def __init__(self, path: Path, layout: Layout[T], patience_s: float = 0.0) -> None:
        self._path, self._unpack, self._patience_s = path, layout.unpack, patience_s
        self._end = _BODY_AT + layout.size
        known = _HEADER.pack(MAGIC, layout.digest, layout.size)
        try:
            with path.open("rb") as file:
                if (found := file.read(_HEADER.size)) != known:
                    raise RecordUnreadableError(f"{path}: {_describe(found)}; known: {_describe(known)}")
                self._map = mmap.mmap(file.fileno(), self._end, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise RecordUnreadableError(f"{path}: {error}") from error

    def sequence(self) -> int:
        """A number that changes with every write: a cheap way to see whether there is a new value."""
        number: int = _SEQUENCE.unpack_from(self._map, _SEQUENCE_AT)[0]
        return number

    def read(self, patience_s: float | None = None) -> T:
        """The last value; raises `RecordUnreadableError` when no whole read succeeds within the patience."""
        patience_s = self._patience_s if patience_s is None else patience_s
        deadline_s = time.monotonic() + patience_s
        while True:
            for _ in range(_TRIES_WITHOUT_SLEEP):
                before = self.sequence()
                packed = self._map[_BODY_AT : self._end]
                checksum = _CHECKSUM.unpack_from(self._map, _CHECKSUM_AT)[0]
                if before % 2 == 0 and before == self.sequence() and checksum == zlib.crc32(packed):
                    return self._unpack(packed)
            if time.monotonic() >= deadline_s:
                raise RecordUnreadableError(f"{self._path}: no whole read within {patience_s:g} s")
            time.sleep(_SLEEP_S)

    def close(self) -> None:
        """Unmaps the record; its file stays."""
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _describe(header: bytes) -> str:
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        return "not a record"
    _, digest, size = _HEADER.unpack(header)
    return f"layout {digest:08x} of {size} bytes"
