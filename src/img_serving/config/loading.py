"""From a file and an environment to a `Config`: which file, what lies over it, and what the log should say about it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from img_serving.config.environment import overlay, substitute
from img_serving.config.moved import foreign_notes
from img_serving.config.problems import ConfigError, KeyPath, Problem, nearest, path_text
from img_serving.config.reader import Reader
from img_serving.config.settings import Config

CONFIG_VARIABLE: Final = "IMG_SERVING_CONFIG"
DEFAULT_FILE: Final = Path("config") / "default.toml"

MOST_BYTES: Final = 16 * 2**20
"""A configuration is smaller than that."""

NOT_YET: Final[Mapping[str, str]] = {
    "storage.signed_urls": "URLs carry no signature",
    "backends[].cut_through": "a picture is passed on when it is complete",
}
"""Keys that the interface fixes and this version does not act on, with what happens instead."""

YAML_SUFFIXES: Final = frozenset({".yaml", ".yml"})

_POSITION = re.compile(r"^(?P<reason>.*) \(at line (?P<line>\d+), column (?P<column>\d+)\)$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load` made: the settings, the file they came from (None: no file), and warnings for the log."""

    config: Config
    source: Path | None
    notes: tuple[str, ...] = ()


def find_config_file(cli_value: str | None, environ: Mapping[str, str], cwd: Path) -> Path | None:
    """The file to read: `--config`, else `IMG_SERVING_CONFIG`, else `./config/default.toml`, else None.

    Raises:
        ConfigError: a file that was named is not there.
    """
    named, source = (
        (cli_value, "--config") if cli_value is not None else (environ.get(CONFIG_VARIABLE), CONFIG_VARIABLE)
    )
    if not named and cli_value is None:
        default = cwd / DEFAULT_FILE
        return default if _is_there(default) else None
    path = cwd / (named or "")
    if not named or not _is_there(path):
        raise ConfigError([Problem("", f'there is no file "{named}"', source)])
    return path


def load(path: Path | None, environ: Mapping[str, str]) -> Loaded:
    """The settings of that file (None: the defaults), with the environment laid over them.

    Raises:
        ConfigError: with everything that is wrong.
    """
    file = "" if path is None else str(path)
    problems: list[Problem] = []

    def refuse(where: KeyPath, message: str, source: str) -> None:
        problems.append(Problem(path_text(where), message, source or file))

    written = {} if path is None else _parse_file(path)
    data: dict[str, Any] = substitute(written, environ, refuse)
    origins = overlay(data, Config, environ, refuse)
    reader = Reader()
    config = reader.table(Config, data, ())
    said = {problem.path for problem in problems}
    for where, message in reader.found:
        if path_text(where) not in said:
            problems.append(Problem(path_text(where), message, _source_of(where, origins, written, file)))
    if config is None or problems:
        raise ConfigError(problems)
    beside = DEFAULT_FILE.parent if path is None else path.parent
    notes = (
        *_not_yet_notes(data, origins, file),
        *_routing_notes(config),
        *_idle_notes(config),
        *foreign_notes(environ, beside),
    )
    return Loaded(config, path, notes)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # somewhere that we may not look: reading it says so properly
        return True


def _parse_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)  # a device has no size, and perhaps no end
        if len(content) > MOST_BYTES:
            raise ConfigError([Problem("", f"has more than {MOST_BYTES // 2**20} MiB", str(path))])
        text = content.decode("utf-8-sig")
        return tomllib.loads(text)
    except OSError as error:
        raise ConfigError([Problem("", f"cannot be read: {error.strerror or error}", str(path))]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("", f"is not UTF-8 (byte {error.start})", str(path))]) from error
    except RecursionError as error:
        raise ConfigError([Problem("", "is nested too deep", str(path))]) from error
    except ConfigError:
        raise  # which is a ValueError, too
    except ValueError as error:  # the TOML error is one, and so is a number of thousands of digits
        raise ConfigError([_syntax_problem(str(error), path)]) from error


def _syntax_problem(reason: str, path: Path) -> Problem:
    if path.suffix.lower() in YAML_SUFFIXES:
        return Problem("", "is YAML by its name, and the configuration is TOML", str(path))
    if found := _POSITION.match(reason):
        return Problem("", f"line {found['line']}, column {found['column']}: {found['reason']}", str(path))
    return Problem("", f"is not TOML: {reason}", str(path))


def _source_of(where: KeyPath, origins: Mapping[KeyPath, str], written: Mapping[str, Any], file: str) -> str:
    """The variable that gave the key or a table around it, else the file; for what is missing, who began its table."""
    for length in range(len(where), 0, -1):
        if (variable := origins.get(where[:length])) is not None:
            return variable
    if not file or not _has(written, where[:2]):
        begun = [variable for path, variable in origins.items() if path[: len(where[:2])] == where[:2]]
        return begun[0] if begun else file
    return file


def _has(written: Any, where: KeyPath) -> bool:
    for part in where:
        if isinstance(part, int):
            if not isinstance(written, list) or part >= len(written):
                return False
        elif not isinstance(written, dict) or part not in written:
            return False
        written = written[part]
    return True


def _keys_set(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key that somebody set, tables before what is in them."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, item in pairs:
        if item is not None:
            yield (*path, part)
            yield from _keys_set(item, (*path, part))


def _not_yet_notes(data: Mapping[str, Any], origins: Mapping[KeyPath, str], file: str) -> Iterator[str]:
    for path in _keys_set(data):
        reason = NOT_YET.get(
            path_text(tuple("[]" if isinstance(part, int) else part for part in path)).replace(".[]", "[]")
        )
        if reason is not None:
            source = _source_of(path, origins, data, file)
            yield f"{path_text(path)} is set ({source}), but this version does not act on it yet: {reason}"


def _routing_notes(config: Config) -> Iterator[str]:
    wanted, names = config.routing.default_backend, [backend.name for backend in config.backends]
    if wanted is None or wanted in names or (not names and wanted == "procedural"):
        return
    near = nearest(wanted, names)
    hint = f" (did you mean `{near}`?)" if near else ""
    yield f"routing.default_backend: no backend here is named `{wanted}`{hint}; it counts once one is added over the API"


def _idle_notes(config: Config) -> Iterator[str]:
    """Settings that are right one by one and have no effect together."""
    names = {backend.name for backend in config.backends} or {"procedural"}
    for index, key in enumerate(config.auth.api_keys):
        if not isinstance(key, str):
            unknown = sorted(set(key.backends or ()) - names)
            if unknown:
                yield f"auth.api_keys[{index}].backends: no backend here is named {', '.join(unknown)}"
            if key.webhook_url is not None and not config.webhooks.enabled:
                yield f"auth.api_keys[{index}].webhook_url is set, but webhooks.enabled is false: nothing is called"
    if config.auth.enabled and config.auth.api_keys and all(key.role != "admin" for key in config.auth.key_list()):
        yield "auth.api_keys: none is an admin key, so nobody may look at the queue or change backends"
    if config.retry.hedge_after_factor is not None and not any(backend.cheap for backend in config.backends):
        yield "retry.hedge_after_factor is set, but no backend is `cheap`: nothing is hedged"
    for index, backend in enumerate(config.backends):
        if backend.max_wait_ms and backend.max_batch_size == 1:
            yield f"backends[{index}].max_wait_ms is set, but its batches hold one picture: nothing lingers"
    longest = config.queue.max_wait_seconds
    if longest is not None and longest >= config.queue.request_timeout_seconds:
        yield "queue.max_wait_seconds is not below queue.request_timeout_seconds: the deadline comes first"
