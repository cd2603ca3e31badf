"""`img-serving generate`: draws pictures with a running gateway, or in this process, and writes them to files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from img_serving.cli.endings import MISUSED, OK, CommandFailed, printable, say
from img_serving.cli.usage import Commands, add_gateway_options, number, size, whole, words

if TYPE_CHECKING:
    from img_serving.cli.client import Answer
    from img_serving.cli.pictures import Named

EXAMPLES = """\
Several pictures go to out-1.png, out-2.png …, or to where {i} stands in the name. Existing files are overwritten; a file
is never left half written. The name's end chooses the format (.png, .jpg, .webp) unless --format does.

examples:
  img-serving generate "a lighthouse at dusk" -o lighthouse.png
  img-serving generate "눈 내리는 한옥 마을" --size 768x512 -n 4 -o "hanok-{i}.webp"
  img-serving generate "a red fox" --seed 42 --steps 30 --negative "blurry"
  img-serving generate "a red fox" --local --size 256x256 -o fox.png       # no gateway needed
  img-serving generate "a red fox" -o - --quiet | display
"""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Tell argparse about the command."""
    parser = commands.add_parser("generate", help="draw pictures into files", epilog=EXAMPLES)
    parser.add_argument("prompt", type=words, help="what to draw")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="where to write; a directory, or - for standard output (default: a name from the prompt and the seed)",
    )
    picture = parser.add_argument_group("the picture")
    picture.add_argument("-n", type=whole(1), default=1, metavar="N", help="how many (default 1)")
    picture.add_argument("--size", type=size, metavar="WxH", help="in pixels (default: the backend's)")
    picture.add_argument("--steps", type=whole(1), metavar="N", help="inference steps")
    picture.add_argument(
        "--seed", type=whole(0, 2**63 - 1), metavar="N", help="of the first picture; the next have N+1 …"
    )
    picture.add_argument("--guidance", type=number, metavar="F", help="how strongly the words bind the picture")
    picture.add_argument("--negative", "--negative-prompt", type=words, metavar="TEXT", help="what not to draw")
    picture.add_argument("--model", type=words, metavar="M", help="a model, an alias, or a backend's name")
    picture.add_argument("--backend", type=words, metavar="B", help="use this backend and no other")
    picture.add_argument("--format", choices=("png", "jpeg", "webp"), help="of the file")
    picture.add_argument("--compression", type=whole(0, 100), metavar="N", help="quality of JPEG and WebP, 0 to 100")
    add_gateway_options(parser)
    local = parser.add_argument_group("without a gateway")
    local.add_argument("--local", action="store_true", help="draw in this process, with the built-in backend")
    local.add_argument("--config", metavar="FILE", help="with --local: use the backends of this configuration")
    told = parser.add_mutually_exclusive_group()
    told.add_argument("--quiet", action="store_true", help="show neither progress nor results")
    told.add_argument("--json", action="store_true", help="show the results as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw and write.

    Raises:
        CommandFailed: it cannot be drawn or written.
    """
    from img_serving.cli.pictures import STDOUT, check_output, name_all, read_pictures, write_all

    if args.config is not None and not args.local:
        raise CommandFailed("--config goes with --local: a running gateway has its own", MISUSED)
    if args.local and (args.url is not None or args.api_key is not None):
        raise CommandFailed("--local calls no gateway: leave --url and --api-key out", MISUSED)
    if args.json and args.output == STDOUT:
        raise CommandFailed("standard output cannot take both the picture and the JSON: name a file with -o", MISUSED)
    check_output(args.output, args.n)
    answer = _draw(args, _wanted(args))
    named = name_all(read_pictures(answer.body), args.output, args.prompt)
    write_all(named)
    if args.json:
        print(json.dumps(_results(answer, named), ensure_ascii=False, indent=2))
    elif not args.quiet:
        _tell(answer, named)
    return OK


def _draw(args: argparse.Namespace, body: dict[str, Any]) -> Answer:
    from img_serving.cli.progress import progress

    title = "drawing" if args.n == 1 else f"drawing {args.n} pictures"
    if args.local:
        from img_serving.cli.configuration import check_backends, read_configuration
        from img_serving.cli.local import draw

        config = read_configuration(args.config, search=False).config
        check_backends(config)
        with progress(title, quiet=args.quiet, measured=True) as watch:
            return draw(config, body, watch)

    from img_serving.cli.client import connect

    client = connect(args)
    with progress(title, quiet=args.quiet, measured=False):
        return client.call("POST", "/v1/images/generations", body)


def _wanted(args: argparse.Namespace) -> dict[str, Any]:
    """The body of the request: what was not said is left to the gateway."""
    from img_serving.cli.pictures import SUFFIXES

    body = {
        "prompt": args.prompt,
        "n": args.n,
        "response_format": "b64_json",
        "size": args.size,
        "num_inference_steps": args.steps,
        "seed": args.seed,
        "guidance_scale": args.guidance,
        "negative_prompt": args.negative,
        "model": args.model,
        "backend": args.backend,
        "output_format": args.format or SUFFIXES.get(Path(args.output or "").suffix.lower()),
        "output_compression": args.compression,
    }
    return {key: value for key, value in body.items() if value is not None}


def _tell(answer: Answer, named: list[Named]) -> None:
    """A line a picture; on standard error where standard output took the picture."""
    backend = answer.headers.get("x-backend") or "unknown backend"
    each = answer.seconds / len(named)
    for one in named:
        seed = "no seed" if one.picture.seed is None else f"seed {one.picture.seed}"
        size_text = _bytes(len(one.picture.b64_json))
        line = f"{one.path or '-'}  {one.width}x{one.height}  {size_text}  {seed}  {backend}  {each:.2f} s"
        if one.path is None:
            say(line)
        else:
            print(printable(line))
    ignored = answer.headers.get("x-img-serving-ignored")
    if ignored:
        say(f"note: {backend} cannot honour {ignored}")


def _results(answer: Answer, named: list[Named]) -> dict[str, Any]:
    ignored = answer.headers.get("x-img-serving-ignored")
    return {
        "backend": answer.headers.get("x-backend"),
        "job_id": answer.headers.get("x-job-id"),
        "request_id": answer.headers.get("x-request-id"),
        "seconds": round(answer.seconds, 3),
        "ignored": ignored.split(", ") if ignored else [],
        "images": [
            {
                "path": str(one.path),
                "bytes": len(one.picture.b64_json),
                "media_type": one.media_type,
                "width": one.width,
                "height": one.height,
                "seed": one.picture.seed,
                "revised_prompt": one.picture.revised_prompt,
            }
            for one in named
        ],
    }


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB" if count >= 1000 else f"{count} B"
