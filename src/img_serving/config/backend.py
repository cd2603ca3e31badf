"""What an operator says about one backend: its protocol, its endpoints, its limits and its credentials."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, get_args
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, field

from img_serving.config.addresses import GRPC_SCHEMES, HTTP_SCHEMES, base_of, fault_of_url
from img_serving.config.problems import ConfigError, Problem
from img_serving.config.reader import read_table
from img_serving.config.section import SECRET, Finding, Section

Protocol = Literal["builtin", "openai", "a1111", "comfyui", "grpc", "kserve", "scripted", "http"]

PROTOCOLS: Final = tuple(str(name) for name in get_args(Protocol))
"""Every protocol that the interface names."""

WITHOUT_ENDPOINTS: Final = frozenset({"builtin", "scripted"})
"""Those that draw by themselves."""

OVER_GRPC: Final = frozenset({"grpc", "kserve"})
"""Those that speak gRPC."""

NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
NAME_RULE: Final = "a name is 1 to 64 letters, digits, dots, underscores and dashes"

_EXAMPLE = "http://localhost:7860"
_EXAMPLES = {"comfyui": "http://localhost:8188", "grpc": "grpc://localhost:50051", "kserve": "grpc://localhost:8001"}
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
_HOP_HEADERS = frozenset(
    {"connection", "content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
)

Text = Annotated[str, Meta(min_length=1)]
Weight = Annotated[float, Meta(gt=0)]
Slots = Annotated[int, Meta(ge=1)]
Table = dict[str, Any]


class EndpointEntry(Section, frozen=True, kw_only=True):
    """One address as a table: what it leaves out is the backend's."""

    url: Annotated[Text, Meta(description="Where it listens.")]
    weight: Annotated[Weight | None, Meta(description="Share of the traffic.")] = None
    max_concurrency: Annotated[Slots | None, Meta(description="Calls in flight at most.")] = None


@dataclass(frozen=True, slots=True)
class EndpointConfig:
    """One address, normalised.

    `url` ends neither with a slash nor with `/v1`, a path prefix is kept. `max_concurrency` None: the protocol's own.
    """

    url: str
    weight: float
    max_concurrency: int | None


