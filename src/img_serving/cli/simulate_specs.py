"""What `simulate` reads: its short texts for endpoints, mixes, tenants and faults, and a gateway's configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, get_args

from img_serving.cli.endings import MISUSED, CommandFailed, printable
from img_serving.config.problems import instead_of
from img_serving.domain.capabilities import BatchShape
from img_serving.domain.tenants import Tenant
from img_serving.policy.endpoint import SWITCH_SECONDS
from img_serving.simulation import Client, Fault, Kind, Noise, Sender, SimulatedEndpoint
from img_serving.simulation.faults import FAULT_KINDS

if TYPE_CHECKING:
    from img_serving.config import Config

MOST_ENDPOINTS: Final = 1000
MOST_KINDS: Final = 1000
MOST_TENANTS: Final = 1000
MOST_FAULTS: Final = 1000
MOST_SECONDS: Final = 1e7
"""Four months: longer times are a slip of the pen."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PICTURE = re.compile(
    r"(?P<width>[0-9]{1,5})x(?P<height>[0-9]{1,5})x(?P<steps>[0-9]{1,5})"
    r"(?:\*(?P<images>[0-9]{1,3}))?(?:@(?P<model>[^:,@*]{1,128}))?(?::(?P<weight>[^:]+))?"
)
_FAULT = re.compile(r"(?P<name>[^@]+)@(?P<start>[0-9.]+)-(?P<end>[0-9.]*):(?P<kind>[a-z]+)(?:=(?P<amount>[^=]+))?")
_SHAPES: tuple[str, ...] = get_args(BatchShape)


class SpecFault(ValueError):
    """A text cannot be used; the message says which part, and what would be right."""


def misused(option: str, text: str, fault: ValueError) -> CommandFailed:
    """The same, as the end of the command."""
    shown = text if len(text) <= 100 else f"{text[:100]}…"
    return CommandFailed(f"{option} {printable(shown)!r}: {fault}", MISUSED)


# ------------------------------------------------------------------------------------------------------------ numbers


@dataclass(frozen=True, slots=True)
class Number:
    """One key that is a number: its bounds, and whether it is whole."""

    least: float
    most: float
    whole: bool = False

    def read(self, name: str, text: str) -> float:
        """The number that `text` says. Raises SpecFault: it is none, or out of bounds."""
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            raise SpecFault(f"{name} must be a {'whole ' if self.whole else ''}number, not {text[:40]!r}") from None
        if not self.least <= value <= self.most:
            raise SpecFault(f"{name} must be {self.least:g} to {self.most:g}, not {text[:40]}")
        return value


_ENDPOINT_NUMBERS: Final[Mapping[str, Number]] = {
    "speed": Number(1e-6, 1e9),
    "slots": Number(1, 1024, whole=True),
    "batch": Number(1, 256, whole=True),
    "overhead": Number(0, 1e6),
    "weight": Number(1e-6, 1e6),
    "tier": Number(0, 1000, whole=True),
    "load": Number(0, 1e6),
    "timeout": Number(1e-3, 1e6),
    "linger": Number(0, 1e6),
    "cheap": Number(0, 1, whole=True),
    "count": Number(1, MOST_ENDPOINTS, whole=True),
}
_ENDPOINT_KEYS: Final = (*_ENDPOINT_NUMBERS, "models", "shape", "group")
TENANT_NUMBERS: Final[Mapping[str, Number]] = {
    "weight": Number(1e-6, 1e6),
    "share": Number(0, 1e6),
    "priority": Number(-1000, 1000, whole=True),
    "running": Number(1, 1e6, whole=True),
    "clients": Number(1, 10_000, whole=True),
    "think": Number(0, 1e6),
}


def seconds_of(text: str) -> float:
    """Seconds, or with a unit: `90`, `90s`, `1.5m`, `2h`.

    Raises:
        SpecFault: it is none, or more than four months.
    """
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:], 0)
    return Number(0, MOST_SECONDS / (unit or 1)).read("a time", text[:-1] if unit else text) * (unit or 1)


