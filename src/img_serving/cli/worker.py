"""`img-serving worker`: serves a model over gRPC, for a gateway to send work to; or tries it on one prompt."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from img_serving.cli.endings import OK, CommandFailed
from img_serving.cli.progress import progress
from img_serving.cli.usage import Commands, number, size, whole, words

if TYPE_CHECKING:
    from img_serving.domain.capabilities import Capabilities
    from img_serving.domain.images import Call
    from img_serving.engines.engine import Engine
    from img_serving.worker.workshop import Loading

TOKEN_VARIABLE = "IMG_SERVING_WORKER_TOKEN"  # noqa: S105 - where it is, not what it is

MODEL_NAME_CHARS = 256

EXAMPLES = f"""\
The engine is `procedural` (the built-in painter), `diffusers` (needs the extra
`diffusers`), or a class of your own: module:Class or file.py:Class.
The gateway's side is a backend with protocol = "grpc" and
endpoints = ["grpc://localhost:50051"]. Callers must know the token in
${TOKEN_VARIABLE}, if there is one; the gateway's side is `api_key`.

examples:
  img-serving worker --engine procedural
  img-serving worker --engine diffusers --model ./stable-diffusion-v1-5
  img-serving worker --engine my_model.py:MyModel --port 50052
  img-serving worker --engine my_model.py:MyModel --try "a red fox" -o fox.png
"""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Tell argparse about the command."""
    parser = commands.add_parser(
        "worker",
        help="serve a model of your own over gRPC",
        usage="img-serving worker [--engine ENGINE] [--model MODEL] [options]",
        epilog=EXAMPLES,
    )
    parser.add_argument("--engine", type=words, default="procedural", help="what draws (default: procedural)")
    parser.add_argument("--model", type=words, help="the folder, file or id that the engine loads")
    parser.add_argument(
        "--model-name", type=words, help="the name to serve it under (default: that of the folder or file)"
    )
    parser.add_argument("--host", type=words, default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument(
        "--port", type=whole(0, 65535), default=50051, help="port to listen on (default 50051; 0 = any)"
    )
    parser.add_argument(
        "--slots",
        type=whole(1, 64),
        help="calls drawn at the same time (default 1; procedural: 1 a processor)",
    )
    parser.add_argument(
        "--queue-size", type=whole(0, 10_000), default=64, help="calls that may wait beyond (default 64)"
    )
    parser.add_argument(
        "--max-batch-size", type=whole(1, 1024), help="pictures in one call (default: what the engine can)"
    )
    parser.add_argument("--tls-cert", help="PEM file of the certificate", metavar="FILE")
    parser.add_argument("--tls-key", help="PEM file of its key", metavar="FILE")
    parser.add_argument("--metrics-port", type=whole(0, 65535), help="serve GET /metrics there (default: nowhere)")
    parser.add_argument(
        "--drain-seconds", type=number, default=15.0, help="for running calls to finish after SIGTERM (default 15)"
    )
    parser.add_argument("--no-warm-up", action="store_true", help="draw nothing before the first request")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument("--log-format", choices=("console", "json"), help="default: console on a terminal, else json")
    _add_diffusers_options(parser.add_argument_group("the diffusers engine"))
    trying = parser.add_argument_group("trying it without a gateway")
    trying.add_argument("--try", dest="prompt", type=words, help="draw this, and end", metavar="PROMPT")
    trying.add_argument("-o", "--output", default="picture.png", help="where to (default picture.png)", metavar="FILE")
    trying.add_argument("--size", type=size, default="auto", help="WIDTHxHEIGHT (default: the model's own)")
    trying.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="default 0")
    trying.add_argument("--steps", type=whole(1, 1000), help="default: the model's own")
    parser.set_defaults(run=run)


