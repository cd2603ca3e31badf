"""The circuit breaker of one endpoint: closed, open for a growing and jittered time, half-open with one trial."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from random import Random


class BreakerState(StrEnum):
    """What a breaker does with a new call."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerOptions:
    """When it opens (consecutive failures) and for how long (seconds, doubling up to a limit, ± `jitter` of it)."""

    failures: int = 5
    open_seconds: float = 5.0
    max_open_seconds: float = 60.0
    jitter: float = 0.2


class CircuitBreaker:
    """Counts consecutive failures of one endpoint.

    Every call is started and ended: `era = start(now)` … `end(era, ok, now)`. News from an earlier era is ignored, so a
    call that began before the breaker opened cannot close it. A call that was cancelled ends with `ok=None`: it counts for
    nothing, but frees the trial.
    """

    __slots__ = ("_era", "_failures", "_open_until", "_openings", "_options", "_rng", "_state", "_trials")

    def __init__(self, options: BreakerOptions, rng: Random) -> None:
        """`rng` draws the jitter."""
        self._options = options
        self._rng = rng
        self._state = BreakerState.CLOSED
        self._era = 0
        self._failures = 0
        self._openings = 0
        self._open_until = 0.0
        self._trials = 0

    @property
    def standing(self) -> BreakerState:
        """What the last call made of it, whatever time has passed since."""
        return self._state

    def state(self, now: float) -> BreakerState:
        """What it is at `now`; changes nothing."""
        if self._state is BreakerState.OPEN and now >= self._open_until:
            return BreakerState.HALF_OPEN
        return self._state

    def admits(self, now: float) -> bool:
        """Whether a call may start; changes nothing, so every endpoint may be asked."""
        if self._state is BreakerState.CLOSED:
            return True
        return now >= self._open_until and not self._trials

    def opens_in(self, now: float) -> float:
        """Seconds until it would let a trial through; 0.0 if it admits calls."""
        return 0.0 if self.admits(now) else max(0.0, self._open_until - now)

    def start(self, now: float) -> int:
        """A call begins; returns the era to give back to `end`. May be called while open, when nothing better is left."""
        if self._state is not BreakerState.CLOSED and now >= self._open_until:
            if self._state is BreakerState.OPEN:
                # calls made while it was open are of an earlier era: they neither free nor decide the trial
                self._state = BreakerState.HALF_OPEN
                self._era += 1
            self._trials += 1
        return self._era

    def end(self, era: int, ok: bool | None, now: float) -> None:
        """A call ended well (True), badly (False) or was cancelled or refused for its content (None)."""
        if era != self._era:
            return
        if ok is None:
            self._trials = max(0, self._trials - 1)
        elif ok:
            self._failures = 0
            self._openings = 0
            if self._state is not BreakerState.CLOSED:
                self._state = BreakerState.CLOSED
                self._trials = 0
                self._era += 1
        else:
            self._failures += 1
            if self._state is BreakerState.HALF_OPEN or (
                self._state is BreakerState.CLOSED and self._failures >= self._options.failures
            ):
                self._open(now)

    def _open(self, now: float) -> None:
        wait = min(self._options.open_seconds * 2**self._openings, self._options.max_open_seconds)
        spread = self._options.jitter
        self._open_until = now + wait * (1 + spread * (2 * self._rng.random() - 1))
        self._openings = min(self._openings + 1, 16)
        self._state = BreakerState.OPEN
        self._trials = 0
        self._failures = 0
        self._era += 1

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self._state} failures={self._failures} era={self._era}>"
