"""The settings of the gateway: every section, key, default and limit, with its documentation beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import Meta, field

from img_serving.config.addresses import fault_of_network, fault_of_origin, fault_of_url
from img_serving.config.backend import NAME_PATTERN, NAME_RULE, BackendConfig, Text, is_token
from img_serving.config.section import SECRET, Finding, Section
from img_serving.domain.tenants import Role, Tenant
from img_serving.policy.webhooks import fault_of_webhook_url, parse_secrets

Strategy = Literal["round_robin", "weighted_round_robin", "random", "least_connections", "least_work", "peak_ewma"]
MAX_KEY_CHARS = 512


class Server(Section, frozen=True, kw_only=True):
    """Where the gateway listens, and what it takes."""

    host: Annotated[Text, Meta(description="Address to listen on.")] = "0.0.0.0"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port to listen on; 0 = any free one.")] = 8080
    public_url: Annotated[
        Text | None,
        Meta(
            description="How clients reach us, for the URLs of pictures; unset: taken from the request.",
            examples=["https://images.example.com"],
        ),
    ] = None
    trusted_proxies: Annotated[
        tuple[Text, ...],
        Meta(description="Addresses and networks whose Forwarded headers are believed.", examples=[["10.0.0.0/8"]]),
    ] = ()
    data_dir: Annotated[Text, Meta(description="Directory of what must survive a restart: keys, backends, jobs.")] = (
        "data"
    )
    max_body_bytes: Annotated[int, Meta(ge=1, description="Largest body of a JSON route.")] = 1024 * 1024
    max_upload_bytes: Annotated[int, Meta(ge=1, description="Largest body of edits and jobs.")] = 64 * 1024 * 1024
    keepalive_after_seconds: Annotated[
        float, Meta(ge=0, description="Seconds after which a waiting reply is kept open with blanks; 0 = off.")
    ] = 50
    drain_timeout_seconds: Annotated[
        float, Meta(ge=0, description="Seconds that running work has to end after SIGTERM.")
    ] = 15
    cors_allow_origins: Annotated[
        tuple[Text, ...],
        Meta(
            description='Origins whose pages may call us from a browser; "*" = all.', examples=[["https://example.com"]]
        ),
    ] = ()

    def findings(self) -> Iterator[Finding]:
        """Addresses that are none."""
        if self.public_url is not None and (fault := fault_of_url(self.public_url)):
            yield (
                ("public_url",),
                fault.replace("use the backend's `username` and `password` keys instead", "leave them out"),
            )
        for index, network in enumerate(self.trusted_proxies):
            if fault := fault_of_network(network):
                yield ("trusted_proxies", index), fault
        for index, origin in enumerate(self.cors_allow_origins):
            if fault := fault_of_origin(origin):
                yield ("cors_allow_origins", index), fault


class Limit(Section, frozen=True, kw_only=True):
    """A rate and a burst, of everybody together or of one address."""

    requests_per_second: Annotated[float, Meta(gt=0, description="Requests a second, on average.")] = 100
    burst_size: Annotated[int, Meta(ge=1, description="Requests at once.")] = 200


class KeyLimit(Section, frozen=True, kw_only=True):
    """A key's own rate and burst: what it leaves out is that of `[rate_limit]`."""

    requests_per_second: Annotated[
        Annotated[float, Meta(gt=0)] | None, Meta(description="Requests a second.", examples=[10])
    ] = None
    burst_size: Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="Requests at once.", examples=[20])] = (
        None
    )


class KeyConfig(Section, frozen=True, kw_only=True):
    """One API key and what its owner may do. `None` means "no bound of its own"."""

    name: Annotated[Text, Meta(description="Who owns it.", examples=["team-a"])]
    key: Annotated[Text, Meta(description="The key.", examples=["${TEAM_A_KEY}"], extra=SECRET)]
    role: Annotated[Role, Meta(description='"admin" may manage backends, keys and the queue.')] = "user"
    models: Annotated[
        Annotated[tuple[Text, ...], Meta(min_length=1)] | None,
        Meta(description="Models it may ask for.", examples=[["sdxl"]]),
    ] = None
    backends: Annotated[
        Annotated[tuple[Text, ...], Meta(min_length=1)] | None,
        Meta(description="Backends its work may go to.", examples=[["stable-diffusion"]]),
    ] = None
    priority: Annotated[int, Meta(ge=-1000, le=1000, description="Higher goes first.")] = 0
    weight: Annotated[float, Meta(gt=0, description="Share among keys of the same priority.")] = 1
    rate_limit: Annotated[KeyLimit | None, Meta(description="Its own rate limit.")] = None
    max_running: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="Its pictures drawn at a time.", examples=[4])
    ] = None
    webhook_url: Annotated[
        Text | None,
        Meta(
            description="Called when its jobs end, those that name no other.",
            examples=["https://hooks.example.com/pictures"],
            extra=SECRET,  # many receivers know their callers by a token in the path
        ),
    ] = None

    def tenant(self) -> Tenant:
        """The owner of the key."""
        limit = self.rate_limit or KeyLimit()
        return Tenant(
            name=self.name,
            role=self.role,
            models=None if self.models is None else frozenset(self.models),
            backends=None if self.backends is None else frozenset(self.backends),
            rate=limit.requests_per_second,
            burst=limit.burst_size,
            priority=self.priority,
            weight=self.weight,
            max_running=self.max_running,
            webhook_url=self.webhook_url,
        )

    def findings(self) -> Iterator[Finding]:
        """A name or a key that cannot be used."""
        if not NAME_PATTERN.fullmatch(self.name):
            yield ("name",), NAME_RULE
        if fault := _fault_of_key(self.key):
            yield ("key",), fault


