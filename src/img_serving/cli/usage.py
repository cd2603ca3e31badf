"""What the commands share towards argparse: a parser that keeps examples as written, and checks of single values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

Commands = argparse._SubParsersAction  # the class has no public name
"""What `register` of a command adds itself to."""

_SIZE = re.compile(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}")


class Parser(argparse.ArgumentParser):
    """Options are never abbreviated (a new one would change what an old script means); texts keep their lines."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs})


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number from `least` to `most`, both inclusive."""

    def check(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least or (most is not None and number > most):
            bounds = f"from {least} to {most}" if most is not None else f"{least} or more"
            raise argparse.ArgumentTypeError(f"{number} is out of bounds: it must be {bounds}")
        return number

    return check


def number(text: str) -> float:
    """A finite number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is out of bounds: it must be 0 or more")
    return value


def seconds_above_zero(text: str) -> float:
    """A finite number of seconds above zero."""
    value = number(text)
    if not value:
        raise argparse.ArgumentTypeError("it must be above 0")
    return value


def words(text: str) -> str:
    """Text that is not blank, and that can travel as UTF-8."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not valid text in this terminal's encoding") from None
    return text


def size(text: str) -> str:
    """WIDTHxHEIGHT in pixels, or "auto"."""
    if text != "auto" and not _SIZE.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: it must be WIDTHxHEIGHT with sides of 1 to 99999 pixels, such as 1024x1024, or auto"
        )
    return text


def add_gateway_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that talks to a running gateway."""
    group = parser.add_argument_group("the gateway")
    group.add_argument(
        "--url", help="where it listens (default: $IMG_SERVING_URL, else http://localhost:8080)", metavar="URL"
    )
    group.add_argument(
        "--api-key",
        help="its API key (default: $IMG_SERVING_API_KEY, else the line IMG_SERVING_API_KEY= in ./.env)",
        metavar="KEY",
    )
