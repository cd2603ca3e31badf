"""ComfyUI's graphs in API format: nodes, their links, and which node gives the picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeGuard

Graph = Mapping[str, Mapping[str, Any]]
"""Node id → `{"class_type": …, "inputs": {name: value or [node id, output index]}}`, as ComfyUI exports it."""

_PICTURES: Final = re.compile(r"(save|preview).*image|image.*(save|preview)", re.IGNORECASE)
_SAVES: Final = re.compile(r"save", re.IGNORECASE)


class Slot(NamedTuple):
    """One input of one node."""

    node: str
    name: str

    def __str__(self) -> str:
        return f"{self.node}.{self.name}"


def is_link(value: Any) -> TypeGuard[list[Any]]:
    """Whether an input's value comes from another node: `[node id, output index]`."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int


def source(graph: Graph, node: str, name: str) -> str | None:
    """The node that an input is linked to; None if it is not, or not to one that is there."""
    value = graph[node]["inputs"].get(name)
    return value[0] if is_link(value) and value[0] in graph else None


def ancestors(graph: Graph, node: str) -> list[str]:
    """The node and all that it depends on, the nearest first."""
    found = [node]
    for one in found:
        for name in graph[one]["inputs"]:
            link = source(graph, one, name)
            if link is not None and link not in found:
                found.append(link)
    return found


def output_of(graph: Graph) -> list[str]:
    """The nodes whose picture may be meant: those that save one, else those that show one, else those at an end."""
    pictures = [node for node, content in graph.items() if _PICTURES.search(content["class_type"])]
    saving = [node for node in pictures if _SAVES.search(graph[node]["class_type"])]
    if pictures:
        return saving or pictures
    linked = {link for node in graph for name in graph[node]["inputs"] if (link := source(graph, node, name))}
    return [node for node in graph if node not in linked]
