"""RolloutRecipe: the stages of a rollout, in order, and what contradicts itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lightning_fp.choices import check_choice
from lightning_fp.recipes.format_evidence import FormatEvidence
from lightning_fp.recipes.stage import Stage
from lightning_fp.shown import shown

FewBlocks = Literal["refuse", "thirds"]

_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class RolloutRecipe:
    """In which formats a run begins, how it comes to the last ones, and what may stop it.

    >>> recipe = RolloutRecipe(
    ...     name="careful",
    ...     stages=(
    ...         Stage(name="bf16", layers={"*": "high"}, until={"share": 0.1}),
    ...         Stage(name="fp8", layers={"blocks[0]": "high", "*": "configured"}),
    ...     ),
    ... )
    >>> RolloutRecipe.from_yaml(recipe.to_yaml()) == recipe
    True
    """

    name: str
    """Of letters, digits, ".", "-" and "_"."""

    description: str = ""
    """For whom and why, in a sentence."""

    stages: tuple[Stage, ...]
    """In order; a layer that the plugin's configuration leaves in high precision stays there."""

    few_blocks: FewBlocks = "refuse"
    """What `blocks[...]` is in a model without numbered blocks, or with fewer than four: "refuse"
    takes them as they are, and refuses a model that has none; "thirds" takes the first, the middle
    and the last third of the converted layers instead. The built-in recipes do the latter."""

    evidence: tuple[FormatEvidence, ...] = ()
    """What short runs have shown of formats. One that has not passed is refused in a stage."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name must be made of letters, digits, '.', '-' and '_', got {shown(self.name)}"
            )
        if not isinstance(self.description, str):
            raise ValueError(f"description must be a text, got {shown(self.description)}")
        if not isinstance(self.stages, (tuple, list)) or not self.stages:
            raise ValueError(
                f"stages must be a list of at least one stage, got {shown(self.stages)}"
            )
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise ValueError(f"stages must be Stages, got {shown(stage)}")
        object.__setattr__(self, "stages", tuple(self.stages))
        check_choice("few_blocks", self.few_blocks, get_args(FewBlocks))
        if not isinstance(self.evidence, (tuple, list)):
            raise ValueError(f"evidence must be a list, got {shown(self.evidence)}")
        for each in self.evidence:
            if not isinstance(each, FormatEvidence):
                raise ValueError(f"evidence must be FormatEvidence, got {shown(each)}")
        object.__setattr__(self, "evidence", tuple(self.evidence))
        self._check_names()
        self._check_order()
        self._check_ends()

    def index(self, name: str) -> int:
        """The place of a stage.

        Raises:
            ValueError: if there is no such stage.
        """
        names = [stage.name for stage in self.stages]
        check_choice("stage", name, names)
        return names.index(name)

    @classmethod
    def from_yaml(cls, source: str | Path) -> RolloutRecipe:
        """Read a recipe.

        Args:
            source: a path, or the text itself.

        Raises:
            ValueError: for a file that is not there, YAML that is none, or a recipe that cannot
                be; it names the file, the stage and the field.
        """
        from lightning_fp.recipes.text import read_recipe

        return read_recipe(source)

    def to_yaml(self) -> str:
        """The recipe as text that `from_yaml` reads back to an equal one."""
        from lightning_fp.recipes.text import write_recipe

        return write_recipe(self)

    def _check_names(self) -> None:
        names = [stage.name for stage in self.stages]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(
                    f"stage {name!r}: name must be another than that of stages[{names.index(name)}]"
                )

    def _check_order(self) -> None:
        """Every stage can be reached, and ends after the one before."""
        for stage, following in zip(self.stages, self.stages[1:], strict=False):
            if stage.is_open_ended:
                raise ValueError(
                    f"{following} is never reached: {stage} before it has neither until nor gates"
                )
        for field in ("tokens", "share"):
            reached, where = 0.0, None
            for stage in self.stages:
                value = stage.until.get(field)
                if value is None:
                    continue
                if value <= reached:
                    raise ValueError(
                        f"{stage}: until.{field} must be more than {reached:g} of {where}, got"
                        f" {value!r}; it counts from the beginning of the run"
                    )
                reached, where = value, stage
            if field == "share" and reached == 1 and where is not self.stages[-1]:
                raise ValueError(f"{self.stages[-1]} is never reached: {where} lasts to the end")

    def _check_ends(self) -> None:
        first, last = self.stages[0], self.stages[-1]
        if first is last and first.gates:
            raise ValueError(
                f"{first}: gates must be empty, got {len(first.gates)}: no other stage"
            )
        if first.on_fail == "step_back":
            raise ValueError(
                f"{first}: on_fail must be 'hold' or 'stop', got 'step_back'; no stage is before it"
            )
        if last.gates and last.on_fail != "step_back":
            raise ValueError(
                f"{last}: on_fail must be 'step_back', got {last.on_fail!r}: no stage comes after"
                " it that its gates could keep from beginning; take 'step_back', or no gates"
            )
