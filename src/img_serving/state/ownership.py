"""Who owns a data directory: one gateway at a time, or two would draw the same jobs."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from img_serving.domain.errors import StartError

log = logging.getLogger(__name__)

LOCK_FILE = "img-serving.lock"


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Hold the directory for as long as the context is open. The system lets go of it when the process ends, however it does.

    Raises:
        StartError: another process has it.
    """
    path = directory / LOCK_FILE
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(
                f"another gateway is running with the data directory {directory}: stop that one, or set server.data_dir"
            ) from None
        except OSError as error:
            if error.errno not in {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}:
                raise StartError(
                    f"the data directory {directory} cannot be locked: {error.strerror or error}"
                ) from error
            log.warning("the file system of %s has no locks: see to it that only one gateway uses it", directory)
        yield
    finally:
        os.close(file)
