"""A scripted upstream on a real socket: speaks OpenAI's and A1111's faces, and breaks them in the ways that real ones do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
import pybase64
from msgspec import Meta

from img_serving.backends.scripted import picture, read_script
from img_serving.backends.stub_server import Answer, Exchange, StubServer

ServerStep = Literal[
    # good answers, and odd ones that are good
    "ok", "drip", "url", "data_url", "escaped", "spaced", "wrapped", "grid", "many", "plain_seed",
    # complete answers that are no use
    "few", "bad_base64", "truncated_base64", "not_picture", "not_json", "wrong_shape", "no_pictures", "wrong_size", "huge",
    # broken connections
    "hang", "close", "cut_body", "long_length", "not_http",
    # error replies
    "refuse", "refuse_fastapi", "refuse_text", "moderation", "model_not_found", "quota", "echo_secret", "html",
    "oom", "sampler", "redirect", "busy", "busy_date", "busy_ms",
    "400", "401", "403", "404", "408", "409", "413", "429", "500", "502", "503", "504", "524",
]  # fmt: skip

STEPS: Final = tuple(str(step) for step in get_args(ServerStep))
HUGE_BYTES: Final = 8 * 1024 * 1024

_Seconds = Annotated[float, Meta(ge=0)]


class ServerScript(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the server does. `sequence` is for POSTs, `check_status` and `models` for GETs; `statuses` overrules by path."""

    sequence: tuple[ServerStep, ...] = ("ok",)
    repeat: Literal["cycle", "last"] = "last"
    latency_seconds: _Seconds = 0.0
    drip_seconds: _Seconds = 0.002
    retry_after: str = "7"
    models: tuple[str, ...] | None = ("scripted",)
    faces: tuple[Literal["openai", "a1111"], ...] = ("openai", "a1111")
    check_status: int = 200
    statuses: dict[str, int] = {}
    echo: str = ""


