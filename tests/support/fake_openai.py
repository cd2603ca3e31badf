"""Servers that speak dialects of OpenAI's Images API, on real sockets: each refuses what the real one refuses.

What a server takes in silence and drops is dropped here too, so a wrong name shows: the picture is another one.
"""

from __future__ import annotations

import asyncio
import email.parser
import email.policy
import io
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import msgspec
import pybase64
from PIL import Image

from img_serving.backends.stub_server import Answer, Exchange, StubServer

Flavour = Literal["openai", "vllm-omni", "sglang", "localai", "sdcpp", "litellm", "together", "xinference"]

SDCPP_SAMPLERS = ("euler", "euler_a", "dpm++2m", "lcm")
SDCPP_SCHEDULERS = ("discrete", "karras", "exponential")
PREVIEWS = 3
"""Partial pictures that the hosted API could give at most."""


def drawn(
    prompt: str,
    seed: int,
    size: tuple[int, int],
    *,
    steps: int | None = None,
    negative: str | None = None,
    notes: str = "",
    kind: str = "PNG",
) -> bytes:
    """A picture of one colour that depends on everything that an engine would look at."""
    key = hash_of(prompt, seed, steps, negative, notes)
    out = io.BytesIO()
    Image.new("RGB", size, (key & 255, key >> 8 & 255, key >> 16 & 255)).save(out, kind)
    return out.getvalue()


def hash_of(*facts: object) -> int:
    """The same in every process."""
    import zlib

    return zlib.crc32(repr(facts).encode())


class Refused(Exception):
    """The answer to a request that this server does not take."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(str(body))
        self.answer = Answer(status, msgspec.json.encode(body))


def unknown_parameter(name: str) -> Refused:
    """The hosted API's words."""
    message = f"Unknown parameter: '{name}'."
    error = {"message": message, "type": "invalid_request_error", "param": name, "code": "unknown_parameter"}
    return Refused(400, {"error": error})