def _keys(words: Iterable[str], known: Sequence[str], of: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals or not value:
            raise SpecFault(f"{word.strip()[:60]!r} is not KEY=VALUE; the keys of {of} are {', '.join(known)}")
        if key not in known:
            raise SpecFault(f"there is no key `{key[:60]}`: {instead_of(key, known)}")
        if key in found:
            raise SpecFault(f"`{key}` is given twice")
        found[key] = value
    return found


def name_of(text: str, what: str) -> str:
    """The name that `text` is. Raises SpecFault: it cannot be the name of `what`."""
    name = text.strip()
    if not _NAME.fullmatch(name):
        raise SpecFault(f"a name of {what} is 1 to 64 letters, digits, dots, underscores and dashes, not {name[:70]!r}")
    return name


# ----------------------------------------------------------------------------------------------------------- endpoints


def read_endpoint(text: str) -> list[SimulatedEndpoint]:
    """`NAME[:KEY=VALUE,…]`: one endpoint, or with `count` several alike.

    Raises:
        SpecFault: it cannot be used.
    """
    head, _, rest = text.partition(":")
    name = name_of(head, "an endpoint")
    words = _keys(rest.split(","), _ENDPOINT_KEYS, "an endpoint") if rest.strip() else {}
    value = {key: number.read(key, words[key]) for key, number in _ENDPOINT_NUMBERS.items() if key in words}
    shape = words.get("shape", "items")
    if shape not in _SHAPES:
        raise SpecFault(f"there is no shape `{shape[:60]}`: {instead_of(shape, _SHAPES)}")
    models = tuple(model.strip() for model in words.get("models", "").split("+") if model.strip())
    count = int(value.get("count", 1))
    batch = int(value.get("batch", 1))
    return [
        SimulatedEndpoint(
            name=name if count == 1 else f"{name}-{place + 1}",
            backend=name,
            speed=value.get("speed", 10.0),
            slots=int(value.get("slots", 1)),
            overhead_seconds=value.get("overhead", 0.0),
            max_batch_size=batch,
            batch="single" if batch == 1 else shape,  # type: ignore[arg-type]
            weight=value.get("weight", 1.0),
            tier=int(value.get("tier", 0)),
            models=models,
            load_seconds=value.get("load", 0.0),
            timeout_seconds=value.get("timeout"),
            max_wait_ms=value.get("linger", 0.0),
            exclusive_group=words.get("group"),
            cheap=bool(value.get("cheap", 0)),
        )
        for place in range(count)
    ]


def read_fleet(texts: Sequence[str]) -> list[SimulatedEndpoint]:
    """All of `--endpoint`.

    Raises:
        CommandFailed: one cannot be used, two have the same name, or they are too many.
    """
    fleet: list[SimulatedEndpoint] = []
    for text in texts:
        try:
            fleet += read_endpoint(text)
        except SpecFault as fault:
            raise misused("--endpoint", text, fault) from None
    return checked_fleet(fleet)


def checked_fleet(fleet: list[SimulatedEndpoint]) -> list[SimulatedEndpoint]:
    """The same, if it is neither too large nor ambiguous.

    Raises:
        CommandFailed: it is.
    """
    if len(fleet) > MOST_ENDPOINTS:
        raise CommandFailed(f"{len(fleet)} endpoints are more than the {MOST_ENDPOINTS} that are simulated", MISUSED)
    names: set[str] = set()
    for endpoint in fleet:
        if endpoint.name in names:
            raise CommandFailed(
                f"two endpoints are called {endpoint.name!r}; for several alike write {endpoint.group}:count=2", MISUSED
            )
        names.add(endpoint.name)
    return fleet


def read_speeds(texts: Sequence[str], fleet: Sequence[SimulatedEndpoint]) -> dict[str, tuple[float, float]]:
    """All of `--speed NAME=SPEED[+OVERHEAD]`, by the name of an endpoint or of its backend.

    Raises:
        CommandFailed: one cannot be used.
    """
    known = list(dict.fromkeys([one.group for one in fleet] + [one.name for one in fleet]))
    speeds: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        speed, _, overhead = value.partition("+")
        try:
            if not equals:
                raise SpecFault("it must be NAME=SPEED or NAME=SPEED+OVERHEAD, for example sd=12+0.8")
            if name not in known:
                raise SpecFault(f"the configuration has no backend `{name[:70]}`: {instead_of(name, known)}")
            speeds[name] = (
                _ENDPOINT_NUMBERS["speed"].read("the speed", speed),
                _ENDPOINT_NUMBERS["overhead"].read("the overhead", overhead or "0"),
            )
        except SpecFault as fault:
            raise misused("--speed", text, fault) from None
    return speeds


def fleet_of(config: Config) -> list[SimulatedEndpoint]:
    """The endpoints of the configured backends, with the slots and batches that the gateway would use.

    Raises:
        CommandFailed: none is configured and enabled, or an adapter refuses its options.
    """
    from img_serving.cli.configuration import check_backends
    from img_serving.config import EndpointConfig
    from img_serving.main import make_adapter

    check_backends(config)
    fleet: list[SimulatedEndpoint] = []
    for backend in config.backends:
        endpoints = backend.endpoint_list() or (
            EndpointConfig(f"{backend.protocol}:", backend.weight, backend.max_concurrency),
        )
        for place, endpoint in enumerate(endpoints if backend.enabled else ()):
            able = make_adapter(backend, endpoint).capabilities
            fleet.append(
                SimulatedEndpoint(
                    name=backend.name if len(endpoints) == 1 else f"{backend.name}-{place + 1}",
                    backend=backend.name,
                    slots=endpoint.max_concurrency or able.max_concurrency,
                    max_batch_size=min(able.max_batch_size, backend.max_batch_size or able.max_batch_size),
                    batch=able.batch,
                    weight=endpoint.weight,
                    tier=backend.tier,
                    models=backend.models,
                    # an engine that reports progress renews the time-out again and again
                    timeout_seconds=None if able.progress else backend.timeout_ms / 1000,
                    # how long loading takes nobody has configured: the scheduler's own first guess stands in
                    load_seconds=SWITCH_SECONDS if able.switches_models and len(backend.models) != 1 else 0.0,
                    max_batch_pixels=backend.max_batch_pixels,
                    max_wait_ms=backend.max_wait_ms,
                    exclusive_group=backend.exclusive_group,
                    cheap=backend.cheap,
                    retry_unknown=backend.retries_unknown(),
                )
            )
    if not fleet:
        raise CommandFailed("the configuration has no enabled [[backends]]: give endpoints with --endpoint", MISUSED)
    return checked_fleet(fleet)


# ------------------------------------------------------------------------------------------------ what is asked, by whom


def read_mix(text: str) -> tuple[Kind, ...]:
    """`WIDTHxHEIGHTxSTEPS[*IMAGES][@MODEL][:WEIGHT],…`.

    Raises:
        CommandFailed: it cannot be used.
    """
    kinds = []
    try:
        for word in text.split(","):
            found = _PICTURE.fullmatch(word.strip())
            if found is None:
                raise SpecFault(
                    f"{word.strip()[:60]!r} is not WIDTHxHEIGHTxSTEPS[*IMAGES][@MODEL][:WEIGHT], "
                    "for example 1024x1024x30 or 512x512x20*4@sdxl:3"
                )
            kinds.append(
                kind_of(
                    (found["width"], found["height"]),
                    found["steps"],
                    found["images"] or "1",
                    found["model"],
                    found["weight"] or "1",
                )
            )
        if len(kinds) > MOST_KINDS:
            raise SpecFault(f"{len(kinds)} kinds are more than the {MOST_KINDS} that are simulated")
    except SpecFault as fault:
        raise misused("--mix", text, fault) from None
    return tuple(kinds)


def kind_of(size: tuple[str, str], steps: str, images: str, model: str | None, weight: str = "1") -> Kind:
    """A kind of request from its texts. Raises SpecFault: a number is none, or out of bounds."""
    side = Number(1, 16384, whole=True)
    return Kind(
        int(side.read("the width", size[0])),
        int(side.read("the height", size[1])),
        int(Number(1, 10_000, whole=True).read("the number of steps", steps)),
        int(Number(1, 100, whole=True).read("the number of images", images)),
        model,
        Number(1e-9, 1e9).read("the weight", weight),
    )


def read_tenants(
    text: str | None, known: Mapping[str, Tenant], until: float | None
) -> tuple[tuple[Sender, ...], tuple[Client, ...]]:
    """`NAME[:KEY=VALUE,…],NAME…`; what a tenant leaves out is that of the API key of this name in the configuration.

    With `clients` a tenant has no share of the arrivals: its clients each send when they have been answered, up to `until`.

    Raises:
        CommandFailed: it cannot be used.
    """
    if text is None:
        return (Sender(Tenant("anonymous")),), ()
    senders: list[Sender] = []
    clients: list[Client] = []
    try:
        for name, words in _tenant_words(text):
            if any(sender.tenant.name == name for sender in senders):
                raise SpecFault(f"the tenant {name!r} is given twice")
            keys = _keys(words, tuple(TENANT_NUMBERS), "a tenant")
            value = {key: TENANT_NUMBERS[key].read(key, word) for key, word in keys.items()}
            base = known.get(name, Tenant(name))
            if "clients" in value:
                if "share" in value:
                    raise SpecFault(f"{name}: `clients` send by themselves and have no `share` of the arrivals")
                if until is None:
                    raise SpecFault(f"{name}: `clients` need --duration, or they would never stop")
                clients += [
                    Client(len(senders), until=until, think_seconds=value.get("think", 0.0))
                    for _ in range(int(value["clients"]))
                ]
            elif "think" in value:
                raise SpecFault(f"{name}: `think` is the pause of `clients`, and there are none")
            running = value.get("running", base.max_running)
            tenant = Tenant(
                name,
                priority=int(value.get("priority", base.priority)),
                weight=value.get("weight", base.weight),
                max_running=None if running is None else int(running),
            )
            senders.append(Sender(tenant, share=0.0 if "clients" in value else value.get("share", 1.0)))
        if len(senders) > MOST_TENANTS or len(clients) > 10_000:
            raise SpecFault(f"at most {MOST_TENANTS} tenants and 10000 clients are simulated")
    except SpecFault as fault:
        raise misused("--tenants", text, fault) from None
    return tuple(senders), tuple(clients)


def _tenant_words(text: str) -> Iterator[tuple[str, list[str]]]:
    """`a:weight=2,share=3,b` is a with two keys, and b."""
    name: str | None = None
    words: list[str] = []
    for word in text.split(","):
        head, colon, rest = word.partition(":")
        if not colon and "=" in word:
            if name is None:
                raise SpecFault(f"{word.strip()[:60]!r} stands before any tenant: write NAME:{word.strip()[:40]}")
            words.append(word)
            continue
        if name is not None:
            yield name, words
        name, words = name_of(head, "a tenant"), [rest] if colon else []
    if name is not None:
        yield name, words


def read_noise(text: str) -> Noise:
    """`0.2`, `uniform:0.2`, `lognormal:0.3` or `none`.

    Raises:
        CommandFailed: it cannot be used.
    """
    shape, _, spread = text.rpartition(":")
    try:
        if text == "none":
            return Noise("none", 0.0)
        if shape in {"", "uniform"}:
            return Noise("uniform", Number(0, 0.99).read("the spread of uniform noise", spread))
        if shape == "lognormal":
            return Noise("lognormal", Number(0, 3).read("the sigma of lognormal noise", spread))
        raise SpecFault(f"there is no noise `{shape[:60]}`: {instead_of(shape, ('uniform', 'lognormal', 'none'))}")
    except SpecFault as fault:
        raise misused("--noise", text, fault) from None


def read_faults(texts: Sequence[str], fleet: Sequence[SimulatedEndpoint]) -> list[Fault]:
    """All of `--fail NAME@START-END:KIND[=AMOUNT]`; without END it lasts.

    Raises:
        CommandFailed: one cannot be used.
    """
    if len(texts) > MOST_FAULTS:
        raise CommandFailed(f"{len(texts)} faults are more than the {MOST_FAULTS} that are simulated", MISUSED)
    known = list(dict.fromkeys([one.name for one in fleet] + [one.group for one in fleet]))
    faults = []
    for text in texts:
        try:
            faults.append(_fault(text, known))
        except ValueError as fault:
            raise misused("--fail", text, fault) from None
    return faults


def _fault(text: str, known: Sequence[str]) -> Fault:
    found = _FAULT.fullmatch(text.strip())
    if found is None:
        raise SpecFault("it must be NAME@START-END:KIND, for example fast@60-120:down or fast@0-600:errors=0.2")
    name, kind, amount = found["name"].strip(), found["kind"], found["amount"]
    if name not in known:
        raise SpecFault(f"there is no endpoint `{name[:70]}`: {instead_of(name, known)}")
    if kind not in FAULT_KINDS:
        raise SpecFault(f"there is no fault `{kind[:60]}`: {instead_of(kind, FAULT_KINDS)}")
    if (amount is not None) != (kind in {"errors", "slow"}):
        right = {"errors": "errors=SHARE (0 to 1)", "slow": "slow=FACTOR"}.get(kind, f"{kind}, without an amount")
        raise SpecFault(f"it must be {right}")
    return Fault(
        name,
        Number(0, MOST_SECONDS).read("the start", found["start"]),
        Number(0, MOST_SECONDS).read("the end", found["end"]) if found["end"] else math.inf,
        kind,
        Number(0, 1e6).read("the amount", amount) if amount else 1.0,
    )