class Auth(Section, frozen=True, kw_only=True):
    """Who may call."""

    enabled: Annotated[bool, Meta(description="Whether a key is asked for.")] = True
    api_keys: Annotated[
        tuple[Text | KeyConfig, ...],
        Meta(
            description="A string is an admin key, a table refines; with none, one is made and printed at the first start.",
            extra=SECRET,
        ),
    ] = ()
    metrics_public: Annotated[bool, Meta(description="Whether /metrics needs no key.")] = True

    def key_list(self) -> tuple[KeyConfig, ...]:
        """All keys as tables: plain strings are admins named `admin-1`, `admin-2`, … by their place in the list."""
        return tuple(
            KeyConfig(name=f"admin-{index + 1}", key=one, role="admin") if isinstance(one, str) else one
            for index, one in enumerate(self.api_keys)
        )

    def findings(self) -> Iterator[Finding]:
        """Keys that cannot travel, or of which nobody could say whose they are."""
        for index, one in enumerate(self.api_keys):
            if isinstance(one, str) and (fault := _fault_of_key(one)):
                yield ("api_keys", index), fault
        names: dict[str, int] = {}
        keys: dict[str, int] = {}
        for index, entry in enumerate(self.key_list()):
            if (first := keys.setdefault(entry.key, index)) != index:
                yield ("api_keys", index), f"is the same key as api_keys[{first}]"
            elif (first := names.setdefault(entry.name, index)) != index:
                yield ("api_keys", index), f'has the same name as api_keys[{first}], "{entry.name}"'


class RateLimit(Limit, frozen=True, kw_only=True):
    """How often one key may call, and, where set, everybody together and one address."""

    enabled: Annotated[bool, Meta(description="Whether calls are counted.")] = True
    global_: Annotated[Limit | None, Meta(description="For all callers together.")] = field(default=None, name="global")
    address: Annotated[Limit | None, Meta(description="For each client address.")] = None


class Routing(Section, frozen=True, kw_only=True):
    """Which backend and endpoint gets the work."""

    strategy: Annotated[Strategy, Meta(description="How an endpoint is chosen among those that are free.")] = (
        "round_robin"
    )
    default_backend: Annotated[
        Text | None,
        Meta(
            description="For requests without a model; unset: the first enabled backend.", examples=["stable-diffusion"]
        ),
    ] = None
    aliases: Annotated[dict[str, Text], Meta(description="Other names of models.", examples=[{"dall-e-3": "sdxl"}])] = (
        field(default_factory=dict)
    )
    unknown_model: Annotated[
        Literal["reject", "default"],
        Meta(description='A model that nobody serves: "reject" = 404, "default" = the default backend takes it.'),
    ] = "reject"
    affinity_seconds: Annotated[
        float,
        Meta(ge=0, description="Longest wait for, or in favour of, an engine with the right model loaded; 0 = none."),
    ] = 15
    tier_overflow_seconds: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="The next tier helps while this one would take longer for what waits; unset: never.",
            examples=[60],
        ),
    ] = None
    slow_start_seconds: Annotated[
        float, Meta(ge=0, description="Seconds until an endpoint that has recovered gets its whole share; 0 = at once.")
    ] = 30
    panic_mode: Annotated[
        bool,
        Meta(description="With no usable endpoint left, try each once all the same; false: wait until one recovers."),
    ] = True

    def findings(self) -> Iterator[Finding]:
        """Aliases that lead nowhere."""
        for alias, model in self.aliases.items():
            if alias == model:
                yield ("aliases", alias), "is an alias of itself"