class BackendConfig(Section, frozen=True, kw_only=True):
    """One `[[backends]]` table. `None` always means "not said: the protocol's own"."""

    name: Annotated[
        Text,
        Meta(
            description="Unique: letters, digits, dots, underscores, dashes; at most 64.", examples=["stable-diffusion"]
        ),
    ]
    protocol: Annotated[
        Protocol,
        Meta(description='What it speaks; "http" finds out by itself.'),
    ] = "http"
    endpoints: Annotated[
        tuple[Text | EndpointEntry, ...],
        Meta(
            description="Addresses, with or without /v1: strings, or { url, weight, max_concurrency } to override.",
            examples=[["http://localhost:7860"]],
        ),
    ] = ()
    models: Annotated[tuple[Text, ...], Meta(description="Model names it serves; [] = ask it.")] = ()
    enabled: Annotated[bool, Meta(description="Whether it gets work.")] = True
    weight: Annotated[Weight, Meta(description="Share of the traffic, for the weighted strategies.")] = 1
    tier: Annotated[
        int, Meta(ge=0, description="Lower tiers are used first; the next one when all of a tier are unusable.")
    ] = 0
    timeout_ms: Annotated[
        int, Meta(gt=0, description="Milliseconds for one attempt; progress reported by the engine renews them.")
    ] = 60000
    max_concurrency: Annotated[
        Slots | None,
        Meta(
            description="Calls in flight per endpoint; unset: 1 for a1111 and comfyui, 32 for the others.",
            examples=[32],
        ),
    ] = None
    max_batch_size: Annotated[
        Slots | None, Meta(description="Pictures in one call; unset: what the protocol can.", examples=[4])
    ] = None
    max_batch_pixels: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Pixels in one call, all pictures together; unset: no bound.", examples=[4194304]),
    ] = None
    max_wait_ms: Annotated[int, Meta(ge=0, description="Milliseconds to linger for a fuller batch.")] = 0
    exclusive_group: Annotated[
        Text | None,
        Meta(description="Backends of one group share a GPU: they take turns.", examples=["gpu-0"]),
    ] = None
    cheap: Annotated[
        bool,
        Meta(description="A picture drawn twice costs nothing: slow calls may be hedged (retry.hedge_after_factor)."),
    ] = False
    retry_unknown: Annotated[
        bool | None,
        Meta(
            description="Try elsewhere after an attempt that may have drawn; unset: unless an api_key says somebody pays.",
            examples=[True],
        ),
    ] = None
    cut_through: Annotated[
        bool,
        Meta(description="Pass bytes on before the picture is complete: sooner, but a bad answer cannot be retried."),
    ] = False
    api_key: Annotated[
        Text | None,
        Meta(description="Sent upstream as Authorization: Bearer.", examples=["${UPSTREAM_API_KEY}"], extra=SECRET),
    ] = None
    headers: Annotated[
        dict[str, str], Meta(description="Sent with every upstream call.", examples=[{"X-Team": "art"}], extra=SECRET)
    ] = field(default_factory=dict)
    username: Annotated[Text | None, Meta(description="HTTP Basic user, with `password`.", examples=["me"])] = None
    password: Annotated[
        str | None, Meta(description="HTTP Basic password.", examples=["${UPSTREAM_PASSWORD}"], extra=SECRET)
    ] = None
    ca_file: Annotated[
        Text | None, Meta(description="PEM file of the CA that signed its certificate.", examples=["config/ca.pem"])
    ] = None
    tls_verify: Annotated[bool, Meta(description="Check its certificate.")] = True
    health_check_path: Annotated[
        Text | None,
        Meta(description="GET path that is 200 when well; unset: the protocol's check.", examples=["/health"]),
    ] = None
    health_check_interval_secs: Annotated[float, Meta(gt=0, description="Seconds between health checks.")] = 30
    health_check_rise: Annotated[int, Meta(ge=1, description="Good checks in a row that bring it back.")] = 1
    health_check_fall: Annotated[int, Meta(ge=1, description="Bad checks in a row that take it out.")] = 2
    default_size: Annotated[
        Text | None, Meta(description="Size where a request has none; unset: 1024x1024.", examples=["1024x1024"])
    ] = None
    shared: Annotated[bool, Meta(description="Others use the engine too: never interrupt what may not be ours.")] = (
        False
    )
    openai: Annotated[Table | None, Meta(description='Options of protocol "openai".', extra=SECRET)] = None
    a1111: Annotated[Table | None, Meta(description='Options of protocol "a1111".', extra=SECRET)] = None
    comfyui: Annotated[Table | None, Meta(description='Options of protocol "comfyui".', extra=SECRET)] = None
    grpc: Annotated[Table | None, Meta(description='Options of protocol "grpc".', extra=SECRET)] = None
    kserve: Annotated[Table | None, Meta(description='Options of protocol "kserve".', extra=SECRET)] = None
    scripted: Annotated[Table | None, Meta(description='Options of protocol "scripted".', extra=SECRET)] = None

    def endpoint_list(self) -> tuple[EndpointConfig, ...]:
        """The endpoints, normalised, with the backend's own figures where an endpoint says none."""
        return tuple(
            EndpointConfig(
                url=base_of(entry.url),
                weight=self.weight if entry.weight is None else entry.weight,
                max_concurrency=self.max_concurrency if entry.max_concurrency is None else entry.max_concurrency,
            )
            for entry in self._entries()
        )

    def options(self) -> Mapping[str, Any]:
        """The table of its own protocol (`[backends.openai]`), empty where there is none."""
        table: Mapping[str, Any] | None = (
            getattr(self, self.protocol, None) if self.protocol in PROTOCOL_TABLES else None
        )
        return table or {}

    def retries_unknown(self) -> bool:
        """Whether an attempt that may have drawn is tried elsewhere: not where somebody pays, unless told so."""
        return self.api_key is None if self.retry_unknown is None else self.retry_unknown

    def default_dimensions(self) -> tuple[int, int]:
        """Width and height in pixels of a picture whose request says none."""
        width, height = (self.default_size or "1024x1024").split("x")
        return int(width), int(height)

    def findings(self) -> Iterator[Finding]:
        """Names, addresses, credentials and tables that cannot be."""
        if not NAME_PATTERN.fullmatch(self.name) or set(self.name) == {"."}:
            yield ("name",), NAME_RULE
        yield from self._protocol_findings()
        yield from self._endpoint_findings()
        yield from self._credential_findings()
        if self.exclusive_group is not None and not NAME_PATTERN.fullmatch(self.exclusive_group):
            yield ("exclusive_group",), NAME_RULE
        if self.health_check_path is not None and not _is_path(self.health_check_path):
            yield ("health_check_path",), 'must be a path such as "/health": it begins with a slash and has no blanks'
        elif self.health_check_path is not None and self.protocol in OVER_GRPC:
            yield (
                ("health_check_path",),
                f'protocol "{self.protocol}" has no paths: leave it out, and its own check is made',
            )
        if self.default_size is not None and not _SIZE.fullmatch(self.default_size):
            yield ("default_size",), 'must be WIDTHxHEIGHT in pixels, for example "1024x1024"'

    def _entries(self) -> tuple[EndpointEntry, ...]:
        return tuple(EndpointEntry(url=one) if isinstance(one, str) else one for one in self.endpoints)

    def _protocol_findings(self) -> Iterator[Finding]:
        for table in PROTOCOL_TABLES:
            if table != self.protocol and getattr(self, table) is not None:
                yield (table,), f'is for protocol = "{table}" only, and this backend has protocol = "{self.protocol}"'

    def _endpoint_findings(self) -> Iterator[Finding]:
        if not self.endpoints and self.protocol not in WITHOUT_ENDPOINTS:
            yield (
                ("endpoints",),
                f'protocol "{self.protocol}" needs at least one, for example ["{_EXAMPLES.get(self.protocol, _EXAMPLE)}"]',
            )
        if self.endpoints and self.protocol in WITHOUT_ENDPOINTS:
            yield ("endpoints",), f'protocol "{self.protocol}" draws by itself and has none: leave the key out'
            return
        schemes = GRPC_SCHEMES if self.protocol in OVER_GRPC else HTTP_SCHEMES
        for index, entry in enumerate(self.endpoints):
            url = entry if isinstance(entry, str) else entry.url
            fault = fault_of_url(url, schemes)
            if fault is None and self.protocol in OVER_GRPC and urlsplit(base_of(url)).path:
                fault = "has a path, which no gRPC address has"
            if fault is not None:
                yield ("endpoints", index) if isinstance(entry, str) else ("endpoints", index, "url"), fault

    def _credential_findings(self) -> Iterator[Finding]:
        if self.api_key is not None and not is_token(self.api_key):
            yield ("api_key",), "has a blank, a control character or a letter outside ASCII, which no header can carry"
        if (self.username is None) != (self.password is None):
            yield (
                ("username" if self.username is None else "password",),
                "missing: `username` and `password` go together",
            )
        if self.username is not None and self.api_key is not None:
            yield ("api_key",), "both `api_key` and `username` are set, and one Authorization header can carry only one"
        if self.username is not None and (":" in self.username or not self.username.isprintable()):
            yield ("username",), "must have no colon and no control character"
        if self.password is not None and not (self.password.isprintable() or self.password == ""):
            yield ("password",), "must have no control character"
        for name, value in self.headers.items():
            if not _HEADER_NAME.fullmatch(name):
                yield ("headers",), "has a name that is no HTTP header name"
            elif name.lower() in _HOP_HEADERS:
                yield ("headers", name), "belongs to the connection and cannot be set"
            elif not (value.isascii() and value.isprintable()) or value != value.strip():
                yield ("headers", name), "must be printable ASCII without blanks at its ends"


