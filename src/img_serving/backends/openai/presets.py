"""The dialects of OpenAI's Images API: what each family of servers calls things, honours, refuses and answers with.

Every server that "speaks OpenAI" speaks it differently, and most drop in silence what they do not know. So each family is one
frozen value here, and nothing elsewhere asks which family it is. Where a fact comes from stands beside the family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from img_serving.backends.sdcpp import TEXT_BYTES
from img_serving.domain.capabilities import ANY_SIZE, BatchShape, Capabilities, SizeRule
from img_serving.domain.images import Operation, OutputFormat

Parameters = Mapping[str, str]
"""Names of `domain.capabilities.PARAMETERS`, and where each goes: a field, or a path into nested ones (`a.b`)."""

SizeStyle = Literal["size", "width_height", "star"]
AskedFormat = Literal["b64_json", "base64", "url", ""]
Placement = Literal["fields", "prompt_tag", "kwargs"]

ALWAYS_FIELDS: Final = frozenset(
    {"quality", "style", "background", "moderation", "output_format", "output_compression", "user"}
)
"""OpenAI's own optional parameters: fields of the body everywhere, also where extensions travel otherwise."""


@dataclass(frozen=True, slots=True)
class Edits:
    """How a family takes edits.

    Attributes:
        shape: `multipart` is OpenAI's form on `/images/edits`; the others are fields of a generation: `image_url` with a data
            URL, `file` with plain base64.
        max_images: input pictures at most.
        mask: how the mask says where to paint; "" where there can be none.
        mask_field: what the mask's part is called.
        parameters: what is honoured here, where that differs from generations.
        keeps_size: left without a size, the server keeps the shape of the picture by itself, as near as it can.
    """

    shape: Literal["multipart", "image_url", "file"] = "multipart"
    max_images: int = 16
    mask: Literal["transparent", "white", ""] = "transparent"
    mask_field: str = "mask"
    parameters: Parameters | None = None
    keeps_size: bool = False


@dataclass(frozen=True, slots=True)
class Preset:
    """One dialect.

    Attributes:
        family: its name in `[backends.openai]`.
        parameters: what is honoured, and under which name.
        size: `size = "WxH"`, `width` and `height`, or `size = "W*H"`.
        response_format: what is asked for; "" asks for nothing.
        always_seed: send a seed even if the client gave none: such a server's own default is always the same one.
        batch: what may share one call.
        max_n: pictures in one call.
        max_concurrency: calls in flight on one endpoint, where the operator says nothing.
        sizes: which sizes are drawn.
        max_steps: inference steps at most.
        max_text_bytes: the longest prompt and negative prompt, in UTF-8, that it survives; None: any.
        formats: what pictures come in, the usual one first; () where anything may be asked for.
        placement: where parameters that are not OpenAI's own go: `fields` of the body, a JSON object in a tag at the end of the
            prompt (`prompt_tag`), or one in the string `kwargs`.
        negative_after_bar: the negative prompt travels behind a `|` in the prompt.
        edits: how edits are taken; None where there are none.
        variations: what `/images/variations` honours, and under which name; None where there is no such route.
        stream: whether unfinished pictures can be asked for (server-sent events).
        extra: constant fields of every body.
        models: models of the same server that differ, by a pattern that matches the beginning of their name.
    """

    family: str
    parameters: Parameters
    size: SizeStyle = "size"
    response_format: AskedFormat = "b64_json"
    always_seed: bool = False
    batch: BatchShape = "request"
    max_n: int = 10
    max_concurrency: int = 32
    sizes: SizeRule = ANY_SIZE
    max_steps: int | None = None
    max_text_bytes: int | None = None
    formats: tuple[OutputFormat, ...] = ()
    placement: Placement = "fields"
    negative_after_bar: bool = False
    edits: Edits | None = None
    variations: Parameters | None = None
    stream: bool = False
    extra: Mapping[str, object] = field(default_factory=dict)
    models: tuple[tuple[re.Pattern[str], Preset], ...] = ()

    def of(self, model: str | None) -> Preset:
        """The dialect that this model has."""
        for pattern, preset in self.models:
            if model is not None and pattern.match(model):
                return preset
        return self

    def names(self, operation: Operation) -> Parameters:
        """What is honoured for this operation, and under which name."""
        if operation == "variation":
            return self.variations or {}
        if operation == "edit" and self.edits is not None and self.edits.parameters is not None:
            return self.edits.parameters
        return self.parameters

    def capabilities(self) -> Capabilities:
        """What routing and batching need to know. The format is always honoured: what does not come so is converted here."""
        edits = self.edits
        always = {"size", "output_format", "output_compression"}
        honours = always.union(self.parameters) - {"strength"}  # which means nothing to a generation
        return Capabilities(
            operations=frozenset(
                {"generation", *(["edit"] if edits else []), *(["variation"] if self.variations is not None else [])}
            ),
            batch=self.batch,
            max_batch_size=self.max_n,
            max_concurrency=self.max_concurrency,
            honours=frozenset(honours),
            honours_in_edits=frozenset(always.union(self.names("edit"))) if edits else None,
            honours_in_variations=frozenset(always.union(self.variations)) if self.variations is not None else None,
            sizes=self.sizes,
            max_steps=self.max_steps,
            max_images=edits.max_images if edits else 1,
            masks=bool(edits and edits.mask),
            formats=self.formats,
            previews=self.stream,
        )


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_DIFFUSION: Final = _same("negative_prompt", "seed", "num_inference_steps", "guidance_scale")
_EVERYTHING: Final = _DIFFUSION | _same(
    *("quality", "style", "background", "moderation", "sampler", "scheduler", "clip_skip"),
    *("output_format", "output_compression", "user", "strength"),
)
"""Every parameter under its canonical name, which most extended servers understand."""

