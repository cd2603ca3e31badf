"""Asks for one picture with the official Python client as it comes, but for its retries, and tells what came of it as JSON."""

from __future__ import annotations

import json
import sys
import time

import openai


def main(url: str, key: str, model: str, prompt: str) -> None:
    """One line on standard output."""
    begun = time.monotonic()
    told: dict[str, object] = {"status": 0, "first_seconds": 0, "picture": "", "error": ""}
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        reply = client.images.generate(model=model, prompt=prompt, size="32x32", response_format="b64_json")
        told |= {"status": 200, "picture": reply.data[0].b64_json if reply.data else ""}
    except openai.OpenAIError as error:
        told["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps({**told, "seconds": time.monotonic() - begun}))


if __name__ == "__main__":
    main(*sys.argv[1:5])
