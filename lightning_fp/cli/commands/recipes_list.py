"""The list of the built-in recipes: without torch, so that it is there at once."""

from __future__ import annotations

from lightning_fp.cli.output import console, print_json
from lightning_fp.recipes.catalogue import CATALOGUE
from lightning_fp.terminal import FittedTable


def run(*, json: bool) -> int:
    """Print the names of the recipes, what they do, and their stages."""
    if json:
        recipes = [{"name": name, **listed._asdict()} for name, listed in CATALOGUE.items()]
        print_json({"recipes": recipes})
        return 0
    grid = FittedTable("", "recipe", "what it does, and its stages")
    for name, listed in CATALOGUE.items():
        grid.add_row(name, f"{listed.description}\n[dim]{' > '.join(listed.stages)}[/dim]")
    console().print(grid)
    return 0
