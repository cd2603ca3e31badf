"""`/openapi.json`, made from the same types that validate requests and shape replies."""

from __future__ import annotations

from typing import Any

import msgspec

from img_serving.api.backends import BackendList, BackendRecord, DeletedBackend
from img_serving.api.edits import EditBody, VariationBody
from img_serving.api.errors import ErrorBody
from img_serving.api.generation import GenerationBody, ImagesReply
from img_serving.api.health import Alive, HealthReply
from img_serving.api.models import Model, ModelList
from img_serving.api.queue import QueueReply
from img_serving.config import BackendConfig

_REF = "#/components/schemas/{name}"


def document(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 description of every route, as plain JSON values."""
    types = [
        GenerationBody,
        EditBody,
        VariationBody,
        ImagesReply,
        ModelList,
        Model,
        BackendConfig,
        BackendList,
        BackendRecord,
        DeletedBackend,
        QueueReply,
        HealthReply,
        Alive,
        ErrorBody,
    ]
    _, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    schemas["EditForm"] = _form_of(schemas["EditBody"], "prompt", mask=True)
    schemas["VariationForm"] = _form_of(schemas["VariationBody"], "image", mask=False)
    key: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}]
    name = _variable("name", "A backend's name.")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "img-serving",
            "version": version,
            "description": "One OpenAI-compatible API in front of many image-generation backends. "
            "Every path is also there without /v1.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": {
            "/v1/images/generations": {
                "post": _operation(
                    "createImage", "Draw pictures", "images", key, body="GenerationBody", answer="ImagesReply"
                )
            },
            "/v1/images/edits": {
                "post": _operation(
                    "editImage",
                    "Change pictures",
                    "images",
                    key,
                    body="EditBody",
                    answer="ImagesReply",
                    form="EditForm",
                )
            },
            "/v1/images/variations": {
                "post": _operation(
                    "varyImage",
                    "Make pictures like one",
                    "images",
                    key,
                    body="VariationBody",
                    answer="ImagesReply",
                    form="VariationForm",
                )
            },
            "/v1/models": {"get": _operation("listModels", "List models", "models", key, answer="ModelList")},
            "/v1/models/{id}": {
                "parameters": [_variable("id", "A model's id; it may hold slashes, raw or as %2F.")],
                "get": _operation("getModel", "Look at one model", "models", key, answer="Model"),
            },
            "/v1/backends": {
                "get": _operation("listBackends", "List backends (admin)", "backends", key, answer="BackendList"),
                "post": _operation(
                    "addBackend",
                    "Add a backend (admin)",
                    "backends",
                    key,
                    body="BackendConfig",
                    answer="BackendRecord",
                    status="201",
                ),
            },
            "/v1/backends/{name}": {
                "parameters": [name],
                "get": _operation("getBackend", "Look at one backend (admin)", "backends", key, answer="BackendRecord"),
                "delete": _operation(
                    "removeBackend", "Remove a backend (admin)", "backends", key, answer="DeletedBackend"
                ),
            },
            "/v1/queue": {
                "get": _operation(
                    "lookAtQueue", "What waits, and for how long (admin)", "queue", key, answer="QueueReply"
                )
            },
            "/images/{name}": {
                "parameters": [_variable("name", "The name at the end of a picture's URL.")],
                "get": {
                    "operationId": "getImage",
                    "summary": "A stored picture",
                    "tags": ["images"],
                    "security": [],
                    "responses": {
                        "200": {"description": "The picture", "content": _picture_types()},
                        "206": {"description": "A range of it", "content": _picture_types()},
                        "304": {"description": "Not modified"},
                        "default": _failure(),
                    },
                },
            },
            "/health": {"get": _operation("health", "How the backends are", "health", [], answer="HealthReply")},
            "/livez": {"get": _operation("livez", "The process answers", "health", [], answer="Alive")},
            "/readyz": {"get": _operation("readyz", "Work is accepted", "health", [], answer="Alive")},
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "summary": "Prometheus metrics",
                    "tags": ["health"],
                    "security": [],
                    "responses": {
                        "200": {"description": "Prometheus text", "content": {"text/plain": {"schema": _STRING}}},
                        "default": _failure(),
                    },
                }
            },
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


_STRING = {"type": "string"}
_FILE = {"type": "string", "format": "binary"}


def _form_of(body: dict[str, Any], required: str, *, mask: bool) -> dict[str, Any]:
    """The same fields as a form, where pictures are files and everything else is text."""
    fields = {name: one for name, one in body["properties"].items() if name not in {"images", "image", "mask"}}
    files: dict[str, Any] = {"image": _FILE, "image[]": {"type": "array", "items": _FILE}}
    if mask:
        files["mask"] = _FILE
    return {"type": "object", "required": [required], "properties": {**fields, **files}}


def _operation(
    operation_id: str,
    summary: str,
    tag: str,
    security: list[dict[str, list[str]]],
    *,
    answer: str,
    body: str | None = None,
    form: str | None = None,
    status: str = "200",
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": operation_id,
        "summary": summary,
        "tags": [tag],
        "security": security,
        "responses": {status: {"description": "Success", "content": _json(answer)}, "default": _failure()},
    }
    if body is not None:
        content = _json(body)
        if form is not None:
            content["multipart/form-data"] = {"schema": {"$ref": _REF.format(name=form)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=schema)}}}


def _failure() -> dict[str, Any]:
    return {"description": "Failure: always the four-key error object", "content": _json("ErrorBody")}


def _picture_types() -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {"image/png": binary, "image/jpeg": binary, "image/webp": binary}


def _variable(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": text, "schema": _STRING}