class ScriptedServer(StubServer):
    """`async with ScriptedServer({"sequence": ["busy", "ok"]}) as server:` listens on a free port; see `server.url`."""

    def __init__(
        self,
        script: Mapping[str, Any] | None = None,
        *,
        port: int = 0,
        tell: Callable[[Exchange], None] | None = None,
    ) -> None:
        """Take the options of `ServerScript`; ValueError names one at fault. The rest is the stub server's."""
        super().__init__(port=port, tell=tell)
        self.script = read_script(ServerScript, script or {})
        self.files: dict[str, bytes] = {}
        self._drawn = 0

    @property
    def posts(self) -> list[Exchange]:
        """The requests that asked for pictures."""
        return [exchange for exchange in self.exchanges if exchange.method == "POST"]

    def follow(self, script: Mapping[str, Any]) -> None:
        """Another script from now on, from the beginning of its sequence. What hangs already goes on hanging.

        Raises:
            ValueError: see `__init__`.
        """
        self.script = read_script(ServerScript, script)
        self._drawn = 0

    async def answer(self, exchange: Exchange) -> Answer:
        """As the script says: the next of the sequence to a POST, facts to a GET."""
        self.drip_seconds = self.script.drip_seconds
        if exchange.method != "POST":
            return self._tell(exchange)
        drawn = self._draw(exchange)
        if self.script.latency_seconds:
            await asyncio.sleep(self.script.latency_seconds)
        return drawn

    # what GETs are told

    def _tell(self, exchange: Exchange) -> Answer:
        path = exchange.path.partition("?")[0]
        if path in self.files:
            return Answer(200, self.files[path], {"content-type": "application/octet-stream"})
        status = self.script.statuses.get(path, self.script.check_status)
        if status != 200:
            return Answer(status, b"{}", {"location": "/elsewhere"} if 300 <= status < 400 else {})
        models, faces = self.script.models, self.script.faces
        if path.endswith("/models") and "openai" in faces and models is not None:
            data = [{"id": name, "object": "model", "created": 0, "owned_by": "scripted"} for name in models]
            return Answer(200, msgspec.json.encode({"object": "list", "data": data}))
        if path == "/sdapi/v1/options" and "a1111" in faces:
            return Answer(200, msgspec.json.encode({"sd_model_checkpoint": (models or ("none",))[0]}))
        if path == "/sdapi/v1/sd-models" and "a1111" in faces and models is not None:
            checkpoints = [{"title": f"{name}.safetensors [abcd]", "model_name": name, "hash": None} for name in models]
            return Answer(200, msgspec.json.encode(checkpoints))
        if path == "/health":
            return Answer(200, b"ok", {"content-type": "text/plain"})
        return Answer(404, b'{"detail":"Not Found"}')

    # what POSTs get

    def _draw(self, exchange: Exchange) -> Answer:
        is_openai = exchange.path.endswith("/images/generations")
        if not (is_openai or exchange.path in {"/sdapi/v1/txt2img", "/sdapi/v1/img2img"}):
            return Answer(404, b'{"detail":"Not Found"}')
        script = self.script
        last = len(script.sequence) - 1
        step = script.sequence[self._drawn % (last + 1) if script.repeat == "cycle" else min(self._drawn, last)]
        self._drawn += 1
        if (error := self._error(step)) is not None:
            return error
        asked = exchange.json
        if step == "not_json":
            return Answer(200, b"<html>welcome</html>", {"content-type": "text/html"})
        if step == "wrong_shape":
            return Answer(200, b'{"data": {"b64_json": 5}, "images": "none"}')
        if step == "no_pictures":
            return Answer(200, b'{"created": 1, "data": []}' if is_openai else b'{"images": [], "info": "{}"}')
        body = self._openai(asked, step) if is_openai else self._a1111(asked, step)
        return Answer(200, body, manner=step)

    def _error(self, step: str) -> Answer | None:
        """The error replies, as real servers word them."""
        script = self.script
        plain = {"content-type": "text/plain"}
        bodies: dict[str, tuple[int, Any]] = {
            "refuse": (400, _openai_error("size 9x9 is not supported", "invalid_value", "size")),
            "refuse_fastapi": (
                422,
                {
                    "detail": [
                        {"type": "int_parsing", "loc": ["body", "steps"], "msg": "not a number", "input": script.echo}
                    ]
                },
            ),
            "moderation": (400, _openai_error("Your request was rejected by the safety system.", "moderation_blocked")),
            "model_not_found": (404, _openai_error("The model does not exist.", "model_not_found", "model")),
            "quota": (429, _openai_error("You exceeded your current quota", "insufficient_quota")),
            "echo_secret": (400, _openai_error(f"what is {script.echo} doing in {script.echo}?", "invalid_value")),
            "oom": (
                500,
                {"error": "OutOfMemoryError", "detail": "", "body": script.echo, "errors": "CUDA out of memory."},
            ),
            "sampler": (404, {"detail": "Sampler not found"}),
        }
        if step in bodies:
            status, body = bodies[step]
            return Answer(status, msgspec.json.encode(body))
        if step == "refuse_text":
            return Answer(400, b"prompt required", plain)
        if step == "html":
            page = b"<html><head><title>502 Bad Gateway</title></head><body><h1>nginx</h1></body></html>"
            return Answer(502, page, {"content-type": "text/html"})
        if step == "redirect":
            return Answer(307, b"", {"location": "https://elsewhere.example/v1?token=secret"})
        if step.startswith("busy"):
            waits = {
                "busy": {"retry-after": script.retry_after},
                "busy_ms": {"retry-after": "30", "retry-after-ms": "250"},
                "busy_date": {
                    "retry-after": "Mon, 02 Mar 2026 10:00:09 GMT",
                    "date": "Mon, 02 Mar 2026 10:00:00 GMT",
                },
            }
            return Answer(503, msgspec.json.encode(_openai_error("overloaded", None)), waits[step])
        if step.isdecimal():
            headers = {"location": "/elsewhere"} if step.startswith("3") else {}
            return Answer(
                int(step), msgspec.json.encode(_openai_error(f"scripted {step} {script.echo}".strip(), None)), headers
            )
        return None

    def _pictures(self, prompt: str, seed: int, size: tuple[int, int], count: int, step: str) -> list[str]:
        width, height = (max(1, side // 2) for side in size) if step == "wrong_size" else size
        count += {"few": -1, "many": 1}.get(step, 0)
        return [_spoiled(picture(prompt, seed + index, width, height), step) for index in range(count)]

    def _openai(self, asked: dict[str, Any], step: str) -> bytes:
        width, height = (int(side) for side in asked.get("size", "64x64").split("x"))
        texts = self._pictures(asked["prompt"], asked.get("seed", 42), (width, height), asked.get("n", 1), step)
        data: list[dict[str, Any]] = [
            {"b64_json": text, "revised_prompt": f"{asked['prompt']}, revised"} for text in texts
        ]
        if step == "plain_seed":
            data = [{**one, "seed": 1000 + index} for index, one in enumerate(data)]
        if step == "data_url":
            data = [{"url": f"data:image/png;base64,{text}"} for text in texts]
        if step == "url":
            names = [f"/files/{len(self.files) + index}.png" for index in range(len(texts))]
            self.files.update({name: pybase64.b64decode(text) for name, text in zip(names, texts, strict=True)})
            data = [{"url": self.url + name} for name in names]
        document = msgspec.json.encode({"created": 1, "data": data})
        if step == "spaced":
            return msgspec.json.format(document, indent=2)
        return document.replace(b"/", b"\\/") if step == "escaped" else document

    def _a1111(self, asked: dict[str, Any], step: str) -> bytes:
        seed, count = asked.get("seed", -1), asked.get("batch_size", 1)
        width, height = asked.get("width", 512), asked.get("height", 512)
        texts = self._pictures(asked["prompt"], seed, (width, height), count, step)
        info = {
            "all_seeds": list(range(seed, seed + count)),
            "index_of_first_image": 0,
            "width": width,
            "height": height,
        }
        if step == "grid":
            texts.insert(0, _spoiled(picture("a grid", 0, width * 2, height), step))
            info["index_of_first_image"] = 1
        if step == "data_url":
            texts = [f"data:image/png;base64,{text}" for text in texts]
        parameters = {**asked, "images": None, "alwayson_scripts": {"images": ["not", "these"]}}
        document = msgspec.json.encode(
            {"parameters": parameters, "images": texts, "info": msgspec.json.encode(info).decode()}
        )
        if step == "spaced":
            return msgspec.json.format(document, indent=2)
        return document.replace(b"/", b"\\/") if step == "escaped" else document


def _openai_error(message: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def _spoiled(png: bytes, step: str) -> str:
    """The picture as base64, unless the step wants something worse."""
    if step == "huge":
        png += bytes(HUGE_BYTES)
    if step == "not_picture":
        png = b"GIF89a, or so they say" * 3
    text = pybase64.b64encode(png).decode()
    if step == "bad_base64":
        return text[:20] + "!?" + text[22:]
    if step == "truncated_base64":
        return text[: len(text) // 2 // 4 * 4]
    if step == "wrapped":
        return "\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    return text
