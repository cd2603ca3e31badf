"""What one server has: which models are ready, and how each is called; asked now and then, and kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc
import grpc.aio

from img_serving.backends.kserve.options import KServeOptions
from img_serving.backends.kserve.signature import ModelInfo, Signature, TensorInfo, Unfit, sign
from img_serving.backends.rpc import Line
from img_serving.domain.capabilities import Capabilities
from img_serving.wire.inference import open_inference_pb2 as wire
from img_serving.wire.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    # the stub of a channel for asyncio is of this type, which only type checkers know
    from img_serving.wire.inference.open_inference_pb2_grpc import GRPCInferenceServiceAsyncStub

MODELS_SECONDS: Final = 300.0
"""How long what a model's tensors are is believed, while nothing contradicts it."""

MODELS_LIMIT: Final = 64
"""Models of a server's list that are asked for their tensors; more have to be configured."""

ASKED_AT_ONCE: Final = 8
PROGRAMS: Final = {"triton": "Triton Inference Server"}

_RESTRICTED: Final = "This protocol is restricted"
"""Triton's words (UNAVAILABLE) for questions that it was told to answer only to those who send a certain header."""

Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True)
class Found:
    """What a look at the server found.

    Attributes:
        is_ready: the server says so; None: it does not tell.
        ready: names of models that are ready, configured ones first; None: nobody knows any.
        faults: why models that should be there are not, a line each.
    """

    is_ready: bool | None
    ready: tuple[str, ...] | None
    faults: tuple[str, ...]


