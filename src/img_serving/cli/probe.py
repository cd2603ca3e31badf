"""`img-serving backends probe URL`: what speaks there, which models it has, how fast it is, and the configuration to paste."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from img_serving.cli.endings import FAILED, MISUSED, OK, CommandFailed, printable, say
from img_serving.cli.usage import size, whole, words

if TYPE_CHECKING:
    from img_serving.cli.progress import Watch
    from img_serving.config import BackendConfig
    from img_serving.domain.capabilities import Capabilities
    from img_serving.domain.images import Artifact
    from img_serving.ports import Backend, HealthReport

EXAMPLES = """\
Only read-only pages are asked, until you agree to one test picture (--draw agrees beforehand, --no-draw refuses). No gateway is
needed, and none is changed.

examples:
  img-serving backends probe http://gpu-1:7860
  img-serving backends probe http://gpu-1:8188 --draw --size 512x512 -o test.png
  img-serving backends probe grpc://gpu-1:50051
  img-serving backends probe https://api.example.com --upstream-api-key-env HOSTED_KEY --model dall-e-3
"""

SHOWN = 12
"""Names of a list that are shown; --json has them all."""

SMALL_AREA = 256 * 256
TEST_STEPS = 8
USUAL_STEPS = 20
PREFERRED_SIZES = ((512, 512), (1024, 1024))
_TOGETHER = {
    "single": "",
    "request": "of one request",
    "seeds": "of one prompt with consecutive seeds",
    "items": "of different requests",
}
_SECRET_KEYS = frozenset({"api_key", "headers", "password"})
DEFAULT_TIMEOUT_SECONDS = 60
NAME_CHARS = 64


@dataclass(frozen=True)
class Probe:
    """What was found out. `check_seconds` is how long its health check took, the quickest of a few."""

    report: HealthReport
    protocol: str
    capabilities: Capabilities
    check_seconds: float


@dataclass(frozen=True)
class Drawing:
    """The test picture."""

    artifact: Artifact
    seconds: float
    ignored: tuple[str, ...]
    steps: int | None


def register(actions: Any) -> None:
    """Tell argparse about the command; `actions` are those of `backends`."""
    parser = actions.add_parser(
        "probe", help="find out what speaks at an address, and how to configure it", epilog=EXAMPLES
    )
    parser.add_argument("url", type=words, metavar="URL", help="where it listens")
    parser.add_argument(
        "--protocol", metavar="P", help="what it speaks, if you know (default: find out; of grpc:// grpc or kserve)"
    )
    parser.add_argument("--name", type=words, metavar="NAME", help="of the backend in the configuration shown")
    parser.add_argument("--upstream-api-key-env", metavar="VAR", help="the environment variable that holds its API key")
    parser.add_argument("--username", metavar="U", help="HTTP Basic user, with --password-env")
    parser.add_argument("--password-env", metavar="VAR", help="the environment variable that holds the password")
    parser.add_argument("--set", action="append", metavar="KEY=JSON", default=[], help="any other key of [[backends]]")
    picture = parser.add_argument_group("the test picture")
    agreed = picture.add_mutually_exclusive_group()
    agreed.add_argument("--draw", action="store_true", help="draw it without asking")
    agreed.add_argument("--no-draw", action="store_true", help="do not draw, do not ask")
    picture.add_argument("--model", type=words, metavar="M", help="the model that draws it (default: the first)")
    picture.add_argument("--size", type=size, metavar="WxH", help="in pixels (default 512x512, or what it can draw)")
    picture.add_argument(
        "--steps", type=whole(1), metavar="N", help="inference steps (default 8, where it takes a number of them)"
    )
    picture.add_argument("--prompt", type=words, default="a lighthouse at dusk", help="what to draw")
    picture.add_argument(
        "-o", "--output", metavar="FILE", help="where to write it (default: it is looked at and dropped)"
    )
    picture.add_argument(
        "--timeout", type=whole(1), default=600, metavar="S", help="seconds to wait for it (default 600)"
    )
    parser.add_argument("--json", action="store_true", help="show what was found as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask, draw if that is agreed to, and tell.

    Raises:
        CommandFailed: the options cannot be used, or the test picture failed.
    """
    if args.output is not None:
        from img_serving.cli.pictures import check_output

        check_output(args.output, 1)  # before anything is paid for
    config = _config(args)
    return asyncio.run(_probe(args, config))


