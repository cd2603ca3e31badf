"""`img-serving backends`: lists, adds and removes the backends of a running gateway."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from img_serving.cli import probe
from img_serving.cli.endings import MISUSED, OK, CommandFailed, printable
from img_serving.cli.usage import Commands, add_gateway_options, number, whole, words

if TYPE_CHECKING:
    from rich.console import Group

    from img_serving.api.backends import BackendEndpointRecord, BackendRecord

EXAMPLES = """\
examples:
  img-serving backends list
  img-serving backends add sd --protocol a1111 --endpoint http://gpu-1:7860 --endpoint http://gpu-2:7860
  img-serving backends remove sd
  img-serving backends probe http://gpu-1:7860     # what speaks there, and how to configure it
"""

ADD_EXAMPLES = """\
examples:
  img-serving backends add sd --protocol a1111 --endpoint http://gpu-1:7860
  img-serving backends add hosted --protocol openai --endpoint https://api.example.com \\
      --model dall-e-3 --upstream-api-key-env HOSTED_KEY
  img-serving backends add sd2 --endpoint http://gpu-3:7860 --set tier=1 --set 'headers={"X-Team": "art"}'

The gateway keeps it in its data directory: it is there after a restart. Every key of [[backends]] can be given with --set
(`img-serving check-config --defaults` describes them).
"""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Tell argparse about the commands."""
    parser = commands.add_parser("backends", help="list, add and remove backends; probe an address", epilog=EXAMPLES)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    listing = actions.add_parser("list", help="show them and how they are")
    listing.add_argument("--json", action="store_true", help="as JSON, exactly as the gateway answers")
    add_gateway_options(listing)
    listing.set_defaults(run=show)

    adding = actions.add_parser("add", help="add one", epilog=ADD_EXAMPLES)
    adding.add_argument("name", type=words, metavar="NAME", help="letters, digits, dots, underscores and dashes")
    adding.add_argument(
        "--protocol", metavar="P", help="what it speaks: openai, a1111 …, or http = the gateway finds out (default)"
    )
    adding.add_argument("--endpoint", action="append", metavar="URL", help="where it listens; repeat for more")
    adding.add_argument("--model", action="append", metavar="M", help="a model it serves (default: ask it); repeatable")
    adding.add_argument("--weight", type=number, metavar="W", help="share of the traffic (default 1)")
    adding.add_argument("--timeout-ms", type=whole(1), metavar="N", help="milliseconds for one attempt (default 60000)")
    adding.add_argument("--max-concurrency", type=whole(1), metavar="N", help="calls in flight per endpoint")
    adding.add_argument(
        "--upstream-api-key-env",
        metavar="VAR",
        help="the environment variable here that holds the backend's own API key",
    )
    adding.add_argument(
        "--set", action="append", metavar="KEY=JSON", default=[], help="any other key of [[backends]]; repeatable"
    )
    add_gateway_options(adding)
    adding.set_defaults(run=add)

    removing = actions.add_parser("remove", help="remove one; what runs there finishes")
    removing.add_argument("name", type=words, metavar="NAME")
    add_gateway_options(removing)
    removing.set_defaults(run=remove)
    probe.register(actions)


def show(args: argparse.Namespace) -> int:
    """`backends list`.

    Raises:
        CommandFailed: the gateway does not answer, or refuses.
    """
    from img_serving.cli.client import connect

    answer = connect(args).call("GET", "/v1/backends")
    if args.json:
        print(json.dumps(answer.json(), indent=2, ensure_ascii=False))
        return OK

    import msgspec
    from rich.console import Console

    from img_serving.api.backends import BackendList

    try:
        backends = msgspec.json.decode(answer.body, type=BackendList).data
    except msgspec.DecodeError as error:
        raise CommandFailed(
            f"the answer is not a list of backends ({error}): is there an img-serving gateway?"
        ) from error
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # nothing is cut or folded for a file or a pipe
    console.print(page_of(backends))
    return OK


