"""`img-serving serve`: reads the configuration and runs the gateway until a signal ends it."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from img_serving.cli.configuration import check_backends, read_configuration
from img_serving.cli.endings import OK, CommandFailed
from img_serving.cli.usage import Commands, whole, words

ENV_FILE_VARIABLE = "IMG_SERVING_ENV_FILE"

EXAMPLES = """\
The configuration is --config, else $IMG_SERVING_CONFIG, else ./config/default.toml, else the defaults; environment
variables such as IMG_SERVING__SERVER__PORT=9000 lie over any of them, and --host and --port over everything.
At the first start with no key configured, an admin key is made and printed once.

examples:
  img-serving serve
  img-serving serve --config production.toml
  img-serving serve --host 127.0.0.1 --port 9000
  IMG_SERVING__AUTH__ENABLED=false img-serving serve --host 127.0.0.1
"""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Tell argparse about the command."""
    parser = commands.add_parser(
        "serve", help="start the gateway (also what happens without a command)", epilog=EXAMPLES
    )
    parser.add_argument("--config", help="the configuration file (TOML)", metavar="FILE")
    parser.add_argument("--host", type=words, help="address to listen on (default 0.0.0.0)")
    parser.add_argument("--port", type=whole(0, 65535), help="port to listen on (default 8080; 0 = any free one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        CommandFailed: it cannot start.
    """
    from img_serving.transport.allocator import tune_allocator

    tune_allocator()  # before anything large is allocated
    with _leaving_on_sigterm():
        return _serve(args)


def _serve(args: argparse.Namespace) -> int:
    loaded = read_configuration(args.config)

    import msgspec

    from img_serving import main
    from img_serving.domain.errors import StartError
    from img_serving.state.sqlite import StateError

    given = {name: value for name in ("host", "port") if (value := getattr(args, name)) is not None}
    config = msgspec.structs.replace(loaded.config, server=msgspec.structs.replace(loaded.config.server, **given))
    env_file = os.environ.get(ENV_FILE_VARIABLE)
    try:
        main.run(
            lambda: main.serve(
                config,
                source=loaded.source,
                notes=loaded.notes,
                env_file=Path(env_file) if env_file else None,
                announce=_announce,
            )
        )
    except (StartError, StateError) as error:
        raise CommandFailed(str(error)) from error
    except (OSError, ValueError):
        check_backends(config)  # says so if an adapter refuses what its backend is configured with
        raise
    return OK


def _announce(line: str) -> None:
    """Shown at once, also in a pipe or a container's log: one of the lines is a key that is shown once."""
    with suppress(OSError):  # whoever read our output has left: no reason to stop serving
        print(line, flush=True)


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM before the server listens to it, or after, ends the program at once, with exit code 0.

    Nothing is drawn at those times, and what is on disk is whole. An exception out of a signal handler could strike anywhere,
    such as in the half-made start of a thread, which then would keep the process from ending.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the handler's shape
        os._exit(OK)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
