"""What one model takes and gives: which of its tensors carries what, found from its metadata, its options, and convention."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from img_serving.backends.kserve.options import Constant, ModelOptions, NamedTensor, usual_datatype
from img_serving.backends.kserve.tensors import DATATYPES, Value, width_of
from img_serving.domain.capabilities import ANY_SIZE, Capabilities, SizeRule
from img_serving.domain.vocabulary import shown

DEFAULT_BATCH: Final = 4
"""Pictures in one call of a model that takes any number, and says no limit."""

NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "prompt": (
        "prompt",
        "prompts",
        "positiveprompt",
        "textprompt",
        "promptin",
        "text",
        "textinput",
        "inputtext",
        "caption",
    ),
    "negative_prompt": ("negativeprompt", "negativeprompts", "negprompt", "negative"),
    "seed": ("seed", "seeds", "randomseed", "noiseseed"),
    "steps": ("steps", "numinferencesteps", "inferencesteps", "numsteps", "samplingsteps"),
    "guidance_scale": ("guidance", "guidancescale", "cfg", "cfgscale"),
    "width": ("width", "imagewidth", "imgw", "imgwidth", "w"),
    "height": ("height", "imageheight", "imgh", "imgheight", "h"),
    "strength": ("strength", "denoisingstrength", "imagestrength", "denoise"),
    "sampler": ("sampler", "samplername"),
    "scheduler": ("scheduler", "schedulername"),
    "clip_skip": ("clipskip",),
    "count": ("samples", "numsamples", "numimages", "numimagesperprompt"),
    "image": ("image", "initimage", "inputimage", "sourceimage", "images", "initimages", "inputimages"),
    "mask": ("mask", "maskimage", "inputmask"),
}
"""Names of input tensors, without case, dashes and underscores, the most telling first."""

OUTPUT_NAMES: Final = (
    "image", "images", "generatedimage", "generatedimages", "outputimage", "outputimages", "imageout", "decodedimage",
    "picture", "pictures", "png", "sample", "samples",
)  # fmt: skip
STEP_NAMES: Final = ("step", "currentstep", "progress", "iteration")

CONVENTION: Final[Mapping[str, tuple[str, str]]] = {
    "prompt": ("PROMPT", "BYTES"),
    "negative_prompt": ("NEGATIVE_PROMPT", "BYTES"),
    "seed": ("SEED", "INT64"),
    "steps": ("STEPS", "INT32"),
    "guidance_scale": ("GUIDANCE", "FP32"),
    "width": ("WIDTH", "INT32"),
    "height": ("HEIGHT", "INT32"),
}
"""What is taken for granted of a model whose server does not tell its tensors."""

USUAL_TYPES: Final[Mapping[str, str]] = {
    **{name: datatype for name, (_, datatype) in CONVENTION.items()},
    "strength": "FP32", "sampler": "BYTES", "scheduler": "BYTES", "clip_skip": "INT32", "count": "INT32", "image": "BYTES",
    "mask": "BYTES",
}  # fmt: skip

FALLBACKS: Final[Mapping[str, Value]] = {
    "negative_prompt": "", "steps": 20, "guidance_scale": 7.5, "strength": 0.75, "clip_skip": 1,
}  # fmt: skip
"""What is sent where a model insists on a tensor and the request says nothing for it."""

OWN: Final = ("prompt", "negative_prompt", "seed", "image", "mask")
"""What may differ from picture to picture of a call; all else its pictures share."""

HONOURS: Final[Mapping[str, str]] = {
    "negative_prompt": "negative_prompt", "seed": "seed", "steps": "num_inference_steps", "guidance_scale": "guidance_scale",
    "sampler": "sampler", "scheduler": "scheduler", "clip_skip": "clip_skip",
}  # fmt: skip

PIXELS: Final = frozenset({"UINT8", "FP16", "FP32", "FP64", "BF16"})
_NOISE = re.compile(r"[\s_.-]+")


class Unfit(ValueError):
    """Why a model cannot be drawn with. `is_other`: it is no model that draws at all, as far as anybody can see."""

    def __init__(self, reason: str, *, is_other: bool = False) -> None:
        """`reason` follows the name of the model."""
        super().__init__(reason)
        self.is_other = is_other


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as a server describes it; -1 in `shape` is any length. `is_required`: the model says that it needs it."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    is_required: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a server says of a model.

    Attributes:
        inputs: its tensors; () where it does not tell.
        outputs: likewise.
        max_batch_size: pictures in one call; 0: it has no batch dimension of the server's; None: not told.
        is_decoupled: it answers a stream only, and more than once.
    """

    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    max_batch_size: int | None = None
    is_decoupled: bool = False


