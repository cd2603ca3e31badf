"""What stable-diffusion.cpp's server does with the text of a prompt, on every route it has: kept away from it here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from img_serving.domain.errors import BackendRefusal, InvalidRequest

TEXT_BYTES: Final = 8 * 1024
"""The longest text that is sent.

The server (97d2990) reads prompts with recursive patterns of `std::regex`, which take hundreds of bytes of stack for each
byte: with 8 MiB of stack 32 kB of text end a program that uses them, for everybody; elsewhere a thread has 1 MiB or less.
"""

TAG: Final = "sd_cpp_extra_args"
_FIELDS = "negative_prompt, seed, num_inference_steps, guidance_scale, sampler, scheduler, clip_skip and strength"


def tagged(arguments: Mapping[str, Any]) -> str:
    """The tag that carries arguments to the engine, to be put behind a prompt. The first one counts there: it must be ours.

    No `<` and no line break stands inside it: nothing in a text can end it, and over several lines it is no tag.
    """
    text = json.dumps(arguments, ensure_ascii=False).replace("<", "\\u003c")
    return f"<{TAG}>{text}</{TAG}>"


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that would set the engine's own arguments, round the gateway's limits.

    Raises:
        BackendRefusal: naming the fields of the request to use instead.
    """
    if f"<{TAG}>" in prompt:
        raise BackendRefusal(
            InvalidRequest(f"the prompt must not hold <{TAG}>: use the request's fields {_FIELDS}", param="prompt")
        )


def check_length(name: str, text: str, max_bytes: int = TEXT_BYTES) -> None:
    """Refuse a text that is longer than the server survives.

    Raises:
        BackendRefusal: naming the field and the limit.
    """
    if len(text) * 4 > max_bytes and len(text.encode()) > max_bytes:
        raise BackendRefusal(
            InvalidRequest(f"{name} is too long for this backend: at most {max_bytes} bytes of UTF-8", param=name)
        )
