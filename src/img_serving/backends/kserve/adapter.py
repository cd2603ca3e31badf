"""The adapter to servers of the Open Inference Protocol v2 over gRPC: one call is one ModelInfer, or one stream a picture."""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import grpc
import grpc.aio

from img_serving.backends.http import PROBE_TIMEOUT_SECONDS, patience, prompts_of
from img_serving.backends.kserve.calls import Request, groups_of, request_of
from img_serving.backends.kserve.options import read_kserve_options
from img_serving.backends.kserve.pictures import pictures_in
from img_serving.backends.kserve.server import KServeServer
from img_serving.backends.kserve.signature import Signature, TensorInfo, Unfit, choose_output
from img_serving.backends.kserve.tensors import Tensor, numbers, tensors_of
from img_serving.backends.rpc import Line, error_of
from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import AttemptError, BackendRefusal, InvalidRequest, NotFound, Outcome
from img_serving.domain.images import Artifact, Call, Item, ItemFailure, Preview, Progress
from img_serving.domain.vocabulary import shown
from img_serving.media.payload import raw_bytes
from img_serving.ports import HealthReport, OnProgress
from img_serving.wire.inference.open_inference_pb2 import ModelInferResponse

QUICK_BYTES: Final = 1024 * 1024
"""Files of this size are looked at in place; more, and all pixels, in a thread."""

_TOO_MANY = re.compile(r"batch[- ]size must be <= (\d+)")
_ASIDE = re.compile(r"^\[request id: [^\]]*\] |\s*\n\s*(?:At:|Traceback).*", re.DOTALL)
"""What Triton puts round its messages: our own request id, and where in the server's files an exception was raised."""

_NOT_READY = re.compile(r"not ready|no available versions|is unavailable|unloading", re.IGNORECASE)
"""A server's own words; UNAVAILABLE alone may also come of a connection that broke under way."""

_UNKNOWN_MODEL = re.compile(r"request for unknown model", re.IGNORECASE)
_WRONG_TENSOR = re.compile(r"unexpected inference input|data-type is|unexpected shape for input|batch-size must be")