class Queue(Section, frozen=True, kw_only=True):
    """How much work may wait, and how long."""

    max_tasks: Annotated[int, Meta(ge=1, description="Pictures that may wait; past it callers get 503.")] = 1000
    max_work: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="Megapixel-steps that may wait beside one job (1024x1024, 20 steps, guidance: 42); unset: no bound.",
            examples=[40000],
        ),
    ] = None
    max_wait_seconds: Annotated[
        Annotated[float, Meta(gt=0)] | None, Meta(description="Longest wait; unset: the deadline.", examples=[120])
    ] = None
    ageing_seconds: Annotated[
        float, Meta(ge=0, description="A priority counts one more for every so many seconds waited; 0 = never.")
    ] = 60
    request_timeout_seconds: Annotated[
        float, Meta(gt=0, description="The deadline of a request, from its arrival to its last picture.")
    ] = 600
    coalesce: Annotated[
        bool, Meta(description="Whether equal requests of one key that name their seed share one job while it runs.")
    ] = False


class Retry(Section, frozen=True, kw_only=True):
    """How often a failed attempt is made again elsewhere."""

    max_attempts: Annotated[int, Meta(ge=1, description="Attempts per picture; 1 = never again.")] = 3
    budget_ratio: Annotated[
        float,
        Meta(ge=0, le=1, description="Second attempts as a share of all traffic (10 a second are always allowed)."),
    ] = 0.2
    hedge_after_factor: Annotated[
        Annotated[float, Meta(gt=1)] | None,
        Meta(
            description="On cheap backends, a second call for one that takes so many times too long; unset: never.",
            examples=[3],
        ),
    ] = None


class Breaker(Section, frozen=True, kw_only=True):
    """When an endpoint that fails is left alone, and for how long."""

    consecutive_failures: Annotated[int, Meta(ge=1, description="It opens after so many failures in a row,")] = 5
    consecutive_timeouts: Annotated[int, Meta(ge=1, description="or so many time-outs in a row,")] = 2
    error_share: Annotated[
        float, Meta(gt=0, le=1, description="or when this share of the calls in the window failed,")
    ] = 0.5
    window_seconds: Annotated[float, Meta(ge=1, description="a window of so many seconds,")] = 30
    min_calls: Annotated[int, Meta(ge=1, description="if it has at least so many calls.")] = 10
    open_seconds: Annotated[
        float, Meta(gt=0, description="Then it is left alone for so long, twice that the next time,")
    ] = 5
    max_open_seconds: Annotated[float, Meta(gt=0, description="and so on up to this; then one call tries it.")] = 60

    def findings(self) -> Iterator[Finding]:
        """Bounds that contradict each other."""
        if self.max_open_seconds < self.open_seconds:
            yield ("max_open_seconds",), f"is less than open_seconds = {self.open_seconds:g}"


class Limits(Section, frozen=True, kw_only=True):
    """What one request may ask for."""

    max_n: Annotated[int, Meta(ge=1, description="Pictures per request.")] = 10
    max_pixels: Annotated[int, Meta(ge=1, description="Width times height of one picture.")] = 16777216
    max_steps: Annotated[int, Meta(ge=1, description="Inference steps.")] = 200
    max_prompt_chars: Annotated[int, Meta(ge=1, description="Characters of a prompt.")] = 32000
    fetch_image_urls: Annotated[
        bool,
        Meta(description="Whether pictures to edit may be named by http(s) URLs, fetched from public addresses only."),
    ] = False


class Storage(Section, frozen=True, kw_only=True):
    """Where pictures are kept for their URLs."""

    dir: Annotated[Text, Meta(description="Directory of the pictures.")] = "generated_images"
    ttl_hours: Annotated[float, Meta(ge=0, description="Hours until a picture is deleted; 0 = keep.")] = 24
    max_bytes: Annotated[int, Meta(ge=0, description="Room for all pictures, the oldest go first; 0 = unlimited.")] = 0
    signed_urls: Annotated[bool, Meta(description="Whether URLs carry a signature that expires.")] = False
    strip_metadata: Annotated[bool, Meta(description="Whether prompts and settings inside the files are removed.")] = (
        False
    )


class Response(Section, frozen=True, kw_only=True):
    """How pictures are handed over."""

    default_format: Annotated[
        Literal["url", "b64_json", "file"], Meta(description='Where a request says none; "file" needs allow_file.')
    ] = "url"
    allow_file: Annotated[bool, Meta(description="Whether clients may ask for a path on this machine.")] = False

    def findings(self) -> Iterator[Finding]:
        """A default that is not allowed."""
        if self.default_format == "file" and not self.allow_file:
            yield ("default_format",), '"file" needs `response.allow_file = true`'


