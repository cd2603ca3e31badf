"""`/openapi.json`, made from the same types that validate requests and shape replies."""

from __future__ import annotations

from typing import Any

import msgspec

from img_serving.api.asked import MAX_KEY_CHARS
from img_serving.api.backends import BackendList, BackendRecord, DeletedBackend
from img_serving.api.edits import EditBody, VariationBody
from img_serving.api.errors import ErrorBody
from img_serving.api.generation import GenerationBody, ImagesReply
from img_serving.api.health import Alive, HealthReply
from img_serving.api.jobs import OPERATIONS, JobBody, JobList
from img_serving.api.models import Model, ModelList
from img_serving.api.queries import MOST_LISTED, USUAL_LIMIT
from img_serving.api.queue import QueueReply
from img_serving.api.webhooks import STATES, WebhookList, WebhookRecord
from img_serving.config import BackendConfig
from img_serving.domain.jobs import JobStatus
from img_serving.gateway.job_records import JobRecord

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
        JobBody,
        JobRecord,
        JobList,
        WebhookList,
        WebhookRecord,
        QueueReply,
        HealthReply,
        Alive,
        ErrorBody,
    ]
    _, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    # what is read and written as it is, without a look inside, has no schema of its own
    schemas["JobBody"]["properties"]["body"] = {"anyOf": [_ref(one) for one in _BODIES]}
    schemas["JobRecord"]["properties"]["result"] = {"anyOf": [_ref("ImagesReply"), {"type": "null"}]}
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
                "parameters": [_IDEMPOTENCY_KEY, _PREFER],
                "post": _operation(
                    "createImage",
                    "Draw pictures",
                    "images",
                    key,
                    body="GenerationBody",
                    answer="ImagesReply",
                    is_image=True,
                    streams=True,
                ),
            },
            "/v1/images/edits": {
                "parameters": [_IDEMPOTENCY_KEY, _PREFER],
                "post": _operation(
                    "editImage",
                    "Change pictures",
                    "images",
                    key,
                    body="EditBody",
                    answer="ImagesReply",
                    form="EditForm",
                    is_image=True,
                    streams=True,
                ),
            },
            "/v1/images/variations": {
                "parameters": [_IDEMPOTENCY_KEY, _PREFER],
                "post": _operation(
                    "varyImage",
                    "Make pictures like one",
                    "images",
                    key,
                    body="VariationBody",
                    answer="ImagesReply",
                    form="VariationForm",
                    is_image=True,
                ),
            },
            "/v1/jobs": {
                "post": {
                    **_operation(
                        "createJob",
                        "Draw without waiting: 202 once the job is on disk",
                        "jobs",
                        key,
                        body="JobBody",
                        answer="JobRecord",
                        status="202",
                    ),
                    "parameters": [_IDEMPOTENCY_KEY],
                },
                "get": {
                    **_operation("listJobs", "List one's own jobs, newest first", "jobs", key, answer="JobList"),
                    "parameters": [
                        _query("status", "Only these.", enum=[*JobStatus]),
                        _query("operation", "Only these.", enum=[*OPERATIONS]),
                        _query("idempotency_key", "The job of this key, with its result."),
                        _query("request_id", "The jobs of this X-Request-Id, with their results."),
                        _query("after", "The id of the last job of the page before."),
                        _limit(),
                    ],
                },
            },
            "/v1/jobs/{id}": {
                "parameters": [_variable("id", "A job's id.")],
                "get": _operation("getJob", "Look at one job", "jobs", key, answer="JobRecord"),
                "delete": _operation("cancelJob", "End a job", "jobs", key, answer="JobRecord"),
            },
            "/v1/jobs/{id}/events": {
                "parameters": [_variable("id", "A job's id."), _LAST_EVENT_ID],
                "get": {
                    "operationId": "followJob",
                    "summary": "What happens to a job, as it happens",
                    "tags": ["jobs"],
                    "security": key,
                    "responses": {
                        "200": {
                            "description": "Server-sent events",
                            "content": {"text/event-stream": {"schema": _STRING}},
                        },
                        "204": {"description": "Everything was heard already (Last-Event-ID)"},
                        "default": _failure(),
                    },
                },
            },
            "/v1/webhooks": {
                "get": {
                    **_operation("listWebhooks", "List what is sent (admin)", "webhooks", key, answer="WebhookList"),
                    "parameters": [
                        _query("state", "Only these.", enum=[*STATES]),
                        _query("job_id", "Those of one job."),
                        _query("after", "The id of the last event of the page before."),
                        _limit(),
                    ],
                }
            },
            "/v1/webhooks/{event_id}": {
                "parameters": [_variable("event_id", "An event's id.")],
                "get": _operation("getWebhook", "Look at one event (admin)", "webhooks", key, answer="WebhookRecord"),
            },
            "/v1/webhooks/{event_id}/redeliver": {
                "parameters": [_variable("event_id", "An event's id.")],
                "post": _operation(
                    "redeliver", "Send an event again (admin)", "webhooks", key, answer="WebhookRecord", status="202"
                ),
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
_BODIES = ("GenerationBody", "EditBody", "VariationBody")
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "The same key again is answered with what came of the first request, for 24 hours.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARS, "pattern": "^[!-~]([ -~]*[!-~])?$"},
}
_PREFER = {
    "name": "Prefer",
    "in": "header",
    "description": "`respond-async`: answer 202 with a job.",
    "schema": _STRING,
}
_LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "Where to go on: the id of the last event that was heard.",
    "schema": _STRING,
}


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
    is_image: bool = False,
    streams: bool = False,
) -> dict[str, Any]:
    content = _json(answer)
    if streams:
        content["text/event-stream"] = {"schema": _STRING}
    responses: dict[str, Any] = {status: {"description": "Success", "content": content}, "default": _failure()}
    if is_image:
        responses["202"] = {
            "description": "A job was made of it (Prefer: respond-async)",
            "content": _json("JobRecord"),
        }
    operation: dict[str, Any] = {
        "operationId": operation_id,
        "summary": summary,
        "tags": [tag],
        "security": security,
        "responses": responses,
    }
    if body is not None:
        read = _json(body)
        if form is not None:
            read["multipart/form-data"] = {"schema": _ref(form)}
        operation["requestBody"] = {"required": True, "content": read}
    return operation


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(schema)}}


def _ref(schema: str) -> dict[str, str]:
    return {"$ref": _REF.format(name=schema)}


def _failure() -> dict[str, Any]:
    return {"description": "Failure: always the four-key error object", "content": _json("ErrorBody")}


def _picture_types() -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {"image/png": binary, "image/jpeg": binary, "image/webp": binary}


def _variable(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": text, "schema": _STRING}


def _query(name: str, text: str, *, enum: list[str] | None = None) -> dict[str, Any]:
    schema: dict[str, Any] = (
        {"type": "string"} if enum is None else {"type": "string", "enum": [str(one) for one in enum]}
    )
    return {"name": name, "in": "query", "description": text, "schema": schema}


def _limit() -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "maximum": MOST_LISTED, "default": USUAL_LIMIT}
    return {"name": "limit", "in": "query", "description": "How many.", "schema": schema}
