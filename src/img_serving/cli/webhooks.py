"""`img-serving webhooks`: the secret that calls are signed with, what became of them, and sending one again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode, urlsplit

from img_serving.cli.configuration import read_configuration
from img_serving.cli.endings import OK, CommandFailed, moment, printable
from img_serving.cli.usage import Commands, add_gateway_options, whole, words

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from img_serving.api.webhooks import WebhookList, WebhookRecord
    from img_serving.cli.client import Client

WIDE = 220
"""Columns of a terminal that has room for every field of an event; in others there are those that matter, and `--json`."""

EXAMPLES = """\
examples:
  img-serving webhooks secret                    what receivers verify signatures with
  img-serving webhooks list --failed             events that nobody took
  img-serving webhooks redeliver evt_0123abcd    send one again
  img-serving webhooks redeliver job_0123abcd    … or those of a job
"""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Tell argparse about the commands."""
    parser = commands.add_parser(
        "webhooks", help="show the webhooks' secret and what became of them; send again", epilog=EXAMPLES
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    secret = actions.add_parser(
        "secret", help="print the secret, as receivers' libraries take it (run it where the gateway runs)"
    )
    secret.add_argument(
        "--config",
        help="the gateway's configuration (default: $IMG_SERVING_CONFIG, else ./config/default.toml, else the defaults)",
        metavar="FILE",
    )
    secret.set_defaults(run=show_secret)

    listing = actions.add_parser("list", help="show events, newest first")
    which = listing.add_mutually_exclusive_group()
    which.add_argument(
        "--failed", dest="state", action="store_const", const="failed", help="only those that were given up"
    )
    which.add_argument(
        "--pending", dest="state", action="store_const", const="pending", help="only those that are still tried"
    )
    listing.add_argument("--job", type=words, metavar="JOB_ID", help="only those of one job")
    listing.add_argument("--limit", type=whole(1, 100), default=20, metavar="N", help="at most so many (default 20)")
    listing.add_argument("--after", type=words, metavar="EVENT_ID", help="those that are older than this one")
    listing.add_argument("--json", action="store_true", help="as JSON, exactly as the gateway answers")
    add_gateway_options(listing)
    listing.set_defaults(run=show)

    again = actions.add_parser("redeliver", help="send an event again, or those of a job")
    again.add_argument("id", type=words, metavar="EVENT_OR_JOB_ID")
    add_gateway_options(again)
    again.set_defaults(run=redeliver)


def show_secret(args: argparse.Namespace) -> int:
    """`webhooks secret`: one line for each.

    Raises:
        CommandFailed: the configuration or the state cannot be read, or there is none yet.
    """
    from img_serving.policy.webhooks import parse_secrets, written_secret
    from img_serving.state.sqlite import StateError
    from img_serving.state.webhook_secret import stored_secret

    config = read_configuration(args.config).config
    text = config.webhooks.secret
    if text is None:
        path = Path(config.server.data_dir) / "img-serving.db"
        try:
            text = stored_secret(path)
        except StateError as error:
            raise CommandFailed(error.message) from error
        if text is None:
            raise CommandFailed(
                f"there is no secret in {path.absolute()}: it is made when the gateway starts for the first time. "
                "Run this in the directory where the gateway runs"
            )
    for key in parse_secrets(text):
        print(written_secret(key))
    return OK


def show(args: argparse.Namespace) -> int:
    """`webhooks list`.

    Raises:
        CommandFailed: the gateway does not answer, or refuses.
    """
    from img_serving.cli.client import connect

    query = {"state": args.state, "job_id": args.job, "limit": args.limit, "after": args.after}
    body = _ask(connect(args), query)
    if args.json:
        print(json.dumps(json.loads(body), indent=2, ensure_ascii=False))
        return OK

    from rich.console import Console

    found = _decoded(body)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # nothing is cut or folded for a file or a pipe
    console.print(page_of(found.data, wide=console.width >= WIDE) if found.data else "no events")
    if found.has_more:
        console.print(f"… and older ones: --after {printable(found.last_id or '')}", markup=False)
    return OK


def redeliver(args: argparse.Namespace) -> int:
    """`webhooks redeliver`.

    Raises:
        CommandFailed: there is no such event or job, or the gateway does not answer.
    """
    from img_serving.cli.client import connect

    client = connect(args)
    ids = [args.id]
    if args.id.startswith("job_"):
        ids = [one.id for one in _decoded(_ask(client, {"job_id": args.id, "limit": 100})).data]
        if not ids:
            raise CommandFailed(
                f"there is no event of {printable(args.id)}: it did not end, named no receiver, or is forgotten"
            )
    for event_id in ids:
        client.call("POST", f"/v1/webhooks/{quote(event_id, safe='')}/redeliver")
        print(f"{printable(event_id)} is sent again")
    return OK


def _ask(client: Client, query: dict[str, str | int | None]) -> bytes:
    given = urlencode({name: value for name, value in query.items() if value is not None})
    answer = client.call("GET", f"/v1/webhooks?{given}")
    answer.json()  # what is not JSON is told
    return answer.body


def _decoded(body: bytes) -> WebhookList:
    import msgspec

    from img_serving.api.webhooks import WebhookList

    try:
        return msgspec.json.decode(body, type=WebhookList)
    except msgspec.DecodeError as error:
        raise CommandFailed(
            f"the answer is not a list of webhooks ({error}): is there an img-serving gateway?"
        ) from error


def page_of(events: list[WebhookRecord], *, wide: bool) -> RenderableType:
    """The events for people; `wide`: there is room for all of each. Texts that come from elsewhere are never read as markup."""
    return _whole(events) if wide else _short(events)


_COLOURS = {"delivered": "green", "failed": "red", "pending": ""}


def _whole(events: list[WebhookRecord]) -> Table:
    from rich.text import Text

    table = _table("EVENT", "TYPE", "JOB", "STATE", "TRIES", "CREATED", "NEXT TRY", "RECEIVER", "LAST ERROR")
    for one in events:
        table.add_row(
            Text(printable(one.id), "bold"),
            Text(printable(one.type)),
            Text(printable(one.job_id)),
            Text(one.state, _COLOURS[one.state]),
            Text(f"{one.attempts:,}"),
            Text(moment(one.created_at)),
            Text(moment(one.next_at)),
            Text(printable(one.url)),
            Text(printable(one.last_error[:200])),
        )
    return table


def _short(events: list[WebhookRecord]) -> RenderableType:
    """80 columns: ids are whole, for `redeliver`; of a receiver there is its host, and what went wrong stands below."""
    from rich.console import Group
    from rich.text import Text

    table = _table("EVENT", "JOB", "STATE", "TRIES", "RECEIVER")
    for one in events:
        table.add_row(
            Text(printable(one.id), "bold"),
            Text(printable(one.type.removeprefix("job."))),
            Text(one.state, _COLOURS[one.state]),
            Text(f"{one.attempts:,}"),
            Text(printable(_host_of(one.url)), overflow="ellipsis", no_wrap=True),
        )
    errors = [Text(printable(f"{one.id}: {one.last_error[:100]}"), "dim") for one in events if one.last_error]
    return Group(table, *[Text(), *errors] * bool(errors), Text("everything of each: --json", "dim"))


def _table(*names: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name in {"EVENT", "TRIES"})
    return table


def _host_of(url: str) -> str:
    """Who is called, without the path: that may be long, or hold a token."""
    try:
        return urlsplit(url).netloc or url
    except ValueError:
        return url
