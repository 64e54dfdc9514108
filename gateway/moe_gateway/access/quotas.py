"""The quotas of tenants: requests a minute, tokens a minute, and requests at a time. Pure; the gate has the clock.

A request is charged when it is admitted: one request, its prompt as far as its size is known, and the most tokens that
its answer may have. When it ends, the tokens that it really took take the place of that. A request that failed before
its answer costs no tokens. With several gateways each has an equal part of a quota.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from moe_contract.access_config import Quota

from moe_gateway.access.key_table import Caller
from moe_gateway.access.token_bucket import TokenBucket

# Names of tenants come from outside: beyond this number those that owe nothing are forgotten.
MOST_IDLE_TENANTS = 10_000
# They are looked for at most this often.
FORGET_PERIOD_S = 1.0
# Weight of the newest request in the mean duration of a tenant's requests.
_NEWEST = 0.1


class QuotaBound(StrEnum):
    """Which bound of a quota is reached."""

    REQUESTS = "requests a minute"
    TOKENS = "tokens a minute"
    CONCURRENCY = "requests at a time"


@dataclass(frozen=True, slots=True)
class OverQuota:
    """A request that is not admitted.

    Attributes:
        limit: the bound that is reached; of several the one that lasts longest.
        bound: its number, for the tenant as a whole.
        wait_s: seconds until the request would be admitted; for requests at a time the time in which one of them
            usually ends.
    """

    limit: QuotaBound
    bound: int
    wait_s: float


@dataclass(slots=True)
class TenantUse:
    """What a tenant uses at this gateway.

    Attributes:
        quota: its bounds, for all gateways together.
        concurrency: most requests at a time here; None: no bound.
        requests, tokens: its buckets; None: no bound.
        in_flight: requests that were admitted and have not ended.
        reserved_tokens: what they were charged.
        mean_s: mean duration of its requests.
    """

    quota: Quota
    concurrency: int | None = None
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    in_flight: int = 0
    reserved_tokens: int = 0
    mean_s: float = 1.0

    def is_idle(self, now_s: float) -> bool:
        """Whether a new state would be the same."""
        buckets = (self.requests, self.tokens)
        return self.in_flight == 0 and all(bucket is None or bucket.is_full(now_s) for bucket in buckets)


@dataclass(slots=True)
class Lease:
    """An admitted request, from its admission to its end.

    Attributes:
        use: of its tenant.
        since_s: when it was admitted.
        prompt_tokens: of its prompt, as far as they were known then.
        charged_tokens: what its tenant was charged then: its prompt, and the most that its answer may have.
    """

    use: TenantUse
    since_s: float
    prompt_tokens: int
    charged_tokens: int
    _has_ended: bool = field(default=False, init=False)

    def end(self, tokens: int, now_s: float) -> None:
        """The request has ended and took these tokens; a second call changes nothing."""
        if self._has_ended:
            return
        self._has_ended, use = True, self.use
        use.in_flight -= 1
        use.reserved_tokens -= self.charged_tokens
        use.mean_s += _NEWEST * (now_s - self.since_s - use.mean_s)
        if use.tokens is not None:
            use.tokens.take(tokens - self.charged_tokens, now_s)


@dataclass(slots=True)
class Place:
    """A place among a tenant's requests at a time, for one that is not admitted yet.

    Attributes:
        use: of its tenant.
    """

    use: TenantUse
    _is_free: bool = field(default=False, init=False)

    def free(self, _task: object = None) -> None:
        """Gives the place back; a second call changes nothing."""
        if not self._is_free:
            self._is_free = True
            self.use.in_flight -= 1


class Quotas:
    """The use of each tenant.

    Args:
        default: quota of tenants that have none of their own.
    """

    def __init__(self, default: Quota) -> None:
        self._default = default
        self._gateways = 1
        self._forgot_s = -math.inf
        self._uses: dict[str, TenantUse] = {}

    @property
    def tenants(self) -> int:
        """Number of tenants that are remembered."""
        return len(self._uses)

    def admit(self, caller: Caller, prompt_tokens: int, now_s: float, *, answer_tokens: int = 0) -> Lease | OverQuota:
        """Admits a request, or names the bound that it has reached, at no cost.

        Args:
            caller: whose tenant is charged.
            prompt_tokens: of its prompt.
            now_s: monotonic seconds.
            answer_tokens: most tokens of its answer, which are reserved for it; 0 where it names no limit.
        """
        use, tokens = self._find_use(caller, now_s), prompt_tokens + answer_tokens
        if (over := _find_limit(use, tokens, now_s)) is not None:
            return over
        use.in_flight += 1
        use.reserved_tokens += tokens
        if use.requests is not None:
            use.requests.take(1, now_s)
        if use.tokens is not None:
            use.tokens.take(tokens, now_s)
        return Lease(use, now_s, prompt_tokens, tokens)

    def look(self, caller: Caller, now_s: float) -> OverQuota | None:
        """The bound that the smallest request would pass now; None: none."""
        return _find_limit(self._find_use(caller, now_s), 0, now_s)

    def reserve(self, caller: Caller, now_s: float) -> Place | OverQuota:
        """Takes a place for a request whose body is still to be read."""
        use = self._find_use(caller, now_s)
        if (over := _find_crowd(use)) is not None:
            return over
        use.in_flight += 1
        return Place(use)

    def quota_of(self, caller: Caller) -> Quota:
        """The quota of a caller's tenant, for all gateways together."""
        return caller.quota or self._default

    def divide(self, gateways: int, now_s: float) -> None:
        """This number of gateways share the requests of all tenants; none at all counts as one."""
        self._gateways = max(1, gateways)
        for use in self._uses.values():
            self._size(use, now_s)

    def _find_use(self, caller: Caller, now_s: float) -> TenantUse:
        quota = self.quota_of(caller)
        use = self._uses.get(caller.name)
        if use is None:
            self._forget_idle(now_s)
            use = self._uses[caller.name] = TenantUse(quota)
            self._size(use, now_s)
        elif use.quota is not quota and use.quota != quota:
            use.quota = quota
            self._size(use, now_s)
        return use

    def _forget_idle(self, now_s: float) -> None:
        if len(self._uses) >= MOST_IDLE_TENANTS and now_s - self._forgot_s >= FORGET_PERIOD_S:
            self._forgot_s = now_s
            self._uses = {name: use for name, use in self._uses.items() if not use.is_idle(now_s)}

    def _size(self, use: TenantUse, now_s: float) -> None:
        quota, gateways = use.quota, self._gateways
        use.concurrency = None if quota.concurrency is None else math.ceil(quota.concurrency / gateways)
        use.requests = _resize(use.requests, quota.requests_per_minute, gateways, now_s)
        use.tokens = _resize(use.tokens, quota.tokens_per_minute, gateways, now_s, use.reserved_tokens)