class _TooMany(Exception):
    """The server takes fewer pictures in one call than it got."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit


class _OnlyStreams(Exception):
    """The model answers a stream only."""


class KServeBackend:
    """Speaks to one endpoint: Triton, KServe's ModelServer, and whoever else serves the protocol."""

    def __init__(
        self,
        line: Line,
        *,
        options: Mapping[str, Any] | None = None,
        models: Sequence[str] = (),
        max_batch_size: int | None = None,
    ) -> None:
        """Describe the endpoint.

        Args:
            line: the connection; closed by `close`.
            options: the table `[backends.kserve]`.
            models: what the operator configured.
            max_batch_size: pictures in one call of models that do not say how many they take.

        Raises:
            ValueError: an option is wrong; the message names it, and what would be right.
        """
        self._line = line
        read = read_kserve_options(options or {})
        for name in read.models:
            if models and name not in models:
                near = difflib.get_close_matches(name, models, n=1)
                hint = f"; did you mean {near[0]}?" if near else f" (they are: {', '.join(models)})"
                raise ValueError(f"models.{name}: is none of the backend's `models`{hint}")
        self._server = KServeServer(line, read, models, max_batch_size)
        self._was_down = True
        try:
            self._capabilities = self._server.capabilities
        except Unfit as unfit:
            raise ValueError(f"tensors: the model {unfit}") from None

    def __repr__(self) -> str:
        return f"<KServeBackend {self._line.target}: {self._server!r}>"

    @property
    def protocol(self) -> str:
        """Always `kserve`."""
        return "kserve"

    @property
    def capabilities(self) -> Capabilities:
        """By convention until the server was asked, then by each model's tensors."""
        return self._capabilities

    async def generate(self, call: Call, on_progress: OnProgress) -> Sequence[Artifact | ItemFailure]:
        """One request for as many pictures as the model takes; of a model that streams, one stream a picture.

        Cancelling cancels the call at once.

        Raises:
            AttemptError: `NOT_STARTED` where the server was not reached, is busy, or lacks a configured model; `FAILED` where
                the model failed or gave no picture; `UNKNOWN` where the call was cut or too slow.
            BackendRefusal: the request is at fault.
        """
        model = call.model or self._server.default_model or ""
        async with (
            self._line.held(min(PROBE_TIMEOUT_SECONDS, call.timeout_seconds)),
            patience(call.timeout_seconds) as heard,
        ):
            try:
                model = model or await self._first_model(call.timeout_seconds)
                return await self._draw(call, model, on_progress, heard)
            except grpc.aio.AioRpcError as error:
                raise self._mapped(error, call, model) from None
            except Unfit as unfit:
                # another endpoint's may do
                raise AttemptError(Outcome.NOT_STARTED, f"the model {model} {unfit}", is_blameless=True) from None
            finally:
                self._capabilities = self._server.capabilities

    async def check(self, timeout_seconds: float) -> HealthReport:
        """Ask whether the server and its models are ready; at the start, and when it was away, what the models' tensors are."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        try:
            async with self._line.held(timeout_seconds):
                left = deadline - asyncio.get_running_loop().time()
                found = await self._server.look(left, afresh=self._was_down)
        except AttemptError as error:
            return self._down(error.message)
        except TimeoutError:
            return self._down(f"no answer within {timeout_seconds:g} s")
        except grpc.aio.AioRpcError as error:
            mapped = error_of(error, self._line.redactor)
            return self._down(str(mapped))
        if found.is_ready is None and found.ready is None:
            return self._down(
                "it answers, but not as the Open Inference Protocol has it (ServerReady is not implemented)"
            )
        able, misfits = self._server.fit(found.ready or ())
        self._capabilities = self._server.capabilities
        faults = tuple(self._line.redactor.clean(one) for one in (*found.faults, *misfits))
        healthy = bool(found.ready) or (found.is_ready is not False and not self._server.configured)
        self._was_down = not healthy
        said = "it is ready" if found.is_ready else "it is not ready"
        return HealthReport(
            healthy=healthy,
            detail="; ".join((said, *faults)),
            models=None if found.ready is None else tuple(able),
            found=f"{self._server.program} (ServerMetadata says so)" if self._server.program else "",
            faults=faults,
        )

    async def close(self) -> None:
        """Close the connection."""
        await self._line.close()

    def _down(self, detail: str) -> HealthReport:
        self._was_down = True
        return HealthReport(healthy=False, detail=detail)

    # drawing

    async def _first_model(self, timeout_seconds: float) -> str:
        """The model of a call that names none, before anybody has asked what there is."""
        await self._server.look(timeout_seconds, afresh=False)
        model = self._server.default_model
        if model is None:
            raise BackendRefusal(InvalidRequest("the backend does not tell its models: name one", param="model"))
        return model

    async def _draw(
        self, call: Call, model: str, on_progress: OnProgress, heard: Callable[[], None]
    ) -> list[Artifact | ItemFailure]:
        signature = await self._server.signature(model)
        _check(call, signature)
        drawn: dict[int, Artifact | ItemFailure] = {}
        while len(drawn) < len(call.items):
            left = [index for index in range(len(call.items)) if index not in drawn]
            group = [left[one] for one in groups_of([call.items[index] for index in left], signature)[0]]
            items = [call.items[index] for index in group]
            try:
                if signature.is_stream:
                    results = await self._stream(
                        call, items[0], model, signature, index=group[0], on_progress=on_progress, heard=heard
                    )
                else:
                    results = await self._infer(call, items, model, signature)
            except _TooMany as news:
                self._server.learn_batch(model, news.limit)
                signature = await self._server.signature(model)
                continue
            except _OnlyStreams:
                self._server.learn_stream(model)
                signature = await self._server.signature(model)
                continue
            heard()
            drawn.update(zip(group, results, strict=True))
        results = [drawn[index] for index in range(len(call.items))]
        failures = [one for one in results if isinstance(one, ItemFailure)]
        if len(failures) == len(results):
            raise AttemptError(Outcome.FAILED, failures[0].message)
        return results

    async def _infer(
        self, call: Call, items: Sequence[Item], model: str, signature: Signature
    ) -> list[Artifact | ItemFailure]:
        request = await _request(signature, call, items, model)
        try:
            answer = await self._server.stub.ModelInfer(request.message, metadata=self._line.metadata_of(call))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED and not signature.is_stream:
                raise _OnlyStreams from None
            found = _TOO_MANY.search(error.details() or "")
            if found and error.code() is grpc.StatusCode.INVALID_ARGUMENT and 0 < int(found[1]) < len(items):
                raise _TooMany(int(found[1])) from None
            raise
        outputs = _outputs(answer)
        del answer  # else every picture would be held a third time
        return await self._pictures(outputs, items, signature)

    async def _stream(
        self,
        call: Call,
        item: Item,
        model: str,
        signature: Signature,
        *,
        index: int,
        on_progress: OnProgress,
        heard: Callable[[], None],
    ) -> list[Artifact | ItemFailure]:
        """One picture of a model that answers more than once: the last picture is it, those before show it unfinished."""
        request = await _request(signature, call, [item], model)
        stream = self._server.stub.ModelStreamInfer(iter([request.message]), metadata=self._line.metadata_of(call))
        last: dict[str, Tensor] | None = None
        answers, done = 0, 0
        try:
            async for answer in stream:
                if answer.error_message:
                    raise self._in_stream(answer.error_message, call, model)
                heard()
                outputs = _outputs(answer.infer_response)
                if outputs:
                    answers += 1
                    last = outputs if _picture(outputs, signature) is not None or last is None else last
                    done = max(done, _step(outputs, signature, answers))
                    total = max(request.steps or done + 1, done)
                    preview = None
                    if call.previews and done < total:
                        preview = await self._preview(outputs, signature, index, done / total)
                    on_progress(Progress(index * total + done, len(call.items) * total, preview))
                final = answer.infer_response.parameters.get("triton_final_response")
                if final is not None and final.bool_param:
                    break
        finally:
            stream.cancel()
        if last is None:
            raise AttemptError(Outcome.FAILED, "the model ended its stream without a picture")
        return await self._pictures(last, [item], signature)

    async def _preview(
        self, outputs: dict[str, Tensor], signature: Signature, index: int, share: float
    ) -> Preview | None:
        tensor = _picture(outputs, signature)
        if tensor is None:
            return None
        try:
            (drawn,) = await _decoded(tensor, [None], signature)
        except ValueError:
            return None  # only the last one has to be a picture
        return Preview(raw_bytes(drawn), drawn.media_type, index, share) if isinstance(drawn, Artifact) else None

    async def _pictures(
        self, outputs: dict[str, Tensor], items: Sequence[Item], signature: Signature
    ) -> list[Artifact | ItemFailure]:
        tensor = _picture(outputs, signature)
        if tensor is None:
            wanted = (
                f"the output {signature.output.name}" if signature.output is not None else "an output with a picture"
            )
            names = (
                ", ".join(f"{shown(one.name)} {shown(one.datatype)}" for one in list(outputs.values())[:8]) or "none"
            )
            raise AttemptError(Outcome.FAILED, f"the reply lacks {wanted} (it has: {names})")
        seeds = [item.seed if "seed" in signature.places else None for item in items]
        try:
            return await _decoded(tensor, seeds, signature)
        except ValueError as error:
            raise AttemptError(Outcome.FAILED, f"the backend's reply is no use: {error}") from None

    # errors

    def _mapped(self, error: grpc.aio.AioRpcError, call: Call, model: str) -> AttemptError | BackendRefusal:
        code = error.code()
        plain = grpc.aio.AioRpcError(
            code,
            error.initial_metadata(),
            error.trailing_metadata(),
            _ASIDE.sub("", error.details() or ""),
            error.debug_error_string(),
        )
        mapped = error_of(plain, self._line.redactor, prompts_of(call))
        if code is grpc.StatusCode.NOT_FOUND:
            self._server.forget(model)
        elif code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED}:
            self._server.doubt(model)
        if code is grpc.StatusCode.UNAVAILABLE and _NOT_READY.search(error.details() or ""):
            return AttemptError(Outcome.NOT_STARTED, "the model is not ready")
        if code is grpc.StatusCode.NOT_FOUND and model in self._server.configured:
            # another endpoint may have it, and this one never promised to
            return AttemptError(Outcome.NOT_STARTED, f"the server lacks the model: {mapped}", is_blameless=True)
        return mapped

    def _in_stream(self, text: str, call: Call, model: str) -> AttemptError | BackendRefusal:
        """What an error inside a stream means: it comes as words alone, without a status."""
        message = self._line.redactor.clean(_ASIDE.sub("", text), prompts_of(call))
        if _UNKNOWN_MODEL.search(text):
            self._server.forget(model)
            return BackendRefusal(NotFound(message, code="model_not_found", param="model"))
        if _WRONG_TENSOR.search(text):
            self._server.doubt(model)
            return BackendRefusal(InvalidRequest(message))
        return AttemptError(Outcome.FAILED, f"the model failed: {message}")


def _check(call: Call, signature: Signature) -> None:
    able = signature.capabilities
    does = "edit" if call.request.images else "generation"
    if does not in able.operations:
        reason = "it only draws, and takes no picture" if call.request.images else "it edits, and needs a picture"
        raise BackendRefusal(InvalidRequest(reason, param="model"))


async def _request(signature: Signature, call: Call, items: Sequence[Item], model: str) -> Request:
    if call.request.images:
        return await asyncio.to_thread(request_of, signature, call, items, model)
    return request_of(signature, call, items, model)


def _outputs(answer: ModelInferResponse) -> dict[str, Tensor]:
    try:
        return tensors_of(answer)
    except ValueError as error:
        raise AttemptError(Outcome.FAILED, f"the backend's reply is no use: {error}") from None


def _picture(outputs: Mapping[str, Tensor], signature: Signature) -> Tensor | None:
    """The tensor with the pictures."""
    if signature.output is not None:
        return outputs.get(signature.output.name)
    found = choose_output([TensorInfo(one.name, one.datatype, one.shape) for one in outputs.values()])
    return None if found is None else outputs[found.name]


def _step(outputs: Mapping[str, Tensor], signature: Signature, answers: int) -> int:
    """The step that an answer is of: as it says, else its number."""
    told = outputs.get(signature.step_output) if signature.step_output is not None else None
    if told is None:
        return answers
    try:
        return max(0, round(float(numbers(told)[0])))
    except (ValueError, IndexError, OverflowError):
        return answers


async def _decoded(tensor: Tensor, seeds: Sequence[int | None], signature: Signature) -> list[Artifact | ItemFailure]:
    if tensor.datatype == "BYTES" and len(tensor.data) <= QUICK_BYTES:
        return pictures_in(tensor, seeds, signature.options)
    return await asyncio.to_thread(pictures_in, tensor, seeds, signature.options)
