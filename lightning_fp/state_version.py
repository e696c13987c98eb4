"""The version that every saved state carries, and what is said of a state of another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_RESUME = "resume with the lightning_fp version that wrote the checkpoint, or a later one"


def check_version(
    state: Mapping[str, Any], version: int, must: str, *, do: str = _RESUME
) -> dict[str, Any]:
    """Refuse a state that was saved in another version.

    Args:
        state: as it was saved, with its "version".
        version: the one that can be read.
        must: how the message begins, e.g. "rollout state must have version".
        do: what to do about it.

    Returns:
        The rest of it.

    Raises:
        ValueError: if it is of another version, or of none.
    """
    if (found := state.get("version")) != version:
        raise ValueError(f"{must} {version}, got {found!r}; {do}")
    return {name: value for name, value in state.items() if name != "version"}
