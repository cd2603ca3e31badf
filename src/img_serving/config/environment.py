"""What the environment says: variables laid over the file, and `${VAR}` inside its strings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from msgspec import inspect

from img_serving.config.moved import moved_to
from img_serving.config.problems import KeyPath, nearest
from img_serving.config.reader import MAX_DEPTH
from img_serving.config.section import (
    Section,
    alternatives,
    bare,
    described_as,
    fields_of,
    is_optional,
    list_in,
    table_in,
)

PREFIX: Final = "IMG_SERVING__"
"""`IMG_SERVING__SERVER__PORT` is `server.port`. Names with a single underscore (`IMG_SERVING_CONFIG`) are not settings."""

WORDS: Final = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}

Refuse = Callable[[KeyPath, str, str], None]
"""Takes a problem: the path, the message, and the source (a variable's name, or empty for the file)."""

_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)(\}?)")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NOT_READABLE: Final = object()


def substitute(value: Any, environ: Mapping[str, str], refuse: Refuse, path: KeyPath = ()) -> Any:
    """`value` with `${VAR}` replaced in every string; `$${` stands for a literal `${`."""
    if len(path) > MAX_DEPTH:
        refuse(path[:3], f"is nested more than {MAX_DEPTH} deep", "")
        return None
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: _replacement(found, environ, refuse, path), value)
    if isinstance(value, dict):
        return {key: substitute(item, environ, refuse, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [substitute(item, environ, refuse, (*path, index)) for index, item in enumerate(value)]
    return value


def _replacement(found: re.Match[str], environ: Mapping[str, str], refuse: Refuse, path: KeyPath) -> str:
    name, end = found.group(1), found.group(2)
    if name is None:
        return "${"
    if not end or not _VARIABLE_NAME.fullmatch(name):
        refuse(path, "has a `${` that names no variable: write ${NAME}, or $${ for a literal ${", "")
    elif name not in environ:
        refuse(path, f"needs the environment variable {name}, which is not set (write $${{ for a literal ${{)", "")
    else:
        return environ[name]
    return ""


def overlay(
    data: dict[str, Any], root: type[Section], environ: Mapping[str, str], refuse: Refuse
) -> dict[KeyPath, str]:
    """Lay the variables over `data`, in place. Returns which variable gave which key.

    Shorter names go first, so that a table given as JSON can be refined by a variable for one key in it; a table given as
    JSON keeps the keys that it does not name, a list takes the place of the whole list.
    """
    origins: dict[KeyPath, str] = {}
    for variable in sorted((name for name in environ if name.startswith(PREFIX)), key=_order):
        found = _find(root, variable, refuse)
        if found is None:
            continue
        path, described = found
        value = parse(described, environ[variable])
        if value is _NOT_READABLE:
            refuse(path, "is not readable as JSON", variable)
        elif (fault := _put(data, path, value, merges=table_in(described) is not None)) is not None:
            refuse(path, fault, variable)
        else:
            origins.update((below, variable) for below in _paths(path, value))
    return origins


def parse(described: inspect.Type, text: str) -> Any:
    """The value that a variable's text means for a key of that type; text that means nothing stays as it is."""
    wanted = alternatives(described)
    if is_optional(described) and not text.strip():
        return None
    if (items := list_in(described)) is not None:
        return _parse_list(items, text.strip())
    holds_table = table_in(described) is not None or any(isinstance(one, inspect.DictType) for one in wanted)
    is_text = any(isinstance(one, inspect.StrType) for one in wanted)
    if holds_table and (not is_text or text.lstrip().startswith("{")):
        return _parse_json(text)
    for one in wanted:
        if isinstance(one, inspect.BoolType):
            return WORDS.get(text.strip().lower(), text)
        if isinstance(one, inspect.IntType | inspect.FloatType):
            return _parse_number(one, text)
    return text


def _parse_number(one: inspect.IntType | inspect.FloatType, text: str) -> Any:
    for kind in (int, float) if isinstance(one, inspect.FloatType) else (int,):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _parse_list(items: inspect.VarTupleType, text: str) -> Any:
    holds_text = any(isinstance(one, inspect.StrType) for one in alternatives(items.item_type))
    if text.startswith("[") or not holds_text:
        return _parse_json(text)
    return [part.strip() for part in text.split(",") if part.strip()]


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_READABLE


def _order(variable: str) -> tuple[int, list[tuple[int, str]]]:
    """Shorter names first, and indexes by number: `…__10__…` after `…__9__…`."""
    parts = variable.split("__")
    return len(parts), [(int(part), "") if _is_index(part) else (0, part) for part in parts]


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) <= 4


def _find(root: type[Section], variable: str, refuse: Refuse) -> tuple[KeyPath, inspect.Type] | None:
    """The key that a variable names, and its type."""
    path: KeyPath = ()
    described: inspect.Type = described_as(root)
    known_so_far = PREFIX
    for part in variable.removeprefix(PREFIX).split("__"):
        table, items = table_in(described), list_in(described)
        if table is not None:
            names = {field.encode_name: field for field in fields_of(table)}
            if part.lower() not in names:
                hint = moved_to(table.__name__, part.lower()) or _nearest_variable(part, list(names), known_so_far)
                refuse((*path, part.lower()), f"unknown key; {hint}", variable)
                return None
            path, described = (*path, part.lower()), names[part.lower()].type
        elif items is not None:
            if not _is_index(part):
                refuse((*path, part.lower()), "is not an index: items of a list are 0, 1, 2, …", variable)
                return None
            path, described = (*path, int(part)), bare(items.item_type)
        else:
            hint = "give the whole table as JSON" if _is_free_table(described) else "there is nothing below this key"
            refuse((*path, part.lower()), f"unknown key; {hint} in {known_so_far.removesuffix('__')}", variable)
            return None
        known_so_far += f"{part.upper()}__"
    return path, described


def _nearest_variable(part: str, names: list[str], known_so_far: str) -> str:
    near = nearest(part, names)
    return f"did you mean {known_so_far}{near.upper()}?" if near else f"known here: {', '.join(names)}"


def _is_free_table(described: inspect.Type) -> bool:
    return any(isinstance(one, inspect.DictType) for one in alternatives(described))


def _put(data: dict[str, Any], path: KeyPath, value: Any, *, merges: bool) -> str | None:
    """Set `path` in `data`, into a table that is there already where it `merges`; the reason where that is impossible."""
    parent: Any = data
    for depth, part in enumerate(path):
        if isinstance(part, int):
            if not isinstance(parent, list):
                return "is inside something that is not a list where it is set as a whole"
            if part > len(parent):
                return f"leaves a gap: the list has {len(parent)}, so the next index is {len(parent)}"
            if part == len(parent):
                parent.append(None)
        elif not isinstance(parent, dict):
            return "is inside something that is not a table where it is set as a whole"
        present = parent[part] if isinstance(part, int) else parent.get(part)
        if depth == len(path) - 1:
            parent[part] = (
                {**present, **value} if merges and isinstance(present, dict) and isinstance(value, dict) else value
            )
        elif present is None:
            parent[part] = [] if isinstance(path[depth + 1], int) else {}
        parent = parent[part]
    return None


def _paths(path: KeyPath, value: Any) -> Iterator[KeyPath]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield (*path, key)