class Logging(Section, frozen=True, kw_only=True):
    """What is written to stderr."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="The least that is logged.")] = (
        "info"
    )
    format: Annotated[
        Literal["console", "json"] | None,
        Meta(description='Unset: "console" on a terminal, else "json".', examples=["json"]),
    ] = None
    prompts: Annotated[bool, Meta(description="Whether prompts are logged.")] = False


class Jobs(Section, frozen=True, kw_only=True):
    """What becomes of work whose client left, and of its results."""

    cancel_on_disconnect: Annotated[bool, Meta(description="Whether work stops when its client leaves.")] = True
    disconnect_grace_seconds: Annotated[
        float, Meta(ge=0, description="Seconds that a client which retries by itself has to come back.")
    ] = 2
    result_ttl_hours: Annotated[float, Meta(ge=0, description="Hours that a finished job is remembered.")] = 24
    max_age_hours: Annotated[
        float, Meta(gt=0, description="The deadline of a job that nobody waits for on a connection.")
    ] = 24


class Webhooks(Section, frozen=True, kw_only=True):
    """Calls to clients when their jobs end."""

    enabled: Annotated[bool, Meta(description="Whether jobs may name a webhook_url.")] = True
    secret: Annotated[
        Text | None,
        Meta(
            description="Signs the calls; unset: made at the first start. Several, with commas, while one replaces another.",
            examples=["${WEBHOOK_SECRET}"],
            extra=SECRET,
        ),
    ] = None
    max_age_hours: Annotated[float, Meta(gt=0, description="Hours for which an undelivered call is tried again.")] = 24
    allow_private_addresses: Annotated[bool, Meta(description="Whether they may go to private networks.")] = False

    def findings(self) -> Iterator[Finding]:
        """A secret that protects nothing."""
        if self.secret is not None:
            try:
                parse_secrets(self.secret)
            except ValueError as error:
                yield ("secret",), str(error)


class Config(Section, frozen=True, kw_only=True):
    """Everything that an operator may say."""

    server: Annotated[Server, Meta(description="Where the gateway listens, and what it takes.")] = field(
        default_factory=Server
    )
    auth: Annotated[Auth, Meta(description="Who may call.")] = field(default_factory=Auth)
    rate_limit: Annotated[RateLimit, Meta(description="How often one key may call.")] = field(default_factory=RateLimit)
    routing: Annotated[Routing, Meta(description="Which backend and endpoint gets the work.")] = field(
        default_factory=Routing
    )
    queue: Annotated[Queue, Meta(description="How much work may wait, and how long.")] = field(default_factory=Queue)
    retry: Annotated[Retry, Meta(description="How often a failed attempt is made again elsewhere.")] = field(
        default_factory=Retry
    )
    breaker: Annotated[Breaker, Meta(description="When a failing endpoint is left alone.")] = field(
        default_factory=Breaker
    )
    limits: Annotated[Limits, Meta(description="What one request may ask for.")] = field(default_factory=Limits)
    storage: Annotated[Storage, Meta(description="Where pictures are kept for their URLs.")] = field(
        default_factory=Storage
    )
    response: Annotated[Response, Meta(description="How pictures are handed over.")] = field(default_factory=Response)
    logging: Annotated[Logging, Meta(description="What is written to stderr.")] = field(default_factory=Logging)
    jobs: Annotated[Jobs, Meta(description="Work whose client left, and its results.")] = field(default_factory=Jobs)
    webhooks: Annotated[Webhooks, Meta(description="Calls to clients when their jobs end.")] = field(
        default_factory=Webhooks
    )
    backends: Annotated[
        tuple[BackendConfig, ...], Meta(description="Who draws; with none here, the built-in backend does.")
    ] = ()

    def findings(self) -> Iterator[Finding]:
        """What sections say against each other."""
        names: dict[str, int] = {}
        for index, backend in enumerate(self.backends):
            if (first := names.setdefault(backend.name, index)) != index:
                yield ("backends", index, "name"), f'"{backend.name}" is already the name of backends[{first}]'
            width, height = backend.default_dimensions()
            if backend.default_size is not None and width * height > self.limits.max_pixels:
                yield ("backends", index, "default_size"), f"is more than limits.max_pixels = {self.limits.max_pixels}"
        for index, key in enumerate(self.auth.api_keys):
            if not isinstance(key, str) and key.webhook_url is not None:
                fault = fault_of_webhook_url(key.webhook_url, allow_private=self.webhooks.allow_private_addresses)
                if fault is not None:
                    yield ("auth", "api_keys", index, "webhook_url"), fault


def _fault_of_key(key: str) -> str | None:
    if not is_token(key) or len(key) > MAX_KEY_CHARS:
        return f"must be 1 to {MAX_KEY_CHARS} printable ASCII characters without blanks, or no header can carry it"
    return None
