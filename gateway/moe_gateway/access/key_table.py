"""The keys that are in force, by their hash. Pure; a reload makes a new table.

Keys are random and long, so that one SHA-256 is enough: there is no dictionary to try, which is what a slow hash would
guard against. Memory holds no key. A lookup tells nothing by its time: it finds a row by the hash of what the client
sent, which the client can't steer towards the hash of a key, and compares the whole hashes in constant time.
"""

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from moe_contract.access_config import Quota
from moe_contract.api_keys import ApiKey
from moe_contract.tenancy import hash_tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whom a credential belongs to.

    Attributes:
        name: of the tenant.
        tenant: its hash, as engines and queues know it.
        priority: level of its requests; None: each request chooses its own.
        quota: of the tenant; None is the gateway's.
    """

    name: str
    tenant: str
    priority: int | None = None
    quota: Quota | None = None


class KeyTable:
    """Finds the caller of a key."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        rows = [*keys]
        quotas = {key.tenant: key.quota for key in rows if key.quota is not None}
        self._rows = {
            digest: (digest, build_caller(key.tenant, key.priority, quotas.get(key.tenant)))
            for key in rows
            for digest in [sha256(key.secret).digest()]
        }
        self._tenants: dict[str, Caller] = {}
        for _, caller in self._rows.values():
            known = self._tenants.setdefault(caller.name, caller)
            if caller.priority is not None and (known.priority is None or caller.priority > known.priority):
                self._tenants[caller.name] = caller

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def names(self) -> dict[str, str]:
        """Names of the tenants by their hash."""
        return {caller.tenant: name for name, caller in self._tenants.items()}

    def find(self, key: bytes) -> Caller | None:
        """The caller; None for a key that is not in force."""
        digest = sha256(key).digest()
        row = self._rows.get(digest)
        return row[1] if row is not None and hmac.compare_digest(row[0], digest) else None

    def add_terms(self, caller: Caller) -> Caller:
        """A caller whose credential is no key, with the quota and the class of its tenant where that has keys too.

        Of several classes it is the least urgent one.
        """
        return self._tenants.get(caller.name, caller)


def build_caller(name: str, priority: int | None = None, quota: Quota | None = None) -> Caller:
    """The caller of a tenant."""
    return Caller(name=name, tenant=hash_tenant(name.encode()), priority=priority, quota=quota)
