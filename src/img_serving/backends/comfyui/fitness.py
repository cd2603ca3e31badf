"""Whether a server can run a workflow, from what it says of its nodes: mistakes show at its start, and not in a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any, Final

import msgspec

from img_serving.backends.comfyui.graph import ancestors, is_link
from img_serving.backends.comfyui.workflow import Template, Workflow
from img_serving.domain.vocabulary import shown

_SOCKETS: Final = frozenset(
    {
        "MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE", "MASK", "NOISE", "GUIDER", "SAMPLER", "SIGMAS",
        "CONTROL_NET", "CLIP_VISION", "CLIP_VISION_OUTPUT", "STYLE_MODEL", "GLIGEN", "UPSCALE_MODEL", "PHOTOMAKER",
    }
)  # fmt: skip
"""Kinds of inputs that take what another node made, and never a text or a number."""

_OWN_MODULES: Final = ("nodes", "comfy_extras")
"""Where ComfyUI's own nodes are. Those that people add may take other values than they list: that is theirs to judge."""

_UPLOADS: Final = frozenset({"image_upload", "video_upload", "audio_upload", "file_upload", "upload", "remote"})
"""Inputs whose choices are files: they also take some that are not listed."""


@dataclass(frozen=True, slots=True)
class NodeClass:
    """What a server says of one class of nodes.

    Attributes:
        kinds: of its inputs: `INT`, `MODEL` …, `COMBO` where one of several is chosen.
        choices: of those inputs whose list is complete.
        is_output: whether it may end a graph.
    """

    kinds: Mapping[str, str]
    choices: Mapping[str, tuple[Any, ...]]
    is_output: bool


Nodes = Mapping[str, NodeClass | None]
"""By class; None: the server has none of that name. One that is not in it is not known."""


def read_node(body: bytes | bytearray, name: str) -> Nodes:
    """The reply to `/object_info/<name>`; empty where it is nothing that is understood."""
    try:
        document = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return {}
    if document == {}:
        return {name: None}
    told = document.get(name) if isinstance(document, dict) else None
    inputs = told.get("input") if isinstance(told, dict) else None
    if not isinstance(told, dict) or not isinstance(inputs, dict):
        return {}
    is_own = str(told.get("python_module", "nodes")).partition(".")[0] in _OWN_MODULES
    kinds: dict[str, str] = {}
    choices: dict[str, tuple[Any, ...]] = {}
    for group in (inputs.get("required"), inputs.get("optional")):
        for key, described in group.items() if isinstance(group, dict) else ():
            if not (isinstance(described, list) and described):
                continue
            kind, more = described[0], described[1] if len(described) > 1 and isinstance(described[1], dict) else {}
            listed = more.get("options") if kind == "COMBO" else kind
            kinds[key] = "COMBO" if isinstance(listed, list) else str(kind)
            if isinstance(listed, list) and is_own and not _UPLOADS & more.keys() and not more.get("multiselect"):
                choices[key] = tuple(listed)
    return {name: NodeClass(kinds, choices, told.get("output_node") is True)}


def classes_of(workflow: Workflow) -> frozenset[str]:
    """The classes of nodes that it needs."""
    return frozenset(
        template.graph[node]["class_type"]
        for template in workflow.templates
        for node in ancestors(template.graph, template.output)
    )


def misfit(workflow: Workflow, nodes: Nodes) -> str | None:
    """Why a server with these nodes cannot run it, as far as that can be told; None if nothing speaks against it."""
    for template in workflow.templates:
        reason = (
            _class_misfit(template, nodes) or _slot_misfit(template, nodes) or _value_misfit(workflow, template, nodes)
        )
        if reason is not None:
            return reason
    return None


def checkpoint_file(workflow: Workflow, template: Template, nodes: Nodes) -> str | None:
    """The workflow's checkpoint as the server calls the file: it may be configured as the model is called here."""
    wanted = workflow.checkpoint
    if wanted is None:
        return None
    for slot in template.slots.get("checkpoint", ()):
        described = nodes.get(template.graph[slot.node]["class_type"])
        choices = described.choices.get(slot.name) if described is not None else None
        if choices is not None:
            return _file(wanted, choices)
    return wanted


def _file(wanted: str, choices: tuple[Any, ...]) -> str | None:
    if wanted in choices:
        return wanted
    names = [(one, one.replace("\\", "/")) for one in choices if isinstance(one, str)]
    plain = wanted.replace("\\", "/")
    same = [one for one, name in names if plain in {name, name.removesuffix(PureWindowsPath(name).suffix)}]
    return same[0] if len(same) == 1 else None


def _class_misfit(template: Template, nodes: Nodes) -> str | None:
    graph = template.graph
    for node in ancestors(graph, template.output):
        kind = graph[node]["class_type"]
        if nodes.get(kind, ...) is None:
            return f"node {node} is a {shown(kind)}, which the server does not have"
    kind = graph[template.output]["class_type"]
    told = nodes.get(kind)
    if told is not None and not told.is_output:
        return f"node {template.output} ({shown(kind)}) is no end of a graph: `output` has to save or show a picture"
    return None


def _slot_misfit(template: Template, nodes: Nodes) -> str | None:
    graph = template.graph
    for parameter, slots in template.slots.items():
        for slot in slots:
            told = nodes.get(graph[slot.node]["class_type"])
            kind = told.kinds.get(slot.name, "") if told is not None else ""
            if kind in _SOCKETS:
                return f"{slot} takes a {kind} of another node, which the {parameter} is not"
    return None


def _value_misfit(workflow: Workflow, template: Template, nodes: Nodes) -> str | None:
    graph = template.graph
    filled = {slot for name in ("image", "mask") for slot in template.slots.get(name, ())}
    if workflow.checkpoint is not None and template.slots.get("checkpoint"):
        filled.update(template.slots["checkpoint"])
        if checkpoint_file(workflow, template, nodes) is None:
            return f"it lacks the checkpoint {shown(workflow.checkpoint)}"
    for node in ancestors(graph, template.output):
        told = nodes.get(graph[node]["class_type"])
        for name, value in graph[node]["inputs"].items():
            choices = told.choices.get(name) if told is not None else None
            if choices is None or is_link(value) or (node, name) in filled or value in choices:
                continue
            few = ", ".join(shown(str(one)) for one in choices[:5]) + (", …" if len(choices) > 5 else "")
            return f"{node}.{name} is {shown(str(value))}, which the server does not have (it has: {few or 'none'})"
    return None
