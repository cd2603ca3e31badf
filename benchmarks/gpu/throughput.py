"""Pictures a second through gateway and worker, beside the same pipeline called in a loop at its best batch size.

Both draw with random weights, made here from configurations, so nothing is downloaded: SDXL and a Flux of FLUX.1-dev's size.
What they draw is noise, but the work is that of the real models. `--tiny` makes networks of a few megabytes, for a CPU.

    python benchmarks/gpu/throughput.py                          # SDXL and Flux at 1024x1024: about 40 GB of GPU memory
    python benchmarks/gpu/throughput.py --tiny --size 64         # sees that it works, anywhere

It needs the extras `grpc` and `diffusers`. The worker is `img-serving worker --engine THIS_FILE:RandomEngine`, a process of its
own, as is the gateway.

SDXL's U-Net has 2.57, Flux 11.9 billion parameters; all weights together are 6.9 and 33.7 GB in 16 bits. Clients are so many
that a full batch always waits, and only what comes once batches are full is timed: what is measured is how much a busy worker
draws, not how soon it is busy. The loop ends each call with floats on the CPU; what is served is a PNG in the gateway's store.
docs/benchmarks.md has the figures of an H100.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from img_serving.engines.diffusers import DiffusersEngine, DiffusersOptions  # noqa: E402 - the path had to be set

MODELS = ("sdxl", "flux")
KEY = "throughput-key"
READY_SECONDS = 600.0
PROMPT = "a lighthouse at dusk, number {}"
PARTS = "THROUGHPUT_PARTS"
"""In the worker's environment: the file that it writes the times of its drawings to."""


@dataclass(frozen=True)
class Served:
    """One model with one number of slots.

    Attributes:
        offline: pictures a second of the loop by batch size.
        offline_again, offline_per_second: at the best one, several times before and after what is served; the median.
        windows, served_per_second: pictures a second through the gateway, in windows of a run that stays busy; the median.
        batches: pictures by the size of the batch they came in.
        call_seconds: that the loop takes for a batch.
        part_seconds, between_seconds: medians of what the worker's engine takes for one, and of the time until the next begins.
    """

    model: str
    size: str
    steps: int
    slots: int
    device: str
    versions: dict[str, str]
    offline: dict[int, float]
    best_batch: int
    offline_again: list[float]
    offline_per_second: float
    windows: list[float]
    served_per_second: float
    ratio: float
    batches: dict[str, int]
    call_seconds: float
    part_seconds: float
    between_seconds: float


class RandomEngine(DiffusersEngine):
    """The diffusers engine, its weights made up instead of read. `model` is of `MODELS`, with `-tiny` behind it or without."""

    def __init__(self, model: str) -> None:
        self._kind, _, self._tiny = model.partition("-")
        super().__init__(DiffusersOptions(model=model, offline=True, buckets=(1, 2, 4, 8, 16)))
        self._parts = os.environ.get(PARTS)

    def _draw_part(self, drawing: Any, works: Any, part: Any) -> bool:
        """As it is, and its times are written down."""
        began = time.monotonic()
        is_drawn = super()._draw_part(drawing, works, part)
        if self._parts:
            with Path(self._parts).open("a", encoding="utf-8") as out:
                out.write(json.dumps([began, time.monotonic(), part.take, part.size]) + "\n")
        return is_drawn

    def read(self, dtype: Any) -> Any:
        """Make the pipeline on its device: a true one would take minutes and twice its memory on the CPU."""
        import torch

        kept = torch.get_default_dtype()
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(dtype)
            with torch.device(self._device):
                pipe = {"sdxl": _sdxl, "flux": _flux}[self._kind](tiny=bool(self._tiny))
        finally:
            torch.set_default_dtype(kept)
        return pipe


def _scheduler(name: str, **numbers: Any) -> Any:
    """A scheduler as pipelines that were read have it: its numbers on the CPU and in float32, whatever is made around it."""
    import diffusers
    import torch

    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            return getattr(diffusers, name)(**numbers)
    finally:
        torch.set_default_dtype(kept)