async def _probe(args: argparse.Namespace, config: BackendConfig) -> int:
    if args.protocol is None and config.protocol == "grpc":
        config = await _inference_server(config) or config
    adapter = _adapter(config)
    try:
        found = await _ask(adapter)
        if not args.json:
            _tell_found(args.url, found)
        if not found.report.healthy:
            if args.json:
                print(json.dumps(_as_json(args, config, found, None), indent=2))
            return FAILED
        drawing = None
        try:
            if args.draw or (not args.no_draw and not args.json and _agrees(args, found)):
                drawing = await _draw(args, adapter, found)
                if not args.json:
                    _tell_drawing(args, drawing)
        finally:
            # what was found is told whatever became of the picture, also where somebody lost patience with it
            if args.json:
                print(json.dumps(_as_json(args, config, found, drawing), indent=2))
            else:
                print("\nto use it, paste this into your configuration:\n")
                print(block(args, config, found, drawing))
        return OK
    finally:
        await adapter.close()


def _adapter(config: BackendConfig) -> Backend:
    from img_serving.main import make_adapter

    try:
        return make_adapter(config, config.endpoint_list()[0])
    except (ValueError, OSError) as error:
        raise CommandFailed(str(error), MISUSED) from None


async def _inference_server(config: BackendConfig) -> BackendConfig | None:
    """The same address as one of the Open Inference Protocol, if a server there says its name as that has it."""
    import msgspec

    from img_serving.gateway.registry import PROBE_TIMEOUT_SECONDS

    config = msgspec.structs.replace(config, protocol="kserve")
    adapter = _adapter(config)
    try:
        return config if (await adapter.check(PROBE_TIMEOUT_SECONDS)).found else None
    finally:
        await adapter.close()


async def _ask(adapter: Backend) -> Probe:
    from img_serving.gateway.registry import PROBE_TIMEOUT_SECONDS

    report = await adapter.check(PROBE_TIMEOUT_SECONDS)
    best = math.inf
    if report.healthy:
        for _ in range(3):  # the first one also asked what it is
            started = time.perf_counter()
            await adapter.check(PROBE_TIMEOUT_SECONDS)
            best = min(best, time.perf_counter() - started)
    return Probe(report, adapter.protocol, adapter.capabilities, best)


async def _draw(args: argparse.Namespace, adapter: Backend, found: Probe) -> Drawing:
    from img_serving.cli.progress import progress
    from img_serving.domain.errors import AttemptError, BackendRefusal
    from img_serving.domain.images import Artifact, Call, ImageRequest, Item, Progress

    model = args.model or (found.report.models[0] if found.report.models else None)
    width, height = _size(args, found)
    able = found.capabilities.of(model)
    steps = _steps(args, able)
    given = {"size", "seed"} | ({"num_inference_steps"} if steps else set())
    request = ImageRequest(
        args.prompt, model=model, width=width, height=height, seed=42, seed_given="seed" in able.honours,
        steps=steps, given=frozenset(given),
    )  # fmt: skip
    refusal = able.sizes.refusal(width, height)
    if refusal is not None:
        raise CommandFailed(f"{refusal}; choose another one with --size", MISUSED)
    call = Call(request, model, width, height, (Item(args.prompt, None, 42),), float(args.timeout))
    if not (args.json or sys.stderr.isatty()):
        say(f"drawing {_described(width, height, steps)}; this may take up to {args.timeout} s without a sign of life")
    started = time.perf_counter()
    with progress("drawing", quiet=args.json, measured=able.progress) as watch:

        def heard(step: Progress) -> None:
            _watch(watch, step)

        try:
            (drawn,) = await adapter.generate(call, heard)
        except AttemptError as error:
            raise CommandFailed(f"the test picture failed: {error.message}") from None
        except BackendRefusal as refused:
            raise CommandFailed(f"the test picture was refused: {refused.error.message}") from None
    seconds = time.perf_counter() - started
    if not isinstance(drawn, Artifact):
        raise CommandFailed(f"the test picture failed: {drawn.message}")
    if args.output is not None:
        _write(args.output, drawn)
    lost = (given - able.honours) | set(drawn.ignored)
    if (drawn.width, drawn.height) != (width, height):
        lost.add("size")
    return Drawing(drawn, seconds, tuple(sorted(lost & given)), steps)


