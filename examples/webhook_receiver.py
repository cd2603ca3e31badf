"""Receives img-serving's webhooks: verifies each call, and does its work once an event. Nothing but the standard library.

WEBHOOK_SECRET="$(.venv/bin/img-serving webhooks secret)" .venv/bin/python examples/webhook_receiver.py 9000
"""

import argparse
import base64
import binascii
import hashlib
import hmac
import json
import os
import sys
import time
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

TOLERANCE_SECONDS = 5 * 60  # an older call may be one that somebody recorded and plays again
MIN_KEY_BYTES = 24  # who can guess the key can sign: with an empty one that is everybody
MAX_BODY_BYTES = 1024 * 1024
MAX_REMEMBERED = 100_000


class NotGenuine(Exception):
    """The call does not come from the gateway, or is too old."""


def key_of(secret):
    """The bytes behind `whsec_…`. ValueError: it is empty, cut short or no secret at all."""
    first, *_ = secret.splitlines() or [""]  # while one secret replaces another, each has a line: any of them will do
    encoded = first.strip().removeprefix("whsec_")
    try:
        key = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise ValueError("it is not whsec_ and base64") from None
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(f"it has {len(key)} bytes, and a secret has {MIN_KEY_BYTES} or more")
    return key


def verify(key, headers, body, now):
    """The id of the event, if the call is genuine. `body` are the bytes as they came: parsing comes afterwards."""
    event_id, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not (timestamp.isascii() and timestamp.isdigit()) or abs(now - int(timestamp)) > TOLERANCE_SECONDS:
        raise NotGenuine("it has no timestamp, or an old one")
    signed = f"{event_id}.{timestamp}.".encode() + body
    expected = hmac.digest(key, signed, hashlib.sha256)
    for one in headers.get("webhook-signature", "").split():
        version, _, signature = one.partition(",")
        try:
            if version == "v1" and hmac.compare_digest(base64.b64decode(signature), expected):
                return event_id
        except (binascii.Error, ValueError):
            pass
    raise NotGenuine("no signature fits")


class Seen:
    """Which events were taken already: every event comes at least once, some come twice.

    A real receiver notes the id in its database, in the transaction that does the work: then a crash loses neither.
    """

    def __init__(self):
        self._ids = OrderedDict()
        self._lock = Lock()

    def add(self, event_id):
        """Whether it is new."""
        with self._lock:
            if event_id in self._ids:
                return False
            self._ids[event_id] = True
            if len(self._ids) > MAX_REMEMBERED:
                self._ids.popitem(last=False)
            return True


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return self.answer(413)
        body = self.rfile.read(int(length))
        try:
            event_id = verify(self.server.key, self.headers, body, time.time())
        except NotGenuine as reason:
            self.log_error("refused: %s", reason)
            return self.answer(401)
        if self.server.seen.add(event_id):
            event = json.loads(body)
            # your work goes here, or better into a queue: answer within 15 seconds
            # one string: print() writes its pieces one by one, and two calls at once would share a line
            sys.stdout.write(f"{event['type']} {event['data']['id']}\n")
            sys.stdout.flush()
        return self.answer(204)

    def answer(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


def main():
    parser = argparse.ArgumentParser(description="Receive img-serving's webhooks.")
    parser.add_argument("port", type=int)
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; put TLS in front of anything else")
    args = parser.parse_args()
    try:
        key = key_of(os.environ.get("WEBHOOK_SECRET", ""))
    except ValueError as reason:
        raise SystemExit(
            f"WEBHOOK_SECRET cannot be used: {reason}. Run, in the directory where the gateway runs:\n"
            '  export WEBHOOK_SECRET="$(.venv/bin/img-serving webhooks secret)"'
        ) from None
    server = ThreadingHTTPServer((args.host, args.port), Receiver)
    server.key, server.seen = key, Seen()
    print(f"listening on http://{args.host}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