def _sdxl(*, tiny: bool) -> Any:
    """Shapes of stabilityai/stable-diffusion-xl-base-1.0, from the configurations that it publishes."""
    import diffusers
    import transformers
    from tests.support import tiny_pipelines

    letters = tiny_pipelines.letter_tokenizer()
    clip: dict[str, Any] = {
        "vocab_size": 49408,
        "num_attention_heads": 12,
        "hidden_size": 768,
        "intermediate_size": 3072,
    }
    big: dict[str, Any] = {
        "vocab_size": 49408,
        "num_attention_heads": 20,
        "hidden_size": 1280,
        "intermediate_size": 5120,
    }
    clip |= {"num_hidden_layers": 12, "projection_dim": 768}
    big |= {"num_hidden_layers": 32, "projection_dim": 1280, "hidden_act": "gelu"}
    unet: dict[str, Any] = {
        "sample_size": 128,
        "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
        "addition_time_embed_dim": 256,
    }
    if tiny:
        small = {"num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        clip |= small | {"projection_dim": 32}
        big |= small | {"projection_dim": 32}
        unet |= {
            "sample_size": 8,
            "layers_per_block": 1,
            "block_out_channels": (32, 64, 64),
            "attention_head_dim": (2, 4, 4),
            "transformer_layers_per_block": (1, 1, 1),
            "cross_attention_dim": 64,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
            "addition_time_embed_dim": 8,
        }
    ends = {"bos_token_id": len(letters) - 2, "eos_token_id": len(letters) - 1}
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(4, tiny=tiny, force_upcast=False),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip, **ends)).eval(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**big, **ends)).eval(),
        tokenizer=letters,
        tokenizer_2=letters,
        unet=diffusers.UNet2DConditionModel(use_linear_projection=True, addition_embed_type="text_time", **unet).eval(),
        scheduler=_scheduler(
            "EulerDiscreteScheduler",
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )


def _flux(*, tiny: bool) -> Any:
    """Shapes of black-forest-labs/FLUX.1-dev: 12 billion parameters, and a T5 encoder of 4.8 billion."""
    import diffusers
    import transformers
    from tests.support import tiny_pipelines

    letters, words = tiny_pipelines.letter_tokenizer(), tiny_pipelines.word_tokenizer()
    clip: dict[str, Any] = {
        "num_attention_heads": 12,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
    }
    t5: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    flux: dict[str, Any] = {
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": (16, 56, 56),
    }
    if tiny:
        clip = {"num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        t5 = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
        flux |= {
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
        }
    ends = {"bos_token_id": len(letters) - 2, "eos_token_id": len(letters) - 1, "vocab_size": 49408}
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(patch_size=1, in_channels=64, guidance_embeds=True, **flux).eval(),
        scheduler=_scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True),
        vae=_vae(
            16, tiny=tiny, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip, **ends)).eval(),
        tokenizer=letters,
        text_encoder_2=transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **t5)
        ).eval(),
        tokenizer_2=words,
    )


def _vae(channels: int, *, tiny: bool, **more: Any) -> Any:
    import diffusers

    widths = [16, 32, 32, 32] if tiny else [128, 256, 512, 512]
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=channels,
        norm_num_groups=8 if tiny else 32,
        layers_per_block=1 if tiny else 2,
        sample_size=1024,
        **more,
    ).eval()


