"""A server that behaves as ComfyUI 0.33.0 and 0.3.64 were seen to, not as documented; it draws with `scripted.picture`."""

from __future__ import annotations

import asyncio
import email
import json
import logging
import re
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
from websockets.frames import Frame, Opcode
from websockets.server import ServerProtocol

from img_serving.backends.scripted import picture
from img_serving.backends.stub_server import Answer, Exchange, StubServer
from img_serving.media.sniff import dimensions

SAMPLERS = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "lms", "uni_pc", "ddim")
SCHEDULERS = ("simple", "sgm_uniform", "karras", "exponential", "normal", "beta")
SILENT = logging.getLogger("tests.fake_comfyui")
"""What our side says is looked at, not what the fake's library does."""

SILENT.setLevel(logging.CRITICAL)

JPEG = bytes.fromhex("ffd8ffe000104a46494600010100000100010000ffd9")
TEXT = {"content-type": "text/plain; charset=utf-8"}

# class → inputs that it needs; a pair is the smallest and largest number
NODES: dict[str, dict[str, Any]] = {
    "CheckpointLoaderSimple": {"ckpt_name": "checkpoints"},
    "CLIPTextEncode": {"text": str, "clip": list},
    "CLIPSetLastLayer": {"stop_at_clip_layer": (-24, -1), "clip": list},
    "EmptyLatentImage": {"width": (16, 16384), "height": (16, 16384), "batch_size": (1, 4096)},
    "KSampler": {
        "model": list, "seed": (0, 2**64 - 1), "steps": (1, 10000), "cfg": (0.0, 100.0), "sampler_name": "samplers",
        "scheduler": "schedulers", "positive": list, "negative": list, "latent_image": list, "denoise": (0.0, 1.0),
    },
    "VAEDecode": {"samples": list, "vae": list},
    "VAEEncode": {"pixels": list, "vae": list},
    "LoadImage": {"image": "files"},
    "LoadImageMask": {"image": "files", "channel": str},
    "ImageScale": {"image": list, "upscale_method": str, "width": (0, 16384), "height": (0, 16384), "crop": str},
    "SetLatentNoiseMask": {"samples": list, "mask": list},
    "PreviewImage": {"images": list},
    "SaveImage": {"images": list, "filename_prefix": str},
}  # fmt: skip
OUTPUTS = ("PreviewImage", "SaveImage")
SOCKETS = {
    "model": "MODEL", "clip": "CLIP", "vae": "VAE", "positive": "CONDITIONING", "negative": "CONDITIONING",
    "latent_image": "LATENT", "samples": "LATENT", "pixels": "IMAGE", "image": "IMAGE", "images": "IMAGE", "mask": "MASK",
}  # fmt: skip
CHOICES = {
    "channel": ("alpha", "red", "green", "blue"),
    "upscale_method": ("nearest-exact", "bilinear", "area", "bicubic", "lanczos"),
    "crop": ("disabled", "center"),
}


class Interrupted(Exception):
    """Somebody asked for it, and a step is over."""


@dataclass(eq=False)
class Job:
    """One prompt in the queue."""

    number: float
    id: str
    graph: dict[str, Any]
    extra: dict[str, Any]
    outputs: list[str]

    @property
    def client_id(self) -> str | None:
        return self.extra.get("client_id")

    @property
    def item(self) -> list[Any]:
        return [self.number, self.id, self.graph, self.extra, self.outputs]


@dataclass(eq=False)
class Socket:
    """One client's websocket."""

    protocol: ServerProtocol
    writer: asyncio.StreamWriter
    wants_metadata: bool = False
    heard: list[Any] = field(default_factory=list)

    def flush(self) -> None:
        data = b"".join(self.protocol.data_to_send())
        if not self.writer.transport.is_closing():
            self.writer.write(data)

    def send(self, frame: str | bytes) -> None:
        if isinstance(frame, str):
            self.protocol.send_text(frame.encode())
        else:
            self.protocol.send_binary(frame)
        self.flush()


