"""JSON for other programs."""

from __future__ import annotations

from typing import Any

from lightning_fp.records.jsonl import json_text


def print_json(value: Any) -> None:
    """Print as JSON without inf and NaN, which JSON does not know: null stands for them."""
    print(json_text(value))