def offline(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """In this process: pictures a second of the bare pipeline at each batch size, until the memory ends; the best one again."""
    import diffusers
    import torch
    import transformers

    from img_serving.engines.diffusers.device import free, is_out_of_memory
    from img_serving.engines.diffusers.quiet import hushed
    from img_serving.engines.engine import load_fully

    engine = RandomEngine(model)
    load_fully(engine)
    pipe = engine._words.pipe if engine._words is not None else None
    assert pipe is not None
    device = engine.statistics().device
    found: dict[int, float] = {}

    def draw(size: int) -> None:
        pipe(
            prompt=[PROMPT.format(number) for number in range(size)],
            generator=[torch.Generator("cpu").manual_seed(number) for number in range(size)],
            width=options.size,
            height=options.size,
            num_inference_steps=options.steps,
            output_type="np",
        )

    def rate(size: int) -> float:
        began, drawn = time.perf_counter(), 0
        while drawn == 0 or time.perf_counter() - began < options.seconds:
            draw(size)  # it ends with a copy to the CPU, so the time is that of the whole work
            drawn += size
        return drawn / (time.perf_counter() - began)

    with hushed():
        for size in options.batch_sizes:
            try:
                draw(size)
                found[size] = rate(size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                break
            finally:
                free(device)
        again = []
        if found:
            best = max(found, key=lambda size: found[size])
            again = [rate(best) for _ in range(options.repeats)]
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "per_second": found,
        "again": again,
        "versions": {one.__name__: one.__version__ for one in (torch, diffusers, transformers)},
    }


def served(model: str, batch: int, rate: float, slots: int, options: argparse.Namespace) -> dict[str, Any]:
    """Pictures a second of requests for one picture each, so many at once that a full batch always waits.

    `rate` is about how many a second there may be.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        worker_port, metrics_port, port = (_free_port() for _ in range(3))
        parts = folder / "parts.jsonl"
        worker = stack.enter_context(
            _program(
                folder / "worker.log",
                *("worker", "--engine", f"{Path(__file__).resolve()}:RandomEngine", "--model", model),
                *("--port", str(worker_port), "--metrics-port", str(metrics_port), "--no-warm-up"),
                *("--max-batch-size", str(batch), "--slots", str(slots)),
                **{PARTS: str(parts)},
            )
        )
        (folder / "gateway.toml").write_text(
            f"""
[server]
data_dir = "{folder / "data"}"
[auth]
api_keys = ["{KEY}"]
[storage]
dir = "{folder / "pictures"}"
[rate_limit]
enabled = false
[queue]
request_timeout_seconds = 3600
[[backends]]
name = "throughput"
protocol = "grpc"
endpoints = ["http://127.0.0.1:{worker_port}"]
models = ["{model}"]
timeout_ms = 600000
health_check_interval_secs = 1
""",
            encoding="utf-8",
        )
        stack.enter_context(
            _program(
                folder / "gateway.log",
                *("serve", "--config", str(folder / "gateway.toml"), "--host", "127.0.0.1", "--port", str(port)),
            )
        )
        size = f"{options.size}x{options.size}"
        body = {"model": model, "size": size, "num_inference_steps": options.steps, "response_format": "url"}

        def ask(number: int) -> None:
            _post(
                f"http://127.0.0.1:{port}/v1/images/generations",
                body | {"prompt": PROMPT.format(number), "seed": number},
            )

        _until(lambda: _loaded(metrics_port), folder, worker)
        _until(lambda: ask(0), folder, worker)
        ended: list[float] = []
        is_over = threading.Event()

        def client(number: int) -> None:
            while not is_over.is_set():
                ask(number)
                ended.append(time.monotonic())

        count = (slots + 1) * batch
        pause = 0.1 * batch / rate
        with ThreadPoolExecutor(count) as clients:
            asking = [clients.submit(client, number) for number in range(count)]
            try:
                before, windows = {}, []
                began = _clump(ended, 0, pause, asking)
                while began[0] < slots + batch:  # the first ones found nobody to be drawn with
                    began = _clump(ended, began[0], pause, asking)
                before = _batches(metrics_port)
                first = began[1]
                for _ in range(options.repeats):
                    reached = began
                    while reached == began or reached[1] - began[1] < options.seconds:
                        reached = _clump(ended, reached[0], pause, asking)
                    windows.append((reached[0] - began[0]) / (reached[1] - began[1]))
                    began = reached
                after = _batches(metrics_port)
            finally:
                is_over.set()
        for one in asking:
            one.result()
        drawn = [json.loads(line) for line in parts.read_text(encoding="utf-8").splitlines()]
        drawn = [one for one in drawn if first <= one[0] and one[1] <= began[1] and one[2] == batch]
        return {
            "windows": windows,
            "batches": {size: n - before.get(size, 0) for size, n in after.items() if n > before.get(size, 0)},
            "part_seconds": statistics.median([one[1] - one[0] for one in drawn] or [0.0]),
            "between_seconds": statistics.median([b[0] - a[1] for a, b in itertools.pairwise(drawn)] or [0.0]),
        }


def _clump(ended: list[float], known: int, pause: float, asking: Sequence[Future[None]]) -> tuple[int, float]:
    """Wait for the pictures of the next batch, beyond the `known` ones: how many there are by then, and since when.

    They come together, and are all there when for `pause` seconds none came.
    """
    deadline = None
    while True:
        time.sleep(0.002)
        broken = next((one.exception() for one in asking if one.done()), None)
        if broken is not None:
            raise broken
        count = len(ended)
        if count == known:
            continue
        last, now = ended[count - 1], time.monotonic()
        deadline = deadline or now + 20 * pause  # calls so short that there is no pause between them
        if now - last > pause or now > deadline:
            return count, last


def _batches(metrics_port: int) -> dict[str, int]:
    """Pictures by the size of the batch they came in."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return {size: int(float(count)) for size, count in re.findall(r'pictures_total\{[^}]*="(\d+)"[^}]*\} (\S+)', text)}


def _post(url: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(
        url,
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    with urllib.request.urlopen(request, timeout=3600) as reply:
        answer = json.load(reply)
    assert len(answer["data"]) == 1


def _loaded(metrics_port: int) -> None:
    """Raises OSError: the worker is loading."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as reply:
        if not re.search(r"worker_ready\S* 1", reply.read().decode()):
            raise OSError("the worker is loading")


def _until(act: Any, folder: Path, worker: subprocess.Popen[bytes]) -> None:
    """Try until it works: programs that start say nothing of when they are ready to one who has no business with them."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            act()
        except OSError as error:
            is_starting = not isinstance(error, urllib.error.HTTPError) or error.code in {404, 503}
            if not is_starting or worker.poll() is not None or time.monotonic() > deadline:
                logs = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in folder.glob("*.log"))
                raise SystemExit(f"it does not get ready ({error})\n{logs}") from None
            time.sleep(0.2)
        else:
            return


@contextlib.contextmanager
def _program(log: Path, *arguments: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """img-serving with these arguments, its words in a file, until the end of the block."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more
    with log.open("wb") as out:
        program = subprocess.Popen(
            [sys.executable, "-m", "img_serving", *arguments], stdout=out, stderr=out, env=environment
        )
        try:
            yield program
        finally:
            program.terminate()
            try:
                program.wait(30)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measured(model: str, options: argparse.Namespace) -> list[Served]:
    """Both ways of one model; the loop runs in a process of its own, so that its memory is free for the worker."""
    told = _loop(model, options.batch_sizes, options)
    loop = {int(size): rate for size, rate in told["per_second"].items()}
    if not loop:
        raise SystemExit(f"{model}: not even one picture of {options.size}x{options.size} fits into the memory")
    best = max(loop, key=lambda size: loop[size])
    print(f"{model}: the loop draws {told['again']} a second in batches of {best}; {loop}", file=sys.stderr, flush=True)
    found = []
    for slots in options.slots:
        found.append(served(model, best, loop[best], slots, options))
        print(f"{model}, {slots} slots: {found[-1]}", file=sys.stderr, flush=True)
    again = [*told["again"], *([] if options.no_loop_after else _loop(model, [best], options)["again"])]
    middle = statistics.median(again)
    results = []
    for slots, one in zip(options.slots, found, strict=True):
        rate = statistics.median(one["windows"])
        results.append(
            Served(
                model=model,
                size=f"{options.size}x{options.size}",
                steps=options.steps,
                slots=slots,
                device=told["device"],
                versions=told["versions"],
                offline=loop,
                best_batch=best,
                offline_again=again,
                offline_per_second=middle,
                served_per_second=rate,
                ratio=rate / middle,
                call_seconds=best / middle,
                **one,
            )
        )
    return results


def _loop(model: str, sizes: Sequence[int], options: argparse.Namespace) -> Any:
    shared = [f"--{name}={getattr(options, name)}" for name in ("size", "steps", "seconds", "repeats")]
    done = subprocess.run(
        [sys.executable, __file__, "--loop", model, *shared, "--batch-sizes", *map(str, sizes)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(results: Sequence[Served]) -> str:
    """For people."""
    heads = (
        f"{'model':12} {'size':>10} {'steps':>5} {'batch':>5} {'slots':>5} {'loop/s':>8} {'served/s':>8} {'ratio':>6}"
    )
    lines = [f"{heads} {'loop s':>7} {'part s':>7} {'gap s':>7}  in batches of"]
    lines += [
        f"{one.model:12} {one.size:>10} {one.steps:>5} {one.best_batch:>5} {one.slots:>5} {one.offline_per_second:>8.3f} "
        f"{one.served_per_second:>8.3f} {one.ratio:>6.3f} {one.call_seconds:>7.3f} {one.part_seconds:>7.3f} "
        f"{one.between_seconds:>7.4f}  {one.batches}"
        for one in results
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tiny", action="store_true", help="networks of a few megabytes")
    parser.add_argument("--size", type=int, default=1024, help="side in pixels (default 1024)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of the loop")
    parser.add_argument(
        "--slots", type=int, nargs="+", default=[2], help="of the worker: while one call is drawn, another is at hand"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of one measurement, at least a batch")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each way")
    parser.add_argument("--no-loop-after", action="store_true", help="measure the loop before what is served only")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        print(json.dumps(offline(options.loop, options)))
        return
    results: list[Served] = []
    for model in options.models:
        results += measured(f"{model}-tiny" if options.tiny else model, options)
        if options.json is not None:
            options.json.write_text(json.dumps([asdict(one) for one in results], indent=2) + "\n", encoding="utf-8")
    print(f"on {results[0].device}, {results[0].versions}\n{table(results)}")


if __name__ == "__main__":
    main()
