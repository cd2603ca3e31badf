"""ComfyUI workflows as the operator gives them: read, checked, mapped to our parameters, and filled for one picture."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from img_serving.backends.comfyui.graph import Graph, Slot, is_link, output_of
from img_serving.backends.comfyui.guess import guess
from img_serving.backends.options import read_options
from img_serving.domain.capabilities import SizeRule
from img_serving.domain.images import Operation

PARAMETER_OF: Final = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "width": "size",
    "height": "size",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "sampler": "sampler",
    "scheduler": "scheduler",
    "clip_skip": "clip_skip",
    "strength": "strength",
    "checkpoint": "model",
    "image": "image",
    "mask": "mask",
}
"""What a workflow's inputs may be mapped to, and the name that each has in the API."""

MAX_FILE_BYTES: Final = 16 * 1024 * 1024

MAX_SIDE: Final = 16384
MIN_SIDE: Final = 16
LATENT_PIXELS: Final = 8
"""A latent has one cell for 8x8 pixels: what is left over is cut off (`EmptyLatentImage`, `VAEEncode`)."""

RUN_INPUT: Final = "img_serving_run"
"""An input that no node has: ComfyUI leaves it out when it runs the node, but it makes the node another one for its cache."""

_TEXTS: Final = frozenset({"prompt", "negative_prompt", "sampler", "scheduler", "checkpoint", "image", "mask"})
_CHANNELS: Final = frozenset({"red", "green", "blue"})

Target = str | list[str]


class InputOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where each of our parameters goes: a "node.input", or several. Left out, it is guessed; `[]` maps it nowhere."""

    prompt: Target | None = None
    negative_prompt: Target | None = None
    seed: Target | None = None
    width: Target | None = None
    height: Target | None = None
    steps: Target | None = None
    guidance_scale: Target | None = None
    sampler: Target | None = None
    scheduler: Target | None = None
    clip_skip: Target | None = None
    strength: Target | None = None
    checkpoint: Target | None = None
    image: Target | None = None
    mask: Target | None = None


class WorkflowOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One of `workflows`.

    `file` or `graph` is what draws, in ComfyUI's API format; `edit_file` or `edit_graph` is what edits, and is the same where
    it is left out and the first one loads a picture. `output` names the node whose picture is taken.
    """

    file: str | None = None
    graph: dict[str, Any] | None = None
    inputs: dict[str, Any] = {}
    output: str | None = None
    edit_file: str | None = None
    edit_graph: dict[str, Any] | None = None
    edit_inputs: dict[str, Any] = {}
    edit_output: str | None = None
    checkpoint: str | None = None
    size_multiple: Annotated[int, Meta(ge=1, le=1024)] | None = None


