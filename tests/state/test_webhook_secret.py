"""The secret of webhooks: the operator's, or made once and kept."""

from __future__ import annotations

import asyncio

import pytest

from img_serving.config import Config, Webhooks
from img_serving.policy.webhooks import written_secret
from img_serving.state.memory import MemoryState
from img_serving.state.sqlite import SqliteState, StateError
from img_serving.state.webhook_secret import stored_secret, webhook_secrets


def test_it_is_made_once_and_stays_the_same():
    async def main() -> None:
        state = MemoryState()
        (first,) = await webhook_secrets(Config(), state)
        assert len(first) == 32
        assert await webhook_secrets(Config(), state) == (first,)
        assert await webhook_secrets(Config(), MemoryState()) != (first,)

    asyncio.run(main())


def test_the_operators_own_is_taken_and_none_is_made():
    async def main() -> None:
        state = MemoryState()
        config = Config(webhooks=Webhooks(secret=f"{'a' * 24},{'b' * 24}"))
        assert await webhook_secrets(config, state) == (b"a" * 24, b"b" * 24)
        assert await state.get_value("webhook_secret") is None

    asyncio.run(main())


def test_it_is_read_from_the_file_while_a_gateway_has_it_open_and_afterwards(tmp_path):
    path = tmp_path / "a dir?#%" / "state.db"
    assert stored_secret(path) is None

    async def main() -> bytes:
        state = SqliteState(path)
        await state.open()
        assert stored_secret(path) is None
        (key,) = await webhook_secrets(Config(), state)
        assert stored_secret(path) == written_secret(key)
        await state.close()
        return key

    key = asyncio.run(main())
    assert stored_secret(path) == written_secret(key)


def test_a_file_that_is_no_state_file_is_said_so(tmp_path):
    path = tmp_path / "state.db"
    path.write_bytes(b"my diary, not a database\n" * 100)
    with pytest.raises(StateError, match="cannot be read"):
        stored_secret(path)
