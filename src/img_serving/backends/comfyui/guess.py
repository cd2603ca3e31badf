"""Where our parameters go in a ComfyUI graph that nobody mapped: the links of its samplers are followed to what holds them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from img_serving.backends.comfyui.graph import Graph, Slot, ancestors, is_link, source

_TEXTS: Final = ("text", "prompt", "text_g", "text_l", "clip_g", "clip_l", "t5xxl", "llama", "qwen25_7b")
_VALUES: Final = ("value", "string", "text", "int", "float", "number", "seed", "noise_seed")
"""What nodes that only hold a value call it."""

_LATENTS: Final = ("latent_image", "latent", "samples", "latents")
_PICTURES: Final = ("pixels", "image", "images")
_SIGMAS: Final = ("sigmas", "high_sigmas", "low_sigmas")
_DEPTH: Final = 32

_TAKES_PICTURE: Final = re.compile(r"edit|reference|kontext", re.IGNORECASE)

_SIZED_MODELS: Final = frozenset({"ModelSamplingFlux", "Flux2Scheduler"})
"""Nodes that want to know the size too."""


def guess(graph: Graph, output: str, images: tuple[Slot, ...] | None = None) -> dict[str, tuple[Slot, ...]]:
    """The slots of every parameter that can be told from the links above `output`; a parameter may be missing.

    `images` are the slots of the pictures, where somebody named them.
    """
    above = ancestors(graph, output)
    samplers = [node for node in above if is_sampler(graph, node)]
    found: dict[str, list[Slot]] = {}
    prompts: list[Slot] = []
    negatives: list[Slot] = []
    for node in samplers:
        prompts += _texts(graph, node, "positive")
        negatives += _texts(graph, node, "negative")
        found.setdefault("seed", []).extend(_find(graph, node, ("seed", "noise_seed"), ("noise",)))
    found["prompt"] = prompts
    # a zeroed copy of the prompt is no negative prompt
    found["negative_prompt"] = [slot for slot in negatives if slot not in prompts]
    for name, look in _LOOKS.items():
        found[name] = _agreed(graph, [look(graph, node) for node in samplers])
    sizes, pictures = _latents(graph, samplers, above)
    for side in ("width", "height"):
        found[side] = [slot for node in sizes for slot in _literal(graph, node, side)]
    if images is not None:
        pictures = list(images)
    found["image"] = pictures
    found["mask"] = _masks(graph, above, pictures)
    found["strength"] = _find(graph, samplers[-1], ("denoise",), _SIGMAS) if samplers and pictures else []
    found["checkpoint"] = _only(slot for node in above for slot in _literal(graph, node, "ckpt_name"))
    found["clip_skip"] = _only(slot for node in above for slot in _literal(graph, node, "stop_at_clip_layer"))
    return {name: tuple(dict.fromkeys(slots)) for name, slots in found.items() if slots}


def steps_of(graph: Graph, output: str) -> dict[str, int]:
    """The samplers above `output`, and how many steps each will take, where that is written in the graph."""
    found = {}
    for node in ancestors(graph, output):
        if is_sampler(graph, node):
            for slot in _find(graph, node, ("steps",), _SIGMAS):
                steps = graph[slot.node]["inputs"][slot.name]
                if type(steps) is int and steps > 0:
                    found[node] = steps
    return found


def is_sampler(graph: Graph, node: str) -> bool:
    """Whether a node draws: it has a latent picture, something random, and something that says what to draw."""
    inputs = graph[node]["inputs"]
    return (
        any(is_link(inputs.get(name)) for name in ("latent_image", "latent"))
        and any(name in inputs for name in ("seed", "noise_seed", "noise"))
        and any(name in inputs for name in ("positive", "guider", "conditioning"))
    )


def _literal(graph: Graph, node: str, name: str) -> list[Slot]:
    """The input itself where it holds a value, or the one of the node that does nothing but hold it. Empty if neither."""
    for _ in range(_DEPTH):
        value = graph[node]["inputs"].get(name)
        if value is None:
            return []
        if not is_link(value):
            return [Slot(node, name)]
        if value[0] not in graph:
            return []
        node = value[0]
        inputs = graph[node]["inputs"]
        held = [one for one in inputs if one in _VALUES]
        links = [one for one in inputs if is_link(inputs[one])]
        if len(held) == 1 and len(links) <= (held[0] in links):
            name = held[0]
        elif len(inputs) == 1 and links:
            name = links[0]  # a reroute
        else:
            return []
    return []


def _find(graph: Graph, node: str, names: Iterable[str], via: Iterable[str]) -> list[Slot]:
    """The nearest value of one of `names`, looking into the node and along the links `via`."""
    seen = [node]
    for one in seen:  # it grows while it is walked
        for name in names:
            if slots := _literal(graph, one, name):
                return slots
        seen += [link for name in via if (link := source(graph, one, name)) and link not in seen]
    return []


def _texts(graph: Graph, sampler: str, side: str) -> list[Slot]:
    """The texts of the positive or the negative side."""
    start = source(graph, sampler, side)
    guider = source(graph, sampler, "guider")
    if start is None and guider is not None:
        start = source(graph, guider, side)
        sampler = guider
    if start is None and side == "positive":
        start = source(graph, sampler, "conditioning")
    seen = [start] if start is not None else []
    found: list[Slot] = []
    for one in seen:
        texts = [slot for name in _TEXTS for slot in _literal(graph, one, name) if _holds_text(graph, slot)]
        if texts:
            found += texts
            continue
        inputs = graph[one]["inputs"]
        # a node with both sides passes each on by itself
        ways = [side] if side in inputs else [name for name in inputs if name.startswith("cond")]
        seen += [link for name in ways if (link := source(graph, one, name)) and link not in seen]
    return found


def _holds_text(graph: Graph, slot: Slot) -> bool:
    return isinstance(graph[slot.node]["inputs"][slot.name], str)


def _guidance(graph: Graph, sampler: str) -> list[Slot]:
    """A distilled model's guidance is an input of its prompt; there the sampler's `cfg` has to stay 1."""
    ways = ("guider", "positive", "conditioning")
    return _find(graph, sampler, ("guidance",), ways) or _find(graph, sampler, ("cfg",), ("guider",))


_LOOKS: Final[dict[str, Callable[[Graph, str], list[Slot]]]] = {
    "steps": lambda graph, node: _find(graph, node, ("steps",), _SIGMAS),
    "guidance_scale": _guidance,
    "sampler": lambda graph, node: _find(graph, node, ("sampler_name",), ("sampler",)),
    "scheduler": lambda graph, node: _find(graph, node, ("scheduler",), _SIGMAS),
}


def _agreed(graph: Graph, slots: list[list[Slot]]) -> list[Slot]:
    """Of several samplers: all where they say the same, else the first that runs; a later one has its own figures."""
    everything = [slot for one in slots for slot in one]
    values: list[Any] = [graph[slot.node]["inputs"][slot.name] for slot in everything]
    if all(value == values[0] for value in values):
        return everything
    return next((one for one in reversed(slots) if one), [])


def _latents(graph: Graph, samplers: list[str], above: list[str]) -> tuple[list[str], list[Slot]]:
    """Where the drawing starts: the nodes that say its size, and the picture that it is made from."""
    seen = [link for node in samplers for name in _LATENTS if (link := source(graph, node, name))]
    sizes: list[str] = []
    pictures: list[Slot] = []
    for one in seen:
        kind = graph[one]["class_type"]
        inputs = graph[one]["inputs"]
        if kind.startswith("LoadImage"):
            pictures += _literal(graph, one, "image")
            continue
        has_size = bool(_literal(graph, one, "width") and _literal(graph, one, "height"))
        has_picture = any(is_link(inputs.get(name)) for name in _PICTURES)
        if has_size and (has_picture or not any(is_link(inputs.get(name)) for name in _LATENTS)):
            sizes.append(one)
        ways = (*_LATENTS, *_PICTURES)
        seen += [link for name in ways if (link := source(graph, one, name)) and link not in seen]
    if sizes:
        sizes += [node for node in above if graph[node]["class_type"] in _SIZED_MODELS]
    if not pictures:
        # a model made for editing takes its picture with the prompt; one that only guides a drawing (a pose) is another matter
        takers = [node for node in above if _TAKES_PICTURE.search(graph[node]["class_type"])]
        behind = {node for taker in takers for node in ancestors(graph, taker)}
        loaders = [node for node in above if node in behind and graph[node]["class_type"] == "LoadImage"]
        pictures = _only(slot for node in loaders for slot in _literal(graph, node, "image"))
    return sizes, list(dict.fromkeys(pictures))[:1]


def _masks(graph: Graph, above: list[str], pictures: list[Slot]) -> list[Slot]:
    """The node that loads a mask, or the picture's own where somebody uses its transparency as one."""
    loaded = [
        slot
        for node in above
        if graph[node]["class_type"] == "LoadImageMask"
        for slot in _literal(graph, node, "image")
    ]
    if loaded:
        return _only(loaded)
    used = {
        value[0]
        for node in above
        for value in graph[node]["inputs"].values()
        if is_link(value) and value[1] == 1 and graph.get(value[0], {}).get("class_type") == "LoadImage"
    }
    return [slot for slot in pictures if slot.node in used]


def _only(slots: Iterable[Slot]) -> list[Slot]:
    """The slot, if there is no other: of several nobody can tell which is meant."""
    found = list(dict.fromkeys(slots))
    return found if len(found) == 1 else []
