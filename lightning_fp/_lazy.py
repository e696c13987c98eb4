"""What a package offers, without the modules behind it until a name is used (PEP 562).

So `import lightning_fp` costs nothing, a record or a recipe is read without torch, and all that
needs no Lightning runs where there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec


def lazy_names(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`.

    Type checkers read the same names from imports under TYPE_CHECKING.

    Args:
        package: its `__name__`. Its modules become attributes by being used, as if imported.
        names: by module below the package, what it is asked for, with blanks between. None of
            them may be called as a module of the package, which would take its place.
    """
    homes = {name: module for module, offered in names.items() for name in offered.split()}
    attributes = vars(sys.modules[package])

    def get(name: str) -> object:
        if name in homes:
            value = getattr(import_module(f"{package}.{homes[name]}"), name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}"):
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return attributes.setdefault(name, value)

    return get, lambda: sorted({*attributes, *homes})
