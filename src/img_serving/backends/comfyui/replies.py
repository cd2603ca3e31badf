"""ComfyUI's replies, read: what it has, what it made of a prompt, and what it complains about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, TypeVar
from urllib.parse import urlencode

import msgspec

from img_serving.domain.errors import AttemptError, Outcome

_VERSION: Final = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")
_PROMPT_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_VERSION_TEXT: Final = re.compile(r"[A-Za-z0-9.+_-]{1,40}")

Kind = TypeVar("Kind")

FIRST_WITH_TARGETED_INTERRUPT: Final = (0, 3, 57)
"""From here on `/interrupt` heeds a `prompt_id` (ComfyUI commit 464ba1d6, 2025-09-02); older servers stop whatever runs."""


class NotComfyUI(ValueError):
    """A complete reply of another shape than ComfyUI's."""


class Accepted(msgspec.Struct, frozen=True):
    """The reply to a prompt that was put into the queue. Servers of 2023 give it an id of their own."""

    prompt_id: str
    node_errors: Any = None


class Picture(msgspec.Struct, frozen=True):
    """Where a picture is."""

    filename: str
    subfolder: str = ""
    type: str = "output"

    @property
    def path(self) -> str:
        """What to GET."""
        query = {"filename": self.filename, "subfolder": self.subfolder, "type": self.type}
        return f"/view?{urlencode(query)}"


class _Output(msgspec.Struct, frozen=True):
    images: list[Picture] = []


class _Status(msgspec.Struct, frozen=True):
    status_str: str = "success"
    completed: bool = True
    messages: list[Any] = []


class Record(msgspec.Struct, frozen=True):
    """What the history has of a prompt: it is there once the prompt is over. Servers of 2023 tell no status."""

    outputs: dict[str, msgspec.Raw] = {}
    status: _Status | None = None

    def picture(self, node: str) -> Picture | None:
        """The first picture of a node; None if it gave none."""
        raw = self.outputs.get(node)
        try:
            images = msgspec.json.decode(raw, type=_Output).images if raw is not None else []
        except ValueError:
            return None
        return images[0] if images else None

    def failure(self) -> str | None:
        """Why it was not drawn, **unredacted**; None if it was. Neither inputs nor tracebacks are in it."""
        if self.status is None or (self.status.completed and self.status.status_str == "success"):
            return None
        for message in self.status.messages:
            if not (isinstance(message, list) and len(message) == 2 and isinstance(message[1], dict)):
                continue
            event, data = message
            if event == "execution_interrupted":
                return "interrupted at the server"
            if event == "execution_error":
                kind = str(data.get("exception_type", "")).rpartition(".")[2]
                said = str(data.get("exception_message", "")).strip()
                return f"{data.get('node_type', 'a node')} failed: {': '.join(one for one in (kind, said) if one)}"
        return "it failed, and the server does not say why"


class Upload(msgspec.Struct, frozen=True):
    """Where an uploaded file went."""

    name: str
    subfolder: str = ""
    type: str = "input"

    @property
    def annotated(self) -> str:
        """As nodes that load pictures take it."""
        return f"{self.subfolder}/{self.name} [{self.type}]".removeprefix("/")


class _Waiting(msgspec.Struct, frozen=True):
    queue_running: list[list[msgspec.Raw]] = []
    queue_pending: list[list[msgspec.Raw]] = []


class Queued(msgspec.Struct, frozen=True):
    """A prompt in the queue: `ahead` others come before it (0 and `is_running`: it is being drawn)."""

    prompt_id: str
    ahead: int
    is_running: bool


class Fault(msgspec.Struct, frozen=True):
    """One complaint about a prompt. `node` and `name` say where ("" where it is about the whole)."""

    kind: str
    message: str
    node: str = ""
    name: str = ""


class _Stats(msgspec.Struct, frozen=True):
    system: dict[str, Any]


_ACCEPTED = msgspec.json.Decoder(Accepted)
_HISTORY = msgspec.json.Decoder(dict[str, Record])
_WAITING = msgspec.json.Decoder(_Waiting)
_UPLOAD = msgspec.json.Decoder(Upload)
_STATS = msgspec.json.Decoder(_Stats)


def read_accepted(body: bytes | bytearray) -> Accepted:
    """Raises NotComfyUI, also for an id that could not be asked after: it goes into paths."""
    accepted = _decode(_ACCEPTED, body)
    if not _PROMPT_ID.fullmatch(accepted.prompt_id):
        raise NotComfyUI
    return accepted


def read_upload(body: bytes | bytearray) -> Upload:
    """Raises NotComfyUI."""
    return _decode(_UPLOAD, body)


def read_record(body: bytes | bytearray, prompt_id: str) -> Record | None:
    """The prompt's record; None while it is not over, or unknown. Raises NotComfyUI."""
    return _decode(_HISTORY, body).get(prompt_id)