@dataclass(frozen=True, slots=True)
class Fixed:
    """A tensor of the operator's, with its values."""

    tensor: TensorInfo
    values: tuple[Value, ...]
    is_whole: bool = False
    """The shape is the operator's own, with -1 for the number of pictures alone."""


@dataclass(frozen=True, slots=True)
class Signature:
    """How a model is called, and what it answers.

    Attributes:
        places: the tensor of each parameter.
        fixed: tensors with values for calls that say nothing else, by name.
        output: the tensor with the pictures; None: it is looked for in each reply.
        step_output: the tensor that counts steps, in replies of a stream.
        has_rows: whether the first dimension counts pictures.
        max_batch_size: pictures in one call.
        is_stream: it answers a stream only.
        options: what the operator said of it.
    """

    places: Mapping[str, TensorInfo]
    fixed: Mapping[str, Fixed] = field(default_factory=dict)
    output: TensorInfo | None = None
    step_output: str | None = None
    has_rows: bool = True
    max_batch_size: int = 1
    is_stream: bool = False
    options: ModelOptions = field(default_factory=ModelOptions)

    @property
    def capabilities(self) -> Capabilities:
        """What can be done with this model."""
        has_image = "image" in self.places
        operations = {"generation"} if not (has_image and self.places["image"].is_required) else set()
        honours = {ours for name, ours in HONOURS.items() if name in self.places}
        if {"width", "height"} <= self.places.keys():
            honours.add("size")
        if has_image:
            operations |= {"edit", "variation"}
            honours |= {"strength"} & self.places.keys()
        multiple = self.options.size_multiple
        pixels = self.output is not None and self.output.datatype in PIXELS
        return Capabilities(
            operations=frozenset(operations),
            batch="items" if self.max_batch_size > 1 else "single",
            max_batch_size=self.max_batch_size,
            honours=frozenset(honours),
            sizes=SizeRule(multiple=multiple) if multiple > 1 else ANY_SIZE,
            masks=has_image and "mask" in self.places,
            formats=("png",) if pixels else (),
            progress=self.is_stream,
            previews=self.is_stream,
            cancels=self.is_stream,
        )

    def shape_of(self, tensor: TensorInfo, rows: int) -> tuple[int, ...]:
        """The shape of a tensor with one value a picture, or one for all where it has no rows."""
        first = rows if self.counts(tensor) else 1
        return tuple((first if index == 0 else 1) if side < 0 else side for index, side in enumerate(tensor.shape))

    def counts(self, tensor: TensorInfo) -> bool:
        """Whether its first dimension is the number of pictures."""
        return self.has_rows and tensor.shape[:1] == (-1,)


def sign(
    info: ModelInfo | None,
    options: ModelOptions,
    *,
    max_batch_size: int | None = None,
    learned_batch: int | None = None,
    is_meant: bool = True,
) -> Signature:
    """How a model is called.

    Args:
        info: what its server says; None: nothing.
        options: what the operator says.
        max_batch_size: the backend's own, for models that say none.
        learned_batch: the server refused more in one call.
        is_meant: the operator named the model; otherwise its tensors have to show that it draws.

    Raises:
        Unfit: it cannot be drawn with.
    """
    known = info if info is not None and info.inputs else None
    places = _places(known, options)
    _check_prompt(known, places)
    fixed = {name: _fixed(constant, known, options) for name, constant in options.constants.items()}
    output = _output(info, options, is_meant=is_meant or bool(options.inputs.get("prompt")))
    has_rows = _has_rows(known, options, places, output)
    signature = Signature(
        places=places,
        fixed=fixed,
        output=output,
        step_output=_step_output(info, options),
        has_rows=has_rows,
        max_batch_size=_limit(known, options, max_batch_size, learned_batch) if has_rows else 1,
        is_stream=info is not None and info.is_decoupled,
        options=options,
    )
    _check_needs(known, signature)
    if signature.is_stream and signature.max_batch_size > 1:
        # its answers are those of one picture: the last of them is the picture, the others show it unfinished
        return Signature(**{name: getattr(signature, name) for name in Signature.__slots__} | {"max_batch_size": 1})
    return signature


