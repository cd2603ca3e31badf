"""The table `[backends.kserve]`: which tensor of a model carries what, for all models and for single ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from img_serving.backends.kserve.tensors import Value, pack
from img_serving.backends.options import read_options

Datatype = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BF16",
    "BYTES",
]
Layout = Literal["hwc", "chw"]
ValueRange = Literal["0..1", "-1..1", "0..255"]
Encoding = Literal["file", "base64"]
Side = Annotated[int, Meta(ge=-1)]
Name = Annotated[str, Meta(min_length=1)]

PARAMETERS: Final = (
    "prompt", "negative_prompt", "seed", "steps", "guidance_scale", "width", "height", "strength", "sampler", "scheduler",
    "clip_skip", "count", "image", "mask",
)  # fmt: skip
"""What a tensor may carry. `count` is how many pictures a prompt gets, which is one."""

Kind = TypeVar("Kind", bound=msgspec.Struct)


class InputOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`inputs`: what each tensor is called, or a table; "" is nowhere."""

    prompt: Any = None
    negative_prompt: Any = None
    seed: Any = None
    steps: Any = None
    guidance_scale: Any = None
    width: Any = None
    height: Any = None
    strength: Any = None
    sampler: Any = None
    scheduler: Any = None
    clip_skip: Any = None
    count: Any = None
    image: Any = None
    mask: Any = None


class TensorOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A tensor as a table. What it leaves out is as the server's metadata has it, else as usual."""

    name: Name | None = None
    type: Datatype | None = None
    shape: list[Side] | None = None


class ConstantOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A tensor of `tensors` as a table."""

    value: bool | int | float | str | list[bool | int | float | str] | None = None
    type: Datatype | None = None
    shape: list[Side] | None = None


class ModelTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[backends.kserve.models.<name>]`: what differs there."""

    version: str | None = None
    inputs: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    parameters: dict[str, bool | int | str] = {}
    output: Name | None = None
    step_output: Name | None = None
    layout: Layout | None = None
    value_range: ValueRange | None = None
    encoding: Encoding | None = None
    batch_dimension: bool | None = None
    max_batch_size: Annotated[int, Meta(ge=1)] | None = None
    size_multiple: Annotated[int, Meta(ge=1, le=1024)] | None = None


