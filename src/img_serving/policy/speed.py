"""How fast an endpoint is: seconds of a call from its cost, learned from the calls that it made."""

from __future__ import annotations

MEMORY = 0.95
"""What a measurement keeps of its weight with each later one: about the last twenty calls count."""

OUTLIER = 3.0
"""A call is taken to have lasted at most this many times what was expected: one stall must not spoil twenty calls."""

DOUBT_CALLS = 4.0
"""How many calls' worth of doubt there is about a fixed part: after few calls, or calls of one size, there is none."""

DUST = 1e-3
"""A fixed part that is a smaller share of a call is none, but rounding."""

STALE_SECONDS = 3600.0
STALE_CALLS = 200
"""Without a call for so long, and for so many times as long as its last one took, an endpoint may have changed."""

KNOWN_WELL = 5
"""Calls after which a surprising one is an outlier; before, nobody knows what is surprising."""


class Speed:
    """`overhead` seconds a call and `per_unit` seconds a megapixel-step; None until the first call was measured.

    A regression of seconds on cost with forgetting. Engines are off by a share of what they do, so each call weighs as one over
    the square of what it would be expected to take: a big picture's seconds must not drown a small one's. Expected in units of
    cost, not in seconds: an engine that has become slower must not be heard less for it.
    """

    __slots__ = ("_w", "_wx", "_wxx", "_wxy", "_wy", "calls", "overhead", "per_unit", "stale_at")

    def __init__(self) -> None:
        self._w = self._wx = self._wxx = self._wy = self._wxy = 0.0
        self.calls = 0
        self.overhead = 0.0
        self.per_unit: float | None = None
        self.stale_at = 0.0
        """From when on what was learned may not be true any more."""

    def seconds(self, cost: float) -> float | None:
        """How long a call of `cost` megapixel-steps should take; None where nothing was measured."""
        return None if self.per_unit is None else self.overhead + cost * self.per_unit

    def learn(self, cost: float, seconds: float, now: float) -> None:
        """A call of `cost` megapixel-steps took `seconds`."""
        if self.per_unit is not None and self.calls >= KNOWN_WELL:
            seconds = min(seconds, OUTLIER * (self.overhead + cost * self.per_unit))
        expected = cost if self.per_unit is None else cost + self.overhead / self.per_unit
        weight = 1.0 / (expected * expected)
        weighted = weight * cost
        w = self._w = self._w * MEMORY + weight
        wx = self._wx = self._wx * MEMORY + weighted
        wxx = self._wxx = self._wxx * MEMORY + weighted * cost
        wy = self._wy = self._wy * MEMORY + weight * seconds
        wxy = self._wxy = self._wxy * MEMORY + weighted * seconds
        doubt = DOUBT_CALLS / (self.calls + 1)
        overhead = (wxx * wy - wx * wxy) / (w * wxx - wx * wx + doubt * wx * wx)
        # a part that is fixed cannot be negative, and cannot be all of it
        mean = wxy / wx
        self.overhead = min(overhead, 0.95 * mean) if overhead > DUST * mean else 0.0
        self.per_unit = (wxy - self.overhead * wx) / wxx
        self.calls += 1
        self.stale_at = now + max(STALE_SECONDS, STALE_CALLS * seconds)

    def __repr__(self) -> str:
        if self.per_unit is None:
            return "? s/MP-step"
        fixed = f"{self.overhead:.3g} s + " if self.overhead > 0 else ""
        return f"{fixed}{self.per_unit:.3g} s/MP-step"