def choose_output(outputs: Sequence[TensorInfo], *, is_meant: bool = True) -> TensorInfo | None:
    """The output with the pictures: by its name, else the only one that could be; None if nothing or too much could be.

    Bytes of another name may be words: they are pictures only in a model that is known to draw.
    """
    able = [one for one in outputs if _is_picture(one)]
    for name in OUTPUT_NAMES:
        for one in able:
            if _key(one.name) == name:
                return one
    others = [one for one in able if is_meant or one.datatype != "BYTES"]
    return others[0] if len(others) == 1 else None


def _places(known: ModelInfo | None, options: ModelOptions) -> dict[str, TensorInfo]:
    if known is None:
        flat = (1,) if options.batch_dimension is False else (-1, 1)
        found = {name: TensorInfo(tensor, kind, flat) for name, (tensor, kind) in CONVENTION.items()}
        for name, tensor in options.inputs.items():
            if tensor is None:
                found.pop(name, None)
            else:
                kind = tensor.datatype or USUAL_TYPES[name]
                usual = flat if kind == "BYTES" or name not in {"image", "mask"} else (*flat[:-1], -1, -1, 3)
                found[name] = TensorInfo(tensor.name, kind, usual if tensor.shape is None else tensor.shape)
        return found
    by_key = {_key(one.name): one for one in reversed(known.inputs)}
    taken = {tensor.name for tensor in options.inputs.values() if tensor is not None}
    found = {}
    for name, spellings in NAMES.items():
        if name in options.inputs:
            named = options.inputs[name]
            if named is not None:
                found[name] = _told(named, known, name)
            continue
        for spelling in spellings:
            one = by_key.get(spelling)
            if one is not None and one.name not in taken and _can_carry(name, one):
                found[name] = one
                taken.add(one.name)
                break
    return found


def _told(named: NamedTensor, known: ModelInfo, parameter: str) -> TensorInfo:
    one = next((one for one in known.inputs if one.name == named.name), None)
    if one is None:
        raise Unfit(f"has no input tensor {shown(named.name)} for the {parameter} (it has: {_listed(known.inputs)})")
    return TensorInfo(
        one.name,
        named.datatype or one.datatype,
        one.shape if named.shape is None else named.shape,
        one.is_required,
    )


def _can_carry(parameter: str, tensor: TensorInfo) -> bool:
    """Whether a tensor of this name may be what it is called."""
    if parameter in {"image", "mask"}:
        return tensor.datatype == "BYTES" or (tensor.datatype in PIXELS and len(tensor.shape) >= 3)
    if parameter in {"prompt", "negative_prompt", "sampler", "scheduler"}:
        return tensor.datatype == "BYTES" and _is_scalar(tensor)
    return tensor.datatype in DATATYPES and _is_scalar(tensor)


def _is_scalar(tensor: TensorInfo) -> bool:
    return math.prod(side for side in tensor.shape if side >= 0) == 1


def _check_prompt(known: ModelInfo | None, places: dict[str, TensorInfo]) -> None:
    if "prompt" not in places and known is not None:
        texts = [one for one in known.inputs if one.datatype == "BYTES" and one not in places.values()]
        raise Unfit(
            "has no input tensor that is called like a prompt"
            + (f" (texts: {_listed(texts)}): say which one is, as inputs = {{ prompt = … }}" if texts else ""),
            is_other=True,
        )
    for name, tensor in places.items():
        if not (name in {"image", "mask"} or _is_scalar(tensor)):
            raise Unfit(f"has the tensor {shown(tensor.name)} of shape {list(tensor.shape)}, which is not one {name}")


def _fixed(constant: Constant, known: ModelInfo | None, options: ModelOptions) -> Fixed:
    one = next((one for one in known.inputs if one.name == constant.name), None) if known is not None else None
    if known is not None and one is None:
        raise Unfit(f"has no input tensor {shown(constant.name)} (it has: {_listed(known.inputs)})")
    kind = constant.datatype or (one.datatype if one is not None else usual_datatype(constant.values))
    if constant.shape is not None:
        return Fixed(TensorInfo(constant.name, kind, constant.shape), constant.values, is_whole=True)
    usual = (len(constant.values),) if options.batch_dimension is False else (-1, len(constant.values))
    return Fixed(TensorInfo(constant.name, kind, one.shape if one is not None else usual), constant.values)


