"""`img-serving version`."""

from __future__ import annotations

import argparse

from img_serving import __version__
from img_serving.cli.endings import OK
from img_serving.cli.usage import Commands


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Tell argparse about the command."""
    commands.add_parser("version", help="show the version").set_defaults(run=run)


def run(args: argparse.Namespace) -> int:  # noqa: ARG001 - a command's shape
    """Show it."""
    print(f"img-serving {__version__}")
    return OK