def _watch(watch: Watch, step: Any) -> None:
    if step.total:
        watch(step.done / step.total)


def _write(path: str, artifact: Artifact) -> None:
    from pathlib import Path

    from img_serving.cli.pictures import Named, Picture, write_all
    from img_serving.media.payload import raw_bytes

    data = raw_bytes(artifact)
    picture = Named(Picture(data, artifact.seed), artifact.media_type, artifact.width, artifact.height, Path(path))
    write_all([picture])


def _size(args: argparse.Namespace, found: Probe) -> tuple[int, int]:
    """The size that was asked for; else one that the model can draw."""
    if args.size is not None:
        width, height = (int(side) for side in args.size.split("x"))
        return width, height
    sizes = found.capabilities.of(args.model or next(iter(found.report.models or ()), None)).sizes
    return next((one for one in (*PREFERRED_SIZES, *sizes.choices) if sizes.refusal(*one) is None), PREFERRED_SIZES[0])


def _steps(args: argparse.Namespace, able: Capabilities) -> int | None:
    """Few, where they can be said: it is a test, and some servers' own number takes minutes."""
    if args.steps is not None or "num_inference_steps" not in able.honours:
        return args.steps  # type: ignore[no-any-return] # an int, or None
    return TEST_STEPS if able.max_steps is None else min(TEST_STEPS, able.max_steps)


def _described(width: int, height: int, steps: int | None) -> str:
    in_steps = "" if steps is None else f" in {steps} step{'s'[: steps != 1]}"
    return f"one test picture of {width}x{height}{in_steps}"


