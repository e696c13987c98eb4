#!/usr/bin/env python3
"""Everything one does with a checkout, each target with all the set-up it needs.

The environment lies in .venv. Its torch is the one that the calling Python already has, if that is
new enough (as in a container or on a cluster: reused, never replaced), else the tested version.
Choose with TORCH=system or TORCH=<version>.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "installed.json"
CALLER = VENV / "calling_python"
OLDEST_TORCH = (2, 11)
ALL_EXTRAS = {"dev", "docs"}
TEST_EXTRAS = {"dev"}
PACKAGE = ROOT / "build" / "package"
PACKAGED_EXTRAS = ("completion", "storage", "te")
"""Those that users install; dev.py itself installs the others."""
SHORT = ("--steps", "8", "--context", "16", "--batch-size", "2", "--rollout", "false")
"""A demo of half a minute, without its second part."""


# --- Targets ------------------------------------------------------------------------------------


def setup(args: list[str]) -> int:
    """Install everything into .venv, for work on the package."""
    install(ALL_EXTRAS)
    return 0


def demo(args: list[str]) -> int:
    """Train a small GPT from BF16 to FP8, with an injected fault, the fallback and the report."""
    install(set())
    return run(BIN / "lightning-fp", "demo", *args)


def test(args: list[str]) -> int:
    """Run all but the slow tests, and the examples in README.md and docs/ (options of pytest)."""
    install(TEST_EXTRAS)
    return pytest("-m", "not slow", "--durations", "20", *args)


def proof(args: list[str]) -> int:
    """Run the slow tests: all seeds, full matrices (options of pytest, for a part of them)."""
    install(TEST_EXTRAS)
    passed = pytest("-m", "slow", "--timeout", "0", *args)
    return passed if args else passed or run(PYTHON, "-m", "tests.strategies")


def lint(args: list[str]) -> int:
    """Check style, formatting, types and the direction of imports."""
    install(TEST_EXTRAS)
    imports = "from importlinter.cli import lint_imports_command as main; main(['--no-logo'])"
    passed = [
        step("ruff check", PYTHON, "-m", "ruff", "check", "--quiet"),
        step("ruff format", PYTHON, "-m", "ruff", "format", "--check", "--diff", "--quiet"),
        step("pyright", PYTHON, "-m", "pyright", "--pythonpath", PYTHON),
        step("lint-imports", PYTHON, "-c", imports),
    ]
    return 0 if all(passed) else 1


def docs(args: list[str]) -> int:
    """Build the documentation into site/; every warning is an error."""
    if sys.version_info < (3, 11):
        sys.exit(f"the site needs Python 3.11 or newer, this is {platform.python_version()}")
    install({"docs"})
    sphinx = [PYTHON, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-b", "html"]
    return 0 if step("sphinx build", *sphinx, "docs", "site") else 1


def bench(args: list[str]) -> int:
    """Run benchmarks/*.py in order, or only those named."""
    install(set())
    scripts = sorted((ROOT / "benchmarks").glob("[!_]*.py"))
    unknown = set(args) - {script.stem for script in scripts}
    if unknown:
        sys.exit(f"benchmarks/ has no {', '.join(sorted(unknown))}")
    return max([run(PYTHON, s) for s in scripts if not args or s.stem in args], default=0)


def peer_suite(args: list[str]) -> int:
    """Run the tests of a checkout of Lightning with our plugin in its Trainers (PATH)."""
    install(TEST_EXTRAS)
    return run(PYTHON, "-m", "tests.peer", *args)


def compatibility(args: list[str]) -> int:
    """Write docs/compatibility.md from the marks of the tests."""
    install(TEST_EXTRAS)
    return run(PYTHON, "-m", "tests.compatibility")


def matrix(args: list[str]) -> int:
    """Run the fast half of the tests under other versions of Python, torch and Lightning."""
    return run(sys.executable, ROOT / "benchmarks" / "versions" / "matrix.py", *args)


def clean(args: list[str]) -> int:
    """Remove .venv, caches and what was built; runs/ stays."""
    made = [".venv", "build", "dist", "site", ".hypothesis", ".import_linter_cache"]
    made += [".pytest_cache", ".ruff_cache"]
    for path in [ROOT / name for name in made]:
        shutil.rmtree(path, ignore_errors=True)
    for path in list(ROOT.rglob("__pycache__")):
        shutil.rmtree(path, ignore_errors=True)
    return 0


def package(args: list[str]) -> int:
    """Build wheel and sdist, install and use them where nothing else is (--quick, or extras)."""
    quick = "--quick" in args
    extras = [arg for arg in args if arg != "--quick"] or ([] if quick else PACKAGED_EXTRAS)
    os.environ.pop("PYTHONPATH", None)  # the package's own files are to be found, not these
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    tools, tested = PACKAGE / "tools", PACKAGE / "tested"
    built = (
        new_environment(tools)
        and step("install build", *pip_in(tools), "build")
        # the wheel is built from the sdist, which must have all that it takes
        and step("build sdist and wheel", python_in(tools), "-m", "build", "--outdir", "dist", ".")
    )
    if not built or not new_environment(tested):
        return 1
    (wheel,) = (ROOT / "dist").glob("*.whl")
    version = wheel.name.split("-")[1]
    print(f"version {version}", flush=True)
    # Not compiled beforehand: most of torch is never imported here.
    install_wheel = [*pip_in(tested), "--no-compile", "--constraint", "constraints-ci.txt"]
    if not step("install the wheel alone", *install_wheel, wheel):
        return 1
    passed = use_it(tested, version, quick=quick)
    for extra in extras:
        title = f"install the wheel with [{extra}]"
        wanted = f"{wheel}[{extra}]"
        resolve = [*install_wheel, "--dry-run", "--only-binary=:all:", wanted]
        if not step(f"resolve [{extra}]", *resolve, quiet=True):
            print(f"  [{extra}] has no wheels for this machine, and is left out", flush=True)
            continue
        passed &= step(title, *install_wheel, wanted) and commands_answer(tested, version)
    return 0 if passed else 1


def use_it(environment: Path, version: str, *, quick: bool) -> bool:
    """What somebody does first, in a directory of its own: `--version`, doctor, demo, report.

    Args:
        environment: where the wheel is installed.
        version: the wheel's.
        quick: whether demo and report are left out.
    """
    place, run_dir = PACKAGE / "place", PACKAGE / "place" / "run"
    place.mkdir()
    commands = {
        "doctor": ["doctor"],
        "demo": ["demo", *SHORT, "--output", run_dir],
        "report": ["report", run_dir / "fp8-dynamic", "--output", place / "report.html"],
    }
    command = command_in(environment)
    passed = commands_answer(environment, version)
    for name, arguments in commands.items():
        if name == "doctor" or not quick:
            passed &= step(f"lightning-fp {name}", command, *arguments, cwd=place)
    written = place / "report.html"
    reported = written.is_file() and "<html" in written.read_text(encoding="utf-8")
    return passed and (quick or reported)


def commands_answer(environment: Path, version: str) -> bool:
    """Whether `lightning-fp --version` names the version of the wheel, and its own files."""
    ask = "import lightning_fp, sys; print(lightning_fp.__version__, lightning_fp.__file__)"
    said: list[str] = []
    for command in ([command_in(environment), "--version"], [python_in(environment), "-c", ask]):
        done = subprocess.run([*map(str, command)], cwd=PACKAGE, capture_output=True, text=True)
        said += done.stdout.split()
    good = said.count(version) == 2 and str(environment) in said[-1]
    print(f"lightning-fp --version ... {'ok' if good else f'FAILED: {said}'}", flush=True)
    return good


_ALL = (
    *(setup, demo, test, proof, matrix, lint, docs, bench, peer_suite, compatibility, package),
    clean,
)
TARGETS: dict[str, Callable[[list[str]], int]] = {
    target.__name__.replace("_", "-"): target for target in _ALL
}


# --- Installing ---------------------------------------------------------------------------------


def install(extras: set[str]) -> None:
    """Bring .venv up to date; does nothing, and fast, if it is."""
    stamp = json.loads(STAMP.read_text()) if STAMP.exists() and PYTHON.exists() else {}
    kind, torch = choose_torch()
    base = [platform.python_version(), kind, torch, sys.prefix if kind == "system" else ""]
    files = fingerprint()
    had = set(stamp.get("extras", []))
    if stamp.get("base") == base and stamp["files"] == files and extras <= had:
        return

    if stamp.get("base") != base:
        make_venv(reuse_packages=kind == "system")
        had = set()
    STAMP.write_text(json.dumps({"base": base, "files": "", "extras": []}))  # nothing is sure now
    wanted = sorted((had | extras) & ALL_EXTRAS)  # an earlier version may have had others
    named = f"[{','.join(wanted)}]" if wanted else ""
    what = f"torch {torch}" + (" (reused)" if kind == "system" else "")
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    pip += [*constraints(kind, torch), "--editable", f".{named}"]
    if not step(f"install {what}, lightning-fp{named}", *pip):
        sys.exit(1)
    if "dev" in wanted:
        unpack_transformer_engine()
    STAMP.write_text(json.dumps({"base": base, "files": files, "extras": wanted}))


def unpack_transformer_engine() -> None:
    """Its Python code, which tests read; not installed, since it is nothing without a GPU."""
    line = re.search(r"^transformer-engine==\S+", (ROOT / "constraints.txt").read_text(), re.M)
    assert line is not None
    target = VENV / "transformer-engine"
    shutil.rmtree(target, ignore_errors=True)
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    if not step(f"unpack {line[0]}", *pip, "--no-deps", "--target", target, line[0]):
        print("tests against it will be skipped", flush=True)


def choose_torch() -> tuple[str, str]:
    """How torch is found ("system", "tested" or "chosen") and its version."""
    choice = os.environ.get("TORCH", "")
    try:
        found = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    release = re.match(r"(\d+)\.(\d+)", found)
    suitable = release is not None and tuple(map(int, release.groups())) >= OLDEST_TORCH
    if choice == "system" and not suitable:
        oldest = ".".join(map(str, OLDEST_TORCH))
        sys.exit(f"TORCH=system: {sys.executable} must have torch >= {oldest}, it has {found}")
    if choice not in ("", "system"):
        return "chosen", choice
    if suitable:
        return "system", found
    tested = re.search(r"^torch==(\S+)", (ROOT / "constraints-ci.txt").read_text(), re.MULTILINE)
    assert tested is not None
    return "tested", tested.group(1)


def constraints(kind: str, torch: str) -> list[str]:
    """The arguments that make pip install the tested versions and this torch."""
    if kind == "tested":
        return ["--constraint", "constraints-ci.txt"]
    if kind == "chosen":
        return ["--constraint", "constraints.txt", f"torch=={torch}"]
    # What the calling Python has fits its torch, and stays as long as it is new enough.
    own = {canonical(d.metadata["Name"] or "") for d in importlib.metadata.distributions()}
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in tested if canonical(line.split("==")[0]) not in own]
    file = VENV / "constraints.txt"
    file.write_text("\n".join([*kept, f"torch=={torch}"]) + "\n")
    return ["--constraint", str(file)]


def make_venv(reuse_packages: bool) -> None:
    """Make .venv anew; with `reuse_packages` it also sees those of the calling Python."""
    if importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(
            f"{sys.executable} cannot make virtual environments. On Debian and Ubuntu:\n"
            f"  apt-get install python3-venv     (or python{version}-venv)"
        )
    if not step("create .venv", sys.executable, "-m", "venv", "--clear", VENV):
        sys.exit(1)
    CALLER.write_text(sys.executable)
    if reuse_packages:
        # Not --system-site-packages: where the calling Python is itself a virtual environment,
        # that would show the packages of the Python below it.
        paths = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.run([PYTHON, "-c", ask], check=True, stdout=subprocess.PIPE, text=True)
        lines = [f"import site; site.addsitedir({path!r})" for path in paths]
        (Path(own.stdout.strip()) / "calling_python.pth").write_text("\n".join(lines) + "\n")


def new_environment(where: Path) -> bool:
    """An environment with nothing in it but pip."""
    return step(f"create {where.relative_to(ROOT)}", sys.executable, "-m", "venv", where)


def python_in(environment: Path) -> Path:
    return environment / BIN.name / PYTHON.name


def command_in(environment: Path) -> Path:
    return environment / BIN.name / ("lightning-fp.exe" if os.name == "nt" else "lightning-fp")


def pip_in(environment: Path) -> list[str]:
    return [
        *(str(python_in(environment)), "-m", "pip", "install", "--quiet", "--no-input"),
        "--disable-pip-version-check",
    ]


def fingerprint() -> str:
    files = [ROOT / name for name in ("pyproject.toml", "constraints.txt", "constraints-ci.txt")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).strip().lower()


# --- Running ------------------------------------------------------------------------------------


def pytest(*args: str) -> int:
    # Two workers with one thread each use two cores better than one worker with two threads.
    return run(PYTHON, "-m", "pytest", "-n", "2", *args, env={"OMP_NUM_THREADS": "1"})


def step(title: str, *command: object, cwd: Path = ROOT, quiet: bool = False) -> bool:
    """Run a command, print one line about it; what it says only if it fails, and not `quiet`."""
    print(f"{title} ...", end=" ", flush=True)
    start = time.monotonic()
    env = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    failed = "no" if quiet else "FAILED"
    print(f"{'ok' if done.returncode == 0 else failed}, {time.monotonic() - start:.1f} s")
    if done.returncode != 0 and not quiet:
        print(done.stdout, flush=True)
    return done.returncode == 0


def run(*command: object, env: dict[str, str] | None = None) -> int:
    sys.stdout.flush()
    parts = [str(part) for part in command]
    return subprocess.run(parts, cwd=ROOT, env={**(env or {}), **os.environ}).returncode


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 (this file runs before anything is installed)
        sys.exit(f"lightning_fp needs Python 3.10 or newer, this is {platform.python_version()}")
    if Path(sys.prefix).resolve() == VENV and CALLER.exists():
        # .venv is active: only the Python that made it can tell whether it is up to date.
        return run(CALLER.read_text(), __file__, *sys.argv[1:])
    name = sys.argv[1] if len(sys.argv) > 1 else "help"
    if name in TARGETS:
        return TARGETS[name](sys.argv[2:])
    print(f"usage: python dev.py TARGET [OPTIONS]\n\n{__doc__}")
    for target, function in TARGETS.items():
        print(f"  {target:13} {function.__doc__}")
    return 0 if name in ("help", "-h", "--help") else 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
