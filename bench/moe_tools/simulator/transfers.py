"""KV blocks between servers: links, first contacts, and the leases under which a prefill engine keeps blocks.

The world owns one `Transfers` and asks it when a transfer ends; it keeps no clock.

A rank has one link in each direction, which serves its transfers one after the other in the order of their begin. A
prefill engine keeps the blocks of a computed prompt until they were fetched or the lease is over; the decode engine
prolongs the lease while the request waits there, as NIXL's heartbeats do.

Invariants: a transfer ends no sooner than its bytes take at the rate of the link; a lease that is over is never
fetched.
"""

import math
from dataclasses import dataclass, field

from moe_scheduling.engine.disaggregation import KvTransfer
from moe_scheduling.signals import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPlan:
    """How KV blocks travel in a run.

    Attributes:
        link: bytes of a token, rate, fixed time and handshake.
        lease_s: seconds for which a prefill engine keeps blocks that nobody asks for; NIXL's default.
        failure_s: seconds until the failure of a transfer from a known engine is seen; measured with NIXL 1.5.1.
        unknown_s: the same for an engine that was never in contact: NIXL's time-out of a handshake.
    """

    link: KvTransfer
    lease_s: float = 30.0
    failure_s: float = 0.06
    unknown_s: float = 5.0


@dataclass(slots=True, kw_only=True)
class TransferCounts:
    """Transfers of a run.

    Attributes:
        done: that arrived.
        tokens: that travelled.
        seconds: from the begin of each to its end.
        failed: that did not arrive; the decode engine then computed the prompt itself.
        expired: leases that ended before their blocks were fetched.
        held: leases that were still open at the end of the run.
    """

    done: int = 0
    tokens: int = 0
    seconds: float = 0.0
    failed: int = 0
    expired: int = 0
    held: int = 0


@dataclass(slots=True, kw_only=True)
class KvLease:
    """Blocks of one request that a prefill engine keeps. `epoch` numbers the processes of its server."""

    source: Target
    epoch: int
    name: str
    expires_s: float
    # A decode engine has the request and prolongs the lease.
    is_claimed: bool = False


@dataclass(slots=True)
class Transfers:
    """Links, contacts and leases of one run; `leases` are by the id of the request at its prefill engine."""

    plan: TransferPlan
    counts: TransferCounts = field(default_factory=TransferCounts)
    leases: dict[str, KvLease] = field(default_factory=dict)
    _met: set[tuple[str, int, str, int]] = field(default_factory=set)
    _out_free_s: dict[Target, float] = field(default_factory=dict)
    _in_free_s: dict[Target, float] = field(default_factory=dict)

    def hold(self, name: str, source: Target, epoch: int, now_s: float) -> KvLease:
        """Opens the lease of a prompt that was computed, under its id at the prefill engine."""
        lease = KvLease(source=source, epoch=epoch, name=name, expires_s=now_s + self.plan.lease_s)
        self.leases[name] = lease
        return lease

    def claim(self, name: str) -> None:
        """Prolongs the lease until the request is fetched or given up; an ended lease stays ended."""
        if (lease := self.leases.get(name)) is not None:
            lease.is_claimed, lease.expires_s = True, math.inf

    def give_up(self, name: str, now_s: float) -> KvLease | None:
        """Ends the heartbeats of a decode engine that is gone; returns the lease, which ends later by itself."""
        lease = self.leases.get(name)
        if lease is not None and lease.is_claimed:
            lease.is_claimed, lease.expires_s = False, now_s + self.plan.lease_s
            return lease
        return None

    def begin(self, lease: KvLease, sink: Target, sink_epoch: int, tokens: int, now_s: float) -> float:
        """Returns when the blocks have arrived at `sink`."""
        link, source = self.plan.link, lease.source
        pair = (source.server, lease.epoch, sink.server, sink_epoch)
        ready_s = now_s + link.transfer_s(0, met=True) + (0.0 if pair in self._met else link.handshake_s)
        self._met.add(pair)
        begins_s = max(ready_s, self._out_free_s.get(source, 0.0), self._in_free_s.get(sink, 0.0))
        ends_s = begins_s + tokens * link.token_bytes / link.bytes_per_s
        self._out_free_s[source] = self._in_free_s[sink] = ends_s
        return ends_s

    def fails_s(self, source: Target, epoch: int, sink: Target, sink_epoch: int) -> float:
        """Returns the seconds until the decode engine sees that a transfer fails."""
        is_known = (source.server, epoch, sink.server, sink_epoch) in self._met
        return self.plan.failure_s if is_known else self.plan.unknown_s

    def arrived(self, tokens: int, seconds: float) -> None:
        """Counts a transfer that arrived."""
        self.counts.done += 1
        self.counts.tokens += tokens
        self.counts.seconds += seconds
