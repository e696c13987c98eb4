"""One check of every saved state's version."""

from __future__ import annotations

import pytest

from lightning_fp.state_version import check_version


def test_the_right_version_gives_the_rest() -> None:
    assert check_version({"version": 2, "a": 1}, 2, "state") == {"a": 1}


@pytest.mark.parametrize("state", [{}, {"version": 1}, {"version": "2"}])
def test_others_are_refused_with_what_to_do(state: dict[str, object]) -> None:
    words = rf"^state must have version 2, got {state.get('version')!r}; resume with the "
    with pytest.raises(ValueError, match=words):
        check_version(state, 2, "state")
    with pytest.raises(ValueError, match=r"; begin anew$"):
        check_version(state, 2, "state", do="begin anew")