@dataclass(frozen=True, slots=True)
class Template:
    """A graph, and where our parameters go in it.

    Attributes:
        graph: in API format.
        slots: of each mapped parameter (keys of `PARAMETER_OF`), the inputs that take it; of `image`, one a picture.
        output: the node whose picture is taken.
        guessed: the parameters whose slots nobody named.
        mask_is_white: the mask is read from a colour channel, so it is white where the edit may paint, not transparent.
    """

    graph: Graph
    slots: Mapping[str, tuple[Slot, ...]]
    output: str
    guessed: frozenset[str] = frozenset()
    mask_is_white: bool = False

    @property
    def honours(self) -> frozenset[str]:
        """The parameters, by their names in the API, that reach this graph. A size takes both of its sides."""
        names = {PARAMETER_OF[name] for name, slots in self.slots.items() if slots}
        if not (self.slots.get("width") and self.slots.get("height")):
            names.discard("size")
        return frozenset(names)

    @property
    def size(self) -> tuple[int, int] | None:
        """The size in pixels that the graph itself says; None where it says none that is mapped."""
        sides = []
        for name in ("width", "height"):
            held = [self.graph[slot.node]["inputs"][slot.name] for slot in self.slots.get(name, ())]
            sides += [value for value in held[:1] if type(value) is int and value > 0]
        return (sides[0], sides[1]) if len(sides) == 2 else None

    @property
    def mask_is_alpha(self) -> bool:
        """The mask is the alpha channel of the picture itself."""
        return bool(self.slots.get("mask")) and self.slots["mask"] == self.slots.get("image")

    @property
    def guesses(self) -> str:
        """What was guessed, in one line, for people."""
        found = ((name, self.slots.get(name, ())) for name in sorted(self.guessed))
        return ", ".join(f"{name} = {' and '.join(map(str, slots))}" for name, slots in found if slots)

    def parameter_at(self, node: str, name: str) -> str | None:
        """Which of our parameters (by its name in the API) goes to this input; None if none does."""
        return next(
            (PARAMETER_OF[key] for key, slots in self.slots.items() for one in slots if (node, name) == one), None
        )

    def filled(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The graph with these values at their slots; what is not mapped is left out, what has no value stays as it is.

        `image` is a sequence: where the graph takes more pictures than there are, the last one stands in for the rest.
        """
        graph: dict[str, Any] = dict(self.graph)
        touched: set[str] = set()
        for name, value in values.items():
            for index, slot in enumerate(self.slots.get(name, ())):
                if slot.node not in touched:
                    touched.add(slot.node)
                    graph[slot.node] = {**graph[slot.node], "inputs": dict(graph[slot.node]["inputs"])}
                chosen = value[min(index, len(value) - 1)] if name == "image" else value
                graph[slot.node]["inputs"][slot.name] = chosen
        return graph

    def afresh(self, graph: Mapping[str, Any], run: str) -> dict[str, Any]:
        """The same filled graph, whose output node has to run again: its cached answer names a file that is gone."""
        node = graph[self.output]
        return {**graph, self.output: {**node, "inputs": {**node["inputs"], RUN_INPUT: run}}}


@dataclass(frozen=True, slots=True)
class Workflow:
    """A model id that the operator gave a graph. `checkpoint` is put into it, where it is set."""

    name: str
    generation: Template | None
    edit: Template | None
    checkpoint: str | None = None
    size_multiple: int | None = None

    @property
    def templates(self) -> tuple[Template, ...]:
        """One or two."""
        return tuple(one for one in (self.generation, self.edit) if one is not None)

    @property
    def operations(self) -> frozenset[Operation]:
        """What it can do."""
        pairs: tuple[tuple[Operation, Template | None], ...] = (
            ("generation", self.generation),
            ("edit", self.edit),
            ("variation", self.edit),  # an edit without words
        )
        return frozenset(name for name, template in pairs if template is not None)

    @property
    def honours(self) -> frozenset[str]:
        """What it honours when it draws; where it only edits, when it does that."""
        return (self.generation or self.templates[0]).honours - {"prompt", "model", "image", "mask"}

    @property
    def honours_in_edits(self) -> frozenset[str] | None:
        """What it honours when it edits; None where it does not."""
        return None if self.edit is None else self.edit.honours - {"prompt", "model", "image", "mask"}

    @property
    def sizes(self) -> SizeRule:
        """The sizes that it draws; any where it takes none, for then a size is not honoured at all."""
        if not any("size" in one.honours for one in self.templates):
            return SizeRule()
        return SizeRule(multiple=self.size_multiple or LATENT_PIXELS, min_side=MIN_SIDE, max_side=MAX_SIDE)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the options something stands, for messages."""

    workflow: str
    prefix: str = ""
    graph: Graph = field(default_factory=dict)

    def error(self, option: str, message: str) -> ValueError:
        return ValueError(f"workflows.{self.workflow}.{self.prefix}{option}: {message}")


def read_workflows(tables: Mapping[str, Any]) -> dict[str, Workflow]:
    """The workflows by model id, as `[backends.comfyui.workflows]` has them. Files are read now.

    Raises:
        ValueError: with the option, what is wrong there, and what would be right. Files are never quoted.
    """
    return {name: _read_workflow(name, table) for name, table in tables.items()}


def _read_workflow(name: str, table: Any) -> Workflow:
    place = _Place(name)
    if not isinstance(table, Mapping):
        # a fault of the configuration, told as all of them are
        raise ValueError(  # noqa: TRY004
            f'workflows.{name}: must be a table such as {{ file = "workflow.json" }}'
        )
    options = _read(WorkflowOptions, table, f"workflows.{name}")
    main = _graph_of(place, options.file, options.graph)
    if main is None:
        raise ValueError(f"workflows.{name}: needs `file` (a workflow exported in API format) or `graph`")
    first = _template(place, main, options.inputs, options.output)
    place = _Place(name, "edit_")
    other = _graph_of(place, options.edit_file, options.edit_graph)
    if other is not None:
        edit = _template(place, other, options.edit_inputs, options.edit_output)
        if not edit.slots.get("image"):
            raise place.error("inputs", 'no picture gets in: say where, as in { image = "10.image" }')
    elif options.edit_inputs or options.edit_output:
        raise place.error("inputs" if options.edit_inputs else "output", "there is no edit_file or edit_graph for it")
    else:
        edit = first
    # a graph that loads its picture cannot do without one
    generation = None if first.slots.get("image") else first
    return Workflow(
        name,
        generation,
        edit if edit.slots.get("image") else None,
        checkpoint=_checkpoint(name, options, [first, edit]),
        size_multiple=options.size_multiple or _multiple((first, edit)),
    )


def _read(kind: type[Any], table: Mapping[str, Any], where: str) -> Any:
    try:
        return read_options(kind, table)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None


def _checkpoint(name: str, options: WorkflowOptions, templates: Sequence[Template]) -> str | None:
    if options.checkpoint is not None and not any(one.slots.get("checkpoint") for one in templates):
        reason = 'no node takes it: say which, as in inputs = { checkpoint = "4.ckpt_name" }'
        raise ValueError(f"workflows.{name}.checkpoint: {reason}")
    return options.checkpoint


def _multiple(templates: Sequence[Template]) -> int | None:
    """Models with a patch of 2x2 latent cells want sides of 16: their own node for an empty latent says so."""
    classes = {
        str(template.graph[slot.node]["class_type"])
        for template in templates
        for slot in template.slots.get("width", ())
    }
    return 2 * LATENT_PIXELS if classes & {"EmptySD3LatentImage", "EmptyFlux2LatentImage"} else None


def _graph_of(place: _Place, file: str | None, graph: Mapping[str, Any] | None) -> Graph | None:
    if file is not None and graph is not None:
        raise place.error("graph", "there is a file as well: one of the two has to go")
    if file is None:
        return None if graph is None else _checked(place, "graph", graph)
    try:
        if Path(file).exists() and not Path(file).is_file():
            raise place.error("file", f"{file} is no regular file")
        if Path(file).stat().st_size > MAX_FILE_BYTES:
            raise place.error("file", f"{file} is over {MAX_FILE_BYTES} bytes, which no workflow is")
        text = Path(file).read_bytes()
    except OSError as error:
        raise place.error("file", f"{file} cannot be read ({error.strerror or type(error).__name__})") from None
    try:
        document = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        raise place.error("file", f"{file} is not JSON: {_API_FORMAT}") from None
    return _checked(place, "file", document)


_API_FORMAT: Final = "export the workflow with File > Export (API), or 'Save (API Format)' in older ComfyUI"


def _checked(place: _Place, option: str, document: Any) -> Graph:
    """The document as a graph. Raises ValueError where it is none."""
    if (
        isinstance(document, dict)
        and isinstance(document.get("prompt"), dict)
        and "class_type" not in document["prompt"]
    ):
        document = document["prompt"]  # a whole request to /prompt
    if isinstance(document, dict) and isinstance(document.get("nodes"), list):
        raise place.error(option, f"this is the format of the editor, which the server does not take: {_API_FORMAT}")
    if not isinstance(document, dict) or not document:
        raise place.error(option, f"this is no workflow: {_API_FORMAT}")
    for node, content in document.items():
        if not isinstance(content, dict) or not isinstance(content.get("class_type"), str):
            raise place.error(option, f"node {node[:40]!r} has no class_type: {_API_FORMAT}")
        if not isinstance(content.get("inputs"), dict):
            raise place.error(option, f"node {node[:40]!r} has no inputs: {_API_FORMAT}")
    for node, content in document.items():
        for name, value in content["inputs"].items():
            if is_link(value) and value[0] not in document:
                raise place.error(option, f"{node}.{name} is linked to node {value[0][:40]!r}, which is not there")
    return document


def _template(place: _Place, graph: Graph, inputs: Mapping[str, Any], output: str | None) -> Template:
    named: InputOptions = _read(InputOptions, inputs, f"workflows.{place.workflow}.{place.prefix}inputs")
    if output is None:
        candidates = output_of(graph)
        if len(candidates) != 1:
            found = f"several would do ({', '.join(candidates)})" if candidates else "no node saves or shows a picture"
            raise place.error("output", f"{found}: name the node whose picture is to be taken")
        output = candidates[0]
    elif output not in graph:
        raise place.error("output", f"there is no node {output[:40]!r}{_nearest(output, graph)}")
    slots: dict[str, tuple[Slot, ...]] = {}
    for name in InputOptions.__struct_fields__:
        told = getattr(named, name)
        if told is not None:
            targets = [told] if isinstance(told, str) else told
            slots[name] = tuple(_slot(place, graph, name, target) for target in targets)
    guessed = {name: found for name, found in guess(graph, output, slots.get("image")).items() if name not in slots}
    slots |= guessed
    if "prompt" not in slots:
        raise place.error(
            "inputs", 'no text node was found for the prompt: say where it goes, as in { prompt = "6.text" }'
        )
    return Template(
        graph,
        {name: found for name, found in slots.items() if found},
        output,
        frozenset(guessed),
        mask_is_white=any(graph[one.node]["inputs"].get("channel") in _CHANNELS for one in slots.get("mask", ())),
    )


def _slot(place: _Place, graph: Graph, name: str, target: str) -> Slot:
    """One "node.input" of a mapping, which has to be there and to hold what we put in. Raises ValueError."""
    # identifiers of nodes and names of inputs may have dots: the longest node that fits is meant
    node = max((one for one in graph if target.startswith(f"{one}.")), key=len, default=None)
    option = f"inputs.{name}"
    if node is None:
        wrong, dot, _ = target.partition(".")
        if not dot:
            raise place.error(option, f'{target[:40]!r} must be "node.input"{_nearest(wrong, graph)}')
        raise place.error(option, f"there is no node {wrong[:40]!r}{_nearest(wrong, graph)}")
    inputs = graph[node]["inputs"]
    wanted = target[len(node) + 1 :]
    if wanted not in inputs:
        kind = graph[node]["class_type"]
        raise place.error(option, f"node {node} ({kind}) has no input {wanted[:40]!r}{_nearest(wanted, inputs)}")
    value = inputs[wanted]
    if not is_link(value) and isinstance(value, str) != (name in _TEXTS):
        held = "a text" if isinstance(value, str) else "no text"
        raise place.error(option, f"{node}.{wanted} holds {held}, which cannot be the {name}")
    return Slot(node, wanted)


def _nearest(wrong: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(wrong, names, 3, cutoff=0.5) or names[:8]
    return f" (the nearest: {', '.join(near)})" if near else ""
