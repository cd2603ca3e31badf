"""Which backends could serve a request, and under which model name each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import Forbidden, InvalidRequest, NotFound, NoUsableBackend
from img_serving.domain.images import ImageRequest
from img_serving.domain.jobs import Route, Target
from img_serving.domain.tenants import Tenant


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend as routing sees it.

    `models` are configured or discovered; empty means nobody knows them, so any name may be meant. `serves_any` is the
    built-in backend where nothing else is configured: it stands in for every model. `endpoints` are its endpoints' own
    capabilities, by number, where they differ. An edit without a size is fitted into `default_pixels`.
    """

    name: str
    models: tuple[str, ...]
    capabilities: Capabilities
    enabled: bool = True
    tier: int = 0
    serves_any: bool = False
    default_pixels: int = 1024 * 1024
    endpoints: tuple[tuple[int, Capabilities], ...] = ()


@dataclass(frozen=True, slots=True)
class RoutingOptions:
    """`aliases` map a model name to another; `default_backend` serves requests that name no model."""

    default_backend: str | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    unknown_model: Literal["reject", "default"] = "reject"


def plan(request: ImageRequest, tenant: Tenant, backends: Sequence[Candidate], options: RoutingOptions) -> Route:
    """The route of a request: every backend that could serve it, in file order.

    An explicit backend comes first, then aliases, then model names, then the default.

    Raises:
        NotFound: no such backend, or nobody has that model (to a `strict` request, no other is an answer).
        Forbidden: this tenant may not use it.
        InvalidRequest: those who have the model cannot do what is asked; the message gives each one's reason.
        NoUsableBackend: there is no enabled backend at all.
    """
    enabled = [backend for backend in backends if backend.enabled]
    if request.backend:
        found = _by_backend(request, backends, options)
    elif request.model is None:
        # the default of those that this tenant may use
        usable = [backend for backend in enabled if tenant.may_use_backend(backend.name)] or enabled
        found = _by_model(request, usable, options)
    else:
        found = _by_model(request, enabled, options)
    if request.model is not None and not tenant.may_use_model(request.model):
        raise Forbidden(f"this key may not use the model {request.model!r}", code="model_not_allowed", param="model")
    allowed = [(backend, model) for backend, model in found if tenant.may_use_backend(backend.name)]
    if not allowed:
        names = ", ".join(sorted(backend.name for backend, _ in found))
        raise Forbidden(f"this key may not use the backend(s) {names}", code="backend_not_allowed", param="backend")
    if request.model is None:
        allowed = [(backend, model) for backend, model in allowed if model is None or tenant.may_use_model(model)]
        if not allowed:
            raise Forbidden("this key may not use the default model; name one it may", param="model")
    fitting: list[Target] = []
    refusals: list[tuple[str, tuple[str, str]]] = []
    for backend, model in allowed:
        if request.strict and stands_in(request, backend, options):
            raise _no_such_model(request)
        refusal, only = _fitting(request, backend, model)
        if refusal is None:
            fitting.append(Target(backend.name, model, backend.tier, only))
        else:
            refusals.append((backend.name, refusal))
    if fitting:
        return tuple(fitting)
    if all(stands_in(request, backend, options) for backend, _ in allowed):
        raise _no_such_model(request)
    reasons = "; ".join(f"{name}: {reason}" for name, (reason, _) in refusals)
    raise InvalidRequest(f"no backend can serve this request ({reasons})", code="unsupported", param=refusals[0][1][1])


def ignored_by(request: ImageRequest, capabilities: Capabilities) -> tuple[str, ...]:
    """Parameters the client set that a backend of these capabilities cannot honour, sorted."""
    return tuple(sorted(request.given - capabilities.honoured(request.operation)))


def stands_in(request: ImageRequest, backend: Candidate, options: RoutingOptions) -> bool:
    """Whether this backend would draw with something else than the model that was asked for, since nobody has that."""
    if request.model is None or not (backend.serves_any or backend.capabilities.any_model):
        return False
    return options.aliases.get(request.model, request.model) not in (*backend.models, backend.name)


def _by_backend(
    request: ImageRequest, backends: Sequence[Candidate], options: RoutingOptions
) -> list[tuple[Candidate, str | None]]:
    backend = next((one for one in backends if one.name == request.backend), None)
    if backend is None:
        known = ", ".join(one.name for one in backends) or "none"
        raise NotFound(
            f"there is no backend {request.backend!r} (known: {known})", code="backend_not_found", param="backend"
        )
    if not backend.enabled:
        raise NoUsableBackend(f"the backend {backend.name!r} is disabled", param="backend", should_retry=False)
    if request.model is None:
        return [(backend, _default_model(backend))]
    model = options.aliases.get(request.model, request.model)
    if backend.serves_any:
        return [(backend, None)]
    if not backend.models or model in backend.models or backend.capabilities.any_model:
        return [(backend, model)]
    if model == backend.name or options.unknown_model == "default":
        return [(backend, _default_model(backend))]
    raise NotFound(
        f"the backend {backend.name!r} has no model {request.model!r} (it has: {', '.join(backend.models)})",
        code="model_not_found",
        param="model",
    )


