"""Finding out which dialect a server speaks: from its host, from its list of models, and by questions that draw nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from img_serving.backends.http import Headers, get
from img_serving.domain.errors import AttemptError, Outcome
from img_serving.domain.vocabulary import Vocabulary
from img_serving.ports import Transport, UpstreamReply

HOSTS: Final = {
    "api.openai.com": "openai",
    "openai.azure.com": "openai",
    "api.together.xyz": "together",
    "api.together.ai": "together",
}
"""Hosts, and the families that speak there; subdomains count."""

SDCPP_PATH: Final = "/sdcpp/v1/capabilities"
LOCALAI_PATH: Final = "/system"

MAX_NAMES: Final = 5000
"""Models of one server that are kept: no server draws with more, and each is looked at whenever the list changes."""

_OWNERS: Final = {"vllm": "vllm-omni", "vllm-omni": "vllm-omni", "sglang": "sglang", "xinference": "xinference"}
"""What each family writes into `owned_by` of its models."""

_LITELLM_CREATED: Final = 1_677_610_602
"""LiteLLM gives every model this birthday (constants.py, 1.109.1)."""

_SDCPP_MODEL: Final = "sd-cpp-local"
_IMAGE_MODEL: Final = re.compile(r"image|dall-e", re.IGNORECASE)


class Model(msgspec.Struct):
    """One entry of a list of models. What is no name is `Any`: an odd note must not cost the list."""

    id: str
    owned_by: Any = None
    created: Any = None
    type: Any = None
    model_type: Any = None

    @property
    def kind(self) -> str | None:
        """What the model makes, where its server tells (Together's `type`, Xinference's `model_type`)."""
        told = self.model_type or self.type
        return told if isinstance(told, str) else None


class _Models(msgspec.Struct):
    data: list[Model]


_MODELS = msgspec.json.Decoder(_Models | list[Model])


@dataclass(frozen=True, slots=True)
class Finding:
    """A family, and what that rests on, for people."""

    family: str
    because: str

    def __str__(self) -> str:
        return f"{self.family} ({self.because})"


class SdcppCapabilities(msgspec.Struct):
    """What stable-diffusion.cpp tells of itself that we use."""

    samplers: list[str] = []
    schedulers: list[str] = []


@dataclass(frozen=True, slots=True)
class Names:
    """Samplers and schedules that a server said it has."""

    samplers: Vocabulary | None = None
    schedulers: Vocabulary | None = None


NO_NAMES: Final = Names()


def by_host(url: str) -> Finding | None:
    """The family that is known to live at this host; None for any other."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    for name, family in HOSTS.items():
        if host == name or host.endswith("." + name):
            return Finding(family, f"its host is {host}")
    return None


def read_models(reply: UpstreamReply) -> list[Model] | None:
    """The list of a good reply: OpenAI's shape, or a bare array as Together's is; None where it is neither."""
    try:
        found = _MODELS.decode(reply.body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else found.data


def names_of(models: Iterable[Model], family: str) -> tuple[str, ...]:
    """The models that draw, where the list tells them from others; else all of them."""
    found = list(models)
    drawing = [model for model in found if model.kind is not None and "image" in model.kind.lower()]
    if not drawing and family == "openai":
        drawing = [model for model in found if _IMAGE_MODEL.search(model.id)]
    return tuple(dict.fromkeys(model.id for model in drawing or found))[:MAX_NAMES]


def by_models(reply: UpstreamReply, models: list[Model]) -> Finding | None:
    """The family whose mark a list of models bears; None where it bears none."""
    if any(name.startswith("x-litellm-") for name in reply.headers):
        return Finding("litellm", "its replies have x-litellm headers")
    owners = {model.owned_by for model in models if isinstance(model.owned_by, str)}
    if len(owners) == 1 and (family := _OWNERS.get(next(iter(owners)))):
        return Finding(family, f"its models are owned by {next(iter(owners))}")
    if bytes(reply.body[:64]).lstrip().startswith(b"[") and any(model.kind for model in models):
        return Finding("together", "its list of models is a bare one, with types")
    if models and all(model.created == _LITELLM_CREATED for model in models):
        return Finding("litellm", "its models have the date that LiteLLM gives them")
    return None


async def ask(transport: Transport, headers: Headers, models: list[Model], timeout_seconds: float) -> Finding | None:
    """Ask what only one family has, where the list of models leaves room for it. Draws nothing.

    Raises:
        AttemptError: a question got no answer, or an error of the server's: it is to be asked again.
    """
    if any(model.id == _SDCPP_MODEL or model.owned_by == "local" for model in models[:MAX_NAMES]):
        document = await _json_at(transport, SDCPP_PATH, headers, timeout_seconds)
        if isinstance(document, dict) and "samplers" in document:
            return Finding("sdcpp", f"GET {SDCPP_PATH} answered")
        if models[0].id == _SDCPP_MODEL:
            return Finding("sdcpp", f"its only model is called {_SDCPP_MODEL}")
    # LocalAI's models have neither an owner nor a date, which no other server leaves out
    if models and all(model.owned_by is None and model.created is None for model in models):
        document = await _json_at(transport, LOCALAI_PATH, headers, timeout_seconds)
        if isinstance(document, dict) and "backends" in document and "loaded_models" in document:
            return Finding("localai", f"GET {LOCALAI_PATH} answered as LocalAI does")
    return None


async def sdcpp_names(transport: Transport, headers: Headers, timeout_seconds: float) -> Names:
    """What stable-diffusion.cpp knows: it takes an unknown name in silence, and draws with another."""
    document = await _json_at(transport, SDCPP_PATH, headers, timeout_seconds)
    try:
        told = msgspec.convert(document, SdcppCapabilities)
    except msgspec.ValidationError:
        return NO_NAMES
    samplers, schedulers = told.samplers[:MAX_NAMES], told.schedulers[:MAX_NAMES]
    return Names(Vocabulary(samplers) if samplers else None, Vocabulary(schedulers) if schedulers else None)


async def _json_at(transport: Transport, path: str, headers: Headers, timeout_seconds: float) -> Any:
    """The document there; None where there is none. Raises AttemptError where that cannot be known now."""
    reply = await get(transport, path, headers, timeout_seconds)
    if reply.status >= 500 or reply.status == 429:
        raise AttemptError(Outcome.NOT_STARTED, f"{path} answered HTTP {reply.status}")
    try:
        return msgspec.json.decode(reply.body) if reply.status == 200 else None
    except (ValueError, RecursionError):
        return None
