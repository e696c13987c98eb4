"""One thread of a process writes records at a time, and a forked process takes no lock with it.

One lock for all writers: what they write is rare and small, and writers without a lock of their own
can be pickled.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager

_lock = threading.RLock()


@contextmanager
def one_at_a_time() -> Generator[None, None, None]:
    """Around what no other thread may write into."""
    with _lock:
        yield


def _begin_anew() -> None:
    """The thread that held it is not in the child, which would wait for ever."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