GPT_IMAGE: Final = re.compile(r"gpt-image|chatgpt-image")


def _generic() -> Preset:
    """Unknown servers: what the client gave goes on as it is. Edits and streaming only where the operator says so.

    Models called as OpenAI's newer ones are never asked for a `response_format`: who imitates their names imitates that too.
    """
    usual = Preset(family="generic", parameters=_EVERYTHING)
    return replace(usual, models=((GPT_IMAGE, replace(usual, response_format="")),))


def _openai() -> Preset:
    """The hosted API: unknown parameters are errors there, and every generation of models has sizes of its own.

    Source: OpenAI's OpenAPI document 2.3.0 (2026-08) and openai-python 3.54.0's types: gpt-image models refuse
    `response_format` (400 unknown_parameter) and always answer in base64; dall-e-3 draws one picture a call; multipart edits
    have neither `moderation` nor `style`; gpt-image-2 and later draw any size of multiples of 16 up to 3840x2160 and 1:3.
    """
    own = _same("quality", "background", "moderation", "output_format", "output_compression", "user")
    edits = Edits(parameters={name: name for name in own if name != "moderation"}, keeps_size=True)
    # of a model that we do not know (an Azure deployment has any name) nothing is assumed
    anything = Preset(family="openai", parameters=own | _same("style"), response_format="", edits=edits)
    gpt = replace(anything, parameters=own, formats=("png", "jpeg", "webp"), stream=True)
    dall_e = replace(anything, parameters=_same("user"), response_format="b64_json", formats=("png",), edits=None)
    rules = {
        r"dall-e-2": replace(
            dall_e,
            sizes=SizeRule(choices=((256, 256), (512, 512), (1024, 1024))),
            edits=replace(edits, max_images=1, parameters=_same("user")),
            variations=_same("user"),
        ),
        r"dall-e-3": replace(
            dall_e,
            parameters=_same("quality", "style", "user"),
            max_n=1,
            sizes=SizeRule(choices=((1024, 1024), (1792, 1024), (1024, 1792))),
        ),
        r"gpt-image-1(?![0-9])|chatgpt-image": replace(
            gpt, sizes=SizeRule(choices=((1024, 1024), (1536, 1024), (1024, 1536)))
        ),
        r"gpt-image-": replace(gpt, sizes=SizeRule(multiple=16, max_side=3840, max_pixels=3840 * 2160, max_ratio=3.0)),
    }
    return replace(anything, models=tuple((re.compile(pattern), preset) for pattern, preset in rules.items()))


OPENAI_MODELS: Final = (
    *("dall-e-2", "dall-e-3", "chatgpt-image-latest", "gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5"),
    *("gpt-image-2", "gpt-image-2.5-sunburst", "gpt-image-2.5-flare", "gpt-image-2.6-sunburst", "gpt-image-2.6-flare"),
)
"""Names of the hosted models that are known without asking, so that their rules hold before the first check."""

VLLM_OMNI: Final = Preset(
    family="vllm-omni",
    # Source: vLLM-Omni 0.30.0 (entrypoints/openai): `url` is refused, `n` is 1 to 10, steps are 1 to 200, a seed is drawn where
    # none is given; the mask of an edit is called mask_image and goes to the pipeline as it is (diffusers paints white).
    parameters=_DIFFUSION | _same("output_format", "output_compression", "user", "strength"),
    max_steps=200,
    formats=("png", "jpeg", "webp"),
    edits=Edits(mask="white", mask_field="mask_image"),
)

