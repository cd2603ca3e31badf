"""The clients of the kill soak: what they ask for in which way, what they saw of it, and what they may hold against us."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from calls import Caller, NoAnswer, Reply
from upstreams import REFUSED

from img_serving.backends.multipart import FilePart, encode_form
from img_serving.backends.scripted import picture

Way = Literal["job", "job-edit", "prefer", "prefer-edit", "job-key", "key", "key-edit"]
"""How a picture is asked for: as a job, with `Prefer: respond-async`, or plainly; those with `key` send an Idempotency-Key."""

WAYS: tuple[Way, ...] = get_args(Way)
TERMINAL = frozenset({"succeeded", "failed", "cancelled", "expired"})
SIDE = 32
GENERATIONS, EDITS, JOBS = "/v1/images/generations", "/v1/images/edits", "/v1/jobs"
# Of all that is asked for.
_REFUSED_SHARE, _CANCELLED_SHARE, _HOOK_SHARE, _INLINE_SHARE, _TWO_SHARE = 0.05, 0.05, 0.5, 0.2, 0.2
_POLL_SECONDS = 0.15


@dataclass(eq=False)
class Order:
    """One thing that a client asked for, and what it saw of it. The tag is its prompt and its X-Request-Id."""

    tag: str
    way: Way
    model: str
    n: int = 1
    inline: bool = False
    hook: str | None = None
    job_id: str | None = None
    answer: Reply | None = None
    sent: int = 0
    last: Mapping[str, Any] | None = None
    """The newest record that was seen of the job; once it is terminal, it stays."""
    was_cancelled: bool = False
    faults: list[str] = field(default_factory=list)
    """What must not happen and did, as the client tells it."""

    @property
    def key(self) -> str | None:
        return f"key-{self.tag}" if "key" in self.way else None

    @property
    def is_plain(self) -> bool:
        """Whether its answer is the picture, and not a job."""
        return self.way in {"key", "key-edit"}

    @property
    def is_edit(self) -> bool:
        return self.way.endswith("edit")

    @property
    def is_accepted(self) -> bool:
        """Whether the client was promised something: a 202, or a whole answer to its key."""
        return self.job_id is not None or self.answer is not None

    @property
    def body(self) -> dict[str, Any]:
        """What the plain route takes, but for pictures."""
        fields = {"model": self.model, "prompt": self.tag, "n": self.n, "size": f"{SIDE}x{SIDE}"}
        fields["response_format"] = "b64_json" if self.inline else "url"
        if self.hook is not None and self.way.startswith("prefer"):
            fields["webhook_url"] = self.hook
        return fields

    def input_picture(self) -> bytes:
        """The picture that an edit starts from: no other order has the same."""
        return picture(f"input of {self.tag}", 7, SIDE, SIDE)

    def request(self) -> tuple[str, bytes, dict[str, str]]:
        """Path, body and headers; they say the same whenever it is asked, but a form has a new boundary each time.

        So do the forms of the official clients, whose retries are still the same request.
        """
        headers = {"X-Request-Id": self.tag}
        if self.key is not None:
            headers["Idempotency-Key"] = self.key
        if self.way.startswith("prefer"):
            headers["Prefer"] = "respond-async"
        if self.way in {"prefer-edit", "key-edit"}:
            fields = [(name, str(value)) for name, value in self.body.items()]
            part = FilePart("image", "in.png", "image/png", self.input_picture())
            form, content_type = encode_form(fields, [part])
            return EDITS, form, headers | {"Content-Type": content_type}
        document: dict[str, Any] = self.body
        path = GENERATIONS
        if self.way.startswith("job"):
            path = JOBS
            if self.is_edit:
                document["image"] = f"data:image/png;base64,{base64.b64encode(self.input_picture()).decode()}"
            document = {"operation": "edit" if self.is_edit else "generation", "body": document}
            if self.hook is not None:
                document["webhook_url"] = self.hook
        return path, json.dumps(document).encode(), headers | {"Content-Type": "application/json"}

    def see(self, record: Mapping[str, Any]) -> None:
        """Compare a record with the one seen before: what is over stays as it was."""
        if record.get("id") != self.job_id:
            self.faults.append(f"{self.tag}: asked for {self.job_id} and was shown {record.get('id')}")
            return
        before = self.last
        if before is not None and before["status"] in TERMINAL:
            for name in ("status", "result", "error", "finished_at"):
                if record.get(name) != before.get(name):
                    told = f"{str(before.get(name))[:150]} became {str(record.get(name))[:150]}"
                    self.faults.append(f"{self.tag} ({self.job_id}): {name} of a finished job changed: {told}")
            return
        self.last = record

    @property
    def is_over(self) -> bool:
        """Whether it was seen to end."""
        return self.answer is not None or (self.last is not None and self.last["status"] in TERMINAL)


class Clients:
    """Everybody who asks: they go on, whatever happens to the gateway, until they are told to stop."""

    def __init__(
        self, caller: Caller, hook: str, models: Mapping[str, float], rng: random.Random, seed_text: str
    ) -> None:
        """`models` are the models to ask for, each with its share."""
        self.orders: list[Order] = []
        self.polls = 0
        self.unanswered = 0
        self.stopping = asyncio.Event()
        self._caller = caller
        self._hook = hook
        self._models = models
        self._rng = rng
        self._seed_text = seed_text
        self._made = 0

    async def run(self, count: int) -> None:
        """`count` of them, each one thing at a time."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(count):
                tasks.create_task(self._live())

    async def _live(self) -> None:
        while not self.stopping.is_set():
            order = self._new_order()
            self.orders.append(order)
            if order.key is None:
                await self._ask_once(order)
            else:
                await self._ask_until_answered(order)
            if order.job_id is not None:
                await self._watch(order)
            await self._look_back()

    def _new_order(self) -> Order:
        rng = self._rng
        self._made += 1
        refused = REFUSED if rng.random() < _REFUSED_SHARE else ""
        tag = f"{refused}{self._seed_text}-{self._made}"
        way = rng.choice(WAYS)
        (model,) = rng.choices([*self._models], [*self._models.values()])
        order = Order(tag, way, model)
        order.n = 2 if rng.random() < _TWO_SHARE else 1
        order.inline = rng.random() < _INLINE_SHARE
        hooked = rng.random() < _HOOK_SHARE and not order.is_plain
        order.hook = self._hook if hooked else None
        return order

    async def _ask_once(self, order: Order) -> None:
        """A job without a key: who gets no answer never knows, and must not ask again."""
        while not self.stopping.is_set():
            try:
                reply = await self._send(order)
            except NoAnswer as error:
                if error.was_sent:
                    return
                await self._pause()
                continue
            self._take(order, reply)
            return

    async def _ask_until_answered(self, order: Order) -> None:
        """With a key one may ask until there is an answer; also beyond the end of the load, so that none stays open."""
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                reply = await self._send(order)
            except NoAnswer:
                await self._pause()
                continue
            if reply.is_final:
                self._take(order, reply)
                return
            await self._pause()
        order.faults.append(f"{order.tag}: no answer to {order.key} in two minutes")

    async def _send(self, order: Order) -> Reply:
        order.sent += 1
        path, body, headers = order.request()
        try:
            return await self._caller.call("POST", path, body, headers)
        except NoAnswer:
            self.unanswered += 1
            raise

    def _take(self, order: Order, reply: Reply) -> None:
        if order.is_plain:
            order.answer = reply
            if reply.status not in {200, 400, 502, 504}:
                order.faults.append(f"{order.tag} ({order.way}): answered {reply}")
            return
        if reply.status != 202:
            order.faults.append(f"{order.tag} ({order.way}): not accepted but answered {reply}")
            return
        try:
            record = reply.json
            order.job_id = record["id"]
        except (ValueError, LookupError, TypeError):
            order.faults.append(f"{order.tag}: a 202 without an id: {reply}")
            return
        if reply.headers.get("location") != f"{JOBS}/{order.job_id}":
            order.faults.append(f"{order.tag}: the Location of a 202 is {reply.headers.get('location')!r}")
        order.see(record)

    async def _watch(self, order: Order) -> None:
        """Poll until it is over, or the load is; some are cancelled meanwhile."""
        if self._rng.random() < _CANCELLED_SHARE:
            await asyncio.sleep(self._rng.uniform(0, 0.5))
            await self._look(order, "DELETE")
        while not (order.is_over or order.faults or self.stopping.is_set()):
            await asyncio.sleep(self._rng.uniform(0.5, 1.5) * _POLL_SECONDS)
            await self._look(order, "GET")

    async def _look(self, order: Order, method: str) -> None:
        try:
            reply = await self._caller.call(method, f"{JOBS}/{order.job_id}")
        except NoAnswer:
            self.unanswered += 1
            return
        self.polls += 1
        if reply.status != 200:
            order.faults.append(f"{order.tag}: {method} of the accepted {order.job_id} is {reply}")
            return
        order.was_cancelled |= method == "DELETE"
        order.see(reply.json)

    async def _look_back(self) -> None:
        """At a job that was over some time ago."""
        over = [one for one in self._rng.sample(self.orders, min(8, len(self.orders))) if one.job_id and one.is_over]
        if over:
            await self._look(over[0], "GET")

    async def _pause(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.05, 0.2))
