"""Who asks for what and when: kinds of requests, senders, and their arrivals, drawn once so that every run meets the same."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import exp
from random import Random
from typing import Literal

from img_serving.domain.images import ImageRequest
from img_serving.domain.tenants import Tenant
from img_serving.policy.cost import cost_of

MAX_TASKS = 2_000_000
"""Pictures of one simulation: more would take minutes and gigabytes, and tell nothing new."""

NoiseShape = Literal["none", "uniform", "lognormal"]


class TooMuch(ValueError):
    """A workload of more pictures than one simulation takes."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request: size in pixels, steps, pictures, and how often it comes beside the others."""

    width: int = 1024
    height: int = 1024
    steps: int = 30
    images: int = 1
    model: str | None = None
    weight: float = 1.0

    def request(self) -> ImageRequest:
        """What the scheduler sees of all requests of this kind."""
        return ImageRequest(
            prompt="a picture",
            model=self.model,
            n=self.images,
            width=self.width,
            height=self.height,
            steps=self.steps,
        )

    @property
    def cost(self) -> float:
        """Megapixel-steps of one picture."""
        return cost_of(self.request())


@dataclass(frozen=True, slots=True)
class Noise:
    """By what factor a call takes longer or shorter than its mean: within ± `spread`, or lognormal with that sigma.

    The mean of the factor is 1 either way.
    """

    shape: NoiseShape = "uniform"
    spread: float = 0.2

    def draw(self, rng: Random) -> float:
        """One factor."""
        if self.shape == "uniform":
            return 1 + self.spread * (2 * rng.random() - 1)
        if self.shape == "lognormal":
            return exp(rng.gauss(-self.spread * self.spread / 2, self.spread))
        return 1.0

    def draws(self, rng: Random, count: int) -> array[float]:
        """So many factors."""
        return array("d", [self.draw(rng) for _ in range(count)])


