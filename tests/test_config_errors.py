"""One line out of what jsonargparse says of a configuration."""

from __future__ import annotations

import pytest

from lightning_fp.cli.config_errors import one_line

CALLBACKS = """Parser key "trainer.callbacks":
  Does not validate against any of the Union subtypes
  Subtypes: [list[a.Callback], <class 'a.Callback'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'a.PrecisionFallback':
        Parser key "policy":
          Does not validate against any of the Union subtypes
          Errors:
            - Problem with given class_path 'a.FallbackPolicy':
                Parser key "grace":
                  {cause}
            - Expected a <class 'NoneType'>
          Given value type: <class 'dict'>
    - Not a valid subclass of Callback
      Subclass types expect one of:
      - a class path (str)
      - a dict with class_path entry
    - Expected a <class 'NoneType'>
  Given value: [{{'class_path': 'a.PrecisionFallback'}}]"""

FIELD = "trainer.callbacks: PrecisionFallback: policy: FallbackPolicy: grace"


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        ("Expected a <class 'int'>. Got value: x", " must be a whole number, got 'x'"),
        ("Expected a <class 'float'>. Got value: []", " must be a number, got '[]'"),
        (
            "Expected a typing.Literal['one', 'two']. Got value: three",
            " must be one of one, two, got 'three'",
        ),
        ("Option 'colour' is not accepted", " has no option 'colour'"),
        ("at least 1 of <class 'a.b.Thing'>, please", ": at least 1 of Thing, please"),
    ],
)
def test_the_cause_with_its_field(cause: str, said: str) -> None:
    assert one_line(CALLBACKS.format(cause=cause)) == FIELD + said


def test_other_messages_become_one_line() -> None:
    assert one_line("every_n_steps must be at least 1, got 0") == (
        "every_n_steps must be at least 1, got 0"
    )
    assert one_line("  Errors:\n    - Expected a <class 'NoneType'>") == (
        "Errors: - Expected a <class 'NoneType'>"  # nothing better is known
    )
    assert one_line("") == ""
    assert len(one_line("a: " + "b" * 1000)) < 420