PROTOCOL_TABLES: Final = ("openai", "a1111", "comfyui", "grpc", "kserve", "scripted")
"""The protocols that have a table of their own in `[[backends]]`."""


def is_token(text: str) -> bool:
    """Whether a key can travel in an Authorization header."""
    return bool(text) and all("!" <= char <= "~" for char in text)


def _is_path(text: str) -> bool:
    return text.startswith("/") and "#" not in text and is_token(text)


def backend_from_mapping(data: Mapping[str, Any], where: str = "") -> BackendConfig:
    """A backend from the keys of `[[backends]]`, as the API and the data directory have them.

    `where` stands before the path of every problem (`backends[0]`); empty, the paths are those of the keys in `data`.

    Raises:
        ConfigError: with everything that is wrong.
    """
    try:
        return read_table(BackendConfig, data)
    except ConfigError as error:
        raise ConfigError(
            Problem(_below(where, problem.path), problem.message, problem.source) for problem in error.problems
        ) from None


def backend_to_mapping(backend: BackendConfig) -> dict[str, Any]:
    """The keys of `[[backends]]` that are set, as JSON values, **secrets included**: for storing, not for showing."""
    mapping: dict[str, Any] = msgspec.to_builtins(backend)
    mapping["models"] = list(backend.models)
    mapping["endpoints"] = [
        {key: value for key, value in one.items() if value is not None} if isinstance(one, dict) else one
        for one in mapping["endpoints"]
    ]
    return {key: value for key, value in mapping.items() if value is not None}


def _below(where: str, path: str) -> str:
    return f"{where}.{path}" if where and path else where or path
