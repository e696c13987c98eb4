"""What a package offers, without the modules behind it until a name is used (PEP 562).

So `import lightning_fp` costs nothing, a record or a recipe is read without torch, and all that
needs no Lightning runs where there is none.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pkgutil import get_data


def lazy_names(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`, for the names that it imports under TYPE_CHECKING.

    They stand there for type checkers, and are read from there at run time too, as lazy_loader
    does it with stubs (scientific-python.org, SPEC 1).

    Args:
        package: its `__name__`. Its modules become attributes by being used, as if imported. None
            of its names may be called as a module of the package, which would take its place.
    """
    source = ast.parse(get_data(package, "__init__.py") or b"")
    imports = [node for node in ast.walk(source) if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: str(node.module) for node in imports for alias in node.names}
    attributes = vars(sys.modules[package])

    def get(name: str) -> object:
        if name in homes:
            value = getattr(import_module(homes[name]), name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}"):
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return attributes.setdefault(name, value)

    return get, lambda: sorted({*attributes, *homes})