SGLANG: Final = Preset(
    family="sglang",
    # Source: SGLang 0.5.23 (multimodal_gen/runtime/entrypoints/openai): without a seed all releases so far draw with a constant
    # one; `url` needs a store; `n` is cut to 10; the form of edits has a mask that nothing reads; `style` is taken and dropped.
    parameters=_DIFFUSION | _same("quality", "background", "output_format", "output_compression", "user"),
    always_seed=True,
    formats=("png", "jpeg", "webp"),
    edits=Edits(mask=""),
)

LOCALAI: Final = Preset(
    family="localai",
    # Source: LocalAI 82c191a (core/http/endpoints/openai/image.go): `step`, the negative prompt behind a `|`, one seed for all
    # n, PNG only, an input picture as base64 in `file`. Its inpainting route knows neither size nor seed: no masks, therefore.
    parameters={"negative_prompt": "negative_prompt", "seed": "seed", "num_inference_steps": "step"},
    formats=("png",),
    negative_after_bar=True,
    edits=Edits(shape="file", max_images=1, mask=""),
)

SDCPP: Final = Preset(
    family="sdcpp",
    # Source: stable-diffusion.cpp 97d2990 (examples/server/routes_openai.cpp, common/common.cpp) and a running server: seed 42
    # unless told, `response_format` ignored, n cut to 8 and steps to 100, consecutive seeds in a batch (each byte for byte as
    # alone), one drawing at a time; the mask is read as grey, white is painted; its edits and most builds write no WebP.
    parameters={
        "negative_prompt": "negative_prompt",
        "seed": "seed",
        "num_inference_steps": "sample_params.sample_steps",
        "guidance_scale": "sample_params.guidance.txt_cfg",
        "sampler": "sample_params.sample_method",
        "scheduler": "sample_params.scheduler",
        "clip_skip": "clip_skip",
        "strength": "strength",
        "output_format": "output_format",
        "output_compression": "output_compression",
    },
    response_format="",
    always_seed=True,
    batch="seeds",
    max_n=8,
    max_concurrency=1,
    sizes=SizeRule(multiple=64, rounding="up", max_side=4096),
    max_steps=100,
    max_text_bytes=TEXT_BYTES,
    formats=("png", "jpeg"),
    placement="prompt_tag",
    edits=Edits(mask="white"),
)

LITELLM: Final = Preset(
    family="litellm",
    # Source: LiteLLM 1.109.1 (proxy/image_endpoints, images/main.py): what it does not know goes on to the provider behind it;
    # `response_format` is an error for most of those, so what comes is taken; `image` or `image[]`, never both; no streaming.
    parameters=_EVERYTHING,
    response_format="",
    edits=Edits(keeps_size=True),
)

TOGETHER: Final = Preset(
    family="together",
    # Source: together-py 3.1.1 (types/image_generate_params.py): width and height, `steps`, base64, JPEG unless told, and an
    # input picture as `image_url` in the body of a generation.
    parameters={
        "negative_prompt": "negative_prompt",
        "seed": "seed",
        "num_inference_steps": "steps",
        "guidance_scale": "guidance_scale",
        "output_format": "output_format",
    },
    size="width_height",
    response_format="base64",
    max_n=4,
    formats=("jpeg", "png"),
    edits=Edits(shape="image_url", max_images=1, mask=""),
)

XINFERENCE: Final = Preset(
    family="xinference",
    # Source: Xinference 4.1.0 (api/restful_api.py, api/schemas/requests.py): `W*H`, url unless told, everything else as a JSON
    # string in `kwargs`; its form of edits takes none of that and paints white, that of variations takes `kwargs` again.
    parameters={
        "negative_prompt": "negative_prompt",
        "seed": "seed",
        "num_inference_steps": "num_inference_steps",
        "guidance_scale": "guidance_scale",
    },
    size="star",
    placement="kwargs",
    edits=Edits(mask="white", parameters={}),
    variations=_same("seed", "num_inference_steps", "guidance_scale"),
)

GENERIC: Final = _generic()
OPENAI: Final = _openai()

PRESETS: Final[Mapping[str, Preset]] = {
    preset.family: preset
    for preset in (OPENAI, GENERIC, VLLM_OMNI, SGLANG, LOCALAI, SDCPP, LITELLM, TOGETHER, XINFERENCE)
}
"""Every family by its name."""
