"""The settings as a file to start from: every key, one line of documentation, its default."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
from msgspec import inspect

from img_serving.config.backend import BackendConfig
from img_serving.config.loading import NOT_YET
from img_serving.config.reader import expected
from img_serving.config.section import Section, alternatives, default_of, documentation_of, fields_of, table_in
from img_serving.config.settings import Auth, Config, KeyConfig

HEADER: Final = """\
# img-serving: every setting, with its default. What begins with # and no blank is a setting that is not made:
# by default it is unset, or this version does not act on it yet; remove the # to make it.
# Unknown keys stop the start. The environment lies over this file: IMG_SERVING__SERVER__PORT=9000,
# IMG_SERVING__BACKENDS__0__ENDPOINTS=http://a:7860,http://b:7860. ${VAR} in a string is that variable ($${ = a plain ${).
"""

KEY_HEADER: Final = """\
# A key with a name, a role and bounds of its own: a table each, in place of `api_keys = […]`, which then has to go.
#[[auth.api_keys]]"""

BACKENDS_HEADER: Final = """\
# ---- Backends: repeat the table for each. With none, the built-in backend serves every model. ----
#[[backends]]"""


def describe() -> str:
    """The documented default configuration as TOML: it loads, and what it loads to equals the defaults."""
    blocks = [HEADER.rstrip()]
    for field in fields_of(Config):
        table = table_in(field.type)
        if table is not None:
            blocks.append("\n".join(_section(field.encode_name, table, documentation_of(field)[0])))
    blocks.append("\n".join([BACKENDS_HEADER, *_lines(BackendConfig, "backends[].", commented=True)]))
    return "\n\n".join(blocks) + "\n"


def _section(name: str, table: type[Section], description: str) -> Iterator[str]:
    yield f"# {description}"
    yield f"[{name}]"
    yield from _lines(table, f"{name}.", commented=False)
    for field in fields_of(table):
        inner = table_in(field.type)
        if table is Auth and field.name == "api_keys":
            yield f"\n{KEY_HEADER}"
            yield from _lines(KeyConfig, "auth.api_keys[].", commented=True)
        elif inner is not None:
            yield f"\n# {documentation_of(field)[0]} Unset by default."
            yield f"#[{name}.{field.encode_name}]"
            yield from _lines(inner, f"{name}.{field.encode_name}.", commented=True)


def _lines(table: type[Section], prefix: str, *, commented: bool) -> Iterator[str]:
    """Two lines a key: what it is, and its default; an example where it is unset."""
    for field in fields_of(table):
        inner = table_in(field.type)
        if inner is not None and not commented:
            continue  # its own table follows
        description, examples = documentation_of(field)
        key, default = f"{prefix}{field.encode_name}", default_of(field)
        is_unset = default is None or default is msgspec.NODEFAULT
        value = _example(inner, examples) if is_unset or (commented and examples) else default
        choices = f" {expected(field.type).capitalize()}." if _is_choice(field.type) else ""
        later = " Not acted on yet." if key in NOT_YET else ""
        mark = "#" if commented or is_unset or later else ""
        example = f" For example {toml_of(examples[0])}." if examples and value != examples[0] else ""
        yield f"# {description}{choices}{example}{later}"
        yield f"{mark}{field.encode_name} = {toml_of(value)}"


def _example(inner: type[Section] | None, examples: tuple[Any, ...]) -> Any:
    if examples:
        return examples[0]
    if inner is None:
        return {}
    return {one.encode_name: documentation_of(one)[1][0] for one in fields_of(inner)}


def _is_choice(described: inspect.Type) -> bool:
    return any(isinstance(one, inspect.LiteralType) for one in alternatives(described))


def toml_of(value: Any) -> str:
    """A value as TOML, on one line. `None` has no word there: what is None is left out of tables and lists."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_key(key)} = {toml_of(item)}" for key, item in value.items() if item is not None)
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_of(item) for item in value if item is not None)}]"
    return str(value)


def _text(value: str) -> str:
    """A basic string: what JSON escapes, and what only TOML refuses (DEL, lone surrogates) or a terminal obeys."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{_scalar(char):08X}" for char in text)


def _scalar(char: str) -> int:
    return 0xFFFD if 0xD800 <= ord(char) < 0xE000 else ord(char)


def _key(key: str) -> str:
    return key if key.replace("_", "a").replace("-", "a").isalnum() and key.isascii() else _text(key)