def _resize(
    bucket: TokenBucket | None, per_minute: int | None, gateways: int, now_s: float, reserved: int = 0
) -> TokenBucket | None:
    if per_minute is None:
        return None
    # A part below one request would never let one through.
    part = max(1.0, per_minute / gateways)
    if bucket is None:
        # What runs already was charged to no bucket, and is given back to this one at its end.
        return TokenBucket(part, part - reserved, now_s)
    bucket.resize(part, now_s, reserved)
    return bucket


def _find_limit(use: TenantUse, tokens: int, now_s: float) -> OverQuota | None:
    quota, found = use.quota, []
    if (over := _find_crowd(use)) is not None:
        found.append(over)
    if use.requests is not None and (wait_s := use.requests.wait_s(1, now_s)) > 0:
        found.append(OverQuota(QuotaBound.REQUESTS, quota.requests_per_minute or 0, wait_s))
    if use.tokens is not None and (wait_s := use.tokens.wait_s(max(1, tokens), now_s)) > 0:
        found.append(OverQuota(QuotaBound.TOKENS, quota.tokens_per_minute or 0, wait_s))
    return max(found, key=lambda over: over.wait_s, default=None)


def _find_crowd(use: TenantUse) -> OverQuota | None:
    if use.concurrency is None or use.in_flight < use.concurrency:
        return None
    return OverQuota(QuotaBound.CONCURRENCY, use.quota.concurrency or 0, use.mean_s / use.concurrency)
