"""`/v1/models`: what can be asked for."""

from __future__ import annotations

from typing import Literal

import msgspec

from img_serving.api.exchange import Exchange, Reply
from img_serving.api.services import Services
from img_serving.domain.errors import NotFound
from img_serving.domain.tenants import Tenant


class Model(msgspec.Struct, frozen=True):
    """A model: `owned_by` names the backends that have it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(msgspec.Struct, frozen=True):
    """All models that the caller may use."""

    object: Literal["list"]
    data: list[Model]


class Models:
    """Handlers of the model routes."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def list(self, exchange: Exchange) -> Reply:
        """`GET /v1/models`."""
        models = self.of(exchange.tenant)
        return Reply(200, (msgspec.json.encode(ModelList("list", list(models.values()))),))

    async def get(self, exchange: Exchange) -> Reply:
        """`GET /v1/models/{id}`; the id may hold slashes."""
        wanted = exchange.variables["id"]
        model = self.of(exchange.tenant).get(wanted)
        if model is None:
            raise NotFound(f"the model {wanted!r} does not exist", code="model_not_found", param="model")
        return Reply(200, (msgspec.json.encode(model),))

    def of(self, tenant: Tenant) -> dict[str, Model]:
        """Those that a tenant may use, by their ids."""
        owners: dict[str, list[str]] = {}
        for backend in self._services.registry.candidates():
            if backend.enabled and tenant.may_use_backend(backend.name):
                for model in backend.models:
                    owners.setdefault(model, []).append(backend.name)
        for alias, model in self._services.config.routing.aliases.items():
            if model in owners:
                owners.setdefault(alias, owners[model])
        created = self._services.started_at
        return {
            name: Model(name, "model", created, ", ".join(backends))
            for name, backends in owners.items()
            if tenant.may_use_model(name)
        }