def _by_model(
    request: ImageRequest, enabled: Sequence[Candidate], options: RoutingOptions
) -> list[tuple[Candidate, str | None]]:
    if not enabled:
        raise NoUsableBackend("no backend is enabled", should_retry=False)
    if request.model is None:
        default = _default(enabled, options)
        return [(default, _default_model(default))]
    model = options.aliases.get(request.model, request.model)
    exact: list[tuple[Candidate, str | None]] = [(backend, model) for backend in enabled if model in backend.models]
    if exact:
        return exact
    named = [(backend, _default_model(backend)) for backend in enabled if backend.name == model]
    if named:
        return named
    # A server that does not list its models is not disabled by that: any name may be one of its own.
    unlisted: list[tuple[Candidate, str | None]] = [
        (backend, model)
        for backend in enabled
        if (not backend.models or backend.capabilities.any_model) and not backend.serves_any
    ]
    if unlisted:
        return unlisted
    stand_in: list[tuple[Candidate, str | None]] = [(backend, None) for backend in enabled if backend.serves_any]
    if stand_in:
        return stand_in
    if options.unknown_model == "default":
        default = _default(enabled, options)
        return [(default, _default_model(default))]
    raise _no_such_model(request)


def _no_such_model(request: ImageRequest) -> NotFound:
    return NotFound(
        f"the model {request.model!r} does not exist; GET /v1/models lists those that do",
        code="model_not_found",
        param="model",
    )


def _default(enabled: Sequence[Candidate], options: RoutingOptions) -> Candidate:
    for backend in enabled:
        if backend.name == options.default_backend:
            return backend
    # the built-in one stands in only where there is no other
    return next((backend for backend in enabled if not backend.serves_any), enabled[0])


def _default_model(backend: Candidate) -> str | None:
    return None if backend.serves_any or not backend.models else backend.models[0]


def _fitting(
    request: ImageRequest, backend: Candidate, model: str | None
) -> tuple[tuple[str, str] | None, tuple[int, ...] | None]:
    """Why a backend cannot serve it (None if it can), and which of its endpoints can, where not all do."""
    if not backend.endpoints:
        return refusal_of(request, backend.capabilities.of(model), backend.default_pixels), None
    pixels = backend.default_pixels
    refusals = [(number, refusal_of(request, can.of(model), pixels)) for number, can in backend.endpoints]
    able = tuple(number for number, refusal in refusals if refusal is None)
    if not able:
        return refusals[0][1], None
    return None, None if len(able) == len(refusals) else able


def refusal_of(request: ImageRequest, can: Capabilities, default_pixels: int | None = None) -> tuple[str, str] | None:
    """Why a backend of these capabilities cannot serve it (reason, field at fault), or None.

    An edit without a size is fitted into `default_pixels`, where they are known.
    """
    if request.operation not in can.operations:
        return f"it cannot do the operation {request.operation!r}", "model"
    if len(request.images) > can.max_images:
        return f"it takes at most {can.max_images} input image{'s'[: can.max_images != 1]}", "image"
    if request.mask is not None and not can.masks:
        return "it cannot use a mask", "mask"
    if request.width and request.height:
        reason = can.sizes.refusal(request.width, request.height)
        if reason is not None:
            return reason, "size"
    if can.max_steps is not None and request.steps is not None and request.steps > can.max_steps:
        return f"it does at most {can.max_steps} steps", "num_inference_steps"
    return _unknown_name(request, can) or (_ignored(request, can, default_pixels) if request.strict else None)


def _unknown_name(request: ImageRequest, can: Capabilities) -> tuple[str, str] | None:
    """A sampler or schedule that the backend does not have: it would draw with another one, and say nothing."""
    for field_name, name, known in (
        ("sampler", request.sampler, can.samplers),
        ("scheduler", request.scheduler, can.schedulers),
    ):
        if (
            name is not None
            and known is not None
            and field_name in can.honoured(request.operation)
            and known.find(name) is None
        ):
            return f"it has no {field_name} {name[:80]!r} ({known.hint(name)})", field_name
    return None


def _ignored(request: ImageRequest, can: Capabilities, default_pixels: int | None) -> tuple[str, str] | None:
    """With `strict`, whatever it cannot honour is a reason to refuse."""
    ignored = ignored_by(request, can)
    if ignored:
        return f"it cannot honour {', '.join(ignored)}", ignored[0]
    if request.width and request.height:
        wanted = request.width, request.height
    elif request.images:
        first = request.images[0]
        wanted = first.width, first.height
        if default_pixels is not None and first.fitted(default_pixels) != wanted:
            return f"without a size it edits pictures of up to {default_pixels} pixels: say a size", "size"
    else:
        return None
    fitting = can.sizes.fit(*wanted)
    if fitting != wanted:
        return f"it draws multiples of {can.sizes.multiple} pixels: {fitting[0]}x{fitting[1]} would do", "size"
    return None
