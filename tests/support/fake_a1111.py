"""Servers with A1111's web API as they were seen to behave (Forge f2.0.1, stable-diffusion.cpp 97d2990), not as documented."""

from __future__ import annotations

import asyncio
import json
import re
import struct
import zlib
from typing import Any, Literal

import msgspec
import pybase64

from img_serving.backends.scripted import picture
from img_serving.backends.scripted_server import ScriptedServer
from img_serving.backends.stub_server import Answer, Exchange

Flavour = Literal["forge", "sdcpp"]

CHECKPOINTS = {"tiny-a": "tiny-a.safetensors", "tiny-b": "sub/tiny-b.safetensors"}
SAMPLERS = {"Euler": ["k_euler"], "Euler a": ["k_euler_a", "k_euler_ancestral"], "DPM++ 2M": ["k_dpmpp_2m"]}
SCHEDULERS = {"automatic": "Automatic", "karras": "Karras", "sgm_uniform": "SGM Uniform"}
UNFINISHED = "unfinished"
STALE_STEPS = 4
"""What the page of progress tells until sampling begins: the steps of a job before."""
TAG = re.compile(r"<sd_cpp_extra_args>(.*?)</sd_cpp_extra_args>")  # over several lines it is none


class FakeA1111(ScriptedServer):
    """One engine behind one lock: it draws for whoever asked, also when they have left, until it is done or interrupted.

    `script` spoils the replies of drawings as `ScriptedServer` does. `drawn` are the bodies that were drawn, as the engine
    understood them; `loads` the checkpoints in the order they were loaded; `interrupts` counts what `/interrupt` stopped.
    """

    def __init__(
        self,
        script: dict[str, Any] | None = None,
        *,
        flavour: Flavour = "forge",
        steps: int = 3,
        step_seconds: float = 0.0,
        basic: str | None = None,
        absent: frozenset[str] = frozenset(),
        liar: bool = False,
    ) -> None:
        """`steps` are those of a request without any; `absent` paths are 404; a `liar` draws with another model than asked."""
        super().__init__(script)
        self.flavour = flavour
        self.steps = steps
        self.step_seconds = step_seconds
        self.basic = basic
        self.absent = absent
        self.liar = liar
        self.writes_notes = False
        self.checkpoints = dict(CHECKPOINTS)
        self.loaded = "tiny-a"
        self.loads: list[str] = []
        self.clip_skip = 1
        self.saved: set[str] = set()
        """Settings in the server's file: only these are put back after a call."""
        self.drawn: list[dict[str, Any]] = []
        self.interrupts = 0
        self.stopped_at: float | None = None
        self._next: str | None = None
        self.state: dict[str, Any] = {}
        self._end()
        self.state["interrupted"] = False
        self._engine = asyncio.Lock()
        self._jobs: set[asyncio.Task[Answer]] = set()
        self.gate: asyncio.Event | None = None
        """Where it is set, the engine waits for it before every step: for tests that look in the middle."""

    @property
    def posts(self) -> list[Exchange]:
        """The requests that asked for pictures."""
        return [one for one in self.exchanges if one.method == "POST" and one.path.endswith(("2img",))]

    async def stop(self) -> None:
        """Stop listening and drawing."""
        await super().stop()
        for job in list(self._jobs):
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)

    async def answer(self, exchange: Exchange) -> Answer:
        """As the real ones do."""
        path = exchange.path.partition("?")[0]
        if self.basic is not None and exchange.headers.get("authorization") != self.basic:
            body = b'{"detail":"Incorrect username or password"}'
            return Answer(401, body, {"www-authenticate": "Basic"})
        if path in self.absent:
            return self._nothing()
        if exchange.method == "GET":
            status = self.script.statuses.get(path, self.script.check_status)
            return self._tell_a1111(path, exchange.path) if status == 200 else Answer(status, b"{}")
        if self.flavour == "sdcpp" and path in {"/sdapi/v1/interrupt", "/sdapi/v1/options"}:
            return self._nothing()
        if path == "/sdapi/v1/interrupt":
            self.state["interrupted"] = True
            if self.gate is not None:
                self.gate.set()
            return Answer(200, b"{}")
        if path == "/sdapi/v1/options":
            return await self._set(exchange.json)
        if path in {"/sdapi/v1/txt2img", "/sdapi/v1/img2img"}:
            return await self._job(exchange, path)
        return self._nothing()

    def _nothing(self) -> Answer:
        if self.flavour == "sdcpp":
            return Answer(404, b"", {"content-type": ""})
        return Answer(404, b'{"detail":"Not Found"}')

    # pages

    def _tell_a1111(self, path: str, whole: str) -> Answer:
        pages: dict[str, Any] = {
            "/sdapi/v1/options": {"sd_model_checkpoint": self._title(self.loaded), "samples_format": "png"},
            "/sdapi/v1/sd-models": [
                {
                    "title": self._title(name),
                    "model_name": name,
                    "hash": "abcd1234" if name in self.loads else None,
                    "filename": f"/models/Stable-diffusion/{file}",
                }
                for name, file in self.checkpoints.items()
            ],
            "/sdapi/v1/samplers": [{"name": one, "aliases": two, "options": {}} for one, two in SAMPLERS.items()],
            "/sdapi/v1/schedulers": [{"name": one, "label": two, "aliases": None} for one, two in SCHEDULERS.items()],
        }
        if self.flavour == "forge":
            pages["/sdapi/v1/options"] |= {"forge_preset": "sd", "CLIP_stop_at_last_layers": float(self.clip_skip)}
            image = self.state.get("image") if "skip_current_image=false" in whole else None
            state = {name: value for name, value in self.state.items() if name not in {"progress", "image"}}
            pages["/sdapi/v1/progress"] = {
                "progress": self.state["progress"],
                "eta_relative": 0.0,
                "state": state,
                "current_image": image,
                "textinfo": None,
            }
        else:
            pages["/sdcpp/v1/capabilities"] = {"samplers": list(SAMPLERS), "loras": []}
            pages["/sdapi/v1/sd-models"] = pages["/sdapi/v1/sd-models"][:1]
        return Answer(200, msgspec.json.encode(pages[path])) if path in pages else self._nothing()

    def _title(self, name: str) -> str:
        known = " [abcd1234]" if name in self.loads else ""
        return self.checkpoints.get(name, name) + known

    async def _set(self, options: dict[str, Any]) -> Answer:
        """Taken at once; the model is loaded by the next drawing."""
        wanted = options.get("sd_model_checkpoint")
        if wanted is not None and self._find(wanted) is None:
            return Answer(500, b'{"error":"RuntimeError","detail":"","body":"","message":"model not found"}')
        self.saved |= set(options)
        self.clip_skip = options.get("CLIP_stop_at_last_layers", self.clip_skip)
        self._next = self._find(wanted) if wanted is not None else self._next
        return Answer(200, b"null")

    def _find(self, wanted: str) -> str | None:
        return next((one for one in self.checkpoints if wanted in {one, self.checkpoints[one], self._title(one)}), None)

    def _load(self, name: str) -> None:
        if name != self.loaded:
            self.loaded = name
            self.loads.append(name)

    # drawing

    async def _job(self, exchange: Exchange, path: str) -> Answer:
        try:
            asked = exchange.json
        except msgspec.DecodeError:
            return Answer(422, b'{"detail":[{"type":"json_invalid","loc":["body",1],"msg":"JSON decode error"}]}')
        if path.endswith("img2img") and not asked.get("init_images"):
            return Answer(404, b'{"detail":"Init image not found"}')
        for name in ("width", "height", "steps", "batch_size"):
            if not isinstance(asked.get(name, 1), int):
                detail = [{"type": "int_parsing", "loc": ["body", name], "msg": "Input should be a valid integer"}]
                return Answer(422, msgspec.json.encode({"detail": detail}))
        job = asyncio.get_running_loop().create_task(self._run(exchange, asked))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return await asyncio.shield(job)

    async def _run(self, exchange: Exchange, asked: dict[str, Any]) -> Answer:
        async with self._engine:
            loop = asyncio.get_running_loop()
            understood = self._understood(asked)
            steps = understood["steps"]
            self._begin()
            if self._next is not None:
                self._load(self._next)
                self._next = None
            before, clip_before = self.loaded, self.clip_skip
            overrides = asked.get("override_settings") or {}
            wanted = self._find(overrides.get("sd_model_checkpoint", before))
            if self.flavour == "forge":
                if wanted is not None:
                    self._load(wanted)  # an unknown one is passed over in silence
                self.clip_skip = overrides.get("CLIP_stop_at_last_layers", self.clip_skip)
            self.drawn.append({**understood, "model": self.loaded, "clip_skip": self.clip_skip})
            try:
                jobs = asked.get("n_iter", 1)
                for step, job in [(step, job) for job in range(jobs) for step in range(1, steps + 1)]:
                    if self.gate is not None:
                        await self.gate.wait()
                    elif self.step_seconds:
                        await asyncio.sleep(self.step_seconds)
                    if self.state["interrupted"]:
                        break
                    shown = picture(f"step {step}", understood["seed"] + job, 8, 8)
                    image = pybase64.b64encode(shown).decode()
                    # the last one is never told: the job is over then
                    self.state.update(job_count=jobs, sampling_step=min(step, steps - 1), sampling_steps=steps)
                    self.state.update(job_no=job, progress=max(0.01, (job + step / steps) / jobs))
                    # at the first step of a further picture, what is shown is still the end of the one before
                    self.state.update(image=self.state["image"] if job and step == 1 else image)
                if self.state["interrupted"]:
                    self.interrupts += 1
                    self.stopped_at = loop.time()
                    # all of them, and nothing in the reply tells that they are unfinished
                    understood = {**understood, "prompt": UNFINISHED}
                understood = {**understood, "batch_size": understood["batch_size"] * jobs}
                spoiled = Exchange(exchange.method, "/sdapi/v1/txt2img", exchange.headers, b"", exchange.started_at)
                spoiled.body = msgspec.json.encode(understood)
                return self._draw(spoiled)
            finally:
                self._end()
                if asked.get("override_settings_restore_afterwards", True):
                    if overrides.get("sd_model_checkpoint"):
                        self._load(before)
                    if "CLIP_stop_at_last_layers" in self.saved:  # one that was never saved stays
                        self.clip_skip = clip_before

    def _understood(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What the engine makes of a request: it rounds, and takes what it knows for what it does not."""
        if self.flavour == "sdcpp":
            asked = self._with_tag(asked)
        multiple = 8 if self.flavour == "forge" else 64
        sides = {}
        for name in ("width", "height"):
            side = asked.get(name, 512)
            sides[name] = side // 8 * 8 if multiple == 8 else -(-side // 64) * 64
        sampler = asked.get("sampler_name")
        schedule = asked.get("scheduler")
        return {
            **asked,
            **sides,
            "seed": asked.get("seed", -1) if asked.get("seed", -1) >= 0 else 4711,
            "steps": min(asked.get("steps") or self.steps, 1000 if self.flavour == "forge" else 100),
            "batch_size": min(asked.get("batch_size", 1), 1000 if self.flavour == "forge" else 8),
            "sampler_name": sampler if sampler in SAMPLERS else "Euler",
            "scheduler": schedule if schedule in SCHEDULERS else "automatic",
        }

    @staticmethod
    def _with_tag(asked: dict[str, Any]) -> dict[str, Any]:
        """The field `seed` has 32 bits, with a sign; the first tag in the prompt wins over the fields, and all tags go."""
        seed = asked.get("seed", -1)
        asked = {**asked, "seed": seed if -(2**31) <= seed < 2**31 else 4711}
        tag = TAG.search(asked["prompt"])
        if tag is not None:
            asked = {**asked, **json.loads(tag[1]), "prompt": TAG.sub("", asked["prompt"])}
        return asked

    def _a1111(self, asked: dict[str, Any], step: str) -> bytes:
        document = json.loads(super()._a1111(asked, step))
        info = json.loads(document["info"])
        drew = next(one for one in self.checkpoints if one != self.loaded) if self.liar else self.loaded
        if self.flavour == "forge":
            info |= {"sd_model_name": drew, "sampler_name": asked["sampler_name"]}
            if asked["scheduler"] != "automatic":
                info["extra_generation_params"] = {"Schedule type": SCHEDULERS[asked["scheduler"]]}
        else:
            info |= {"sd_model_name": self.checkpoints[drew]}
        document["info"] = json.dumps(info)
        if self.writes_notes:
            document["images"] = [self._with_note(text, asked) for text in document["images"]]
        text = json.dumps(document)
        return text.replace("/", "\\/").encode() if step == "escaped" else text.encode()

    @staticmethod
    def _with_note(text: str, asked: dict[str, Any]) -> str:
        """The picture with what it was drawn from in a text chunk, as the real ones write it."""
        png = pybase64.b64decode(text)
        note = b"parameters\0" + f"{asked['prompt']}\nSteps: {asked['steps']}, Seed: {asked['seed']}".encode()
        chunk = struct.pack(">I", len(note)) + b"tEXt" + note + struct.pack(">I", zlib.crc32(b"tEXt" + note))
        return pybase64.b64encode(png[:33] + chunk + png[33:]).decode()

    def _begin(self) -> None:
        self.state.update(
            interrupted=False,
            job="scripts_txt2img",
            job_count=-1,
            job_no=0,
            sampling_step=0,
            sampling_steps=STALE_STEPS,
            progress=0.01,
        )

    def _end(self) -> None:
        # `interrupted` stays as it was until the next one begins
        self.state.update(
            skipped=False,
            stopping_generation=False,
            job="",
            job_count=0,
            job_no=0,
            job_timestamp="20261126",
            sampling_step=0,
            sampling_steps=STALE_STEPS,
            progress=0.0,
            image=None,
        )
