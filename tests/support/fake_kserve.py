"""Servers of the Open Inference Protocol as they were seen to behave (Triton 2.51, kserve 0.21), not as documented."""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import grpc
import grpc.aio

from img_serving.backends.rpc import MAX_MESSAGE_BYTES
from img_serving.backends.scripted import picture
from img_serving.wire.inference import open_inference_pb2 as wire
from img_serving.wire.inference.open_inference_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

Flavour = Literal["triton", "kserve"]
Draw = Callable[[dict[str, list[Any]], int], bytes]

HUGE_BYTES = 6 * 1024 * 1024
LETTERS = {
    "BOOL": "?", "UINT8": "B", "UINT32": "I", "UINT64": "Q", "INT32": "i", "INT64": "q", "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip


@dataclass(frozen=True)
class In:
    """An input of a model's configuration; `dims` without the batch dimension."""

    name: str
    datatype: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True


@dataclass(frozen=True)
class Out:
    name: str
    datatype: str
    dims: tuple[int, ...] = (1,)


TXT2IMG_INPUTS = (
    In("PROMPT", "BYTES", optional=False),
    In("NEGATIVE_PROMPT", "BYTES"),
    In("SEED", "INT64"),
    In("STEPS", "INT32"),
    In("GUIDANCE", "FP32"),
    In("WIDTH", "INT32"),
    In("HEIGHT", "INT32"),
)


@dataclass(frozen=True)
class FakeModel:
    """A model's configuration. `answers` is how many responses a decoupled one gives; `state` as the index has it."""

    inputs: tuple[In, ...] = TXT2IMG_INPUTS
    outputs: tuple[Out, ...] = (Out("IMAGE", "BYTES"), Out("SEED_USED", "INT64"))
    max_batch_size: int = 4
    decoupled: bool = False
    answers: int = 3
    state: str = "READY"
    reason: str = ""

    def shape(self, dims: Sequence[int]) -> list[int]:
        return [-1, *dims] if self.max_batch_size else list(dims)


@dataclass
class Seen:
    """A request as the server got it, its values by the tensor's name, and the metadata that came with it."""

    message: wire.ModelInferRequest
    metadata: dict[str, str]
    values: dict[str, list[Any]]


@dataclass
class FakeKServe(GRPCInferenceServiceServicer):
    """A server of models.

    `step` spoils what a call answers; `echo` is quoted in errors; `step_seconds` is what a step of a stream takes. `restricted`
    is the header without which only pictures and readiness are answered, as Triton's `--grpc-restricted-protocol` has it.
    `asked` are the names of questions, in order.
    """

    flavour: Flavour = "triton"
    models: dict[str, FakeModel] = field(default_factory=lambda: {"txt2img": FakeModel()})
    step: str = "ok"
    echo: str = ""
    is_ready: bool = True
    draw: Draw | None = None
    typed: bool = False
    lists_models: bool = True
    tells_config: bool = True
    step_seconds: float = 0.0
    restricted: str = ""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    seen: list[Seen] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    in_flight: int = 0
    cancelled: int = 0
    port: int = 0

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self.max_message_bytes),
                ("grpc.max_send_message_length", self.max_message_bytes),
                ("grpc.so_reuseport", 0),
            ]
        )
        add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        await self._server.stop(None)

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    @property
    def texts(self) -> str:
        """All words that came in."""
        return "\n".join(
            text.decode() for one in self.seen for row in one.values.values() for text in row if isinstance(text, bytes)
        )

    # questions

    async def ServerLive(self, request, context):
        return wire.ServerLiveResponse(live=True)

    async def ServerReady(self, request, context):
        self.asked.append("ServerReady")
        return wire.ServerReadyResponse(ready=self.is_ready)

    async def ServerMetadata(self, request, context):
        self.asked.append("ServerMetadata")
        await self._guard(context)
        if self.flavour == "triton":
            return wire.ServerMetadataResponse(name="triton", version="2.51.0", extensions=["model_configuration"])
        return wire.ServerMetadataResponse(name="kserve", version="0.21.0", extensions=["model_repository_extension"])

    async def ModelReady(self, request, context):
        self.asked.append("ModelReady")
        model = self.models.get(request.name)
        if model is None and self.flavour == "kserve":
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Model with name {request.name} does not exist.")
        return wire.ModelReadyResponse(ready=model is not None and model.state == "READY")

    async def ModelMetadata(self, request, context):
        self.asked.append("ModelMetadata")
        await self._guard(context)
        model = await self._model(request.name, context)
        if self.flavour == "kserve":
            return wire.ModelMetadataResponse(name=request.name)
        answer = wire.ModelMetadataResponse(name=request.name, versions=["1"], platform="python")
        for one in model.inputs:
            answer.inputs.add(name=one.name, datatype=one.datatype, shape=model.shape(one.dims))
        for out in model.outputs:
            answer.outputs.add(name=out.name, datatype=out.datatype, shape=model.shape(out.dims))
        return answer

    async def ModelConfig(self, request, context):
        self.asked.append("ModelConfig")
        await self._guard(context)
        if self.flavour == "kserve" or not self.tells_config:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        model = await self._model(request.name, context)
        answer = wire.ModelConfigResponse()
        answer.config.name = request.name
        answer.config.max_batch_size = model.max_batch_size
        answer.config.model_transaction_policy.decoupled = model.decoupled
        for one in model.inputs:
            answer.config.input.add(name=one.name, optional=one.optional)
        return answer

    async def RepositoryIndex(self, request, context):
        self.asked.append("RepositoryIndex")
        await self._guard(context)
        if self.flavour == "kserve" or not self.lists_models:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        answer = wire.RepositoryIndexResponse()
        for name, model in self.models.items():
            answer.models.add(name=name, version="1", state=model.state, reason=model.reason)
        return answer

    # pictures

    async def ModelInfer(self, request, context):
        model = await self._model(request.model_name, context)
        if model.decoupled and self.flavour == "triton":
            reason = "ModelInfer RPC doesn't support models with decoupled transaction policy"
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, reason)
        self.in_flight += 1
        try:
            values = self._read(request, context)
            refusal = self._refusal(request, model, values)
            if refusal:
                await context.abort(*refusal)
            await self._mishap(context)
            return self._answer(request, model, values)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1

    async def ModelStreamInfer(self, request_iterator, context) -> AsyncIterator[wire.ModelStreamInferResponse]:
        if self.flavour == "kserve":
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        self.in_flight += 1
        try:
            async for request in request_iterator:
                model = self.models.get(request.model_name)
                if model is None:
                    text = f"Request for unknown model: '{request.model_name}' is not found"
                    yield wire.ModelStreamInferResponse(error_message=text)
                    continue
                values = self._read(request, context)
                refusal = self._refusal(request, model, values)
                if refusal:
                    yield wire.ModelStreamInferResponse(error_message=refusal[1])
                    continue
                if self.step == "500":
                    yield wire.ModelStreamInferResponse(error_message=self._broken())
                    continue
                await self._mishap(context)
                steps = values.get("STEPS", [model.answers])[0]
                for step in range(1, steps + 1):
                    await asyncio.sleep(self.step_seconds)
                    answer = self._answer(request, model, {**values, "STEP": [step], "LAST": [step == steps]})
                    answer.parameters["triton_final_response"].bool_param = False
                    yield wire.ModelStreamInferResponse(infer_response=answer)
                if request.parameters["triton_enable_empty_final_response"].bool_param:
                    final = wire.ModelInferResponse(id=request.id)
                    final.parameters["triton_final_response"].bool_param = True
                    yield wire.ModelStreamInferResponse(infer_response=final)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1

    async def _guard(self, context: Any) -> None:
        name = f"triton-grpc-protocol-{self.restricted}"
        if self.restricted and name not in dict(context.invocation_metadata()):
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"This protocol is restricted, expecting header '{name}'")

    async def _model(self, name: str, context: Any) -> FakeModel:
        model = self.models.get(name)
        if model is None:
            triton, kserve = (
                f"Request for unknown model: '{name}' is not found",
                f"Model with name {name} does not exist.",
            )
            await context.abort(grpc.StatusCode.NOT_FOUND, triton if self.flavour == "triton" else kserve)
            raise AssertionError
        if model.state != "READY":
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, f"Request for unknown model: '{name}' has no available versions"
            )
        return model

    def _read(self, request: wire.ModelInferRequest, context: Any) -> dict[str, list[Any]]:
        values: dict[str, list[Any]] = {}
        for one, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            if one.datatype == "BYTES":
                values[one.name] = []
                at = 0
                while at < len(raw):
                    (length,) = struct.unpack_from("<I", raw, at)
                    values[one.name].append(raw[at + 4 : at + 4 + length])
                    at += 4 + length
            else:
                count = len(raw) // struct.calcsize(f"<{LETTERS[one.datatype]}")
                values[one.name] = list(struct.unpack(f"<{count}{LETTERS[one.datatype]}", raw))
            assert len(values[one.name]) == math.prod(one.shape), one.name
        metadata = {str(name): str(value) for name, value in context.invocation_metadata()}
        copy = wire.ModelInferRequest()
        copy.CopyFrom(request)
        self.seen.append(Seen(copy, metadata, values))
        return values

    def _refusal(
        self, request: wire.ModelInferRequest, model: FakeModel, values: dict[str, list[Any]]
    ) -> tuple[grpc.StatusCode, str] | None:
        """What Triton has against the tensors themselves; kserve leaves all that to the model."""
        if self.step == "refuse" or b"FAIL" in values.get("PROMPT", ()):
            return grpc.StatusCode.INVALID_ARGUMENT, "prompt refused"
        if self.flavour == "kserve":
            return None if "PROMPT" in values else (grpc.StatusCode.INTERNAL, "Internal server error")
        invalid, tag = grpc.StatusCode.INVALID_ARGUMENT, f"[request id: {request.id or '<id_unknown>'}] "
        known = {one.name: one for one in model.inputs}
        for one in request.inputs:
            if one.name not in known:
                return invalid, f"unexpected inference input '{one.name}' for model '{request.model_name}'"
            wanted = known[one.name].datatype
            if one.datatype != wanted:
                said = f"inference input '{one.name}' data-type is '{one.datatype}', but model"
                return invalid, f"{tag}{said} '{request.model_name}' expects '{wanted}'"
            dims = model.shape(known[one.name].dims)
            if len(dims) != len(one.shape) or any(
                want not in {-1, got} for want, got in zip(dims, one.shape, strict=True)
            ):
                return invalid, f"{tag}unexpected shape for input '{one.name}' for model '{request.model_name}'"
        if model.max_batch_size and request.inputs[0].shape[0] > model.max_batch_size:
            said = f"inference request batch-size must be <= {model.max_batch_size}"
            return invalid, f"{tag}{said} for '{request.model_name}'"
        needed = [one.name for one in model.inputs if not one.optional]
        if len(request.inputs) < len(needed):
            # it counts, and does not look which ones are missing: the model finds out
            said = (
                f"expected {len(needed)} inputs but got {len(request.inputs)} inputs for model '{request.model_name}'"
            )
            return invalid, f"{tag}{said}"
        if not set(needed) <= values.keys():
            return grpc.StatusCode.INTERNAL, self._broken()
        return None

    def _broken(self) -> str:
        if self.flavour == "kserve" and not self.echo:
            return "Internal server error"
        name = self.seen[-1].message.model_name
        where = "\n\nAt:\n  /models/secret-place/1/model.py(28): execute\n"
        return f"Failed to process the request(s) for model '{name}_0_0', message: ValueError: no {self.echo}{where}"

    async def _mishap(self, context: Any) -> None:
        codes = {
            "500": grpc.StatusCode.INTERNAL, "unknown": grpc.StatusCode.UNKNOWN, "401": grpc.StatusCode.UNAUTHENTICATED,
            "403": grpc.StatusCode.PERMISSION_DENIED, "busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
            "503": grpc.StatusCode.UNAVAILABLE, "not_ready": grpc.StatusCode.UNAVAILABLE,
            "late": grpc.StatusCode.DEADLINE_EXCEEDED,
            "unimplemented": grpc.StatusCode.UNIMPLEMENTED, "invalid": grpc.StatusCode.INVALID_ARGUMENT,
        }  # fmt: skip
        if self.step in codes:
            words = {"500": self._broken(), "not_ready": f"Model with name txt2img is not ready. {self.echo}"}
            await context.abort(codes[self.step], words.get(self.step, f"as told {self.echo}"))
        if self.step in {"hang", "cut"}:
            await asyncio.Event().wait()

    def _answer(
        self, request: wire.ModelInferRequest, model: FakeModel, values: dict[str, list[Any]]
    ) -> wire.ModelInferResponse:
        answer = wire.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        asked = {one.name for one in request.outputs}
        count = len(_prompts(values))
        for out in model.outputs:
            if asked and out.name not in asked and self.flavour == "triton":
                continue
            shape, data = self._output(out, model, values, count)
            if out.name == model.outputs[0].name:
                shape, data = self._spoiled(shape, data)
            tensor = answer.outputs.add(name=out.name, datatype=out.datatype, shape=shape)
            if self.flavour == "kserve":
                tensor.parameters["binary_data_size"].int64_param = len(data)
            if self.typed:
                _into_contents(tensor.contents, out.datatype, data)
            else:
                answer.raw_output_contents.append(data)
        if self.step == "no_outputs":
            answer.ClearField("outputs")
            answer.ClearField("raw_output_contents")
        if self.step == "few_contents":
            answer.raw_output_contents.append(b"")
        return answer

    def _output(self, out: Out, model: FakeModel, values: dict[str, list[Any]], count: int) -> tuple[list[int], bytes]:
        rows = [count] if model.max_batch_size or out.dims[0] < 0 else []
        if out.datatype in {"INT64", "INT32"}:
            told = values.get("STEP" if out.name == "STEP" else "SEED", [0] * count)
            return [*rows, 1], struct.pack(f"<{len(told)}{LETTERS[out.datatype]}", *told)
        parts = [self._draw_one(values, index) for index in range(count)]
        if out.datatype == "BYTES":
            return [*rows, 1] if len(out.dims) + bool(rows) > 1 or not rows else rows, b"".join(map(packed, parts))
        return self._pixels(out, rows, values, count)

    def _draw_one(self, values: dict[str, list[Any]], index: int) -> bytes:
        if self.draw is not None:
            return self.draw(values, index)

        def at(name: str, default: int) -> int:
            row = next((row for key, row in values.items() if key.casefold() == name), [default])
            return int(row[min(index, len(row) - 1)])

        prompt = _prompts(values)[index].decode()
        if not values.get("LAST", [True])[0]:
            prompt += f" unfinished {values['STEP'][0]}"
        width, height = (32, 32) if self.step == "wrong_size" else (at("width", 64), at("height", 64))
        return picture(prompt, at("seed", 0), width, height)

    def _pixels(self, out: Out, rows: list[int], values: dict[str, list[Any]], count: int) -> tuple[list[int], bytes]:
        """Each picture of one colour, its seed's: red the seed, green 128, blue 255 at both ends of any range."""
        width, height = (int(values.get(name, [8])[0]) for name in ("width", "height"))
        seeds = values.get("seed", [0] * count)
        colours = [(seed % 256, 128, 255) for seed in seeds[:count]]
        is_chw = out.dims[-1] != 3
        flat: list[int] = []
        for colour in colours:
            if is_chw:
                flat += [value for value in colour for _ in range(width * height)]
            else:
                flat += list(colour) * (width * height)
        shape = [*rows, *((3, height, width) if is_chw else (height, width, 3))]
        if out.datatype == "UINT8":
            return shape, bytes(flat)
        return shape, struct.pack(f"<{len(flat)}{LETTERS[out.datatype]}", *(value / 255 for value in flat))

    def _spoiled(self, shape: list[int], data: bytes) -> tuple[list[int], bytes]:
        if self.step == "not_picture":
            return shape, packed(b"GIF89a, or so they say") * math.prod(shape)
        if self.step == "truncated_picture":
            return shape, packed(data[4 : len(data) // 2])
        if self.step == "truncated":
            return shape, data[:-5]
        if self.step == "wrong_shape":
            return [*shape, 7], data
        if self.step == "negative_shape":
            return [-1, *shape[1:]], data
        if self.step == "huge":
            return shape, packed(data[4:] + bytes(HUGE_BYTES))
        return shape, data


def _prompts(values: dict[str, list[Any]]) -> list[bytes]:
    """The tensor that is called so, else the first with words."""
    named = [row for key, row in values.items() if key.casefold() == "prompt"]
    return next(iter(named or [row for row in values.values() if isinstance(row[0], bytes)]))


def packed(part: bytes) -> bytes:
    """One element of a BYTES tensor."""
    return struct.pack("<I", len(part)) + part


def _into_contents(contents: wire.InferTensorContents, datatype: str, data: bytes) -> None:
    if datatype == "BYTES":
        while data:
            (length,) = struct.unpack_from("<I", data)
            contents.bytes_contents.append(data[4 : 4 + length])
            data = data[4 + length :]
        return
    letter = LETTERS[datatype]
    numbers = struct.unpack(f"<{len(data) // struct.calcsize(letter)}{letter}", data)
    fields = {"UINT8": "uint_contents", "INT32": "int_contents", "INT64": "int64_contents", "FP32": "fp32_contents"}
    getattr(contents, fields[datatype]).extend(numbers)
