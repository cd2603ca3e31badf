"""Calls openai-python as its users do, and tells in JSON what it returned or raised: one file for 1.x, 2.x and 3.x.

Each line of standard input is one call (`tests/support/official_clients.py` writes them), each line of standard output what
came of it. Nothing but the library and the standard library is there.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import sys
import time
from typing import Any

import openai

HEADERS = ("x-stainless-retry-count", "idempotency-key")


def main() -> None:
    """Answer calls until there are no more."""
    for line in sys.stdin:
        call = json.loads(line)
        told = asyncio.run(Calls(call).tell()) if call.get("asynchronous") else Calls(call).tell_at_once()
        write({"told": told})


def write(line: dict[str, Any]) -> None:
    """Tell something: an event as soon as the library gives it out, and in the end how the call went."""
    print(json.dumps(line), flush=True)


class Calls:
    """One call, with a client of its own: `attempts` are the requests that the library made of it."""

    def __init__(self, call: dict[str, Any]) -> None:
        self.call = call
        self.attempts: list[dict[str, Any]] = []
        self.began = time.monotonic()

    def tell_at_once(self) -> dict[str, Any]:
        """With the synchronous client."""
        watched = openai.DefaultHttpxClient(event_hooks={"response": [self.note]})
        with openai.OpenAI(http_client=watched, **self.options()) as client:
            try:
                reply = self.begin(client)
                if self.is_stream:
                    for event in reply:
                        write({"event": event.to_dict()})
                    return self.told()
                return self.told(result=_plain(reply), request_id=getattr(reply, "_request_id", None))
            except Exception as error:  # whatever a user would see
                return self.told(raised=_raised(error))

    async def tell(self) -> dict[str, Any]:
        """With the asynchronous client."""

        async def note(response: Any) -> None:
            self.note(response)

        watched = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note]})
        async with openai.AsyncOpenAI(http_client=watched, **self.options()) as client:
            try:
                reply = self.begin(client)
                reply = await reply if inspect.isawaitable(reply) else reply
                if self.is_stream:
                    async for event in reply:
                        write({"event": event.to_dict()})
                    return self.told()
                return self.told(result=_plain(reply), request_id=getattr(reply, "_request_id", None))
            except Exception as error:  # whatever a user would see
                return self.told(raised=_raised(error))

    @property
    def is_stream(self) -> bool:
        """Whether events are what comes back."""
        return bool(self.call["arguments"].get("stream"))

    def options(self) -> dict[str, Any]:
        """Those of the client itself."""
        return {
            name: self.call[name] for name in ("base_url", "api_key", "max_retries", "timeout") if name in self.call
        }

    def begin(self, client: Any) -> Any:
        """Call the scenario's method."""
        scenario = self.call["scenario"]
        arguments = {name: _file_or_value(value) for name, value in self.call["arguments"].items()}
        extras = {"extra_headers": self.call["headers"], "extra_body": self.call["extensions"] or None}
        if scenario == "generate":
            return client.images.generate(**arguments, **extras)
        if scenario == "edit":
            return client.images.edit(**arguments, **extras)
        if scenario == "variation":
            return client.images.create_variation(**arguments, **extras)
        if scenario == "models":
            return client.models.list()
        if scenario == "model":
            return client.models.retrieve(arguments["model"])
        # what the library has no method for, with its own transport, errors and retries
        options = {"headers": self.call["headers"]}
        if scenario == "get":
            return client.get(arguments["path"], cast_to=object, options=options)
        if scenario == "post":
            return client.post(arguments["path"], cast_to=object, body=arguments["body"], options=options)
        raise ValueError(f"no scenario {scenario}")

    def note(self, response: Any) -> None:
        """Remember one request and the head of its reply."""
        sent = {name: response.request.headers.get(name) for name in HEADERS}
        seconds = time.monotonic() - self.began
        self.attempts.append(
            {"status": response.status_code, "headers": dict(response.headers), "sent": sent, "seconds": seconds}
        )

    def told(self, **what: Any) -> dict[str, Any]:
        """What is written."""
        return {"attempts": self.attempts, "seconds": time.monotonic() - self.began, **what}


def _plain(reply: Any) -> Any:
    """A reply of the library as JSON has it; a page as its list."""
    if hasattr(reply, "to_dict"):
        return reply.to_dict()
    return reply


def _raised(error: Exception) -> dict[str, Any]:
    return {
        "classes": [kind.__name__ for kind in type(error).__mro__],
        "message": str(error),
        "status": getattr(error, "status_code", None),
        "request_id": getattr(error, "request_id", None),
        **{name: getattr(error, name, None) for name in ("code", "param", "type")},
    }


def _file_or_value(value: Any) -> Any:
    """`{"base64": …, "name": …, "type": …}` is a file, without a name its bytes alone; so are those in lists."""
    if isinstance(value, list):
        return [_file_or_value(one) for one in value]
    if not isinstance(value, dict) or "base64" not in value:
        return value
    content = base64.b64decode(value["base64"])
    return (value["name"], content, value["type"]) if "name" in value else content


if __name__ == "__main__":
    main()