def invalid(param: str, message: str = "Invalid value") -> Refused:
    """The hosted API's words."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": "invalid_value"}
    return Refused(400, {"error": error})


class FakeOpenAI(StubServer):
    """`async with FakeOpenAI("sdcpp") as server:` plays that server; see `server.last` for what it understood."""

    def __init__(
        self,
        flavour: Flavour,
        *,
        models: tuple[str, ...] = (),
        events: Callable[[list[bytes]], AsyncIterator[bytes]] | None = None,
    ) -> None:
        """`models` are those it has. `events` writes the stream out of its ordinary events, to spoil it."""
        super().__init__()
        self.flavour = flavour
        self.models = models or DEFAULT_MODELS[flavour]
        self.events = events
        self.last: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}

    @property
    def posts(self) -> list[Exchange]:
        """The requests that asked for pictures."""
        return [exchange for exchange in self.exchanges if exchange.method == "POST"]

    async def answer(self, exchange: Exchange) -> Answer:
        """Models and marks to a GET, pictures to a POST."""
        try:
            if exchange.method == "GET":
                return self._tell(exchange.path)
            fields, files = _form(exchange) if "multipart" in exchange.headers.get("content-type", "") else ({}, {})
            is_edit = exchange.path != "/v1/images/generations"
            if exchange.path == "/v1/images/variations" and self.flavour in {"openai", "xinference"}:
                self._check_variation(fields, files)
                fields = {"prompt": "", **fields}
            elif exchange.path not in {"/v1/images/generations", "/v1/images/edits"}:
                return Answer(404, b'{"detail":"Not Found"}')
            if is_edit and not files:
                raise Refused(422, {"detail": [{"loc": ["body", "image"], "msg": "Field required"}]})
            asked = fields if is_edit else _decoded(exchange, self.flavour)
            return self._draw(asked, files)
        except Refused as refused:
            return refused.answer

    # GETs

    def _tell(self, path: str) -> Answer:
        if path in self.files:
            return Answer(200, self.files[path], {"content-type": "image/png"})
        headers = {"x-litellm-version": "1.109.1"} if self.flavour == "litellm" else {}
        if path == "/v1/models":
            return Answer(200, msgspec.json.encode(self._listed()), headers)
        if path == "/sdcpp/v1/capabilities" and self.flavour == "sdcpp":
            told = {"samplers": SDCPP_SAMPLERS, "schedulers": SDCPP_SCHEDULERS, "limits": {"max_batch_count": 8}}
            return Answer(200, msgspec.json.encode(told))
        if path == "/system" and self.flavour == "localai":
            return Answer(200, b'{"backends": ["diffusers"], "loaded_models": []}')
        return Answer(404, b"" if self.flavour == "sdcpp" else b'{"detail":"Not Found"}')

    def _listed(self) -> Any:
        entries: dict[str, dict[str, Any]] = {
            "openai": {"object": "model", "created": 1_700_000_000, "owned_by": "system"},
            "vllm-omni": {
                "object": "model",
                "created": 1_790_000_000,
                "owned_by": "vllm",
                "root": "m",
                "permission": [],
            },
            "sglang": {"object": "model", "created": 1_790_000_000, "owned_by": "sglang"},
            "localai": {"object": "model"},
            "sdcpp": {"object": "model", "owned_by": "local"},
            "litellm": {"object": "model", "created": 1_677_610_602, "owned_by": "openai"},
            "together": {"object": "model", "created": 0, "type": "image", "display_name": "FLUX"},
            "xinference": {"object": "model", "created": 0, "owned_by": "xinference", "model_type": "image"},
        }
        data = [{"id": name, **entries[self.flavour]} for name in self.models]
        if self.flavour == "together":
            return [*data, {"id": "some/chat", "object": "model", "created": 0, "type": "chat"}]
        if self.flavour == "xinference":
            data.append({**data[0], "id": "a-chat-model", "model_type": "LLM"})
        return {"data": data} if self.flavour == "sdcpp" else {"object": "list", "data": data}

    # POSTs

    def _draw(self, asked: dict[str, Any], files: dict[str, list[bytes]]) -> Answer:
        if self.flavour in {"openai", "vllm-omni", "sglang", "together", "xinference", "litellm"} and not files:
            _check_json_types(asked)
        understood = getattr(self, "_read_" + self.flavour.replace("-", "_"))(asked, files)
        self.last = understood
        self.last["files"] = files
        size, kind = understood["size"], understood.get("kind", "PNG")
        notes = repr(sorted((name, value) for name, value in understood.get("notes", {}).items()))
        pictures = [
            drawn(understood["prompt"], seed, size, steps=understood.get("steps"), negative=understood.get("negative"),
                  notes=notes, kind=kind)
            for seed in understood["seeds"]
        ]  # fmt: skip
        if understood.get("stream"):
            return self._stream(pictures[0], understood, is_edit=bool(files))
        data = [self._item(one, understood) for one in pictures]
        return Answer(200, msgspec.json.encode({"created": 1, "data": data, **understood.get("reply", {})}))

    def _check_variation(self, fields: dict[str, Any], files: dict[str, list[bytes]]) -> None:
        """OpenAI's document 2.3.0, and Xinference 4.1.0, whose form may have words but need not."""
        if self.flavour == "openai":
            if fields.get("model", "dall-e-2") != "dall-e-2":
                raise invalid("model")
            if "prompt" in fields:
                raise unknown_parameter("prompt")
        if list(files) != ["image"] or len(files["image"]) != 1:
            raise invalid("image")

    def _item(self, data: bytes, understood: dict[str, Any]) -> dict[str, Any]:
        if understood.get("as_url"):
            name = f"/generated-images/{len(self.files)}.png"
            self.files[name] = data
            return {"url": self.url + name}
        return {"b64_json": pybase64.b64encode(data).decode()}

    def _read_openai(self, asked: dict[str, Any], files: dict[str, list[bytes]]) -> dict[str, Any]:
        """OpenAI's document 2.3.0: closed, with rules of each generation of models."""
        model = asked.get("model", "dall-e-2")
        gpt = model.startswith(("gpt-image", "chatgpt-image"))
        known = {"model", "prompt", "n", "size", "user"}
        if gpt:
            known |= {"quality", "background", "output_format", "output_compression", "stream", "partial_images"}
            known |= {"input_fidelity"} if files else {"moderation"}
        else:
            known |= {"response_format"} | ({"quality", "style"} if model == "dall-e-3" else set())
        for name in asked:
            if name not in known:
                raise unknown_parameter(name)
        if model not in self.models:
            error = {"message": "The model does not exist.", "type": "invalid_request_error", "param": "model"}
            raise Refused(404, {"error": {**error, "code": "model_not_found"}})
        n = int(asked.get("n", 1))
        if not 1 <= n <= (1 if model == "dall-e-3" else 10):
            raise invalid("n")
        if files and model == "dall-e-3":
            raise invalid("model")
        if files and not (files.get("image") or files.get("image[]")):
            raise invalid("image")
        if files and "mask" in files and Image.open(io.BytesIO(files["mask"][0])).mode not in {"RGBA", "LA"}:
            raise invalid("mask", "Invalid mask image format - mask must have an alpha channel")
        size = _hosted_size(model, asked.get("size", "auto" if gpt else "1024x1024"))
        kind = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}[asked.get("output_format", "png")]
        if asked.get("output_compression") not in {None, "100", 100} and kind == "PNG":
            raise invalid("output_compression", "Compression less than 100 is not supported for PNG output format")
        effective = {"size": f"{size[0]}x{size[1]}", "quality": "low", "background": "opaque"}
        return {
            "prompt": asked["prompt"], "seeds": range(100, 100 + n), "size": size, "kind": kind,
            "stream": _truth(asked.get("stream", False)), "partial_images": int(asked.get("partial_images", 0)),
            "as_url": not gpt and asked.get("response_format", "url") == "url",
            "reply": effective if gpt else {},
        }  # fmt: skip

    def _read_vllm_omni(self, asked: dict[str, Any], files: dict[str, list[bytes]]) -> dict[str, Any]:
        """vLLM-Omni 0.30.0: a pydantic model that ignores what it does not know, and checks the rest."""
        if asked.get("response_format", "b64_json") not in {"b64_json", "file"}:
            raise _pydantic("response_format", "Only 'b64_json' or 'file' response format is supported")
        if asked.get("model") not in {None, *self.models}:
            detail = f"Model mismatch: request specifies '{asked['model']}' but server is running '{self.models[0]}'."
            raise Refused(400, {"detail": detail})
        n, steps = int(asked.get("n", 1)), _int(asked.get("num_inference_steps"))
        if not 1 <= n <= 10:
            raise _pydantic("n", "Input should be less than or equal to 10")
        if steps is not None and not 1 <= steps <= 200:
            raise _pydantic("num_inference_steps", "Input should be less than or equal to 200")
        seed = _int(asked.get("seed"))
        notes = {name: float(asked[name]) for name in ("guidance_scale", "strength") if name in asked}
        return {
            "prompt": asked["prompt"], "negative": asked.get("negative_prompt"), "steps": steps, "notes": notes,
            "seeds": [5 if seed is None else seed] * n, "size": _sides(asked.get("size", "1024x1024"), "x"),
            "kind": {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}[asked.get("output_format", "png")],
            "mask": files.get("mask_image"),
        }  # fmt: skip

    def _read_sglang(self, asked: dict[str, Any], files: dict[str, list[bytes]]) -> dict[str, Any]:
        """SGLang 0.5.23: `detail` errors, a constant seed, `n` cut to ten, and a URL that needs a store."""
        if asked.get("response_format", "b64_json" if files else "url") != "b64_json":
            raise Refused(400, {"detail": "response_format='url' requires cloud storage to be configured."})
        n = max(1, min(int(asked.get("n", 1)), 10))
        seed = int(asked.get("seed", 1024))
        notes = {"guidance": float(asked["guidance_scale"])} if "guidance_scale" in asked else {}
        return {
            "prompt": asked["prompt"], "negative": asked.get("negative_prompt"), "notes": notes,
            "steps": _int(asked.get("num_inference_steps")), "seeds": range(seed, seed + n),
            "size": _sides(asked.get("size", "1024x1024"), "x"),
        }  # fmt: skip

    def _read_localai(self, asked: dict[str, Any], _: dict[str, list[bytes]]) -> dict[str, Any]:
        """LocalAI 82c191a: what stands behind the first `|` is the negative prompt, one seed serves all pictures."""
        if not asked.get("model"):
            raise Refused(400, {"error": {"code": 400, "message": "Bad Request", "type": ""}})
        prompt, *rest = asked["prompt"].split("|")
        if asked.get("file"):
            pybase64.b64decode(asked["file"], validate=True)
        return {
            "prompt": prompt, "negative": rest[0] if rest else None, "steps": asked.get("step", 15),
            "seeds": [asked.get("seed", -1)] * (asked.get("n") or 1), "file": asked.get("file"),
            "size": _sides(asked.get("size", "512x512"), "x"), "as_url": asked.get("response_format") != "b64_json",
        }  # fmt: skip

    def _read_sdcpp(self, asked: dict[str, Any], files: dict[str, list[bytes]]) -> dict[str, Any]:
        """stable-diffusion.cpp 97d2990: the first tag counts, seed 42, sizes rounded up, nonsense becomes the default."""
        prompt = asked.get("prompt", "")
        if not prompt:
            raise Refused(400, {"error": "prompt required"})
        if asked.get("output_format", "png") not in {"png", "jpeg"}:
            raise Refused(400, {"error": "invalid output_format, must be one of [png, jpeg]"})
        found = re.search("<sd_cpp_extra_args>([^\r\n]*?)</sd_cpp_extra_args>", prompt)
        extra: dict[str, Any] = {}
        if found:
            prompt = re.sub("<sd_cpp_extra_args>([^\r\n]*?)</sd_cpp_extra_args>", "", prompt)
            try:
                extra = json.loads(found[1])
            except ValueError:
                raise Refused(400, {"error": "invalid sd_cpp_extra_args"}) from None
        width, height = _loose_sides(asked.get("size", ""), (512, 512))
        n, seed = min(8, max(1, int(asked.get("n", 1)))), extra.get("seed", 42)
        sampling = extra.get("sample_params", {})
        method, schedule = sampling.get("sample_method"), sampling.get("scheduler")
        notes = {
            "sampler": method if method in SDCPP_SAMPLERS else None,
            "scheduler": schedule if schedule in SDCPP_SCHEDULERS else None,
            "guidance": sampling.get("guidance", {}).get("txt_cfg"),
            **{name: extra.get(name) for name in ("clip_skip", "strength", "vae_tiling_params")},
        }
        return {
            "prompt": prompt, "negative": extra.get("negative_prompt", ""), "notes": notes,
            "steps": min(100, max(1, sampling.get("sample_steps", 20))), "seeds": range(seed, seed + n),
            "size": tuple(-(-side // 64) * 64 for side in (width, height)), "mask": files.get("mask"),
            "kind": {"png": "PNG", "jpeg": "JPEG"}[asked.get("output_format", "png")],
            "reply": {"output_format": asked.get("output_format", "png")},
        }  # fmt: skip

    def _read_litellm(self, asked: dict[str, Any], files: dict[str, list[bytes]]) -> dict[str, Any]:
        """LiteLLM 1.109.1 before an OpenAI account: its own wrapping of errors."""
        if asked.get("model") not in self.models:
            message = "{'error': '/images/generations: Invalid model name passed in model=" + f"{asked.get('model')}'}}"
            raise Refused(400, {"error": {"message": message, "type": "None", "param": "None", "code": "400"}})
        if "response_format" in asked:
            message = "litellm.UnsupportedParamsError: Setting `response_format` is not supported by openai"
            raise Refused(400, {"error": {"message": message, "type": "None", "param": "None", "code": "400"}})
        if "image" in files and "image[]" in files:
            raise Refused(422, {"detail": "Cannot specify both 'image' and 'image[]'"})
        if "forbidden" in asked["prompt"]:
            message = "litellm.ContentPolicyViolationError: OpenAIException - Your request was rejected."
            raise Refused(400, {"error": {"message": message, "type": "None", "param": "None", "code": "400"}})
        seed = int(asked.get("seed", 3))
        return {
            "prompt": asked["prompt"], "negative": asked.get("negative_prompt"),
            "steps": _int(asked.get("num_inference_steps")), "seeds": [seed] * int(asked.get("n", 1)),
            "size": _sides(asked.get("size", "64x64"), "x"), "as_url": True,
        }  # fmt: skip

    def _read_together(self, asked: dict[str, Any], _: dict[str, list[bytes]]) -> dict[str, Any]:
        """Together's API as its client 3.1.1 describes it: closed values, JPEG unless told otherwise."""
        known = {"model", "prompt", "n", "width", "height", "steps", "seed", "negative_prompt", "guidance_scale"}
        known |= {"output_format", "response_format", "image_url", "image_loras", "disable_safety_checker"}
        for name in asked:
            if name not in known:
                raise unknown_parameter(name)
        if asked.get("response_format", "url") not in {"base64", "url"}:
            raise invalid("response_format")
        if asked.get("output_format", "jpeg") not in {"jpeg", "png"}:
            raise invalid("output_format")
        if not 1 <= asked.get("n", 1) <= 4:
            raise invalid("n")
        if not asked.get("image_url", "data:,").startswith("data:"):
            raise invalid("image_url")
        seed = asked.get("seed", 11)
        return {
            "prompt": asked["prompt"], "negative": asked.get("negative_prompt"), "steps": asked.get("steps"),
            "seeds": range(seed, seed + asked.get("n", 1)), "image_url": asked.get("image_url"),
            "notes": {"guidance": asked.get("guidance_scale")},
            "size": (asked.get("width", 1024), asked.get("height", 1024)),
            "kind": asked.get("output_format", "jpeg").upper(), "as_url": asked.get("response_format") != "base64",
        }  # fmt: skip

    def _read_xinference(self, asked: dict[str, Any], files: dict[str, list[bytes]]) -> dict[str, Any]:
        """Xinference 4.1.0: a JSON string in `kwargs`, sizes with a star, and nothing of that in its form of edits."""
        if asked.get("model") not in self.models:
            raise Refused(400, {"detail": f"Model not found in the model list, uid: {asked.get('model')}"})
        takes_kwargs = not files or not asked["prompt"]  # the form of variations has them, that of edits drops them
        extra = json.loads(asked["kwargs"]) if asked.get("kwargs") and takes_kwargs else {}
        known = {"negative_prompt", "seed", "num_inference_steps", "guidance_scale", "padding_image_to_multiple"}
        if unknown := set(extra) - known:
            raise Refused(500, {"detail": f"__call__() got an unexpected keyword argument '{min(unknown)}'"})
        seed = extra.get("seed", 9)
        return {
            "prompt": asked["prompt"], "negative": extra.get("negative_prompt"), "steps": extra.get("num_inference_steps"),
            "notes": {"guidance": extra.get("guidance_scale")}, "seeds": [seed] * int(asked.get("n", 1)),
            "size": _sides(asked.get("size", "1024*1024").replace("x", "*") if files else asked["size"], "*"),
            "mask": files.get("mask"), "as_url": asked.get("response_format", "url") == "url",
        }  # fmt: skip

    # streams

    def _stream(self, picture: bytes, understood: dict[str, Any], *, is_edit: bool) -> Answer:
        kind = "image_edit" if is_edit else "image_generation"
        text = pybase64.b64encode(picture).decode()
        about = {"created_at": 1, "size": "auto", "quality": "low", "background": "opaque", "output_format": "png"}
        events = []
        for index in range(min(understood["partial_images"], PREVIEWS)):
            body = {"type": f"{kind}.partial_image", "b64_json": text, "partial_image_index": index, **about}
            events.append(_event(f"{kind}.partial_image", body))
        usage = {"total_tokens": 1, "input_tokens": 1, "output_tokens": 0, "input_tokens_details": {}}
        events.append(
            _event(f"{kind}.completed", {"type": f"{kind}.completed", "b64_json": text, **about, "usage": usage})
        )
        pieces = self.events(events) if self.events is not None else _one_by_one(events)
        return Answer(200, b"", {"content-type": "text/event-stream; charset=utf-8"}, pieces=pieces)


DEFAULT_MODELS: dict[Flavour, tuple[str, ...]] = {
    "openai": ("dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-2", "gpt-4o"),
    "vllm-omni": ("Qwen/Qwen-Image",),
    "sglang": ("black-forest-labs/FLUX.1-dev",),
    "localai": ("stablediffusion",),
    "sdcpp": ("sd-cpp-local",),
    "litellm": ("gpt-image-1", "flux"),
    "together": ("black-forest-labs/FLUX.1-schnell",),
    "xinference": ("sd3-medium",),
}


def sse(name: str, body: Any) -> bytes:
    """One event as the hosted API writes it."""
    return _event(name, body)


def _event(name: str, body: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(body) + b"\n\n"


async def _one_by_one(events: list[bytes]) -> AsyncIterator[bytes]:
    for event in events:
        yield event
        await asyncio.sleep(0)


def _decoded(exchange: Exchange, flavour: Flavour) -> dict[str, Any]:
    try:
        asked = exchange.json
    except ValueError:
        if flavour == "sdcpp":
            message = "[json.exception.parse_error.101] parse error at line 1, column 2"
            raise Refused(500, {"error": "server_error", "message": message}) from None
        raise Refused(422, {"detail": [{"loc": ["body", 1], "msg": "JSON decode error"}]}) from None
    assert isinstance(asked, dict)
    return asked


def _check_json_types(asked: dict[str, Any]) -> None:
    for name in ("n", "seed", "num_inference_steps", "steps", "width", "height", "partial_images"):
        if name in asked and type(asked[name]) is not int:
            raise _pydantic(name, "Input should be a valid integer")


def _pydantic(name: str, message: str) -> Refused:
    return Refused(422, {"detail": [{"type": "value_error", "loc": ["body", name], "msg": message, "input": "…"}]})


def _hosted_size(model: str, size: str) -> tuple[int, int]:
    fixed = {
        "dall-e-2": ("256x256", "512x512", "1024x1024"),
        "dall-e-3": ("1024x1024", "1792x1024", "1024x1792"),
        "gpt-image-1": ("auto", "1024x1024", "1536x1024", "1024x1536"),
    }.get(model)
    if fixed is not None and size not in fixed:
        raise invalid("size", f"Invalid value: '{size}'")
    if size == "auto":
        return 1024, 1024
    width, height = _sides(size, "x")
    if fixed is None and (width % 16 or height % 16 or max(width, height) > 3 * min(width, height)):
        raise invalid("size", f"Invalid value: '{size}'")
    return width, height


def _sides(size: str, between: str) -> tuple[int, int]:
    try:
        width, height = size.split(between)
        return int(width), int(height)
    except ValueError:
        raise Refused(400, {"detail": "Invalid size"}) from None


def _loose_sides(size: str, default: tuple[int, int]) -> tuple[int, int]:
    found = re.match(r"(\d+)x(\d+)", size)
    return (int(found[1]), int(found[2])) if found else default


def _int(value: Any) -> int | None:
    return None if value is None else int(value)


def _truth(value: Any) -> bool:
    return value in {True, "true", "True", "1"}


def _form(exchange: Exchange) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """A form as Python's own mail parser reads it, which is nobody's that we wrote."""
    head = f"Content-Type: {exchange.headers['content-type']}\r\nMIME-Version: 1.0\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + exchange.body)
    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        data = part.get_payload(decode=True)
        assert isinstance(name, str)
        assert isinstance(data, bytes)
        if part.get_filename() is None:
            assert name not in fields, f"{name} came twice"
            fields[name] = data.decode()
        else:
            files.setdefault(name, []).append(data)
    return fields, files
