"""The secret that webhooks are signed with: the operator's, or one that is made at the first start and kept in the state."""

from __future__ import annotations

import secrets
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final
from urllib.parse import quote

from img_serving.config import Config
from img_serving.policy.webhooks import parse_secrets, written_secret
from img_serving.ports import StateStore
from img_serving.state.sqlite import StateError

WEBHOOK_SECRET: Final = "webhook_secret"  # noqa: S105 - the name that it is kept under
_SECRET_BYTES: Final = 32


async def webhook_secrets(config: Config, state: StateStore) -> tuple[bytes, ...]:
    """The keys to sign with: of `webhooks.secret`, else the one made at the first start.

    Raises:
        ValueError: what is there is no secret (`Webhooks.findings` told so before, of the operator's).
        StateError: the state cannot be read or written.
    """
    if config.webhooks.secret is not None:
        return parse_secrets(config.webhooks.secret)
    stored = await state.get_value(WEBHOOK_SECRET)
    if stored is None:
        stored = written_secret(secrets.token_bytes(_SECRET_BYTES))
        await state.put_value(WEBHOOK_SECRET, stored)
    return parse_secrets(stored)


def stored_secret(path: Path) -> str | None:
    """The secret in a state file that a gateway may have open; None: there is none yet. Nothing is written.

    Raises:
        StateError: the file cannot be read.
    """
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=5.0)) as connection:
            row = connection.execute("SELECT value FROM named_values WHERE key = ?", (WEBHOOK_SECRET,)).fetchone()
    except sqlite3.Error as error:
        raise StateError(f"the state file {path} cannot be read ({error}): check its owner and mode") from error
    return None if row is None else str(row[0])
