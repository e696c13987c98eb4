"""What an import brings with it, and what runs where Lightning is not installed."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import pkgutil
import pydoc
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import lightning_fp

FRONTS = [
    "",
    "kernels",
    "layers",
    "loop",
    "metrics",
    "numerics",
    "recipes",
    "records",
    "rl",
    "stability",
]
"""The packages that import a module when one of its names is used."""


def front(room: str) -> ModuleType:
    return importlib.import_module(f"lightning_fp.{room}".rstrip("."))


def for_type_checkers(package: ModuleType) -> dict[str, str]:
    """`{name: module}` of the imports under TYPE_CHECKING."""
    assert package.__file__ is not None
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert isinstance(block.test, ast.Name)
    assert block.test.id == "TYPE_CHECKING"
    return {
        alias.name: str(statement.module)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def in_a_new_process(program: str) -> str:
    """What a program prints; it must end well."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def third_party(statement: str) -> set[str]:
    """The packages, other than this one and Python's own, that a statement imports."""
    printed = in_a_new_process(f"""
        import sys
        before = set(sys.modules)
        {statement}
        roots = {{name.partition(".")[0] for name in set(sys.modules) - before}}
        print(*sorted(roots - set(sys.stdlib_module_names) - {{"lightning_fp", "__mp_main__"}}))
    """)
    return set(printed.split())


def test_the_package_imports_no_other() -> None:
    assert third_party("import lightning_fp") == set()


@pytest.mark.parametrize(
    "statement",
    [
        "import lightning_fp; dir(lightning_fp)",
        "from lightning_fp import DivergenceDetector, FallbackPolicy",
        "from lightning_fp.records import EventWriter, read_events, read_run",
        "from lightning_fp import kernels, layers, numerics, rl, stability",
    ],
)
def test_what_needs_no_tensors_imports_no_torch(statement: str) -> None:
    assert third_party(statement) == set()


@pytest.mark.parametrize("room", FRONTS)
def test_names_are_the_same_to_type_checkers_and_at_run_time(room: str) -> None:
    package = front(room)
    checked = for_type_checkers(package)
    assert sorted(checked) == sorted(package.__all__)
    for name, module in checked.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)
    members = dict(inspect.getmembers(package))
    assert members.keys() >= checked.keys() | {"__all__", "__doc__"}


@pytest.mark.parametrize("room", FRONTS)
def test_no_name_is_a_modules_name_too(room: str) -> None:
    package = front(room)
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert modules.isdisjoint(package.__all__)


def test_help_pickles_and_errors_are_those_of_a_plain_package() -> None:
    text = pydoc.plain(pydoc.render_doc(lightning_fp))
    assert all(name in text for name in lightning_fp.__all__)
    for name in ("convert", "LinearFormat", "FP8Precision"):
        assert pickle.loads(pickle.dumps(getattr(lightning_fp, name))) is vars(lightning_fp)[name]
    with pytest.raises(AttributeError, match=r"module 'lightning_fp' has no attribute 'Nothing'"):
        lightning_fp.Nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Nothing' from 'lightning_fp'"):
        from lightning_fp import Nothing  # noqa: F401


def test_modules_are_attributes_without_an_import_of_their_own() -> None:
    printed = in_a_new_process("""
        import lightning_fp
        print(lightning_fp.records.events.Note is lightning_fp.records.Note)
    """)
    assert printed == "True\n"


def test_the_lower_floors_run_where_lightning_is_not_installed() -> None:
    printed = in_a_new_process("""
        import sys
        from pathlib import Path


        class NotInstalled:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("lightning", "pytorch_lightning"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


        sys.meta_path.insert(0, NotInstalled())

        import torch
        from torch import nn

        import lightning_fp as fp
        from lightning_fp import metrics, numerics, recipes, records, rl, stability

        # numbers, and a metric of what a cast loses
        x, scale = torch.randn(16, 32), torch.tensor(16.0)
        assert numerics.saturating_cast(x * scale, torch.float8_e4m3fn).float().isfinite().all()
        lost = metrics.SQNR()
        lost.update(x, scale, torch.float8_e4m3fn)
        assert 20 < lost.compute() < 40

        # weights for a policy gradient
        logprobs = -torch.ones(2, 3)
        assert rl.correction("verl").weights(logprobs, logprobs).eq(1).all()

        # a model in FP8, a step of it, the same once more without a trace, and back
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
        report = fp.convert(model, "fp8-dynamic")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        detector = fp.DivergenceDetector()
        state, losses = detector.init(), []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            state, decision = detector.step(state, loss=loss.item(), grad_norm=1.0, lr=0.1)
        assert len(report.converted) == 2
        assert losses == sorted(losses, reverse=True)
        gradient = model[0].weight.grad.clone()
        with stability.untouched(model):
            replayed = model(x).square().mean()
            replayed.backward()
        assert replayed < losses[-1] and torch.equal(gradient, model[0].weight.grad)
        assert detector.load_state_dict(detector.state_dict(state)) == state
        fp.revert(model)

        # records, written and read
        records.EventWriter("run").append(records.Started(step=1, reason="test"))
        records.write_loss("run", records.Loss.of([0, 1, 2], losses))
        assert [event.step for event in records.read_events("run")] == [1]
        assert records.read_loss("run").values.tolist() == losses

        # a recipe, from YAML to the formats of a model's layers
        Path("recipe.yaml").write_text(recipes.get("conservative").to_yaml())
        recipe = fp.RolloutRecipe.from_yaml("recipe.yaml")
        stages = recipes.formats_by_stage(recipe, {"b.0": "fp8-dynamic"}, high="bf16")
        assert stages[0].formats == {"b.0": "bf16"}

        try:
            fp.FP8Precision
        except ModuleNotFoundError as error:
            print(error)
    """)
    assert printed == "No module named 'lightning'\n"
