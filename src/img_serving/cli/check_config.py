"""`img-serving check-config`: whether the configuration can be used, what it amounts to, and what it could say."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from img_serving.cli.configuration import check_backends, read_configuration
from img_serving.cli.endings import OK, printable
from img_serving.cli.usage import Commands

if TYPE_CHECKING:
    from img_serving.config import BackendConfig, Config

EXAMPLES = """\
examples:
  img-serving check-config
  img-serving check-config --config production.toml --show
  img-serving check-config --defaults > config/default.toml
"""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Tell argparse about the command."""
    parser = commands.add_parser("check-config", help="check the configuration without starting", epilog=EXAMPLES)
    parser.add_argument(
        "--config",
        help="the file (default: $IMG_SERVING_CONFIG, else ./config/default.toml, else the defaults)",
        metavar="FILE",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--show", action="store_true", help="show every setting as it will be used; secrets are masked")
    shown.add_argument("--defaults", action="store_true", help="show a documented file with every default, and stop")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check and summarise.

    Raises:
        CommandFailed: the configuration cannot be used; the message has everything that is wrong.
    """
    from img_serving.config import describe

    if args.defaults:
        print(describe(), end="")
        return OK
    loaded = read_configuration(args.config)
    check_backends(loaded.config)
    if args.show:
        print(f"# {loaded.source or 'the defaults'}, with the environment over it; *** stands for a secret")
        print("\n".join(_toml_of(loaded.config)))
        return OK
    print(f"OK: {printable(str(loaded.source or 'the defaults (no file)'))}")
    for name, text in _summary(loaded.config):
        print(f"  {name:<9} {printable(text)}")
    for note in loaded.notes:
        print(f"note: {printable(note)}")
    return OK


def _summary(config: Config) -> Iterator[tuple[str, str]]:
    server, auth = config.server, config.auth
    host = f"[{server.host}]" if ":" in server.host else server.host
    yield "address", f"http://{host}:{server.port}"
    keys = auth.key_list()
    if not auth.enabled:
        yield "keys", "authentication is off: everybody may do everything"
    elif keys:
        admins = sum(key.role == "admin" for key in keys)
        yield "keys", f"{len(keys)} ({admins} admin, {len(keys) - admins} user)"
    else:
        yield "keys", "none configured: an admin key is made at the first start"
    if not config.backends:
        yield "backends", "none configured: the built-in one serves every model"
    for index, backend in enumerate(config.backends):
        yield "backends" if index == 0 else "", _about(backend)


def _about(backend: BackendConfig) -> str:
    count = len(backend.endpoints)
    endpoints = f", {count} endpoint{'' if count == 1 else 's'}" if count else ""
    return f"{backend.name} ({backend.protocol}{endpoints}{'' if backend.enabled else ', disabled'})"


def _toml_of(config: Config) -> Iterator[str]:
    """The settings as TOML: what is unset is left out."""
    for section, values in _visible(config).items():
        tables = values if isinstance(values, list) else [values]
        for table in tables:
            yield ""
            yield f"[[{section}]]" if isinstance(values, list) else f"[{section}]"
            yield from (f"{key} = {_toml(value)}" for key, value in table.items())


def _visible(value: Any) -> Any:
    """Plain values of a setting, as it lets itself be seen: each table hides its own secrets."""
    from img_serving.config.section import Section

    if isinstance(value, Section):
        names = dict(zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True))
        shown = {names[name]: _visible(item) for name, item in value.__rich_repr__()}
        return {name: item for name, item in shown.items() if item is not None}
    if isinstance(value, Mapping):
        return {str(name): _visible(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_visible(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {_toml(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
