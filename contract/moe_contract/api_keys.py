"""API keys of clients, read from folders that are laid out as a mounted Secret. Read by the gateway and by `up`.

Each file of a folder is an entry of the Secret. Its name is the tenant, its text either keys, one a line, or a JSON
object:

    {"keys": ["sk-..."], "tenant": "team-a", "priority": 10, "quota": {"requestsPerMinute": 600}}

Invariant: no error shows a part of a key.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from moe_contract.access_config import Quota
from moe_contract.documents import parse_document, parse_model, read_file
from moe_contract.input_errors import InputError, InvalidInput
from moe_contract.sections import Section

SHORTEST_KEY = 16
# The kubelet's link to the folder of the Secret's newest content, which it replaces as a whole.
CURRENT = "..data"


class EntryQuota(Quota):
    """A quota with its fields spelt as in the resource."""

    model_config = ConfigDict(alias_generator=to_camel)


class KeyEntry(Section):
    """An entry of a Secret that is a JSON object.

    Attributes:
        keys: the keys.
        tenant: whom they belong to; None is the entry's name.
        priority: the level of its requests; lower is more urgent. What a request asks for is added, and only above 0.
        quota: of the tenant; None is the gateway's.
    """

    keys: tuple[str, ...]
    tenant: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    priority: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] | None = None
    quota: EntryQuota | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key and whom it belongs to.

    Attributes:
        secret: the key itself.
        tenant: name of the tenant.
        priority: level of its requests; None: each request chooses its own.
        quota: of the tenant; None is the gateway's.
    """

    secret: bytes
    tenant: str
    priority: int | None = None
    quota: Quota | None = None

    def __repr__(self) -> str:
        return f"ApiKey(tenant={self.tenant!r})"


def read_keys(folders: Iterable[Path]) -> tuple[ApiKey, ...]:
    """All keys of these folders.

    Raises:
        InvalidInput: an entry cannot be read or is not valid, a key is there twice, or a tenant has two quotas.
    """
    keys: list[ApiKey] = []
    errors: list[InputError] = []
    for folder in folders:
        for path in _list_entries(folder):
            try:
                keys += _read_entry(path, f"{folder.name}/{path.name}")
            except InvalidInput as error:
                errors += error.errors
    errors += _find_clashes(keys)
    if errors:
        raise InvalidInput(errors)
    return tuple(keys)


def _list_entries(folder: Path) -> list[Path]:
    """The files of a folder, all of one version where the kubelet replaces them."""
    current = folder / CURRENT
    try:
        base = current.resolve(strict=True) if current.is_symlink() else folder
        return sorted(path for path in base.iterdir() if not path.name.startswith(".") and path.is_file())
    except OSError as error:
        raise InvalidInput([InputError("auth.key_dirs", f"cannot read {folder}: {error.strerror}")]) from None


def _read_entry(path: Path, name: str) -> Iterator[ApiKey]:
    text = read_file(path, name).strip()
    if text.startswith(b"{"):
        entry = _parse_entry(text, name)
    else:
        entry = KeyEntry(
            keys=tuple(line.strip().decode(errors="replace") for line in text.splitlines() if line.strip())
        )
    if not entry.keys:
        raise InvalidInput([InputError(name, "holds no key")])
    for number, key in enumerate(entry.keys):
        _check_key(key, f"{name}: key {number + 1}")
    tenant = entry.tenant or path.name
    return iter(
        [ApiKey(secret=key.encode(), tenant=tenant, priority=entry.priority, quota=entry.quota) for key in entry.keys]
    )


def _parse_entry(text: bytes, name: str) -> KeyEntry:
    try:
        return parse_model(KeyEntry, parse_document(text))
    except InvalidInput as error:
        # Messages about `keys` would show the value, which may be a key.
        rows = [
            InputError(name, f"{row.path}: a list of texts is needed" if row.path.startswith("keys") else str(row))
            for row in error.errors
        ]
        raise InvalidInput(rows) from None


def _check_key(key: str, place: str) -> None:
    if len(key) < SHORTEST_KEY or len(key) > 1024:
        raise InvalidInput([InputError(place, f"has {len(key)} characters; {SHORTEST_KEY} to 1024 are needed")])
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidInput([InputError(place, "has a character that no header can carry")])


def _find_clashes(keys: Iterable[ApiKey]) -> Iterator[InputError]:
    owners: dict[bytes, str] = {}
    quotas: dict[str, Quota] = {}
    for key in keys:
        if (owner := owners.setdefault(key.secret, key.tenant)) != key.tenant:
            yield InputError(key.tenant, f"has the same key as {owner}")
        if key.quota is not None and quotas.setdefault(key.tenant, key.quota) != key.quota:
            yield InputError(key.tenant, "has two entries with different quotas")
