"""`/sdapi/v1/*`: A1111's API for clients that speak no other, translated onto the routes that there are.

Pictures from words, and the lists around them; everything goes the way of `POST /v1/images/generations`. Left out of
/openapi.json on purpose: it describes our API, and this one is described where it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from img_serving.api.a1111_shapes import AUTOMATIC, Options, TextToImage, chosen, to_generation, told_of
from img_serving.api.bodies import decode_json, read_raw
from img_serving.api.exchange import Exchange, Reply
from img_serving.api.generation import MAX_NAME_CHARS
from img_serving.api.images import Images
from img_serving.api.models import Models
from img_serving.api.services import Services
from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import InvalidRequest
from img_serving.domain.tenants import Tenant
from img_serving.domain.vocabulary import Vocabulary

MAX_SELECTIONS = 1000
"""Keys whose checkpoint is remembered: there are as many as an operator gives out."""

_IDLE = {
    "progress": 0.0,
    "eta_relative": 0.0,
    "state": {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": 0,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    },
    "current_image": None,
    "textinfo": None,
}
"""Nothing goes on: a checkpoint is chosen at once. What a picture is at is told by `/v1/jobs` and by streams."""


class A1111Facade:
    """Handlers of A1111's routes."""

    def __init__(self, services: Services, images: Images, models: Models) -> None:
        self._services = services
        self._images = images
        self._models = models
        self._limit = services.config.server.max_body_bytes
        # numbers come as text from some forms
        self._bodies = msgspec.json.Decoder(TextToImage, strict=False)
        self._options = msgspec.json.Decoder(Options)
        self._selected: dict[str, str] = {}
        """The checkpoint that the clients of a key have chosen, by the key's name, the latest choice last."""

    async def txt2img(self, exchange: Exchange) -> Reply:
        """`POST /sdapi/v1/txt2img`: draw, and answer with base64."""
        raw = await read_raw(exchange, self._limit)
        body = decode_json(raw, self._bodies)
        asked = self._images.read_generation(to_generation(body, raw, self._selected.get(exchange.tenant.name)))
        reply = await self._images.draw(exchange, asked)
        job = exchange.job
        model = asked.request.model or (job.backend if job is not None else None) or ""
        return Reply(200, told_of(reply.parts, asked.request, model), headers=reply.headers)

    async def options(self, exchange: Exchange) -> Reply:
        """`GET /sdapi/v1/options`: the checkpoint, and what some clients look for beside it."""
        return _json(
            {
                "sd_model_checkpoint": self._selected.get(exchange.tenant.name) or self._first(exchange.tenant),
                "sd_vae": AUTOMATIC,
                "CLIP_stop_at_last_layers": 1,
                "samples_format": "png",
                # what tells a gateway before this one that it may speak to us in a richer way
                "served_by": "img-serving",
            }
        )

    async def set_options(self, exchange: Exchange) -> Reply:
        """`POST /sdapi/v1/options`: the checkpoint of this key's requests that name none; other settings are passed over."""
        body = decode_json(await read_raw(exchange, self._limit), self._options)
        name = body.sd_model_checkpoint
        if isinstance(name, str) and len(name) > MAX_NAME_CHARS:
            raise InvalidRequest(
                f"sd_model_checkpoint has over {MAX_NAME_CHARS} characters", param="sd_model_checkpoint"
            )
        if name is not msgspec.UNSET:
            self._selected.pop(exchange.tenant.name, None)
        if isinstance(name, str) and chosen(name) is not None:
            self._selected[exchange.tenant.name] = name
            if len(self._selected) > MAX_SELECTIONS:
                del self._selected[next(iter(self._selected))]
        return _json(None)

    async def checkpoints(self, exchange: Exchange) -> Reply:
        """`GET /sdapi/v1/sd-models`: the models that the key may use."""
        return _json(
            [
                {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
                for name in self._models.of(exchange.tenant)
            ]
        )

    async def samplers(self, exchange: Exchange) -> Reply:
        """`GET /sdapi/v1/samplers`: those that the backends know."""
        names = self._known(exchange.tenant, lambda can: can.samplers)
        return _json([{"name": name, "aliases": [], "options": {}} for name in names])

    async def schedulers(self, exchange: Exchange) -> Reply:
        """`GET /sdapi/v1/schedulers`: the same of noise schedules."""
        names = self._known(exchange.tenant, lambda can: can.schedulers)
        return _json([{"name": name, "label": name, "aliases": None} for name in names])

    async def upscalers(self, exchange: Exchange) -> Reply:  # noqa: ARG002 - a handler's shape
        """`GET /sdapi/v1/upscalers`: none, which A1111 says with an entry of its own."""
        return _json([{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1}])

    async def nothing(self, exchange: Exchange) -> Reply:  # noqa: ARG002 - a handler's shape
        """What there is none of here: VAEs, modules, latent upscalers."""
        return _json([])

    async def progress(self, exchange: Exchange) -> Reply:  # noqa: ARG002 - a handler's shape
        """`GET /sdapi/v1/progress`."""
        return _json(_IDLE)

    async def interrupt(self, exchange: Exchange) -> Reply:  # noqa: ARG002 - a handler's shape
        """`POST /sdapi/v1/interrupt`: ends nothing, for it names nothing. Who wants no more closes the connection."""
        return _json({})

    def _first(self, tenant: Tenant) -> str:
        """The model that a request gets which names none, as far as names tell."""
        default = self._services.config.routing.default_backend
        own = [one for one in self._candidates(tenant) if one.name == default] if default else []
        usable = self._models.of(tenant)
        return next((model for one in own for model in one.models if model in usable), next(iter(usable), ""))

    def _known(self, tenant: Tenant, vocabulary: Callable[[Capabilities], Vocabulary | None]) -> list[str]:
        lists: Iterable[Vocabulary | None] = (vocabulary(one.capabilities) for one in self._candidates(tenant))
        names = dict.fromkeys(name for one in lists if one is not None for name in one.names)
        return [AUTOMATIC, *(name for name in names if name.lower() != AUTOMATIC.lower())]

    def _candidates(self, tenant: Tenant) -> list[Any]:
        candidates = self._services.registry.candidates()
        return [one for one in candidates if one.enabled and tenant.may_use_backend(one.name)]


def _json(value: object) -> Reply:
    return Reply(200, (msgspec.json.encode(value),))
