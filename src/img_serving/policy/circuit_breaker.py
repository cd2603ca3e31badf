"""The circuit breaker of one endpoint: closed, open for a growing and jittered time, half-open with one trial."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
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
    """When it opens, and for how long.

    It opens after `failures` in a row, after `timeouts` of them in a row that were time-outs (each has cost somebody the
    longest wait there is, so fewer are enough), or when `error_share` of the calls that ended within `window_seconds` failed,
    if there were at least `min_calls`. It stays open for `open_seconds`, doubling each time up to `max_open_seconds`,
    ± `jitter` of it; after `max_open_seconds` without trouble the doubling begins anew.
    """

    failures: int = 5
    timeouts: int = 2
    error_share: float = 0.5
    window_seconds: float = 30.0
    min_calls: int = 10
    open_seconds: float = 5.0
    max_open_seconds: float = 60.0
    jitter: float = 0.2


class CircuitBreaker:
    """Judges one endpoint by how its calls end.

    Every call is started and ended: `era = start(now)` … `end(era, ok, now)`. News from an earlier era is ignored, so a
    call that began before the breaker opened cannot close it. A call that was cancelled ends with `ok=None`: it counts for
    nothing, but frees the trial.
    """

    __slots__ = (
        "_closed_at",
        "_era",
        "_failures",
        "_open_until",
        "_openings",
        "_options",
        "_rng",
        "_state",
        "_timeouts",
        "_trials",
        "_window",
        "on_change",
    )

    def __init__(self, options: BreakerOptions, rng: Random) -> None:
        """`rng` draws the jitter."""
        self._options = options
        self._rng = rng
        self._state = BreakerState.CLOSED
        self._era = 0
        self._failures = 0
        self._timeouts = 0
        self._openings = 0
        self._open_until = 0.0
        self._closed_at = float("-inf")
        self._trials = 0
        self.on_change: Callable[[], None] = lambda: None
        """Called when it may admit calls that it did not before, or the reverse."""
        self._window: deque[list[float]] = deque()
        """(second, calls that ended in it, those of them that failed), oldest first: the share costs no more for more calls."""

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

    def steady_until(self, now: float) -> float:
        """Until when `admits` will say the same, if no call starts or ends."""
        return self._open_until if self._state is not BreakerState.CLOSED and now < self._open_until else float("inf")

    def start(self, now: float) -> int:
        """A call begins; returns the era to give back to `end`. May be called while open, when nothing better is left."""
        if self._state is not BreakerState.CLOSED and now >= self._open_until:
            if self._state is BreakerState.OPEN:
                # calls made while it was open are of an earlier era: they neither free nor decide the trial
                self._state = BreakerState.HALF_OPEN
                self._era += 1
            self._trials += 1
            self.on_change()
        return self._era

    def end(self, era: int, ok: bool | None, now: float, *, timed_out: bool = False) -> None:
        """A call ended well (True), badly (False; perhaps it `timed_out`), or was cancelled or refused (None)."""
        if era != self._era:
            return
        if ok is None:
            if self._trials:
                self._trials -= 1
                self.on_change()
        elif ok:
            self._failures = self._timeouts = 0
            self._count(now, bad=0)
            if self._state is not BreakerState.CLOSED:
                self._close(now)
        else:
            self._failures += 1
            self._timeouts = self._timeouts + 1 if timed_out else 0
            self._count(now, bad=1)
            if self._state is BreakerState.HALF_OPEN or (self._state is BreakerState.CLOSED and self._is_enough()):
                self._open(now)

    def try_soon(self, now: float) -> None:
        """Its endpoint is back, by its health check: a trial may go now instead of at the end of the wait."""
        if self._state is BreakerState.OPEN and now < self._open_until:
            self._open_until = now
            self.on_change()

    def _count(self, now: float, *, bad: int) -> None:
        """One more call in the window."""
        window = self._window
        second = now // 1.0
        if window and window[-1][0] == second:
            cell = window[-1]
            cell[1] += 1
            cell[2] += bad
        else:
            oldest = now - self._options.window_seconds
            while window and window[0][0] < oldest:
                window.popleft()
            window.append([second, 1, bad])

    def _is_enough(self) -> bool:
        options = self._options
        if self._failures >= options.failures or self._timeouts >= options.timeouts:
            return True
        calls = sum(cell[1] for cell in self._window)
        return calls >= options.min_calls and sum(cell[2] for cell in self._window) >= options.error_share * calls

    def _open(self, now: float) -> None:
        options = self._options
        if self._state is BreakerState.CLOSED and now - self._closed_at >= options.max_open_seconds:
            self._openings = 0
        wait = min(options.open_seconds * 2**self._openings, options.max_open_seconds)
        spread = options.jitter
        self._open_until = now + wait * (1 + spread * (2 * self._rng.random() - 1))
        self._openings = min(self._openings + 1, 16)
        self._state = BreakerState.OPEN
        self._start_anew()

    def _close(self, now: float) -> None:
        self._state = BreakerState.CLOSED
        self._closed_at = now
        self._start_anew()

    def _start_anew(self) -> None:
        self._trials = self._failures = self._timeouts = 0
        self._window.clear()
        self._era += 1
        self.on_change()

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self._state} failures={self._failures} era={self._era}>"
