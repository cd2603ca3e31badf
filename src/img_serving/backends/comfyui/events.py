"""What ComfyUI says over its websocket, read for one prompt: how far it is, unfinished pictures, and that it is over."""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import Any, Final

import msgspec

from img_serving.domain.images import MediaType
from img_serving.media.sniff import sniff

FEATURE_FLAGS: Final = '{"type":"feature_flags","data":{"supports_preview_metadata":true}}'
"""Asks for previews that name their prompt. Counts only as the first message of a connection."""

MAX_FRAME_BYTES: Final = 32 * 1024 * 1024

_PREVIEW, _PREVIEW_WITH_METADATA = 1, 4
_WORD: Final = Struct(">I")
_ENDS: Final = frozenset({"execution_success", "execution_error", "execution_interrupted"})
_TOLD: Final = frozenset({"execution_start", "executing", "progress"})
"""Events worth a report. `progress_state` says the same as `progress`, with all nodes each time."""


class _Data(msgspec.Struct, frozen=True):
    """What the events that matter carry. `node` is null, and there, where the prompt is over."""

    prompt_id: str | None = None
    node: str | int | msgspec.UnsetType | None = msgspec.UNSET
    value: float | None = None
    max: float | None = None


class _ExecInfo(msgspec.Struct, frozen=True):
    queue_remaining: int


class _QueueStatus(msgspec.Struct, frozen=True):
    exec_info: _ExecInfo


class _Status(msgspec.Struct, frozen=True):
    status: _QueueStatus


class _Event(msgspec.Struct, frozen=True):
    type: str
    data: msgspec.Raw = msgspec.Raw(b"{}")


class _Metadata(msgspec.Struct, frozen=True):
    prompt_id: str | None = None


_EVENT = msgspec.json.Decoder(_Event)
_STATUS = msgspec.json.Decoder(_Status)
_DATA = msgspec.json.Decoder(_Data)
_METADATA = msgspec.json.Decoder(_Metadata)


class News(msgspec.Struct, frozen=True):
    """What one frame says of our prompt: a sign of life in any case.

    `done` of `total` steps (0 of 0: not known yet). `is_over`: it ended, one way or the other.
    """

    done: int = 0
    total: int = 0
    preview: tuple[bytes, MediaType] | None = None
    is_over: bool = False


class Watch:
    """Reads the frames of one connection for one prompt. Others' prompts, and what is nobody's, are left out.

    The server sends us what our own prompt does, and what others' do that gave no client id: so every event is held against
    `prompt_id`, and what names no prompt (previews of the older kind) is ours only while ours runs.
    """

    def __init__(self, prompt_id: str, expected: Mapping[str, int], *, previews: bool) -> None:
        """`expected` names the nodes that draw and the steps of each; `previews`: unfinished pictures are wanted."""
        self.prompt_id = prompt_id
        self.is_running = False
        self.has_started = False
        self.is_over = False
        self.is_idle = False
        """The server last said that it has nothing to do, which is no news of ours."""
        self._previews = previews
        self._totals = dict(expected)
        self._counts_all = not expected
        self._done: dict[str, int] = {}
        self._told = (0, sum(expected.values()))

    def __repr__(self) -> str:
        state = "over" if self.is_over else "running" if self.is_running else "waiting"
        return f"<Watch {self.prompt_id}: {state}, {self._told[0]}/{self._told[1]}>"

    def take(self, frame: str | bytes) -> News | None:
        """What a frame says of our prompt; None if nothing. Frames that cannot be read say nothing."""
        if isinstance(frame, bytes):
            return self._binary(frame)
        try:
            event = _EVENT.decode(frame)
            if event.type == "status":
                self.is_idle = not _STATUS.decode(event.data).status.exec_info.queue_remaining
                return None
            data = _DATA.decode(event.data) if event.type in _ENDS or event.type in _TOLD else None
        except (ValueError, RecursionError):
            return None
        if data is None:
            return None
        if data.prompt_id is None:
            # the oldest servers name no prompt with their progress, and none do with the node that a new connection is told
            return self._progress(data) if self.is_running and event.type == "progress" else None
        if data.prompt_id != self.prompt_id:
            self.is_running = False  # one runs at a time
            return None
        if event.type in _ENDS or (event.type == "executing" and data.node is None):
            self.is_running, self.is_over = False, True
            return self._news(is_over=True)
        self.is_running = self.has_started = True
        return self._progress(data) if event.type == "progress" else self._news()

    def _progress(self, data: _Data) -> News:
        node = str(data.node)
        if data.value is not None and data.max and (self._counts_all or node in self._totals):
            self._totals[node] = int(data.max)
            self._done[node] = min(int(data.value), int(data.max))
            done, total = sum(self._done.values()), sum(self._totals.values())
            if done * max(1, self._told[1]) >= self._told[0] * total:
                self._told = (done, total)  # never backwards, also where another node begins to count
        return self._news()

    def _news(self, **more: Any) -> News:
        return News(*self._told, **more)

    def _binary(self, frame: bytes) -> News | None:
        if not self._previews or len(frame) < 8:
            return None
        kind, word = _WORD.unpack_from(frame)[0], _WORD.unpack_from(frame, 4)[0]
        start = 8
        if kind == _PREVIEW_WITH_METADATA:
            start += word
            try:
                prompt_id = _METADATA.decode(frame[8:start]).prompt_id
            except (ValueError, RecursionError):
                return None
            if prompt_id is not None and prompt_id != self.prompt_id:
                return None
            if prompt_id is None and not self.is_running:
                return None
        elif kind != _PREVIEW or not self.is_running:
            return None
        picture = frame[start:]
        media_type = sniff(picture)
        return None if media_type is None else self._news(preview=(picture, media_type))
