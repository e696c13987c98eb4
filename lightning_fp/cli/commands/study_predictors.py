"""Tell which signals of a run tell of its failure before the loss does."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from lightning_fp.cli.output import console, print_json
from lightning_fp.counting import counted
from lightning_fp.study.predictor_runs import read_runs
from lightning_fp.study.predictors import REFERENCES, Predictor, Predictors, predictors
from lightning_fp.terminal import FittedTable


# `json` is the name of the option.
def run(*, directories: Sequence[str], ahead: Sequence[int], seed: int, json: bool) -> int:
    """Print the AUC of each signal; see `signatures.study_predictors`.

    Raises:
        ValueError: for what the user can put right.
    """
    found = predictors(read_runs(directories), ahead, seed=seed)
    if json:
        print_json(found.to_dict())
    else:
        _print(found, ahead, console())
    return 0


def _print(found: Predictors, ahead: Sequence[int], screen: Console) -> None:
    numbers = ("AUC", "95%", "runs", "pairs")
    for steps in ahead:
        title = f"Predicting a failure {steps} step{'s' if steps > 1 else ''} ahead"
        grid = FittedTable(title, "signal", "moves", *numbers, right=numbers)
        for row in found.rows:
            if row.ahead == steps:
                style = "dim" if row.signal in REFERENCES or row.low <= 0.5 else ""
                grid.add_row(*_cells(row), style=style)
        screen.print(grid)
        if not any(row.pairs for row in found.rows if row.ahead == steps):
            screen.print(
                f"Nothing to compare: this takes runs of at least two seeds that failed after step"
                f" {steps}, and others that were well by then.",
                soft_wrap=True,
            )
    note = (
        f"{counted(found.runs, 'run')} of {counted(found.seeds, 'seed')}, {found.failed} failed;"
        " AUC on held-out seeds,"
        " intervals by a bootstrap over runs; dim: seen without a monitor, or no better than chance"
    )
    screen.print(note, style="dim", markup=False, soft_wrap=True)


def _cells(row: Predictor) -> tuple[str, ...]:
    if row.auc is None:
        return row.signal, "", "", "", "0", "0"
    ends = f"{row.low:.2f} to {row.high:.2f}"
    return row.signal, row.direction, f"{row.auc:.2f}", ends, str(row.failures), str(row.pairs)
