"""`img-serving jobs`: the jobs of one's key in a running gateway: listed, looked at, followed, cancelled."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlencode

from img_serving.cli.endings import INTERRUPTED, OK, CommandFailed, moment, printable, say
from img_serving.cli.usage import Commands, add_gateway_options, whole, words

if TYPE_CHECKING:
    from rich.table import Table

    from img_serving.cli.client import Answer, Client
    from img_serving.cli.job_words import SeenJob

STATUSES: Final = ("queued", "running", "succeeded", "failed", "cancelled", "expired")
OPERATIONS: Final = ("generation", "edit", "variation")
# written out, because `--help` loads nothing but the standard library

WIDE: Final = 100
"""Columns of a terminal that has room for more than one blank between two columns of the table."""

EXAMPLES = """\
examples:
  img-serving jobs list                    one's own, newest first
  img-serving jobs list --status failed    … only those that failed
  img-serving jobs show job_0123abcd       everything about one
  img-serving jobs follow job_0123abcd     how far it is, until its end
  img-serving jobs cancel job_0123abcd     end it, at the engine too

A job is seen with the key that made it, and for a day after its end (jobs.result_ttl_hours).
"""

LIST_EXAMPLES = """\
PROGRESS is the share that is drawn (45%), or the place in line (#3: two pictures are before it); ~12s: it should be done in
12 seconds.

examples:
  img-serving jobs list --status running
  img-serving jobs list --operation edit --limit 5
  img-serving jobs list --json | python3 -m json.tool
"""

SHOW_EXAMPLES = """\
examples:
  img-serving jobs show job_0123abcd
  img-serving jobs show job_0123abcd --json    with the whole result
"""

FOLLOW_EXAMPLES = """\
The addresses of the pictures go to standard output, one a line; all else to standard error. Ctrl-C leaves the job running.

examples:
  img-serving jobs follow job_0123abcd
  img-serving jobs follow job_0123abcd | xargs -n 1 curl -sO

exit codes: 0 succeeded, 1 failed, cancelled, expired or not to be followed, 130 interrupted
"""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Tell argparse about the commands."""
    parser = commands.add_parser("jobs", help="list, show, follow and cancel jobs", epilog=EXAMPLES)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    listing = actions.add_parser("list", help="show one's own, newest first", epilog=LIST_EXAMPLES)
    listing.add_argument("--status", choices=STATUSES, metavar="S", help=f"only those that are {', '.join(STATUSES)}")
    listing.add_argument(
        "--operation", choices=OPERATIONS, metavar="O", help=f"only those of one kind: {', '.join(OPERATIONS)}"
    )
    listing.add_argument("--limit", type=whole(1, 100), default=20, metavar="N", help="at most so many (default 20)")
    listing.add_argument("--after", type=words, metavar="JOB_ID", help="those that are older than this one")
    listing.add_argument("--json", action="store_true", help="as JSON, exactly as the gateway answers")
    add_gateway_options(listing)
    listing.set_defaults(run=show_list)

    showing = actions.add_parser("show", help="show everything about one", epilog=SHOW_EXAMPLES)
    showing.add_argument("id", type=words, metavar="JOB_ID")
    showing.add_argument("--json", action="store_true", help="as JSON, exactly as the gateway answers")
    add_gateway_options(showing)
    showing.set_defaults(run=show)

    following = actions.add_parser("follow", help="show how far one is, until its end", epilog=FOLLOW_EXAMPLES)
    following.add_argument("id", type=words, metavar="JOB_ID")
    add_gateway_options(following)
    following.set_defaults(run=follow)

    cancelling = actions.add_parser("cancel", help="end one, at the engine too")
    cancelling.add_argument("id", type=words, metavar="JOB_ID")
    add_gateway_options(cancelling)
    cancelling.set_defaults(run=cancel)


def show_list(args: argparse.Namespace) -> int:
    """`jobs list`.

    Raises:
        CommandFailed: the gateway does not answer, or refuses.
    """
    from img_serving.cli.client import connect

    query = {"status": args.status, "operation": args.operation, "limit": args.limit, "after": args.after}
    given = urlencode({name: value for name, value in query.items() if value is not None})
    answer = connect(args).call("GET", f"/v1/jobs?{given}")
    if args.json:
        _print_json(answer.json())
        return OK

    from rich.console import Console

    from img_serving.cli.job_words import read_page

    found = read_page(answer.body)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # nothing is cut or folded for a file or a pipe
    if found.data:
        console.print(table_of(found.data, time.time(), wide=console.width >= WIDE))
    else:
        print("no jobs" if args.status is None and args.operation is None and args.after is None else "no such jobs")
    if found.has_more:
        print(f"… and older ones: --after {printable(found.last_id or '')}")
    return OK


def show(args: argparse.Namespace) -> int:
    """`jobs show`.

    Raises:
        CommandFailed: there is no such job, or the gateway does not answer.
    """
    from img_serving.cli.client import connect

    answer = call(connect(args), "GET", args.id)
    if args.json:
        _print_json(answer.json())
        return OK
    from img_serving.cli.job_words import read_record, urls_of

    record = read_record(answer.body)
    urls = urls_of(record)
    for name, value in _fields(record, time.time()):
        print(f"{name:<15} {value}")
    if urls:
        print("pictures", *(url or "(base64: --json shows it)" for url in urls), sep="\n")
    return OK


def follow(args: argparse.Namespace) -> int:
    """`jobs follow`.

    Raises:
        CommandFailed: the job did not succeed, there is none, or the gateway does not answer any more.
    """
    from img_serving.cli.client import connect
    from img_serving.cli.following import until_over
    from img_serving.cli.job_words import error_of, urls_of

    try:
        record = until_over(connect(args), args.id)
    except KeyboardInterrupt:
        say(
            f"{args.id} goes on: `img-serving jobs follow {args.id}` watches it again, "
            f"`img-serving jobs cancel {args.id}` ends it"
        )
        return INTERRUPTED
    error = error_of(record)
    if record.status != "succeeded" or error:
        came = "succeeded, but its pictures cannot be had" if record.status == "succeeded" else f"is {record.status}"
        raise CommandFailed(f"{args.id} {came}" + (f": {error}" if error else ""))
    urls = urls_of(record)
    for url in urls:
        if url is not None:
            print(url)
    if None in urls:
        say(f"its pictures came as base64: `img-serving jobs show {args.id} --json` has them")
    elif not urls:
        say(f"{args.id} succeeded; its pictures went to whoever asked for them, and are not kept")
    return OK


def cancel(args: argparse.Namespace) -> int:
    """`jobs cancel`.

    Raises:
        CommandFailed: there is no such job, it is not over yet, or the gateway does not answer.
    """
    from img_serving.cli.client import connect
    from img_serving.cli.job_words import is_over, read_record

    record = read_record(call(connect(args), "DELETE", args.id).body)
    name = printable(args.id)
    if not is_over(record):  # a gateway that stops keeps what waits
        raise CommandFailed(f"{args.id} is still {record.status}: is the gateway stopping? Ask again when it is back")
    if record.status == "cancelled":
        print(f"{name} is cancelled")
    else:
        print(f"{name} was over before: it is {printable(record.status)} (`img-serving jobs show {name}`)")
    return OK


def path_of(job_id: str) -> str:
    """Where a job is, below the gateway's URL."""
    return f"/v1/jobs/{quote(job_id, safe='')}"


def call(client: Client, method: str, job_id: str) -> Answer:
    """One request about one job.

    Raises:
        CommandFailed: there is no such job, or no answer.
    """
    from img_serving.cli.client import Refused

    try:
        return client.call(method, path_of(job_id))
    except Refused as refusal:
        raise explained(refusal, job_id) from refusal


def explained(refusal: CommandFailed, job_id: str) -> CommandFailed:
    """A refusal, with what to do where there is no such job."""
    if getattr(refusal, "code", None) != "job_not_found":
        return refusal
    return CommandFailed(
        f"there is no job {job_id} for this key: it is another key's, or its time is over\n"
        "hint: `img-serving jobs list` shows this key's jobs; they are kept for a day after their end (jobs.result_ttl_hours)"
    )


def table_of(jobs: list[SeenJob], now: float, *, wide: bool = True) -> Table:
    """The jobs for people, as of `now` (Unix seconds). Texts that come from elsewhere are never read as markup.

    Not `wide`: it fits into 80 columns, and only the name of a model is folded.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from img_serving.cli.job_words import COLOURS, brief, one_line, place

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1) if wide else 0)
    for name in ("JOB", "STATUS", "OPERATION", "MODEL", "N", "PROGRESS", "AGE"):
        table.add_column(
            name, overflow="fold", no_wrap=name != "MODEL", justify="right" if name in {"N", "AGE"} else "left"
        )
    for one in jobs:
        table.add_row(
            Text(one_line(one.id), "bold"),
            Text(one_line(one.status), COLOURS.get(one.status, "")),
            Text(one_line(one.operation)),
            Text(one_line(one.model or "-")),
            Text(str(one.n)),
            Text(place(one)),
            Text(brief(now - one.created_at)),
        )
    return table


def _fields(record: SeenJob, now: float) -> list[tuple[str, str]]:
    """Everything about a job but its pictures, for people; what is not there is left out."""
    from img_serving.cli.job_words import brief, error_of, is_over, one_line, state

    open_now = not is_over(record)
    eta = f"in about {brief(record.eta_seconds)}" if record.eta_seconds is not None else "nobody knows"
    fields: list[tuple[str, str | None]] = [
        ("job", record.id),
        ("status", state(record)),
        ("error", error_of(record) or None),
        ("operation", record.operation),
        ("model", record.model),
        ("pictures asked", str(record.n)),
        ("progress", f"{record.progress:.0%}"),
        ("pictures before", f"{record.position:,}" if record.position is not None else None),
        ("done", eta if open_now else None),
        ("backend", record.backend),
        ("attempts", str(record.attempts)),
        ("created", f"{moment(record.created_at)} ({brief(now - record.created_at)} ago)"),
        ("started", None if record.started_at is None else moment(record.started_at)),
        ("finished", None if record.finished_at is None else moment(record.finished_at)),
        ("kept until", None if record.expires_at is None else moment(record.expires_at)),
        ("request", record.request_id or None),
        ("idempotency key", record.idempotency_key),
        ("webhook", record.webhook_url),
        ("waits for", record.waiting_for),
    ]
    return [(name, one_line(value)) for name, value in fields if value is not None]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