def _output(info: ModelInfo | None, options: ModelOptions, *, is_meant: bool) -> TensorInfo | None:
    outputs = () if info is None else info.outputs
    if options.output is not None:
        named = next((one for one in outputs if one.name == options.output), None)
        if named is None and outputs:
            raise Unfit(f"has no output tensor {shown(options.output)} (it has: {_listed(outputs)})")
        return named if named is not None else TensorInfo(options.output, "", ())
    if not outputs:
        return None
    found = choose_output(outputs, is_meant=is_meant)
    if found is None:
        raise Unfit(
            f"has no output tensor that is called like a picture (it has: {_listed(outputs)}): say which one is, as `output`",
            is_other=not any(_is_picture(one) for one in outputs) or not is_meant,
        )
    return found


def _is_picture(tensor: TensorInfo) -> bool:
    if tensor.datatype == "BYTES":
        return True
    sides = tensor.shape
    return tensor.datatype in PIXELS and len(sides) >= 3 and bool({-1, 1, 3} & {sides[-1], sides[-3]})


def _step_output(info: ModelInfo | None, options: ModelOptions) -> str | None:
    if options.step_output is not None:
        return options.step_output
    outputs = () if info is None else info.outputs
    return next((one.name for name in STEP_NAMES for one in outputs if _key(one.name) == name), None)


def _has_rows(
    known: ModelInfo | None, options: ModelOptions, places: Mapping[str, TensorInfo], output: TensorInfo | None
) -> bool:
    if options.batch_dimension is not None:
        return options.batch_dimension
    if known is None or known.max_batch_size:
        return True
    # without a batch dimension of the server's: where all that differs between pictures, and the pictures, may be many
    lists = all(places[name].shape[:1] == (-1,) for name in OWN if name in places)
    if output is None or not output.datatype:
        return lists
    many = output.shape[:1] == (-1,) and (output.datatype == "BYTES" or len(output.shape) >= 4)
    return lists and many


def _limit(known: ModelInfo | None, options: ModelOptions, backend: int | None, learned: int | None) -> int:
    told = options.max_batch_size or backend
    if known is not None and known.max_batch_size:
        limit = min(known.max_batch_size, told or known.max_batch_size)
    else:
        limit = told or (1 if known is None else DEFAULT_BATCH)
    return max(1, limit if learned is None else min(limit, learned))


def _check_needs(known: ModelInfo | None, signature: Signature) -> None:
    """Whether there is something for every tensor that the model insists on."""
    by_name = {tensor.name: name for name, tensor in signature.places.items()}
    always = {"prompt", "seed", "width", "height", "count", "image", "mask", *FALLBACKS}
    for one in () if known is None else known.inputs:
        if one.is_required and by_name.get(one.name) not in always and one.name not in signature.fixed:
            raise Unfit(
                f"needs the tensor {shown(one.name)} ({one.datatype} {list(one.shape)}), and nothing here goes there: "
                f"give it a value, as tensors = {{ {shown(one.name)} = … }}"
            )
    for fixed in signature.fixed.values():
        fixed_shape(signature, fixed, 1)
    for tensor in signature.places.values():
        if tensor.datatype != "BYTES" and width_of(tensor.datatype) is None:
            raise Unfit(
                f"has the tensor {shown(tensor.name)} of {shown(tensor.datatype)}, a datatype that nobody knows"
            )


def fixed_shape(signature: Signature, fixed: Fixed, rows: int) -> tuple[tuple[int, ...], int]:
    """The shape of the operator's tensor in a call for `rows` pictures, and how often its values are written.

    Raises:
        Unfit: the values do not fit into it.
    """
    shape, count = fixed.tensor.shape, len(fixed.values)
    leads = shape[:1] == (-1,) and (signature.has_rows or fixed.is_whole)
    rest = shape[1:] if leads else shape
    left, over = divmod(count, math.prod(side for side in rest if side >= 0) or 1)
    sides = []
    for side in rest:
        # the first side that may be of any length takes them all
        sides.append(left if side < 0 else side)
        left = 1 if side < 0 else left
    if over or left != 1 or 0 in rest:
        values = f"{count} value{'s'[: count != 1]}"
        raise Unfit(f"cannot be given {values} of {shown(fixed.tensor.name)}: its shape is {list(shape)}")
    return (*((rows,) if leads else ()), *sides), rows if leads else 1


def _listed(tensors: Iterable[TensorInfo]) -> str:
    names = [f"{shown(one.name)} {one.datatype}" for one in tensors]
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "") or "none"


def _key(name: str) -> str:
    return _NOISE.sub("", name).casefold()