class KServeServer:
    """One endpoint, as far as it is known. Nothing here draws."""

    def __init__(
        self, line: Line, options: KServeOptions, models: Sequence[str] = (), max_batch_size: int | None = None
    ) -> None:
        """`models` are the operator's; `max_batch_size` is for models that do not say theirs."""
        self._line = line
        self._options = options
        self._max_batch_size = max_batch_size
        self.configured = tuple(models)
        self.program = ""
        self._infos: dict[str, ModelInfo | None] = {}
        self._learned_at: dict[str, float] = {}
        self._learned_batch: dict[str, int] = {}
        self._streams: set[str] = set()
        self._signatures: dict[str, Signature | Unfit] = {}
        self._capabilities: Capabilities | None = None

    def __repr__(self) -> str:
        return f"<KServeServer {self.program or 'not asked yet'}: {', '.join(self._signatures) or 'no model known'}>"

    @property
    def stub(self) -> GRPCInferenceServiceAsyncStub:
        """The service; whoever calls has connected before."""
        return GRPCInferenceServiceStub(self._line.channel)

    @property
    def default_model(self) -> str | None:
        """The model of a call that names none."""
        usable = [name for name, one in self._signatures.items() if isinstance(one, Signature)]
        return next((name for name in (*self.configured, *self._options.models, *usable)), None)

    @property
    def capabilities(self) -> Capabilities:
        """Those of its first model, with each other one's own; by convention while none is known."""
        if self._capabilities is None:
            self._capabilities = self._describe()
        return self._capabilities

    async def look(self, timeout_seconds: float, *, afresh: bool) -> Found:
        """Ask which models are ready, and of those whose tensors are not known (`afresh`: of all) what these are.

        Raises:
            AioRpcError, TimeoutError: it does not answer, or not as such a server.
        """
        async with asyncio.timeout(timeout_seconds):
            is_ready = await self._ask_ready()
            if afresh or not self.program:
                await self._ask_program()
            states = await self._ask_index()
            faults: list[str] = []
            wanted = self.configured or (tuple(self._options.models) if states is None else ())
            if wanted:
                ready = [name for name in wanted if await self._is_model_ready(name, states, faults)]
            elif states is None:
                if afresh:
                    self._signatures.clear()
                    self._learned_at.clear()
                    self._capabilities = None
                return Found(is_ready, None, ("the server does not list its models: name them, as `models`",))
            else:
                ready = [name for name, (state, _) in states.items() if state == "READY"]
                missing = [name for name in self._options.models if name not in ready]
                faults += [f"the model {name} is not ready{_reason(states, name)}" for name in missing]
            await self._learn_all(ready[:MODELS_LIMIT], afresh=afresh)
        if len(ready) > MODELS_LIMIT:
            faults.append(
                f"the server lists {len(ready)} models, of which {MODELS_LIMIT} were asked: name yours, as `models`"
            )
        return Found(is_ready, tuple(ready), tuple(faults))

    def fit(self, models: Iterable[str]) -> tuple[list[str], list[str]]:
        """Those of `models` that can be drawn with, and why the others cannot, but for those that are no painters at all."""
        able, faults = [], []
        for name in models:
            found = self._signatures.get(name)
            if isinstance(found, Unfit):
                if self._is_meant(name) or not found.is_other:
                    faults.append(f"the model {name} {found}")
            else:
                able.append(name)
        return able, faults

    async def signature(self, model: str) -> Signature:
        """How this model is called.

        Raises:
            Unfit: it cannot be.
            AioRpcError: the server does not have it, or does not answer.
        """
        if model not in self._learned_at:
            await self._learn(model)
        found = self._signatures[model]
        if isinstance(found, Unfit):
            raise found
        return found

    def doubt(self, model: str) -> None:
        """What is known of its tensors may be wrong: they are asked for again before the next call."""
        self._learned_at.pop(model, None)
        self._streams.discard(model)

    def forget(self, model: str) -> None:
        """The server does not have it."""
        self.doubt(model)
        self._signatures.pop(model, None)
        self._infos.pop(model, None)
        self._capabilities = None

    def learn_batch(self, model: str, limit: int) -> None:
        """It refused more than `limit` pictures in one call."""
        self._learned_batch[model] = max(1, limit)
        self._settle(model)

    def learn_stream(self, model: str) -> None:
        """It answers a stream only."""
        self._streams.add(model)
        self._settle(model)

    # asking

    async def _ask_ready(self) -> bool | None:
        answer = await _or_none(self.stub.ServerReady(wire.ServerReadyRequest(), metadata=self._line.metadata))
        return None if answer is None else answer.ready

    async def _ask_program(self) -> None:
        answer = await _or_none(self.stub.ServerMetadata(wire.ServerMetadataRequest(), metadata=self._line.metadata))
        if answer is not None:
            name = self._line.redactor.clean(PROGRAMS.get(answer.name, answer.name))
            self.program = f"{name} {self._line.redactor.clean(answer.version)}".strip()[:100]

    async def _ask_index(self) -> dict[str, tuple[str, str]] | None:
        """State and reason of every model; None where the server does not list them."""
        answer = await _or_none(self.stub.RepositoryIndex(wire.RepositoryIndexRequest(), metadata=self._line.metadata))
        if answer is None:
            return None
        states: dict[str, tuple[str, str]] = {}
        for one in answer.models:
            version = self._options.of(one.name).version
            if one.name and (not version or version == one.version or one.state != "READY"):
                # several versions: one that is ready will do
                known = states.get(one.name, ("", ""))
                states[one.name] = known if known[0] == "READY" else (one.state, one.reason)
        return states

    async def _is_model_ready(self, name: str, states: dict[str, tuple[str, str]] | None, faults: list[str]) -> bool:
        request = wire.ModelReadyRequest(name=name, version=self._options.of(name).version)
        try:
            answer = await self.stub.ModelReady(request, metadata=self._line.metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                faults.append(f"the server does not have the model {name}")
                return False
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return True  # whoever cannot say so is asked for pictures
            raise
        if not answer.ready:
            faults.append(f"the model {name} is not ready{_reason(states or {}, name)}")
        return answer.ready

    async def _learn_all(self, models: Sequence[str], *, afresh: bool) -> None:
        now = asyncio.get_running_loop().time()
        stale = [
            name
            for name in models
            if afresh or name not in self._learned_at or now - self._learned_at[name] > MODELS_SECONDS
        ]
        for start in range(0, len(stale), ASKED_AT_ONCE):
            asked = await asyncio.gather(
                *(self._learn(name) for name in stale[start : start + ASKED_AT_ONCE]), return_exceptions=True
            )
            for one in asked:
                if isinstance(one, BaseException) and not isinstance(one, grpc.aio.AioRpcError):
                    raise one
        # what is gone from the server's list can be called no more
        for name in () if self.configured else self._signatures.keys() - set(models):
            self.forget(name)

    async def _learn(self, model: str) -> None:
        """Ask for a model's tensors. Raises AioRpcError where the server does not have it, or does not answer."""
        version = self._options.of(model).version
        metadata = await _or_none(
            self.stub.ModelMetadata(
                wire.ModelMetadataRequest(name=model, version=version), metadata=self._line.metadata
            )
        )
        info = None
        if metadata is not None and metadata.inputs:
            answer = await _or_none(
                self.stub.ModelConfig(
                    wire.ModelConfigRequest(name=model, version=version), metadata=self._line.metadata
                )
            )
            info = _info(metadata, None if answer is None or not answer.config.name else answer.config)
        self._infos[model] = info
        self._learned_at[model] = asyncio.get_running_loop().time()
        if info is not None:
            self._learned_batch.pop(model, None)
        self._settle(model)

    def _describe(self) -> Capabilities:
        usable = {name: one.capabilities for name, one in self._signatures.items() if isinstance(one, Signature)}
        if not usable:
            first = self.configured[0] if self.configured else next(iter(self._options.models), "")
            usable = {"": self._sign(first, None).capabilities}
        order = [name for name in self.configured if name in usable] or list(usable)
        # an endpoint's calls are bounded by this, and each model's by its own
        base = replace(usable[order[0]], max_batch_size=max(one.max_batch_size for one in usable.values()))
        return replace(base, variants={name: one for name, one in usable.items() if name and one != base})

    def _settle(self, model: str) -> None:
        self._capabilities = None
        info = self._infos.get(model)
        if model in self._streams:
            info = replace(info if info is not None else ModelInfo(), is_decoupled=True)
        try:
            self._signatures[model] = self._sign(model, info)
        except Unfit as unfit:
            self._signatures[model] = unfit

    def _sign(self, model: str, info: ModelInfo | None) -> Signature:
        return sign(
            info,
            self._options.of(model),
            max_batch_size=self._max_batch_size,
            learned_batch=self._learned_batch.get(model),
            is_meant=self._is_meant(model),
        )

    def _is_meant(self, model: str) -> bool:
        return model in self.configured or model in self._options.models


async def _or_none(call: Awaitable[Reply]) -> Reply | None:
    """The reply; None where the server does not know such a question, or answers it to others only.

    Raises:
        AioRpcError: all else.
    """
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED or _RESTRICTED in (error.details() or ""):
            return None
        raise


def _info(metadata: wire.ModelMetadataResponse, config: Any) -> ModelInfo:
    needed = set() if config is None else {one.name for one in config.input if not one.optional}
    return ModelInfo(
        inputs=tuple(
            TensorInfo(one.name, one.datatype, tuple(one.shape), one.name in needed) for one in metadata.inputs
        ),
        outputs=tuple(TensorInfo(one.name, one.datatype, tuple(one.shape)) for one in metadata.outputs),
        max_batch_size=None if config is None else config.max_batch_size,
        is_decoupled=config is not None and config.model_transaction_policy.decoupled,
    )


def _reason(states: dict[str, tuple[str, str]], name: str) -> str:
    state, reason = states.get(name, ("", ""))
    said = ": ".join(part for part in (state, reason) if part)
    return f" ({said[:200]})" if said else ""
