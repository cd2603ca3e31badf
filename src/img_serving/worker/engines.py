"""Which engine a worker runs: one of ours by name, or a class of your own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from img_serving.domain.errors import StartError
from img_serving.engines.engine import Engine

OURS: Final = ("procedural", "diffusers")
_METHODS: Final = ("load", "capabilities", "generate")


def own_engine(name: str, model: str | None) -> Callable[[], Engine]:
    """The class that `module:Class` or `file.py:Class` names. With a `model` it is made as `Class(model=model)`.

    Raises:
        StartError: there is no such class, or it is no engine.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute:
        raise StartError(
            f"there is no engine {name!r}: it is {' or '.join(OURS)}, or a class of yours as module:Class or file.py:Class"
        )
    module = _module_of(where)
    kind: Any = getattr(module, attribute, None)
    if kind is None:
        classes = [one for one, value in vars(module).items() if inspect.isclass(value) and hasattr(value, "generate")]
        hint = f"; it has {', '.join(classes)}" if classes else ""
        raise StartError(f"{where} has no class {attribute!r}{hint}")
    missing = [method for method in _METHODS if not callable(getattr(kind, method, None))]
    if missing:
        raise StartError(f"{name} is no engine: it has no method {' and no '.join(missing)}")
    if model is None:
        return lambda: _made(kind, name)
    return lambda: _made(kind, name, model=model)


def _made(kind: Any, name: str, **arguments: str) -> Engine:
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise StartError(f"{name} cannot be made with {arguments or 'no arguments'}: {error}") from None
    engine: Engine = kind(**arguments)
    return engine


def _module_of(where: str) -> ModuleType:
    try:
        if where.endswith(".py"):
            return _from_file(Path(where))
        if "" not in sys.path:
            sys.path.insert(0, "")  # a module beside which the command was given
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(f"{error.name}.")):
            raise StartError(f"there is no module {where!r} here or among what is installed") from None
        raise StartError(f"{where} needs the module {error.name!r}, which is not installed") from error
    except (StartError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also one that calls sys.exit() as it is imported
        raise StartError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise StartError(f"there is no file {path}")
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise StartError(f"{path} is no Python file")
    sys.path.insert(0, str(path.parent.resolve()))  # what it imports may lie beside it
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
