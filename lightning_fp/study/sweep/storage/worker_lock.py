"""A worker's lock: held as long as its process lives, so that others see at once when it is gone.

The operating system lets go of it however the process ends. Where there are no such locks, or the
worker is on another machine, its lease has to run out instead.
"""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


class WorkerLock:
    """Names this process as a worker, and shows that it lives.

    Args:
        directory: where the workers of a sweep keep their locks.
    """

    def __init__(self, directory: Path) -> None:
        self.host = socket.gethostname()
        self.name = f"{self.host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._path = directory / f"{self.name}.lock"
        self._file: IO[bytes] | None = None

    def __enter__(self) -> WorkerLock:
        if fcntl is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()

    def is_gone(self, worker: str) -> bool:
        """Whether another worker's process has ended; False where that cannot be known."""
        # A network's file system may keep locks on each machine alone.
        if fcntl is None or worker == self.name or worker.rsplit("-", 2)[0] != self.host:
            return False
        path = self._path.with_name(f"{worker}.lock")
        try:
            file = path.open("rb")
        except FileNotFoundError:  # it has just ended in order, or another has buried it
            return False
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        path.unlink(missing_ok=True)
        return True