class KServeTable(ModelTable, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[backends.kserve]`: the same for all models, and the models that differ."""

    models: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor that the operator named: `datatype` and `shape` (-1: any) None where the metadata shall say."""

    name: str
    datatype: str | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor with a value of the operator's. `shape` None: one value as the other tensors have one, a list as a row."""

    name: str
    values: tuple[Value, ...]
    datatype: str | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What is said of one model.

    Attributes:
        version: of the model; "" lets the server choose.
        inputs: which tensor carries which of `PARAMETERS`; None: none does.
        constants: tensors with a value for calls that say nothing else, by name.
        parameters: of the request itself.
        output: the tensor with the pictures.
        step_output: the tensor with the number of the step, of models that answer more than once.
        layout: of pictures that are tensors; None: told by the shape.
        value_range: of floating-point pictures.
        encoding: how pictures travel in BYTES.
        batch_dimension: whether the first dimension counts pictures; None: as the metadata has it.
        max_batch_size: pictures in one call, where the server does not say.
        size_multiple: sides are rounded down to it.
    """

    version: str = ""
    inputs: Mapping[str, NamedTensor | None] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    parameters: Mapping[str, bool | int | str] = field(default_factory=dict)
    output: str | None = None
    step_output: str | None = None
    layout: Layout | None = None
    value_range: ValueRange | None = None
    encoding: Encoding = "file"
    batch_dimension: bool | None = None
    max_batch_size: int | None = None
    size_multiple: int = 1


@dataclass(frozen=True, slots=True)
class KServeOptions:
    """What is said of all models, and of those that differ."""

    common: ModelOptions = field(default_factory=ModelOptions)
    models: Mapping[str, ModelOptions] = field(default_factory=dict)

    def of(self, model: str) -> ModelOptions:
        """What is said of this one."""
        return self.models.get(model, self.common)


def read_kserve_options(table: Mapping[str, Any]) -> KServeOptions:
    """The table, checked.

    Raises:
        ValueError: naming the option, what is wrong with it, and what would be right.
    """
    read = read_options(KServeTable, table)
    common = _over(ModelOptions(), read, "")
    models = {}
    for name, content in read.models.items():
        where = f"models.{name}."
        if not isinstance(content, Mapping):
            raise ValueError(f'models.{name}: must be a table, such as {{ output = "IMAGE" }}')  # noqa: TRY004
        models[name] = _over(common, _read(ModelTable, content, where), where)
    return KServeOptions(common, models)


def _over(common: ModelOptions, table: ModelTable, where: str) -> ModelOptions:
    """What a table says, and what was said before where it does not."""
    inputs = dict(common.inputs)
    named = _read(InputOptions, table.inputs, f"{where}inputs.")
    for name in PARAMETERS:
        if (told := getattr(named, name)) is not None:
            inputs[name] = _named(told, f"{where}inputs.{name}")
    for name in ("prompt", "negative_prompt"):
        tensor = inputs.get(name)
        if tensor is not None and tensor.datatype not in {None, "BYTES"}:
            raise ValueError(f"{where}inputs.{name}.type: words travel as BYTES, not as {tensor.datatype}")
    if "prompt" in inputs and inputs["prompt"] is None:
        raise ValueError(f"{where}inputs.prompt: nothing could be drawn without it: name its tensor, or leave it out")
    taken: dict[str, str] = {}
    for name, tensor in inputs.items():
        if tensor is not None and taken.setdefault(tensor.name, name) != name:
            raise ValueError(f"{where}inputs.{name}: the tensor {tensor.name} carries the {taken[tensor.name]} already")
    constants = dict(common.constants)
    for name, told in table.tensors.items():
        if not name:
            raise ValueError(f"{where}tensors: a tensor has a name")
        constants[name] = _constant(name, told, f"{where}tensors.{name}")
    return ModelOptions(
        version=common.version if table.version is None else table.version,
        inputs=inputs,
        constants=constants,
        parameters={**common.parameters, **_parameters(table.parameters, where)},
        output=table.output or common.output,
        step_output=table.step_output or common.step_output,
        layout=table.layout or common.layout,
        value_range=table.value_range or common.value_range,
        encoding=table.encoding or common.encoding,
        batch_dimension=common.batch_dimension if table.batch_dimension is None else table.batch_dimension,
        max_batch_size=table.max_batch_size or common.max_batch_size,
        size_multiple=table.size_multiple or common.size_multiple,
    )


def _named(told: Any, where: str) -> NamedTensor | None:
    if isinstance(told, str):
        return NamedTensor(told) if told else None
    if not isinstance(told, Mapping):
        raise ValueError(  # noqa: TRY004 - a mistake in a file, not in the program
            f'{where}: must be the name of a tensor, a table such as {{ name = "SEED", type = "INT64", shape = [-1, 1] }}, '
            'or "" for nowhere'
        )
    read = _read(TensorOptions, told, f"{where}.")
    if read.name is None:
        raise ValueError(f"{where}.name: missing: what the model calls the tensor")
    return NamedTensor(read.name, read.type, None if read.shape is None else tuple(read.shape))


def _constant(name: str, told: Any, where: str) -> Constant:
    read = _read(ConstantOptions, told if isinstance(told, Mapping) else {"value": told}, f"{where}.")
    if read.value is None:
        raise ValueError(f"{where}.value: missing: what the tensor holds")
    values: Sequence[Value] = read.value if isinstance(read.value, list) else [read.value]
    if not values:
        raise ValueError(f"{where}: a tensor has at least one value")
    if isinstance(read.value, list) and len({isinstance(one, str) for one in values}) > 1:
        raise ValueError(f"{where}: the values of a tensor are all texts, or all numbers")
    if read.type is not None and "INT" in read.type and any(isinstance(one, float) and one % 1 for one in values):
        raise ValueError(f"{where}.value: {read.type} has whole numbers only")
    try:
        pack(read.type or usual_datatype(values), values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Constant(name, tuple(values), read.type, None if read.shape is None else tuple(read.shape))


def usual_datatype(values: Sequence[Value]) -> str:
    """The datatype of values that nobody said one for."""
    if any(isinstance(one, str | bytes) for one in values):
        return "BYTES"
    if all(isinstance(one, bool) for one in values):
        return "BOOL"
    if any(isinstance(one, float) for one in values):
        return "FP32"
    return "INT32" if all(-(2**31) <= int(one) < 2**31 for one in values) else "INT64"


def _parameters(told: Mapping[str, bool | int | str], where: str) -> Mapping[str, bool | int | str]:
    for name, value in told.items():
        if not isinstance(value, bool | str) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{where}parameters.{name}: {value} does not fit into 64 bits")
    return told


def _read(kind: type[Kind], table: Mapping[str, Any], where: str) -> Kind:
    """The table, errors named from the protocol's own table on."""
    try:
        return read_options(kind, table)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
