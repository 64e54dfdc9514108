"""Which engines there are and which of them may get new requests. Owned by the dispatcher; no I/O, no clock.

An engine may get new requests while Kubernetes offers it, it says that it is ready, and it is not ejected.

Failures and errors eject it, for `FIRST_EJECTION_S` first and twice as long each further time. A failure, such as a
broken connection, ejects at once. An error that the engine answers may be due to the request, so it takes
`ERRORS_TO_EJECT` of them, and such an engine is still used while there is no other. After an ejection an engine is on
trial: it gets one request at a time, until one is answered; after errors until whole answers have forgiven them.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_contract.agent_state import EngineState
from moe_contract.gateway_config import EngineAddress
from moe_scheduling.signals import Target

FIRST_EJECTION_S = 0.25
LONGEST_EJECTION_S = 30.0
# Errors, less half of them at each good answer, from which an engine is ejected.
ERRORS_TO_EJECT = 3
# An engine that refused a request as full gets no new one for this long; it is no failure.
FULL_PAUSE_S = 0.1
# A trial without an answer by then keeps others out no longer: a long answer in one piece shows nothing before its end.
LONGEST_TRIAL_S = 5.0


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
        is_draining: whether its agent says that it finishes what it has and takes nothing new.
        is_stuck: whether its agent says that one of its ranks makes no steps, for which the others wait.
        failures: failures in a row.
        errors: errors that it answered, halved by each good answer.
        ejected_until_s: no new requests before this time, because it failed or is full.
        suspended_until_s: no new requests before this time while another engine takes them, because it answered errors.
        trial: the one request that it gets while it is on trial; None without one.
        models: names of the models and adapters that it serves, as far as known.
        model_rows: what it lists of them, by name.
        has_listed: whether it has listed its names, so that it serves no others.
        pid: of its serving process, as far as known.
        identity: that of the engine, as its agent reports it; empty without.
        exchanges_blocks: whether its agent says that it exchanges KV blocks with other engines.
        reported: what its agent said last; None before, and without an agent.
    """

    address: EngineAddress
    host: bytes
    targets: tuple[Target, ...]
    group: str = ""
    is_offered: bool = True
    is_ready: bool = False
    is_reachable: bool = False
    is_draining: bool = False
    is_stuck: bool = False
    failures: int = 0
    errors: int = 0
    ejected_until_s: float = -math.inf
    suspended_until_s: float = -math.inf
    trial: int | None = None
    trial_until_s: float = -math.inf
    models: frozenset[str] = frozenset()
    model_rows: Mapping[str, Any] = field(default_factory=dict)
    has_listed: bool = False
    pid: int | None = None
    identity: str = ""
    exchanges_blocks: bool = False
    reported: EngineState | None = None

    def may_accept(self, now_s: float) -> bool:
        """Whether it may get new requests while there are other engines."""
        free = now_s >= self.suspended_until_s and not self.is_stuck
        return free and self.may_accept_alone(now_s) and not self.is_tried(now_s)

    def is_tried(self, now_s: float) -> bool:
        """Whether a request is on its way that has to be answered before the next one."""
        return self.trial is not None and now_s < self.trial_until_s

    def is_tried_with(self, key: int, now_s: float) -> bool:
        """Whether this is the request that it gets while it is on trial."""
        return self.trial == key and self.may_accept_alone(now_s)

    def may_accept_alone(self, now_s: float) -> bool:
        """Whether it may get new requests while no other engine may."""
        return self.is_offered and self.is_ready and now_s >= self.ejected_until_s

    @property
    def is_on_trial(self) -> bool:
        """Whether it has failed and not answered since."""
        return self.failures > 0 or self.errors >= ERRORS_TO_EJECT


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
        # Names of the engines that may be ejected or on trial; usually empty, so that asking for them costs nothing.
        self._troubled: set[str] = set()

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

    def set_ready(self, name: str, ready: bool, *, draining: bool = False, stuck: bool = False) -> Engine | None:
        """An engine says whether it takes new requests. One that becomes ready starts without its earlier failures.

        One of which a rank is stuck is used while there is no other, for the rank may be amid a very long step.
        """
        if (engine := self.engines.get(name)) is None:
            return None
        if ready and not engine.is_ready:
            _forgive(engine)
        engine.is_ready = ready
        engine.is_draining = draining
        engine.is_stuck = stuck
        if stuck:
            self._troubled.add(name)
        return engine

    def set_reachable(self, name: str, reachable: bool, reported: EngineState | None = None) -> Engine | None:
        """The source of an engine's signals answers, an agent with a state, or no more."""
        if (engine := self.engines.get(name)) is None:
            return None
        engine.reported = reported or engine.reported
        if engine.is_reachable is reachable:
            return None
        engine.is_reachable = reachable
        return engine

    def set_process(
        self, name: str, pid: int | None, identity: str = "", *, exchanges_blocks: bool = False
    ) -> Engine | None:
        """The process that serves, and the engine's identity: another process has an empty cache and another speed."""
        if (engine := self.engines.get(name)) is None:
            return None
        engine.identity, engine.exchanges_blocks = identity, exchanges_blocks
        if pid == engine.pid:
            return None
        engine.pid = pid
        return engine

    def set_models(self, name: str, rows: Mapping[str, Any], *, listed: bool = True) -> Engine | None:
        """What an engine lists of the models that it serves, by their names; `listed`: these are all of them."""
        if (engine := self.engines.get(name)) is None:
            return None
        engine.model_rows, listed = rows, listed and bool(rows)
        if engine.models == rows.keys() and (engine.has_listed or not listed):
            return None
        engine.models, engine.has_listed = frozenset(rows), engine.has_listed or listed
        return engine

    def any_may_accept(self, names: Iterable[str], now_s: float) -> bool:
        """Whether one of these engines may get new requests; names that are not known count for nothing."""
        engines = self.engines
        return any(engines[name].may_accept(now_s) for name in names if name in engines)

    def models(self) -> frozenset[str]:
        """The names of all models that any engine serves."""
        return frozenset(model for engine in self.engines.values() for model in engine.models)

    def fail(self, target: Target, now_s: float, *, dead: bool = False) -> Engine | None:
        """An engine broke a request or refused the connection: it is ejected.

        One that says that it is dead starts anew and is reported ready then: it is ejected for the longest time.
        """
        if (engine := self.engines.get(target.server)) is None:
            return None
        self._troubled.add(target.server)
        engine.failures += 1
        ejection_s = LONGEST_EJECTION_S if dead else _ejection_s(engine.failures)
        engine.ejected_until_s = now_s + ejection_s
        engine.trial = None
        self.ejections[target.server] += 1
        return engine

    def err(self, target: Target, now_s: float) -> Engine | None:
        """An engine answered with an error of its own: from `ERRORS_TO_EJECT` of them on it is ejected.

        Errors of requests that were sent before an ejection do not prolong it.
        """
        engine = self.engines.get(target.server)
        if engine is None or now_s < engine.suspended_until_s:
            return None
        engine.errors += 1
        engine.trial = None
        if engine.errors >= ERRORS_TO_EJECT:
            self._troubled.add(target.server)
            engine.suspended_until_s = now_s + _ejection_s(engine.errors - ERRORS_TO_EJECT + 1)
            self.ejections[target.server] += 1
        return engine

    def stall(self, target: Target, now_s: float) -> Engine | None:
        """An engine has work and makes no steps: it is ejected as for errors, again while it stays so."""
        engine = self.engines.get(target.server)
        if engine is None or now_s < engine.suspended_until_s:
            return None
        engine.errors = max(engine.errors, ERRORS_TO_EJECT - 1)
        return self.err(target, now_s)

    def begin_trial(self, target: Target, key: int, now_s: float) -> Engine | None:
        """A request was sent to an engine; one that is on trial gets no other until that one is decided."""
        engine = self.engines.get(target.server)
        if engine is None or not engine.is_on_trial or engine.is_tried(now_s):
            return None
        self._troubled.add(target.server)
        engine.trial, engine.trial_until_s = key, now_s + LONGEST_TRIAL_S
        return engine

    def pass_trial(self, target: Target, key: int, successor: int, now_s: float) -> None:
        """Another request has taken the place of this one: where it was the one of a trial, that one is now."""
        engine = self.engines.get(target.server)
        if engine is not None and engine.trial == key:
            engine.trial, engine.trial_until_s = successor, now_s + LONGEST_TRIAL_S

    def end_trial(self, target: Target, key: int) -> Engine | None:
        """A request has ended: where it was the one of a trial, the next may follow."""
        engine = self.engines.get(target.server)
        if engine is None or engine.trial != key:
            return None
        engine.trial = None
        return engine

    def pause_full(self, target: Target, now_s: float) -> Engine | None:
        """An engine answered 503: it is full or about to end, which is no failure. It gets a short pause."""
        if (engine := self.engines.get(target.server)) is None:
            return None
        self._troubled.add(target.server)
        engine.ejected_until_s = max(engine.ejected_until_s, now_s + FULL_PAUSE_S)
        return engine

    def succeed(self, target: Target) -> Engine | None:
        """An engine begins an answer: its failures in a row end, and with them its ejection and its trial.

        One that answered errors is on trial until the answer is whole: it may break again amid a stream.
        """
        engine = self.engines.get(target.server)
        if engine is None or not (engine.failures or engine.trial is not None):
            return None
        engine.failures, engine.ejected_until_s = 0, -math.inf
        if not engine.is_on_trial:
            engine.trial = None
        return engine

    def complete(self, target: Target) -> Engine | None:
        """An engine gave a whole answer without an error: half of its errors are forgiven."""
        engine = self.engines.get(target.server)
        if engine is None or not engine.errors:
            return None
        engine.errors //= 2
        if engine.errors < ERRORS_TO_EJECT:
            engine.suspended_until_s, engine.trial = -math.inf, None
        return engine

    def ejected(self) -> list[Engine]:
        """The engines that are or were ejected and have not answered since."""
        if not self._troubled:
            return []
        ejected = [
            engine for engine in self.engines.values() if engine.address.name in self._troubled and _is_out(engine)
        ]
        self._troubled = {engine.address.name for engine in ejected}
        return ejected


def _forgive(engine: Engine) -> None:
    engine.failures = engine.errors = 0
    engine.ejected_until_s = engine.suspended_until_s = -math.inf
    engine.trial = None


def _is_out(engine: Engine) -> bool:
    until_s = max(engine.ejected_until_s, engine.suspended_until_s)
    return until_s > -math.inf or engine.trial is not None or engine.is_stuck


def _ejection_s(times: int) -> float:
    return min(LONGEST_EJECTION_S, FIRST_EJECTION_S * 2.0 ** min(times - 1, 16))


def _new_engine(address: EngineAddress) -> Engine:
    return Engine(
        address=address,
        host=address.url.removeprefix("http://").encode(),
        targets=tuple(Target(address.name, rank) for rank in range(address.ranks)),
    )
