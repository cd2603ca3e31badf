"""The admin key that is made at the first start: its hash in the state store, the key itself shown once and in an env file."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from img_serving.config import Config
from img_serving.domain.errors import StartError
from img_serving.policy.api_keys import digest_of
from img_serving.ports import StateStore

KEY_HASHES = "admin_key_hashes"
ENV_KEY = "IMG_SERVING_API_KEY"


async def admin_key(config: Config, state: StateStore, env_file: Path | None) -> tuple[list[bytes], str | None]:
    """The digests of the keys made at earlier starts, and a new key where there is none to call with.

    Only a key's digest is kept. `env_file` (`make serve`) also remembers the key itself; if its key is lost or unknown, a
    new one is made beside the old ones, which stay good.
    """
    if not config.auth.enabled:
        return [], None
    stored = await state.get_value(KEY_HASHES)
    digests = [bytes.fromhex(one) for one in (stored or "").split(",") if one]
    known = {*digests, *(digest_of(key.key) for key in config.auth.key_list())}
    remembered = read_env_key(env_file) if env_file is not None else None
    if remembered is not None and digest_of(remembered) in known:
        return digests, None
    if env_file is None and known:
        return digests, None
    if env_file is not None and config.auth.key_list():
        # the operator has keys of their own: the file gets the first that may do everything
        first = next((key.key for key in config.auth.key_list() if key.role == "admin"), None)
        if first is not None:
            write_env_key(env_file, first)
            return digests, None
    key = "sk-" + secrets.token_urlsafe(32)
    digests.append(digest_of(key))
    if env_file is not None:
        write_env_key(env_file, key)
    return digests, key


async def remember_keys(digests: list[bytes], state: StateStore) -> None:
    """Keep the digests, after the new key was shown: one that nobody saw would lock its owner out for good."""
    await state.put_value(KEY_HASHES, ",".join(one.hex() for one in digests))


def read_env_key(path: Path) -> str | None:
    """The key in an env file, or None."""
    with suppress(OSError, UnicodeDecodeError):
        for line in path.read_text().splitlines():
            name, separator, value = line.removeprefix("export ").partition("=")
            if separator and name.strip() == ENV_KEY:
                return value.strip().strip("'\"") or None
    return None


def write_env_key(path: Path, key: str) -> None:
    """Add or replace the one line with the key; the file is for its owner's eyes only.

    Raises:
        StartError: it cannot be written.
    """
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.removeprefix("export ").partition("=")[0].strip() != ENV_KEY]
        part = path.with_name(path.name + ".part")
        with suppress(FileNotFoundError):
            part.unlink()
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write("\n".join([*kept, f"{ENV_KEY}={key}"]) + "\n")
        part.replace(path)
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"cannot write the API key to {path}: {error}") from error