def find_queued(body: bytes | bytearray, prompt_id: str, client_id: str) -> Queued | None:
    """Our prompt in a reply of `/queue`: by its id, or by ours, where the server gave it an id of its own.

    Raises:
        NotComfyUI: it is no queue.
    """
    waiting = _decode(_WAITING, body)
    try:
        running = [_ids(item) for item in waiting.queue_running]
        # a heap: sorted only by number, which is the order they are drawn in
        pending = [_ids(item) for item in sorted(waiting.queue_pending, key=lambda item: float(bytes(item[0])))]
    except (ValueError, IndexError, TypeError):
        raise NotComfyUI from None
    for ahead, (one, client) in enumerate([*running, *pending]):
        if one == prompt_id or (client is not None and client == client_id):
            is_running = ahead < len(running)
            return Queued(one, 0 if is_running else ahead, is_running)
    return None


def is_nothing_to_cancel(body: bytes | bytearray) -> bool:
    """Whether the reply to a job's cancellation says that there is no such job, or that it is over."""
    try:
        document = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return True
    return not (isinstance(document, dict) and document.get("cancelled") is True)


def read_choices(body: bytes | bytearray, node: str, name: str) -> tuple[str, ...] | None:
    """What may be chosen for an input, from `/object_info/<node>`; both shapes of a choice are known. None: it does not say."""
    try:
        found = msgspec.json.decode(body)[node]["input"]["required"][name]
        choices = found[1]["options"] if found[0] == "COMBO" else found[0]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    if not isinstance(choices, list):
        return None
    return tuple(one for one in choices if isinstance(one, str))


def read_version(body: bytes | bytearray) -> str | None:
    """The version from `/system_stats`; "" where it is ComfyUI that does not tell, None where it is something else."""
    try:
        system = _STATS.decode(body).system
    except (ValueError, RecursionError):
        return None
    version = system.get("comfyui_version", "")
    return version if isinstance(version, str) and _VERSION_TEXT.fullmatch(version) else ""


def heeds_interrupted_id(version: str) -> bool:
    """Whether a server of this version interrupts the prompt that it is told and no other."""
    found = _VERSION.match(version)
    return found is not None and tuple(int(part) for part in found.groups()) >= FIRST_WITH_TARGETED_INTERRUPT


def faults_in(document: Any) -> list[Fault]:
    """What a 400 complains about, the nodes first; [] where it is not ComfyUI's."""
    if not isinstance(document, dict):
        return []
    faults = list(_node_faults(document.get("node_errors")))
    error = document.get("error")
    if isinstance(error, dict) and isinstance(error.get("type"), str) and "extra_info" in error:
        faults.append(Fault(error["type"], _joined(error)))
    return faults


def _node_faults(nodes: Any) -> Iterator[Fault]:
    """Without any it is a list in older versions."""
    for node, found in nodes.items() if isinstance(nodes, dict) else ():
        errors = found.get("errors") if isinstance(found, dict) else None
        for error in errors if isinstance(errors, list) else ():
            if isinstance(error, dict):
                extra = error.get("extra_info")
                name = extra.get("input_name") if isinstance(extra, dict) else None
                name = name if isinstance(name, str) else ""
                where = f"{found.get('class_type', 'node')}{'.' if name else ''}{name}"
                yield Fault(str(error.get("type", "")), f"{where}: {_joined(error)}", str(node), name)


def lost_outputs(accepted: Accepted) -> frozenset[str]:
    """Output nodes of an accepted prompt that will not run, for what they depend on was refused."""
    nodes = accepted.node_errors
    found = nodes.values() if isinstance(nodes, dict) else ()
    lists = (one.get("dependent_outputs") for one in found if isinstance(one, dict))
    return frozenset(str(node) for nodes in lists if isinstance(nodes, list) for node in nodes)


def _joined(error: dict[str, Any]) -> str:
    parts = [part for name in ("message", "details") if isinstance(part := error.get(name), str) and part]
    if len(parts) == 2 and parts[0] == parts[1]:
        parts.pop()
    return f"{parts[0]} ({parts[1]})" if len(parts) == 2 else "".join(parts)


def _ids(item: list[msgspec.Raw]) -> tuple[str, str | None]:
    extra = msgspec.json.decode(item[3]) if len(item) > 3 else None
    client = extra.get("client_id") if isinstance(extra, dict) else None
    prompt_id = msgspec.json.decode(item[1], type=str)
    return prompt_id if _PROMPT_ID.fullmatch(prompt_id) else "", client if isinstance(client, str) else None


def _decode(decoder: msgspec.json.Decoder[Kind], body: bytes | bytearray) -> Kind:
    try:
        return decoder.decode(body)
    except (ValueError, RecursionError):
        raise NotComfyUI from None


def not_comfyui(path: str) -> AttemptError:
    """The error for a complete reply that is not ComfyUI's."""
    return AttemptError(Outcome.FAILED, f"the backend's reply to {path} is not ComfyUI's (bad JSON or another shape)")
