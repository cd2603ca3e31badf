"""The token bucket: a rate and a burst, asked with the time in hand."""

from __future__ import annotations


class TokenBucket:
    """Refills at `rate` tokens a second up to `burst` tokens; starts full."""

    __slots__ = ("_at", "burst", "rate", "tokens")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        """`rate` in tokens a second, `burst` in tokens, both above zero; `now` in seconds. `tokens` is as of the last take."""
        self.rate = rate
        self.burst = burst
        self.tokens = burst
        self._at = now

    def take(self, cost: float, now: float) -> float:
        """Take `cost` tokens and return 0.0, or take none and return the seconds until they would be there.

        A cost above the burst is charged as the burst: it could never be paid otherwise.
        """
        elapsed = now - self._at
        if elapsed > 0:
            self.tokens = min(self.burst, self.tokens + elapsed * self.rate)
            self._at = now
        cost = min(cost, self.burst)
        # a billionth of a token forgives the rounding of many small refills
        if self.tokens + 1e-9 >= cost:
            self.tokens -= cost
            return 0.0
        return (cost - self.tokens) / self.rate

    def give_back(self, cost: float) -> None:
        """Undo a `take` of `cost` tokens: the call was refused elsewhere."""
        self.tokens = min(self.burst, self.tokens + min(cost, self.burst))

    def remaining(self, now: float) -> int:
        """Whole tokens in hand at `now`; changes nothing."""
        return max(0, int(min(self.burst, self.tokens + max(0.0, now - self._at) * self.rate) + 1e-9))

    def full_in(self, now: float) -> float:
        """Seconds until the bucket is full again; changes nothing."""
        tokens = min(self.burst, self.tokens + max(0.0, now - self._at) * self.rate)
        return (self.burst - tokens) / self.rate
