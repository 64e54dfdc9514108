"""The binary layout of a shared-memory record, derived from the type of its value.

A field's type decides its format: `int` and `float` (64 bits each), `bool`, an enum (the number of its member), a
nested dataclass or named tuple, a tuple of fixed length, or one of these `| None`. Adding a field to a type is enough
to carry it. The functions that pack and unpack are compiled once from the fields, as `dataclasses` does for
`__init__`: packing eighteen numbers takes about a microsecond.

Invariant: two layouts have the same digest only if they have the same fields, of the same types, in the same order.
"""

import struct
import types
import zlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_FORMATS: dict[Any, str] = {bool: "?", int: "q", float: "d"}


class Layout(Generic[T]):
    """How a value of one type is stored in a fixed number of bytes.

    Args:
        kind: a dataclass or a named tuple.

    Attributes:
        size: bytes of a packed value.
        digest: 32 bits that differ between layouts.
        pack: bytes of a value. Reads attributes alone, so any object that has those of `kind` will do.
        unpack: the value of bytes that `pack` made.

    Raises:
        TypeError: a field has a type that cannot be stored.
    """

    pack: Callable[[Any], bytes]
    unpack: Callable[[bytes], T]

    def __init__(self, kind: type[T]) -> None:
        compiler = _Compiler()
        rebuilt = compiler.add(kind, "value")
        body = struct.Struct("<" + compiler.formats)
        names = {**compiler.names, "pack": body.pack, "unpack": body.unpack}
        self.size = body.size
        self.digest = zlib.crc32(" ".join(compiler.description).encode())
        self.pack = eval(f"lambda value: pack({', '.join(compiler.packed)})", names)
        self.unpack = eval(f"lambda data: (lambda leaf: {rebuilt})(unpack(data))", names)


class _Compiler:
    """Walks the fields of a type and writes the expressions that take a value apart and rebuild it."""

    def __init__(self) -> None:
        self.formats = ""
        self.packed: list[str] = []
        self.description: list[str] = []
        self.names: dict[str, Any] = {}

    def add(self, kind: Any, source: str) -> str:
        """Adds a value of type `kind` that the expression `source` reads; returns the expression that rebuilds it."""
        self.description.append(f"{source.rpartition('.')[2]}:{getattr(kind, '__name__', kind)}")
        if kind in _FORMATS:
            return self._add_leaf(_FORMATS[kind], source)
        if get_origin(kind) in (Union, types.UnionType):
            return self._add_optional(kind, source)
        if get_origin(kind) is tuple:
            parts = [self.add(part, f"{source}[{place}]") for place, part in enumerate(get_args(kind))]
            return f"({', '.join(parts)},)"
        if isinstance(kind, type) and issubclass(kind, Enum):
            return self._add_enum(kind, source)
        parts = [f"{name}={self.add(part, f'{source}.{name}')}" for name, part in _fields_of(kind)]
        return f"{self._name(kind)}({', '.join(parts)})"

    def _add_leaf(self, letter: str, source: str) -> str:
        self.formats += letter
        self.packed.append(source)
        return f"leaf[{len(self.packed) - 1}]"

    def _add_enum(self, kind: type[Enum], source: str) -> str:
        members = tuple(kind)
        self.description += [str(member.value) for member in members]
        numbers = self._name({member: number for number, member in enumerate(members)})
        return f"{self._name(members)}[{self._add_leaf('B', f'{numbers}[{source}]')}]"

    def _add_optional(self, kind: Any, source: str) -> str:
        """A flag, then the value, or zeros in its place."""
        inner, *others = [part for part in get_args(kind) if part is not type(None)]
        if others:
            raise TypeError(f"no layout for {kind!r}; known: one type, or None")
        layout = Layout(inner)
        zeros = self._name(layout.unpack(bytes(layout.size)))
        is_there = self._add_leaf("?", f"{source} is not None")
        return f"({self.add(inner, f'({source} or {zeros})')} if {is_there} else None)"

    def _name(self, value: Any) -> str:
        name = f"_{len(self.names)}"
        self.names[name] = value
        return name


def _fields_of(kind: Any) -> list[tuple[str, Any]]:
    """Names and types of the fields of a dataclass or a named tuple, in their order."""
    if is_dataclass(kind):
        names = [field.name for field in fields(kind)]
    elif hasattr(kind, "_fields"):
        names = list(kind._fields)
    else:
        raise TypeError(f"no layout for {kind!r}; known: int, float, bool, enums, dataclasses, named tuples, tuples")
    hints = get_type_hints(kind)
    return [(name, hints[name]) for name in names]
