"""Libraries that keep their words to themselves: no bars, no warnings about a prompt, no telemetry, no network when offline."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Final

from img_serving.domain.errors import StartError

NEEDED: Final = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
TALKATIVE: Final = r"(torch|diffusers|transformers|accelerate|peft|safetensors|huggingface_hub|tokenizers)(\.|$)"


def import_libraries(*, offline: bool) -> None:
    """Import torch and diffusers, told beforehand to be quiet, and offline if need be.

    Raises:
        StartError: something is not installed; the message says how it would be.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise StartError(
            f"the diffusers engine needs {', '.join(missing)}: install img-serving with its extra `diffusers`"
        )
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn when the process forks
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
        if "huggingface_hub" in sys.modules:  # it has read the environment already
            sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE = True
    with hushed():
        import diffusers
        import transformers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Nothing that these libraries warn of is shown."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=TALKATIVE)
        # warnings that blame their caller, which is us
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
