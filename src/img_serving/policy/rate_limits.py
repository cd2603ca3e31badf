"""Whom a call is charged to: the buckets of the gateway, of an address and of a key, checked together."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from img_serving.domain.tenants import Tenant
from img_serving.policy.token_bucket import TokenBucket

MAX_BUCKETS = 10_000
"""Addresses remembered at most: past it the one unseen for longest is forgotten, which can only be in its favour."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """A rate (requests a second) and a burst (requests)."""

    rate: float
    burst: float


class Charge(msgspec.Struct, frozen=True, gc=False):
    """What a call was told: `wait_seconds` 0.0 means it may go; the other figures describe the key's bucket."""

    wait_seconds: float
    scope: str = "key"
    limit: int | None = None
    remaining: int = 0
    reset_seconds: float = 0.0


FREE = Charge(0.0)


class RateLimits:
    """One call costs one token of each bucket that applies; a refused call costs nobody else's."""

    def __init__(
        self, per_key: Allowance | None, *, everybody: Allowance | None = None, per_address: Allowance | None = None
    ) -> None:
        """None means unlimited. `per_key` is the default that a tenant's own figures override."""
        self._per_key = per_key
        self._per_address = per_address
        self._everybody = everybody
        self._global: TokenBucket | None = None
        self._tenants: dict[str, TokenBucket] = {}
        self._addresses: OrderedDict[str, TokenBucket] = OrderedDict()

    @property
    def has_address_limits(self) -> bool:
        """Whether `charge_address` could ever say no."""
        return self._everybody is not None or self._per_address is not None

    def charge_address(self, address: str, now: float) -> float:
        """Charge a caller before it is known who it is: the seconds to wait, 0.0 to go on."""
        # The caller's own bucket first: what it is refused must not come out of everybody's.
        if self._per_address is not None:
            bucket = self._addresses.get(address)
            if bucket is None:
                bucket = self._addresses[address] = TokenBucket(self._per_address.rate, self._per_address.burst, now)
                if len(self._addresses) > MAX_BUCKETS:
                    self._addresses.popitem(last=False)
            else:
                self._addresses.move_to_end(address)
            wait = bucket.take(1, now)
            if wait > 0:
                return wait
        if self._everybody is None:
            return 0.0
        if self._global is None:
            self._global = TokenBucket(self._everybody.rate, self._everybody.burst, now)
        return self._global.take(1, now)

    def charge(self, tenant: Tenant, now: float) -> Charge:
        """Charge one call to a key. Refused, it gives back what `charge_address` took from everybody's bucket."""
        bucket = self._tenants.get(tenant.name)
        if bucket is None:
            if self._per_key is None and tenant.rate is None:
                return FREE
            rate = tenant.rate if tenant.rate is not None else self._per_key.rate if self._per_key else 1.0
            burst = tenant.burst if tenant.burst is not None else self._per_key.burst if self._per_key else rate * 2
            bucket = self._tenants[tenant.name] = TokenBucket(rate, burst, now)
        wait = bucket.take(1, now)
        if wait > 0 and self._global is not None:
            self._global.give_back(1)
        tokens = bucket.tokens
        return Charge(wait, "key", int(bucket.burst), int(tokens + 1e-9), (bucket.burst - tokens) / bucket.rate)