class FakeComfyUI(StubServer):
    """One worker, one queue, one history, any number of clients. What goes wrong is the test's to say.

    `drawn` are the graphs that a sampler really worked on; `loads` the checkpoints in the order they were loaded; `stopped`
    the ids of interrupted prompts, with the loop's time.
    """

    def __init__(self, *, port: int = 0, tell: Callable[[Exchange], None] | None = None) -> None:
        super().__init__(port=port, tell=tell)
        # what kind of server it is
        self.version: str | None = "0.33.0"
        self.has_jobs = True
        self.takes_prompt_id = True
        self.heeds_interrupted_id = True
        self.new_choices = False
        self.writes_metadata = True
        self.previews = True
        self.checkpoints = ["sub/tiny-b.safetensors", "tiny-a.safetensors"]
        # what goes wrong
        self.step_seconds = 0.001
        self.starting_seconds = 0.0
        """Between taking a prompt from the queue and forgetting what interrupts came before."""
        self.hangs = False
        self.node_error: str | None = None
        self.gives_nothing = False
        self.websocket = "ok"
        """"refuse" (404), "hang" (no answer to the handshake), "mute" (nothing is ever sent)."""
        self.cut_after: int | None = None
        """Frames after which each websocket is cut."""
        self.spoil: dict[str, Answer] = {}
        """What is answered instead, by path."""
        self.view_manner = ""
        self.file: bytes | None = None
        """Every picture, instead of what was drawn."""
        # what it has and what it did
        self.queue: list[Job] = []
        self.running: Job | None = None
        self.history: dict[str, dict[str, Any]] = {}
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.sockets: dict[str, Socket] = {}
        self.clients: list[str] = []
        self.flags: list[Any] = []
        self.drawn: list[dict[str, Any]] = []
        self.loads: list[str] = []
        self.stopped: list[tuple[str, float]] = []
        self.frees = 0
        self._cache: dict[str, Any] = {}
        self._counter = 0
        self._number = 0
        self._interrupt = False
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    @property
    def posts(self) -> list[Exchange]:
        """The prompts that came in."""
        return [one for one in self.exchanges if one.path == "/prompt" and one.method == "POST"]

    def asked(self, path: str) -> list[Exchange]:
        """The requests to a path."""
        return [one for one in self.exchanges if one.path.partition("?")[0] == path]

    async def start(self) -> None:
        await super().start()
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
            self._worker = None
        await super().stop()

    async def restart(self) -> None:
        """The program ends and starts again: it knows nothing of before."""
        await self.stop()
        self.forget()
        await self.start()

    def forget(self) -> None:
        """Lose queue, history, cache and files for passing use."""
        self.queue.clear()
        self.running = None
        self.history.clear()
        self._cache.clear()
        self.files.clear()

    def submit(self, graph: dict[str, Any], client_id: str | None = None) -> str:
        """Somebody else's prompt. Returns its id."""
        return self._enqueue(graph, str(uuid.uuid4()), {} if client_id is None else {"client_id": client_id}, ["9"])

    def cut(self) -> None:
        """Every websocket breaks, in the middle of whatever it was."""
        for socket in list(self.sockets.values()):
            socket.writer.transport.abort()

    # HTTP

    async def answer(self, exchange: Exchange) -> Answer:
        url = urlsplit(exchange.path)
        path = url.path.removeprefix("/api") if not url.path.startswith("/api/jobs") else url.path
        if path in self.spoil:
            return self.spoil[path]
        if exchange.method == "POST":
            return self._change(path, exchange)
        if path == "/prompt":
            return _json({"exec_info": {"queue_remaining": self._remaining}})
        if path == "/queue":
            running = [self.running.item] if self.running is not None else []
            return _json({"queue_running": running, "queue_pending": [job.item for job in self.queue]})
        if path.startswith("/history/"):
            name = path.removeprefix("/history/")
            return _json({name: self.history[name]} if name in self.history else {})
        if path == "/view":
            return self._view({key: values[0] for key, values in parse_qs(url.query).items()})
        if path == "/system_stats":
            told = {} if self.version is None else {"comfyui_version": self.version}
            return _json({"system": {"os": "linux", **told}, "devices": []})
        if path.startswith("/object_info/"):
            return self._object_info(path.removeprefix("/object_info/"))
        return Answer(404, b"404: Not Found", TEXT)

    def _change(self, path: str, exchange: Exchange) -> Answer:
        if path == "/upload/image":
            return self._upload(exchange)
        try:
            body = exchange.json if exchange.body else {}
        except msgspec.DecodeError:
            return Answer(500, b"500 Internal Server Error\n\nServer got itself in trouble", TEXT)
        if path == "/prompt":
            return self._prompt(body)
        if path == "/queue":
            for one in body.get("delete", []):
                self._delete(one)
            if body.get("clear"):
                self.queue.clear()
                self._tell_status()
            return Answer(200, b"", {"content-type": "application/octet-stream"})
        if path == "/interrupt":
            wanted = body.get("prompt_id") if self.heeds_interrupted_id else None
            if self.running is not None and wanted in {None, self.running.id}:
                self._interrupt = True
            return Answer(200, b"", {"content-type": "application/octet-stream"})
        if path == "/free":
            self.frees += 1
            self._cache.clear()
            return Answer(200, b"", {"content-type": "application/octet-stream"})
        if self.has_jobs and (found := re.fullmatch(r"/api/jobs/([^/]+)/cancel", path)):
            return _json({"cancelled": self._cancel(found[1])})
        return Answer(404, b"404: Not Found", TEXT)

    def _cancel(self, job_id: str) -> bool:
        if self.running is not None and self.running.id == job_id:
            self._interrupt = True
            return True
        return self._delete(job_id)

    def _delete(self, job_id: str) -> bool:
        for job in self.queue:
            if job.id == job_id:
                self.queue.remove(job)
                self._tell_status()
                return True
        return False

    def _prompt(self, body: dict[str, Any]) -> Answer:
        prompt_id = body.get("prompt_id") if self.takes_prompt_id else None
        if prompt_id is None:
            prompt_id = str(uuid.uuid4())
        elif str(uuid.UUID(prompt_id)) != prompt_id:
            return _complaint("invalid_prompt_id", "prompt_id must be a valid UUID")
        if "prompt" not in body:
            return _complaint("no_prompt", "No prompt provided")
        graph = body["prompt"]
        for node, content in graph.items():
            if content["class_type"] not in NODES:
                kind = content["class_type"]
                return _complaint(
                    "missing_node_type", f"Node '{kind}' not found. The custom node may not be installed.", node
                )
        outputs = [node for node, content in graph.items() if content["class_type"] in OUTPUTS]
        if not outputs:
            return _complaint("prompt_no_outputs", "Prompt has no outputs")
        errors = self._node_errors(graph, outputs)
        if errors:
            document = {
                "error": {
                    "type": "prompt_outputs_failed_validation",
                    "message": "Prompt outputs failed validation",
                    "details": "",
                    "extra_info": {},
                },
                "node_errors": errors,
            }
            return Answer(400, msgspec.json.encode(document))
        extra = dict(body.get("extra_data", {}))
        if "client_id" in body:
            extra["client_id"] = body["client_id"]
        self._enqueue(graph, prompt_id, extra, outputs)
        return _json({"prompt_id": prompt_id, "number": self._number, "node_errors": {}})

    def _enqueue(self, graph: dict[str, Any], prompt_id: str, extra: dict[str, Any], outputs: list[str]) -> str:
        self._number += 1
        self.queue.append(Job(self._number, prompt_id, graph, extra, outputs))
        self._tell_status()
        self._wake.set()
        return prompt_id

    def _node_errors(self, graph: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lists = {"checkpoints": self.checkpoints, "samplers": SAMPLERS, "schedulers": SCHEDULERS}
        for node, content in graph.items():
            errors = []
            for name, rule in NODES[content["class_type"]].items():
                value = content["inputs"].get(name)
                if value is None:
                    errors.append(("required_input_missing", "Required input is missing", name, name))
                elif isinstance(value, list):
                    continue
                elif isinstance(rule, tuple) and value < rule[0]:
                    errors.append(
                        ("value_smaller_than_min", f"Value {value} smaller than min of {rule[0]}", name, name)
                    )
                elif isinstance(rule, tuple) and value > rule[1]:
                    errors.append(("value_bigger_than_max", f"Value {value} bigger than max of {rule[1]}", name, name))
                elif rule == "files" and self._loaded(value) is None:
                    errors.append(
                        (
                            "custom_validation_failed",
                            "Custom validation failed for node",
                            f"{name} - Invalid image file: {value}",
                            name,
                        )
                    )
                elif isinstance(rule, str) and rule in lists and value not in lists[rule]:
                    errors.append(
                        (
                            "value_not_in_list",
                            "Value not in list",
                            f"{name}: '{value}' not in {list(lists[rule])}",
                            name,
                        )
                    )
            if errors:
                found[node] = {
                    "errors": [
                        {"type": kind, "message": message, "details": details, "extra_info": {"input_name": name}}
                        for kind, message, details, name in errors
                    ],
                    "dependent_outputs": outputs,
                    "class_type": content["class_type"],
                }
        return found

    def _upload(self, exchange: Exchange) -> Answer:
        head = f"Content-Type: {exchange.headers['content-type']}\r\n\r\n".encode()
        fields: dict[str, Any] = {}
        name = None
        for part in email.message_from_bytes(head + exchange.body).get_payload():
            assert not isinstance(part, str)
            key = part.get_param("name", header="content-disposition")
            fields[str(key)] = part.get_payload(decode=True)
            name = part.get_filename() or name
        if not name or "image" not in fields:
            return Answer(400, b"", {"content-type": "application/octet-stream"})
        place = fields.get("type", b"input").decode(), fields.get("subfolder", b"").decode()
        stem, dot, ending = name.rpartition(".")
        count = 0
        chosen = name
        # the same file is not written twice, another one of its name gets a number
        while self.files.get((*place, chosen), fields["image"]) != fields["image"]:
            count += 1
            chosen = f"{stem} ({count}){dot}{ending}"
        self.files[(*place, chosen)] = fields["image"]
        return _json({"name": chosen, "subfolder": place[1], "type": place[0]})

    def _loaded(self, annotated: str) -> bytes | None:
        found = re.fullmatch(r"(?:(.*)/)?([^/]+?)(?: \[(input|temp|output)\])?", annotated)
        return self.files.get((found[3] or "input", found[1] or "", found[2])) if found else None

    def _view(self, query: dict[str, str]) -> Answer:
        if ".." in query.get("filename", ""):
            return Answer(400, b"", TEXT)
        data = self.files.get((query.get("type", "output"), query.get("subfolder", ""), query.get("filename", "")))
        if data is None:
            return Answer(404, b"", {"content-type": "application/octet-stream"})
        return Answer(200, data, {"content-type": "image/png"}, manner=self.view_manner)

    def _object_info(self, node: str) -> Answer:
        if node not in NODES:
            return _json({})
        required = {name: self._described(name, rule) for name, rule in NODES[node].items()}
        told = {"input": {"required": required}, "python_module": "nodes", "output_node": node in OUTPUTS}
        return _json({node: told})

    def _described(self, name: str, rule: Any) -> list[Any]:
        """An input as `/object_info` has it."""
        if isinstance(rule, tuple):
            kind = "FLOAT" if isinstance(rule[1], float) else "INT"
            return [kind, {"min": rule[0], "max": rule[1]}]
        if rule is list:
            return [SOCKETS[name]]
        if rule == "files":
            return [["example.png"], {"image_upload": True}]
        choices = {"checkpoints": self.checkpoints, "samplers": SAMPLERS, "schedulers": SCHEDULERS, **CHOICES}
        names = choices.get(rule if isinstance(rule, str) else name)
        if names is None:
            return ["STRING", {"multiline": True}]
        return ["COMBO", {"options": list(names)}] if self.new_choices else [list(names), {"tooltip": "…"}]

    # the websocket

    async def upgrade(self, exchange: Exchange, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.websocket == "hang":
            await asyncio.get_running_loop().create_future()
        if self.websocket == "refuse":
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
            return
        if self.websocket == "redirect":
            writer.write(b"HTTP/1.1 307 Elsewhere\r\nlocation: ws://127.0.0.1:1/ws\r\ncontent-length: 0\r\n\r\n")
            return
        protocol = ServerProtocol(max_size=None, logger=SILENT)
        lines = "".join(f"{name}: {value}\r\n" for name, value in exchange.headers.items())
        protocol.receive_data(f"GET {exchange.path} HTTP/1.1\r\n{lines}\r\n".encode())
        (request,) = protocol.events_received()
        protocol.send_response(protocol.accept(request))  # type: ignore[arg-type] # the first event is the request
        sid = parse_qs(urlsplit(exchange.path).query).get("clientId", [uuid.uuid4().hex])[0]
        socket = self.sockets[sid] = Socket(protocol, writer)
        self.clients.append(sid)
        socket.flush()
        try:
            self._send("status", {"status": self._status, "sid": sid}, sid)
            if self.running is not None and self.running.client_id == sid:
                self._send("executing", {"node": "3"}, sid)  # with no prompt id: so it is
            is_first = True
            while data := await reader.read(65536):
                protocol.receive_data(data)
                for event in protocol.events_received():
                    if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                        message = json.loads(bytes(event.data))
                        self.flags.append(message)
                        if is_first and message.get("type") == "feature_flags":
                            socket.wants_metadata = bool(message["data"].get("supports_preview_metadata"))
                            self._send("feature_flags", {"supports_preview_metadata": True}, sid)
                        is_first = False
                socket.flush()
        finally:
            # by its name: a new connection of the same client goes too, as in the real server
            self.sockets.pop(sid, None)

    def _send(self, event: str, data: dict[str, Any], sid: str | None) -> None:
        self._send_frame(json.dumps({"type": event, "data": data}), sid)

    def _send_frame(self, frame: str | bytes, sid: str | None) -> None:
        if self.websocket == "mute":
            return
        for socket in (
            list(self.sockets.values()) if sid is None else [self.sockets[sid]] if sid in self.sockets else []
        ):
            socket.heard.append(frame)
            socket.send(frame)
            if self.cut_after is not None and len(socket.heard) > self.cut_after:
                socket.writer.transport.abort()

    @property
    def _remaining(self) -> int:
        return len(self.queue) + (self.running is not None)

    @property
    def _status(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": self._remaining}}

    def _tell_status(self) -> None:
        self._send("status", {"status": self._status}, None)

    # the worker

    async def _work(self) -> None:
        while True:
            if not self.queue:
                self._wake.clear()
                await self._wake.wait()
                continue
            self.queue.sort(key=lambda one: one.number)
            job = self.running = self.queue.pop(0)
            self._tell_status()
            await asyncio.sleep(self.starting_seconds)
            self._interrupt = False
            messages: list[Any] = []
            outputs: dict[str, Any] = {}
            try:
                await self._execute(job, messages, outputs)
                self._note("execution_success", job, {}, messages)
                status = {"status_str": "success", "completed": True, "messages": messages}
            except (Interrupted, RuntimeError):
                status = {"status_str": "error", "completed": False, "messages": messages}
            await asyncio.sleep(0)
            self.history[job.id] = {"prompt": job.item, "outputs": outputs, "status": status, "meta": {}}
            self.running = None
            self._tell_status()
            if job.client_id is not None:
                self._send("executing", {"node": None, "prompt_id": job.id}, job.client_id)

    def _note(self, event: str, job: Job, data: dict[str, Any], messages: list[Any], *, to_all: bool = False) -> None:
        data = {"prompt_id": job.id, **data, "timestamp": 1795673586433}
        messages.append([event, data])
        if job.client_id is not None or to_all:
            self._send(event, data, job.client_id)

    async def _execute(self, job: Job, messages: list[Any], outputs: dict[str, Any]) -> None:
        sid = job.client_id
        self._note("execution_start", job, {}, messages)
        order = list(dict.fromkeys(node for output in job.outputs for node in _order(job.graph, output)))
        keys = {node: _signature(job.graph, node) for node in order}
        cached = [node for node in order if keys[node] in self._cache]
        self._note("execution_cached", job, {"nodes": cached}, messages)
        for node in order:
            if node in cached:
                if node in job.outputs:
                    outputs[node] = self._cache[keys[node]]
                    self._send_output(job, node, outputs[node])
                continue
            if node not in job.outputs and all(keys[one] in self._cache for one in job.outputs):
                continue  # nobody needs it
            self._send("progress_state", {"prompt_id": job.id, "nodes": {}}, sid)
            if sid is not None:
                self._send("executing", {"node": node, "display_node": node, "prompt_id": job.id}, sid)
            try:
                await self._run(job, node)
            except Interrupted:
                self.stopped.append((job.id, asyncio.get_running_loop().time()))
                data = {"node_id": node, "node_type": job.graph[node]["class_type"], "executed": []}
                self._note("execution_interrupted", job, data, messages, to_all=True)
                raise
            except RuntimeError as error:
                data = {
                    "node_id": node, "node_type": job.graph[node]["class_type"], "executed": [],
                    "exception_message": f"{error}\n", "exception_type": "torch.OutOfMemoryError",
                    "traceback": ["File /secret/place.py"], "current_inputs": {"text": [str(job.graph)]}, "current_outputs": [],
                }  # fmt: skip
                self._note("execution_error", job, data, messages)
                raise
            result = self._save(job, node) if node in job.outputs else True
            self._cache[keys[node]] = result
            if node in job.outputs:
                outputs[node] = result
                self._send_output(job, node, result)

    def _send_output(self, job: Job, node: str, output: Any) -> None:
        if job.client_id is not None:
            data = {"node": node, "display_node": node, "output": output, "prompt_id": job.id}
            self._send("executed", data, job.client_id)

    async def _run(self, job: Job, node: str) -> None:
        kind, inputs = job.graph[node]["class_type"], job.graph[node]["inputs"]
        self._heed()
        if kind == "CheckpointLoaderSimple":
            self.loads.append(inputs["ckpt_name"])
        if kind != "KSampler":
            return
        self.drawn.append(job.graph)
        steps = inputs["steps"]
        for step in range(1, steps + 1):
            while self.hangs:
                await asyncio.sleep(0.001)
                self._heed()
            await asyncio.sleep(self.step_seconds)
            self._heed()
            if self.node_error is not None and step == min(2, steps):
                raise RuntimeError(self.node_error)
            self._send(
                "progress_state", {"prompt_id": job.id, "nodes": {node: {"value": step, "max": steps}}}, job.client_id
            )
            if self.previews or job.extra.get("preview_method", "none") != "none":
                self._send_preview(job, node)
            self._send("progress", {"value": step, "max": steps, "prompt_id": job.id, "node": node}, job.client_id)

    def _send_preview(self, job: Job, node: str) -> None:
        sid = job.client_id
        socket = self.sockets.get(sid) if sid is not None else None
        if socket is not None and socket.wants_metadata:
            metadata = json.dumps({"node_id": node, "prompt_id": job.id, "image_type": "image/jpeg"}).encode()
            self._send_frame(struct.pack(">II", 4, len(metadata)) + metadata + JPEG, sid)
        else:
            self._send_frame(struct.pack(">II", 1, 1) + JPEG, sid)

    def _heed(self) -> None:
        if self._interrupt:
            self._interrupt = False
            raise Interrupted

    def _save(self, job: Job, node: str) -> dict[str, Any]:
        if self.gives_nothing:
            return {"images": []}
        content = job.graph[node]
        temporary = content["class_type"] == "PreviewImage"
        prefix = "ComfyUI_temp_abcde" if temporary else content["inputs"]["filename_prefix"]
        subfolder, _, stem = prefix.rpartition("/")
        self._counter += 1
        place = "temp" if temporary else "output", subfolder, f"{stem}_{self._counter:05}_.png"
        data = self.file if self.file is not None else self._draw(job.graph, node)
        if self.writes_metadata and self.file is None:
            data = _with_text(data, json.dumps(job.graph))
        self.files[place] = data
        return {"images": [{"filename": place[2], "subfolder": place[1], "type": place[0]}]}

    def _draw(self, graph: dict[str, Any], node: str) -> bytes:
        """What depends on everything that the sampler was told, and for a plain drawing only on prompt and seed."""
        above = [graph[one] for one in _order(graph, node)]
        sampler = next(one["inputs"] for one in above if one["class_type"] == "KSampler")
        prompt = graph[sampler["positive"][0]]["inputs"]["text"]
        loaded = [one["inputs"]["image"] for one in above if one["class_type"].startswith("LoadImage")]
        sized = [one["inputs"] for one in above if one["class_type"] in {"EmptyLatentImage", "ImageScale"}]
        if sized:
            width, height = sized[-1]["width"], sized[-1]["height"]
        else:
            width, height = dimensions(self._loaded(loaded[0]) or b"")
        text = "|".join([prompt, *loaded, *([str(sampler["denoise"])] if loaded else [])])
        return picture(text, sampler["seed"], width // 8 * 8, height // 8 * 8)


def _json(document: Any) -> Answer:
    return Answer(200, msgspec.json.encode(document), {"content-type": "application/json; charset=utf-8"})


def _complaint(kind: str, message: str, node: str | None = None) -> Answer:
    extra = {} if node is None else {"node_id": node}
    error = {"type": kind, "message": message, "details": message, "extra_info": extra}
    return Answer(400, msgspec.json.encode({"error": error, "node_errors": {}}))


def _links(graph: dict[str, Any], node: str) -> Iterator[str]:
    for value in graph[node]["inputs"].values():
        if isinstance(value, list):
            yield value[0]


def _order(graph: dict[str, Any], node: str) -> list[str]:
    """The nodes that one depends on, those first, and itself."""
    found = [one for link in _links(graph, node) for one in _order(graph, link)]
    return [*dict.fromkeys(found), node]


def _signature(graph: dict[str, Any], node: str) -> str:
    """What the cache knows a node by: its class and all its inputs, also those that the class does not have."""
    inputs = {
        name: ["node", _signature(graph, value[0]), value[1]] if isinstance(value, list) else value
        for name, value in graph[node]["inputs"].items()
    }
    return json.dumps([graph[node]["class_type"], inputs], sort_keys=True)


def _with_text(png: bytes, text: str) -> bytes:
    """The whole graph in a text chunk behind the header, as ComfyUI writes it."""
    body = b"tEXtprompt\0" + text.encode()
    return png[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + png[33:]
