"""The command line: finds the command, runs it, and turns every ending into an exit code and at most one clear message.

What a command needs is imported when it runs: `--help` and `version` load nothing but the standard library.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from img_serving import __version__
from img_serving.cli import (
    backends,
    check_config,
    generate,
    health,
    jobs,
    queue,
    serve,
    simulate,
    version,
    webhooks,
    worker,
)
from img_serving.cli.endings import FAILED, INTERRUPTED, OK, CommandFailed, say
from img_serving.cli.usage import Parser

PROGRAM = "img-serving"
COMMANDS = (serve, generate, backends, jobs, queue, webhooks, worker, check_config, health, simulate, version)
"""One module a command: its `register` tells argparse about it, and names the function that runs it."""

EXAMPLES = """\
examples:
  img-serving                                   start the gateway on port 8080 (the same as `serve`)
  img-serving --port 9000                       … on another port
  img-serving generate "a red fox" -o fox.png   draw a picture with a running gateway
  img-serving generate "a red fox" --local      … without one
  img-serving jobs follow job_0123abcd          how far a job is, until its end
  img-serving queue --watch                     what waits, for whom and how long
  img-serving worker --help                     serve a model of your own to a gateway
  img-serving simulate --help                   … and what would, with other GPUs
  img-serving check-config                      is the configuration right?
  img-serving health                            is the gateway ready?

exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        # a prompt or a path may hold what the terminal's encoding does not have
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except CommandFailed as failure:
        say(f"error: {failure}")
        return failure.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        return FAILED
    return code


def _run(words: list[str]) -> int:
    try:
        args = _parser().parse_args(_with_default_command(words))
    except SystemExit as ending:  # argparse has said what there is to say
        return ending.code if isinstance(ending.code, int) else OK
    code: int = args.run(args)
    return code


def _with_default_command(words: list[str]) -> list[str]:
    """`img-serving --port 9000` is `img-serving serve --port 9000`."""
    if not words or (words[0].startswith("-") and words[0] not in {"-h", "--help", "--version"}):
        return ["serve", *words]
    return words


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="One OpenAI-compatible gateway in front of many image-generation backends.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.register(commands)
    return parser


def _close_stdout() -> None:
    """Whoever read our output has left (`| head`): let the interpreter's last flush go nowhere."""
    with suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


__all__ = ["main"]