def _agrees(args: argparse.Namespace, found: Probe) -> bool:
    """Ask whether to draw; without a terminal nobody can be asked, so nothing is drawn."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        say("no test picture is drawn without a terminal to ask at; --draw agrees beforehand")
        return False
    model = args.model or next(iter(found.report.models or ()), None)
    what = _described(*_size(args, found), _steps(args, found.capabilities.of(model)))
    # inside a loop Ctrl-C only asks its task to end, which does not happen while this waits
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        answer = input(f"\ndraw {what} there? it takes its time, and hosted ones charge for it [y/N] ")
    except EOFError:
        return False
    finally:
        signal.signal(signal.SIGINT, before)
    return answer.strip().lower() in {"y", "yes", "예", "네", "ㅇ"}


# what is told


def _tell_found(url: str, found: Probe) -> None:
    report, able = found.report, found.capabilities
    lines = [f"{url}"]
    if not report.healthy:
        lines.append(f"  cannot be used: {_line(report.detail)}")
        if "credentials" in report.detail:
            lines.append("  give a key with --upstream-api-key-env VAR, or --username and --password-env")
        print(printable("\n".join(lines)))
        return
    lines.append(f"  speaks      {found.protocol}" + (f": {_line(report.found)}" if report.found else ""))
    lines.append(f"  health      {_line(report.detail)}; a check takes {found.check_seconds * 1000:.1f} ms")
    lines.append(f"  models      {_listed(report.models) if report.models else 'it does not say'}")
    does = [{"generation": "draws", "edit": "edits", "variation": "varies"}[one] for one in sorted(able.operations)]
    extras = [
        word
        for word, has in (
            ("masks", able.masks), ("progress", able.progress), ("previews", able.previews), ("can be stopped", able.cancels),
        )
        if has
    ]  # fmt: skip
    lines.append(f"  does        {', '.join(sorted(set(does)) + extras)}")
    lines.append(f"  honours     {', '.join(sorted(able.honours)) or 'nothing that is known'}")
    lines.append(f"  sizes       {_sizes(able)}")
    if able.samplers is not None:
        lines.append(f"  samplers    {_listed(able.samplers.names)}")
    if able.schedulers is not None:
        lines.append(f"  schedules   {_listed(able.schedulers.names)}")
    one_call = (
        "one picture" if able.max_batch_size == 1 else f"up to {able.max_batch_size} pictures {_TOGETHER[able.batch]}"
    )
    lines.append(f"  one call    {one_call}")
    lines += [f"  but         {_line(fault)}" for fault in report.faults]
    print(printable("\n".join(lines)))


def _tell_drawing(args: argparse.Namespace, drawing: Drawing) -> None:
    drawn = drawing.artifact
    seed = "" if drawn.seed is None else f", seed {drawn.seed}"
    print(
        printable(f"\ntest picture: {drawn.width}x{drawn.height} {drawn.media_type} in {drawing.seconds:.2f} s{seed}")
    )
    if drawing.ignored:
        print(printable(f"  not honoured: {', '.join(drawing.ignored)}"))
    if args.output:
        print(printable(f"  written to {args.output}"))


def _line(text: str) -> str:
    """Text from elsewhere on one line: nothing in it may look like a line of ours."""
    return printable(text.replace("\n", "\\n"))


def _listed(names: tuple[str, ...]) -> str:
    names = tuple(_line(name) for name in names)
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _sizes(able: Capabilities) -> str:
    rule = able.sizes
    if rule.choices:
        return ", ".join(f"{width}x{height}" for width, height in rule.choices)
    parts = [f"multiples of {rule.multiple}, others rounded {rule.rounding}"] if rule.multiple > 1 else []
    if rule.min_side > 1:
        parts.append(f"sides from {rule.min_side}")
    if rule.max_side is not None:
        parts.append(f"sides to {rule.max_side}")
    if rule.max_pixels is not None:
        parts.append(f"{rule.max_pixels} pixels at most")
    return ", ".join(parts) or "any, as far as is known"


def block(args: argparse.Namespace, config: BackendConfig, found: Probe, drawing: Drawing | None) -> str:
    """The `[[backends]]` table to paste: what was found, and of secrets only where they are kept."""
    from img_serving.config import toml_of

    lines = ["[[backends]]", f"name = {toml_of(config.name)}", f"protocol = {toml_of(found.protocol)}"]
    lines.append(f"endpoints = {toml_of([_plain(config)])}")
    settings = _settings(args)
    if found.report.models and len(found.report.models) > 1 and "models" not in settings:
        lines.append(f"#models = {toml_of(found.report.models[:SHOWN])}  # to serve these only")
    if args.upstream_api_key_env:
        lines.append(f'api_key = "${{{args.upstream_api_key_env}}}"')
    if args.username:
        lines += [f"username = {toml_of(args.username)}", f'password = "${{{args.password_env}}}"']
    for key, value in settings.items():
        if key in _SECRET_KEYS:
            lines.append(f'#{key} = "${{…}}"  # as you gave it; keep secrets in the environment')
        elif value is not None:
            lines.append(f"{key} = {toml_of(value)}")
    wait = _timeout(found, drawing)
    if wait is not None and "timeout_ms" not in settings:
        lines.append(f"timeout_ms = {wait * 1000}  # 1024x1024 would take about {wait // 3} s there")
    return "\n".join(lines)


def _timeout(found: Probe, drawing: Drawing | None) -> int | None:
    """Seconds that one attempt needs, where the default is too short for a picture of the default size."""
    if drawing is None or found.capabilities.progress:
        return None  # progress renews the time-out
    area = drawing.artifact.width * drawing.artifact.height
    if area < SMALL_AREA:
        return None  # most of its time was not spent on pixels
    expected = drawing.seconds * max(1.0, 1024 * 1024 / area)
    if drawing.steps is not None and "num_inference_steps" not in drawing.ignored:
        expected *= max(1.0, USUAL_STEPS / drawing.steps)
    return math.ceil(expected) * 3 if expected * 2 > DEFAULT_TIMEOUT_SECONDS else None


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    from img_serving.cli.backends import settings_of

    return settings_of(args.set, {})


def _as_json(args: argparse.Namespace, config: BackendConfig, found: Probe, drawing: Drawing | None) -> dict[str, Any]:
    import msgspec

    from img_serving.api.backends import capabilities_record
    from img_serving.config import backend_to_mapping

    report = found.report
    made = {key: value for key, value in backend_to_mapping(config).items() if key in {"name", "endpoints"}}
    record: dict[str, Any] = {
        "url": _plain(config),
        "healthy": report.healthy,
        "detail": report.detail,
        "protocol": found.protocol,
        "found": report.found,
        "models": list(report.models or ()),
        "check_seconds": round(found.check_seconds, 6) if report.healthy else None,
        "faults": list(report.faults),
        "capabilities": msgspec.to_builtins(capabilities_record(found.capabilities)) if report.healthy else None,
        "backend": {**made, "protocol": found.protocol},
        "picture": None,
    }
    if drawing is not None:
        record["picture"] = {
            "width": drawing.artifact.width,
            "height": drawing.artifact.height,
            "media_type": drawing.artifact.media_type,
            "seed": drawing.artifact.seed,
            "seconds": round(drawing.seconds, 6),
            "steps": drawing.steps,
            "ignored": list(drawing.ignored),
            "path": args.output,
        }
    return record


# what is asked


def _protocol(url: str) -> str:
    """What an address itself says of its protocol: nobody can find out whether gRPC is spoken by asking for pages.

    Whether that is a worker's or the Open Inference Protocol is asked there.
    """
    return "grpc" if url.startswith(("grpc://", "grpcs://")) else "http"


def _config(args: argparse.Namespace) -> BackendConfig:
    """The backend that the options describe.

    Raises:
        CommandFailed: it cannot be one.
    """
    from img_serving.cli.backends import settings_of
    from img_serving.config import ConfigError, backend_from_mapping

    url = args.url if "://" in args.url else f"http://{args.url}"
    body: dict[str, Any] = {
        "name": args.name or _name(url),
        "protocol": args.protocol or _protocol(url),
        "endpoints": [url],
    }
    for option, key, variable in (
        ("--upstream-api-key-env", "api_key", args.upstream_api_key_env),
        ("--password-env", "password", args.password_env),
    ):
        if variable is not None:
            secret = os.environ.get(variable)
            if not secret:
                raise CommandFailed(f"the environment variable {variable} ({option}) is not set", MISUSED)
            body[key] = secret
    if args.username is not None:
        body["username"] = args.username
    body |= settings_of(args.set, body)
    try:
        return backend_from_mapping(body)
    except ConfigError as error:
        reasons = "; ".join(f"{one.path}: {one.message}" if one.path else one.message for one in error.problems)
        raise CommandFailed(reasons.replace("endpoints[0]", "URL"), MISUSED) from None


def _name(url: str) -> str:
    """A name for the backend from its address."""
    try:
        parts = urlsplit(url)
        text = (parts.hostname or "backend") + (f"-{parts.port}" if parts.port else "")
    except ValueError:
        return "backend"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:NAME_CHARS] or "backend"


def _plain(config: BackendConfig) -> str:
    return config.endpoint_list()[0].url