def _add_diffusers_options(group: Any) -> None:
    """Each named as its field of `DiffusersOptions`; what is not said is left to that record (SUPPRESS)."""

    def add(flag: str, **more: Any) -> None:
        group.add_argument(flag, default=argparse.SUPPRESS, **more)

    add("--device", type=words, help="auto (default), cpu, mps, xpu, cuda, cuda:1 …")
    add("--dtype", choices=("auto", "float32", "float16", "bfloat16"), help="of weights and arithmetic (default auto)")
    add("--offline", action="store_true", help="no network: everything is on disk or in the hub's cache")
    add("--revision", type=words, help="a branch, tag or commit of a model of the hub")
    add("--variant", type=words, help="which set of weights, such as fp16")
    add("--config", type=words, help="for a single file: the folder or id that has its configuration")
    add("--lora-dir", type=Path, help="the folder whose *.safetensors prompts may name: <lora:name:0.8>", metavar="DIR")
    add("--max-loras", type=whole(1), help="LoRAs that stay loaded (default 8)", metavar="N")
    add("--buckets", type=_buckets, help="batch sizes that are drawn (default 1,2,4,8)", metavar="N,…")
    add("--no-padding", dest="padding", action="store_false", help="do not fill a batch up to its bucket")
    add("--allow-pickle", action="store_true", help="also read weights that can run code as they load (.bin, .ckpt)")
    add("--safety-checker", action="store_true", help="keep the model's safety checker, if it has one")
    add("--no-vae-slicing", dest="vae_slicing", action="store_false", help="decode a batch's pictures all at once")
    add("--vae-tiling", action="store_true", help="decode in tiles: less memory for large pictures")
    add("--cpu-offload", choices=("none", "model", "sequential"), help="keep what is not in use in main memory")
    add("--max-pixels", type=whole(1), help="of a picture (default 4194304)", metavar="N")
    add("--max-steps", type=whole(1), help="inference steps at most (default 200)", metavar="N")
    add("--default-steps", type=whole(1), help="where a request says none", metavar="N")
    add("--default-guidance-scale", type=number, help="where a request says none", metavar="X")
    add("--true-cfg-scale", type=number, help="above 1, negative prompts act on Flux (default 1)", metavar="X")


