"""Which engines there are and which of them may get new requests. Owned by the dispatcher; no I/O, no clock.

An engine may get new requests while Kubernetes offers it, it says that it is ready, and it is not ejected. A failure
ejects it for `FIRST_EJECTION_S`, doubled by each further failure in a row.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from moe_contract.gateway_config import EngineAddress
from moe_scheduling.signals import Target

FIRST_EJECTION_S = 0.25
LONGEST_EJECTION_S = 30.0
# An engine that refused a request as full gets no new one for this long; it is no failure.
FULL_PAUSE_S = 0.1


@dataclass(slots=True, kw_only=True)
class Engine:
    """One engine: a server and the targets (data-parallel ranks) behind it. Written by `EngineFleet` alone.

    Attributes:
        address: its address; another address is another engine.
        host: value of the `Host` header of requests to it.
        targets: one for each rank.
        group: name of the Service that it was found behind; empty for one of a fixed list.
        is_offered: whether Kubernetes lets it have new requests.
        is_ready: whether its agent or its health route says that it takes requests; False before the first word.
        is_reachable: whether the source of its signals answers.
        failures: failures in a row.
        ejected_until_s: no new requests before this time, because it failed or is full.
        models: names of the models that it serves, as far as known.
        pid: of its serving process, as far as known.
    """

    address: EngineAddress
    host: bytes
    targets: tuple[Target, ...]
    group: str = ""
    is_offered: bool = True
    is_ready: bool = False
    is_reachable: bool = False
    failures: int = 0
    ejected_until_s: float = -math.inf
    models: frozenset[str] = frozenset()
    pid: int | None = None

    def may_accept(self, now_s: float) -> bool:
        """Whether it may get new requests."""
        return self.is_offered and self.is_ready and now_s >= self.ejected_until_s


class EngineFleet:
    """The known engines by name: the one writer of `Engine`.

    Methods that change an engine return it, or None when nothing has changed or no such engine is known.

    Attributes:
        engines: by name, in the order in which they were given.
        ejections: failures that ejected an engine, by its name; a metric.
    """

    def __init__(self) -> None:
        self.engines: dict[str, Engine] = {}
        self.ejections: Counter[str] = Counter()

    def replace(self, addresses: Collection[EngineAddress]) -> list[Engine]:
        """Makes these the known engines and returns those that are known no more.

        An engine whose address stays keeps its state. The same name at another address is another engine.
        """
        before = self.engines
        known = {engine.address: engine for engine in before.values()}
        self.engines = {address.name: known.get(address) or _new_engine(address) for address in addresses}
        return [engine for name, engine in before.items() if self.engines.get(name) is not engine]

    def offer(self, groups: Mapping[str, str], offered: Collection[str]) -> None:
        """Writes down the group of each engine, and the names of those that Kubernetes offers for new requests."""
        for name, engine in self.engines.items():
            engine.group = groups[name]
            engine.is_offered = name in offered

    def set_ready(self, name: str, ready: bool) -> Engine | None:
        """An engine says whether it takes new requests. One that becomes ready starts without its earlier failures."""
        if (engine := self.engines.get(name)) is None:
            return None
        if ready and not engine.is_ready:
            _forgive(engine)
        engine.is_ready = ready
        return engine

    def set_reachable(self, name: str, reachable: bool) -> Engine | None:
        """The source of an engine's signals answers, or no more."""
        if (engine := self.engines.get(name)) is None or engine.is_reachable is reachable:
            return None
        engine.is_reachable = reachable
        return engine

    def set_process(self, name: str, pid: int | None) -> Engine | None:
        """The process that serves: another one has an empty cache and another speed."""
        if (engine := self.engines.get(name)) is None or pid == engine.pid:
            return None
        engine.pid = pid
        return engine

    def set_models(self, name: str, models: frozenset[str]) -> Engine | None:
        """The names of the models that an engine serves."""
        if (engine := self.engines.get(name)) is None or models == engine.models:
            return None
        engine.models = models
        return engine

    def models(self) -> frozenset[str]:
        """The names of all models that any engine serves."""
        return frozenset(model for engine in self.engines.values() for model in engine.models)

    def fail(self, target: Target, now_s: float, *, dead: bool = False) -> Engine | None:
        """An engine broke a request or refused the connection: it is ejected.

        One that says that it is dead starts anew and is reported ready then: it is ejected for the longest time.
        """
        if (engine := self.engines.get(target.server)) is None:
            return None
        engine.failures += 1
        ejection_s = LONGEST_EJECTION_S if dead else FIRST_EJECTION_S * 2 ** min(engine.failures - 1, 16)
        engine.ejected_until_s = now_s + min(LONGEST_EJECTION_S, ejection_s)
        self.ejections[target.server] += 1
        return engine

    def pause_full(self, target: Target, now_s: float) -> Engine | None:
        """An engine answered 503: it is full or about to end, which is no failure. It gets a short pause."""
        if (engine := self.engines.get(target.server)) is None:
            return None
        engine.ejected_until_s = max(engine.ejected_until_s, now_s + FULL_PAUSE_S)
        return engine

    def succeed(self, target: Target) -> Engine | None:
        """An engine answered: its failures in a row end, and with them its ejection."""
        if (engine := self.engines.get(target.server)) is None or not engine.failures:
            return None
        _forgive(engine)
        return engine

    def ejected(self) -> list[Engine]:
        """The engines that are or were ejected."""
        return [engine for engine in self.engines.values() if engine.ejected_until_s > -math.inf]


def _forgive(engine: Engine) -> None:
    engine.failures, engine.ejected_until_s = 0, -math.inf


def _new_engine(address: EngineAddress) -> Engine:
    return Engine(
        address=address,
        host=address.url.removeprefix("http://").encode(),
        targets=tuple(Target(address.name, rank) for rank in range(address.ranks)),
    )