def add(args: argparse.Namespace) -> int:
    """`backends add`.

    Raises:
        CommandFailed: a value cannot be used, or the gateway refuses.
    """
    from img_serving.cli.client import connect

    body = _wanted(args)
    record = connect(args).call("POST", "/v1/backends", body).json()
    count = len(record.get("endpoints", []))
    print(
        printable(
            f"added {record.get('name', args.name)} ({record.get('protocol', '?')}, "
            f"{count} endpoint{'' if count == 1 else 's'}); `img-serving backends list` shows how it is"
        )
    )
    return OK


def remove(args: argparse.Namespace) -> int:
    """`backends remove`.

    Raises:
        CommandFailed: there is none of that name, or it is not the API's to remove.
    """
    from img_serving.cli.client import connect

    connect(args).call("DELETE", f"/v1/backends/{quote(args.name, safe='')}")
    print(f"removed {printable(args.name)}")
    return OK


def _wanted(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of `[[backends]]` that the options say."""
    body: dict[str, Any] = {
        "name": args.name,
        "protocol": args.protocol,
        "endpoints": args.endpoint,
        "models": args.model,
        "weight": args.weight,
        "timeout_ms": args.timeout_ms,
        "max_concurrency": args.max_concurrency,
    }
    body = {key: value for key, value in body.items() if value is not None}
    if args.upstream_api_key_env is not None:
        secret = os.environ.get(args.upstream_api_key_env)
        if not secret:
            raise CommandFailed(f"the environment variable {args.upstream_api_key_env} is not set", MISUSED)
        body["api_key"] = secret
    return body | settings_of(args.set, body)


def settings_of(given: list[str], body: dict[str, Any]) -> dict[str, Any]:
    """What `--set KEY=JSON` says; no key of `body`, and none twice.

    Raises:
        CommandFailed: one is not of that form, or its value is not JSON.
    """
    found: dict[str, Any] = {}
    for setting in given:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise CommandFailed("--set takes KEY=JSON, for example --set tier=1", MISUSED)
        if key in body or key in found:
            raise CommandFailed(f"{key} is given twice", MISUSED)
        try:
            found[key] = json.loads(text)
        except ValueError:
            if text[:1] in '{["':
                raise CommandFailed(f"the value of --set {key}=… is not JSON", MISUSED) from None
            found[key] = text  # a plain word needs no quotes
    return found


def page_of(backends: list[BackendRecord]) -> Group:
    """The backends and their endpoints for people. Texts that come from backends are never read as markup."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def text(value: str, style: str = "") -> Text:
        return Text(printable(value), style)

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("NAME", "PROTOCOL", "STATE", "WEIGHT", "IN FLIGHT"):
        table.add_column(name, overflow="fold", no_wrap=name != "NAME")
    table.add_column("MODELS", overflow="fold", min_width=16)
    endpoints = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    endpoints.add_column("NAME", overflow="fold", max_width=20)
    endpoints.add_column("ENDPOINT", overflow="fold", min_width=28)
    endpoints.add_column("STATE", overflow="fold", min_width=24)
    for one in backends:
        detected = f" ({one.detected_protocol})" if one.detected_protocol else ""
        in_flight = sum(endpoint.in_flight for endpoint in one.endpoints)
        slots = sum(endpoint.max_concurrency for endpoint in one.endpoints)
        table.add_row(
            text(one.name, "bold"),
            text(one.protocol + detected),
            text(*_state_of(one)),
            text(f"{one.weight:g}"),
            text(f"{in_flight}/{slots}"),
            text(", ".join(one.models) or "-"),
        )
        for endpoint in one.endpoints:
            endpoints.add_row(text(one.name, "bold"), text(endpoint.url), text(_state_of_endpoint(endpoint)))
    return Group(table, Text(), endpoints)


def _state_of(backend: BackendRecord) -> tuple[str, str]:
    """A word and a colour."""
    if not backend.enabled:
        return "disabled", "dim"
    return ("healthy", "green") if backend.healthy else ("unhealthy", "red")


def _state_of_endpoint(endpoint: BackendEndpointRecord) -> str:
    """`up` and which program it is, or what is wrong with it."""
    state: str = endpoint.health
    if endpoint.breaker != "closed":
        state += f", breaker {endpoint.breaker.replace('_', ' ')}"
    detail = endpoint.health_detail if endpoint.health == "down" else endpoint.found.partition(" (")[0]
    return f"{state} ({detail[:100]})" if detail else state