def _buckets(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of batch sizes such as 1,2,4,8") from None


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        CommandFailed: it cannot start.
    """
    from img_serving.domain.errors import StartError
    from img_serving.transport.allocator import tune_allocator

    tune_allocator()
    try:
        factory = _engine(args)
        _check_grpc()
        return _try(args, factory) if args.prompt is not None else _serve(args, factory)
    except StartError as error:
        if ":" in args.engine and error.__cause__ is not None:
            raise _where_it_broke(error) from error
        raise CommandFailed(str(error)) from error


def _check_grpc() -> None:
    from img_serving.wire import hush_grpc

    hush_grpc()
    try:
        import grpc  # noqa: F401 - is it there?
    except ImportError:
        raise CommandFailed("a worker needs gRPC: install img-serving with its extra `grpc`") from None


def _serve(args: argparse.Namespace, factory: Callable[[], Engine]) -> int:
    from img_serving.telemetry.logs import choose_format, set_up
    from img_serving.transport.event_loop import run as run_loop
    from img_serving.worker.options import WorkerOptions
    from img_serving.worker.program import serve

    if (args.tls_cert is None) != (args.tls_key is None):
        raise CommandFailed("--tls-cert and --tls-key go together", exit_code=2)
    set_up(args.log_level, choose_format(args.log_format, sys.stderr))
    options = WorkerOptions(
        host=args.host,
        port=args.port,
        model=_model_name(args),
        any_model=args.engine == "procedural" and args.model_name is None,
        slots=args.slots or (_threads() if args.engine == "procedural" else 1),
        queue_size=args.queue_size,
        max_batch_size=args.max_batch_size,
        token=_token(),
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        metrics_port=args.metrics_port,
        drain_seconds=args.drain_seconds,
        warm_up=not args.no_warm_up,
    )
    with _loading_bar() as on_loading:
        run_loop(lambda: serve(factory, options, announce=_announce, on_loading=on_loading))
    return _left(OK)


def _left(code: int) -> int:
    """The exit code; where an engine is still at it (it loads, or asks nobody whether to go on), the process ends here.

    Python would wait for its thread, however long that takes.
    """
    import threading

    drawing = [thread for thread in threading.enumerate() if thread.name.startswith("engine")]
    for thread in drawing:
        thread.join(0.2)
    if any(thread.is_alive() for thread in drawing):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _try(args: argparse.Namespace, factory: Callable[[], Engine]) -> int:
    """Draw one picture in this process, as a worker would: what the engine says of itself is checked, and the request."""
    import asyncio
    import logging

    from img_serving.domain.errors import AttemptError, BackendRefusal, GatewayError
    from img_serving.domain.images import Artifact, Progress
    from img_serving.media.payload import raw_bytes
    from img_serving.worker.options import WorkerOptions
    from img_serving.worker.workshop import Workshop

    worker_log = logging.getLogger("img_serving.worker")
    worker_log.disabled = True  # what goes wrong is shown below
    shop = Workshop(factory, WorkerOptions(model=_model_name(args), any_model=True, warm_up=False))
    previews = 0

    async def draw() -> Any:
        with _loading_bar() as on_loading:
            await shop.load(on_loading or (lambda _: None))
            if on_loading is not None:
                on_loading(None)
        call = _call(args, shop.capabilities)
        shop.admit(call)
        with progress("drawing", quiet=False, measured=True) as watch:

            def stepped(step: Progress) -> None:
                nonlocal previews
                previews += step.preview is not None
                watch(step.done / max(1, step.total))

            return call, await shop.draw(call, stepped, lambda: None)

    try:
        call, (result,) = asyncio.run(draw())
    except AttemptError as error:
        raise _where_it_broke(error) from error
    except BackendRefusal as refusal:
        raise CommandFailed(f"refused: {refusal.error.message}") from refusal
    except GatewayError as error:
        raise CommandFailed(error.message) from error
    finally:
        worker_log.disabled = False
        shop.close()
    if not isinstance(result, Artifact):
        raise CommandFailed(f"{'refused' if result.refused else 'failed'}: {result.message}")
    try:
        Path(args.output).write_bytes(raw_bytes(result))
    except OSError as error:
        raise CommandFailed(f"{args.output} cannot be written ({error.strerror or error})") from error
    told = f"{args.output}: {result.width}x{result.height}, {result.media_type}, seed {result.seed}"
    if (result.width, result.height) != (call.width, call.height):
        told += f" (BUT {call.width}x{call.height} WAS ASKED FOR)"
    print(told + (f", {previews} previews" if previews else ""))
    return _left(OK)


def _where_it_broke(error: Exception) -> CommandFailed:
    """What an engine raised, with the way to it, for whoever writes the engine."""
    import traceback

    cause = error.__cause__
    if cause is not None:
        traceback.print_exception(cause)
    return CommandFailed(str(error))


def _call(args: argparse.Namespace, can: Capabilities) -> Call:
    from img_serving.engines.engine import call_of

    width, height = (
        (int(side) for side in args.size.split("x")) if args.size != "auto" else can.default_size or (512, 512)
    )
    return call_of(args.prompt, seed=args.seed, width=width, height=height, steps=args.steps, previews=can.previews)


def _engine(args: argparse.Namespace) -> Callable[[], Engine]:
    from img_serving.worker.engines import own_engine

    given = _diffusers_given(args)
    if args.engine == "diffusers":
        return _diffusers(args, given)
    if given:
        flags = ", ".join(sorted(given))
        raise CommandFailed(f"{flags}: only for --engine diffusers", exit_code=2)
    if args.engine == "procedural":
        from img_serving.engines.procedural import ProceduralEngine

        if args.model is not None:
            raise CommandFailed("--model is not for the procedural engine, which has no weights", exit_code=2)
        return ProceduralEngine
    return own_engine(args.engine, args.model)


def _diffusers_given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the diffusers engine that were said, by their fields."""
    from dataclasses import fields

    from img_serving.engines.diffusers.options import DiffusersOptions

    names = {field.name for field in fields(DiffusersOptions)} - {"model", "max_batch_size"}
    return {name: value for name, value in vars(args).items() if name in names}


def _diffusers(args: argparse.Namespace, given: dict[str, Any]) -> Callable[[], Engine]:
    from img_serving.engines.diffusers import DiffusersEngine, DiffusersOptions

    if args.model is None:
        raise CommandFailed("--engine diffusers needs --model: a folder, a .safetensors file or a hub id", exit_code=2)
    try:
        options = DiffusersOptions(model=args.model, max_batch_size=args.max_batch_size, **given)
    except ValueError as error:
        raise CommandFailed(str(error), exit_code=2) from None
    return lambda: DiffusersEngine(options)


def _model_name(args: argparse.Namespace) -> str:
    """What was said, else the last part of the model's path or id, else the engine's name."""
    if args.model_name is not None:
        if len(args.model_name) > MODEL_NAME_CHARS or not args.model_name.isprintable():
            raise CommandFailed(f"--model-name: at most {MODEL_NAME_CHARS} printable characters", exit_code=2)
        return str(args.model_name)
    if args.model is not None:
        return Path(args.model.rstrip("/")).name.removesuffix(".safetensors") or "model"
    return str(args.engine).rpartition(":")[2].lower()


def _threads() -> int:
    return min(4, os.cpu_count() or 1)


def _token() -> str | None:
    token = os.environ.get(TOKEN_VARIABLE)
    if token is not None and not (token and all("!" <= char <= "~" for char in token)):
        raise CommandFailed(f"${TOKEN_VARIABLE} is empty, or has a blank or a letter outside ASCII", exit_code=2)
    return token


def _announce(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _loading_bar() -> Iterator[Callable[[Loading | None], None] | None]:
    """What is done while the model loads, on a terminal; gone when it is ready."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape

    with ExitStack() as stack:
        status = stack.enter_context(Console(stderr=True).status("loading"))

        def on_loading(loading: Loading | None) -> None:
            if loading is None:
                stack.close()
            else:
                status.update(f"loading {loading.share:.0%}: {escape(loading.doing)}")

        yield on_loading
