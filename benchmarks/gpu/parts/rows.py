"""What is measured, one line of JSON each, on disk at once."""

from __future__ import annotations

import json
import time
from pathlib import Path


class NotHereError(Exception):
    """This part cannot be measured here; the message says why."""


class OutOfTimeError(Exception):
    """No time is left for another row."""


class Rows:
    """Takes the rows of one part.

    Args:
        path: the file they go to.
        part: its name.
        deadline: by `time.monotonic`; the row after it is not begun.
    """

    def __init__(self, path: Path, *, part: str, deadline: float) -> None:
        self.path, self.part, self.deadline = path, part, deadline

    def add(
        self,
        what: str,
        value: float | None,
        unit: str = "",
        *,
        ratio: float | None = None,
        note: str = "",
    ) -> None:
        """Keep one figure; call it as soon as there is one.

        Args:
            what: that was measured.
            value: None where it could not be; the note says why.
            unit: of the value.
            ratio: of BF16's time to this one's, or another that the note names.
            note: how to read it.
        """
        row = {"what": what, "value": value, "unit": unit, "ratio": ratio, "note": note}
        self._write({"part": self.part, **row})
        if time.monotonic() > self.deadline:
            raise OutOfTimeError

    def end(self, status: str, reason: str, *, seconds: float) -> None:
        """Say how the part ended."""
        self._write({"part": self.part, "status": status, "reason": reason, "seconds": seconds})

    def _write(self, line: dict[str, object]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