@dataclass(frozen=True, slots=True)
class Sender:
    """A tenant, its share of the arrivals, and the places of the kinds it asks for (None: all of them)."""

    tenant: Tenant
    share: float = 1.0
    kinds: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Client:
    """One who sends the next request when the last one is answered and `think_seconds` have passed (a closed loop).

    It stops after `count` requests, and sends none from `until` on. `sender` is a place in the workload's senders.
    """

    sender: int
    count: int | None = None
    until: float | None = None
    start: float = 0.0
    think_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.count is None and self.until is None:
            raise ValueError("a client that never stops would be simulated for ever: say `count` or `until`")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One line of a trace."""

    at: float
    kind: int
    sender: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """Arrivals in order, as columns: second, place of the kind, place of the sender; `noise` has a factor for each picture."""

    kinds: tuple[Kind, ...]
    senders: tuple[Sender, ...] = (Sender(Tenant("anonymous")),)
    at: array[float] = field(default_factory=lambda: array("d"))
    kind: array[int] = field(default_factory=lambda: array("H"))
    sender: array[int] = field(default_factory=lambda: array("H"))
    noise: array[float] = field(default_factory=lambda: array("d"))
    clients: tuple[Client, ...] = ()
    noise_of_clients: Noise = Noise("none")
    client_seed: int = 0

    @property
    def images(self) -> int:
        """Pictures asked for, those of clients aside."""
        return len(self.noise)

    def draw_kind(self, sender: int, rng: Random) -> int:
        """What that sender asks for next."""
        places = self.senders[sender].kinds or range(len(self.kinds))
        if len(places) == 1:
            return places[0]
        return rng.choices(places, [self.kinds[place].weight for place in places])[0]

    def mean_request(self, sender: int) -> tuple[float, float]:
        """Mean pictures of a request of that sender, and their mean cost together."""
        kinds = [self.kinds[place] for place in self.senders[sender].kinds or range(len(self.kinds))]
        total = sum(kind.weight for kind in kinds)
        images = sum(kind.weight * kind.images for kind in kinds) / total
        return images, sum(kind.weight * kind.images * kind.cost for kind in kinds) / total


def poisson(
    kinds: Sequence[Kind],
    rate: float,
    *,
    seconds: float | None = None,
    count: int | None = None,
    senders: Sequence[Sender] = (Sender(Tenant("anonymous")),),
    noise: Noise = Noise(),
    rng: Random,
) -> Workload:
    """Requests that come by chance, `rate` a second, for `seconds` or until there are `count`.

    Raises:
        TooMuch: that would be more than one simulation takes.
    """
    if (seconds is None) == (count is None):
        raise ValueError("say how long or how many, and not both")
    expected = count if count is not None else rate * (seconds or 0.0)
    if expected > MAX_TASKS:
        raise TooMuch(f"{expected:,.0f} requests are more than the {MAX_TASKS:,} that one simulation takes")
    times = array("d")
    now = 0.0
    while count is None or len(times) < count:
        now += rng.expovariate(rate)
        if seconds is not None and now >= seconds:
            break
        times.append(now)
    return _drawn(kinds, senders, times, noise, rng)


def burst(
    kinds: Sequence[Kind],
    count: int,
    *,
    senders: Sequence[Sender] = (Sender(Tenant("anonymous")),),
    noise: Noise = Noise(),
    rng: Random,
) -> Workload:
    """`count` requests at second 0.

    Raises:
        TooMuch: that would be more than one simulation takes.
    """
    if count > MAX_TASKS:
        raise TooMuch(f"{count:,} requests are more than the {MAX_TASKS:,} that one simulation takes")
    return _drawn(kinds, senders, array("d", bytes(8 * count)), noise, rng)


def trace(
    kinds: Sequence[Kind],
    arrivals: Iterable[Arrival],
    *,
    senders: Sequence[Sender] = (Sender(Tenant("anonymous")),),
    noise: Noise = Noise(),
    rng: Random,
) -> Workload:
    """Requests as they were recorded, in any order.

    Raises:
        TooMuch: they are for more pictures than one simulation takes.
    """
    ordered = sorted(arrivals, key=lambda one: one.at)
    chosen = array("H", [one.kind for one in ordered])
    return Workload(
        kinds=tuple(kinds),
        senders=tuple(senders),
        at=array("d", [one.at for one in ordered]),
        kind=chosen,
        sender=array("H", [one.sender for one in ordered]),
        noise=_factors(kinds, chosen, noise, rng),
        noise_of_clients=noise,
        client_seed=rng.getrandbits(64),
    )


def _drawn(
    kinds: Sequence[Kind], senders: Sequence[Sender], times: array[float], noise: Noise, rng: Random
) -> Workload:
    """Kinds and senders for arrivals at these times."""
    count = len(times)
    sending = [place for place, sender in enumerate(senders) if sender.share > 0]
    if count and not sending:
        raise ValueError("nobody has a share of the arrivals")
    shares = list(accumulate(senders[place].share for place in sending))
    who = array("H", rng.choices(sending, cum_weights=shares, k=count) if len(sending) > 1 else sending[:1] * count)
    everything = list(range(len(kinds)))
    weights = list(accumulate(kind.weight for kind in kinds))
    what = array("H", rng.choices(everything, cum_weights=weights, k=count) if len(kinds) > 1 else bytes(2 * count))
    picky = {place: sender.kinds for place, sender in enumerate(senders) if sender.kinds is not None}
    if picky:
        for index, place in enumerate(who):
            wanted = picky.get(place)
            if wanted is not None:
                what[index] = rng.choices(wanted, [kinds[one].weight for one in wanted])[0]
    return Workload(
        kinds=tuple(kinds),
        senders=tuple(senders),
        at=times,
        kind=what,
        sender=who,
        noise=_factors(kinds, what, noise, rng),
        noise_of_clients=noise,
        client_seed=rng.getrandbits(64),
    )


def _factors(kinds: Sequence[Kind], what: array[int], noise: Noise, rng: Random) -> array[float]:
    sizes = [kind.images for kind in kinds]
    images = sum(sizes[place] for place in what)
    if images > MAX_TASKS:
        raise TooMuch(f"{images:,} pictures are more than the {MAX_TASKS:,} that one simulation takes")
    return noise.draws(rng, images)
