"""Reads the configuration for the commands that need one, and tells what is wrong with it as a usage error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from img_serving.cli.endings import MISUSED, CommandFailed

if TYPE_CHECKING:
    from img_serving.config import Config, Loaded


def read_configuration(named: str | None, *, search: bool = True) -> Loaded:
    """The settings: of the file `named`, else (`search`) of the one that is found, with the environment over them.

    Raises:
        CommandFailed: they cannot be used; the message has everything that is wrong.
    """
    from img_serving.config import ConfigError, find_config_file, load

    try:
        path = find_config_file(named, os.environ, Path.cwd()) if search or named is not None else None
        return load(path, os.environ)
    except ConfigError as error:
        raise CommandFailed(str(error), MISUSED) from error
    except FileNotFoundError as error:  # the current directory itself is gone
        raise CommandFailed(f"the current directory cannot be read: {error.strerror}", MISUSED) from error


def check_backends(config: Config) -> None:
    """Make every adapter once, without using it: only they know the options of their protocols, and read their CA files.

    Raises:
        CommandFailed: one refuses; the message names its backend.
    """
    from img_serving.config import EndpointConfig
    from img_serving.main import make_adapter

    for index, backend in enumerate(config.backends):
        try:
            for endpoint in backend.endpoint_list() or (EndpointConfig(f"{backend.protocol}:", 1, None),):
                make_adapter(backend, endpoint)
        except (OSError, ValueError) as error:
            about = f"{backend.ca_file}: {error.strerror or error}" if isinstance(error, OSError) else str(error)
            raise CommandFailed(f"configuration: backends[{index}] ({backend.name}): {about}", MISUSED) from error
