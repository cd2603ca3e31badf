"""A job that is over stays as it ended, whatever is still on its way to the store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec import structs

from img_serving.domain.images import ImageRequest
from img_serving.domain.jobs import JobStatus
from img_serving.domain.stored import StoredJob
from img_serving.state.memory import MemoryState
from img_serving.state.sqlite import SqliteState


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_late_note_does_not_undo_an_end(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        state = MemoryState() if kind == "memory" else SqliteState(tmp_path / "state.db")
        await state.open()
        running = StoredJob(
            id="job_1",
            tenant="me",
            request=ImageRequest(prompt="x"),
            created_at=1.0,
            deadline_at=2.0,
            response_format="url",
            base_url="",
            artifact_key=b"",
            status=JobStatus.RUNNING,
        )
        await state.add_job(running)
        await state.save_job(structs.replace(running, status=JobStatus.FAILED))
        await state.save_job(running)
        found = await state.find_job("me", "job_1")
        assert found is not None
        assert found.status is JobStatus.FAILED
        assert await state.unfinished_jobs(10) == []
        await state.close()

    asyncio.run(main())
