"""Measure the path on a GPU with one command, in minutes: what runs, how fast, and at what cost.

    python benchmarks/gpu/lane.py --minutes 8 --out DIR

From a checkout on a bare machine: Python, torch 2.11 or newer with CUDA, nothing installed, no
network. What lacks a package is skipped, with the reason. Parts run in order of worth, each in a
process of its own, because a bad kernel takes the CUDA context with it and a compilation may hang.
Each has a share of the time that is left. Rows are on disk as they are measured, so nothing that
was measured is lost: `DIR/<part>.jsonl`, its output in `DIR/<part>.log`, all together in
`DIR/lane.json` and, as a table, `DIR/lane.md`.

`--dry` runs every part in small on the CPU, to see that it runs. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

sys.path.insert(0, str(HERE))

from parts import SHARES  # noqa: E402
from parts.results import clocks, write_results  # noqa: E402

SPARE = 5.0
"""Seconds before its limit at which a part ends by itself, between two rows."""

LEAST = 60.0
"""Seconds that every part has, if they are left: to import torch for the first time, from a slow
disk and with all of CUDA, takes longer than what small parts measure."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--only", nargs="+", choices=tuple(SHARES), default=tuple(SHARES))
    parser.add_argument("--dry", action="store_true", help="in small, on the CPU")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        (out / f"{name}.jsonl").unlink(missing_ok=True)

    end = time.monotonic() + 60 * options.minutes
    # In small all parts share a process: most of its time goes into importing torch.
    groups = [list(options.only)] if options.dry else [[name] for name in options.only]
    seen: dict[str, str] = {}
    for index, group in enumerate(groups):
        left = end - time.monotonic()
        weights = [sum(SHARES[name] for name in each) for each in groups[index:]]
        limit = max(left * weights[0] / sum(weights), min(LEAST, left))
        print(f"{', '.join(group)}: {limit:.0f} s at most", flush=True)
        seen.update(dict.fromkeys(group, clocks()))
        why = run(group, limit, out, dry=options.dry)
        write_results(out, list(options.only), seen, ended=why, dry=options.dry)
        if why:
            print(f"  {why}", flush=True)
    print((out / "lane.md").read_text())
    return 0


def run(names: list[str], limit: float, out: Path, *, dry: bool) -> str:
    """Run parts in a process of their own.

    Returns:
        Why it ended before its parts did, or "".
    """
    path = os.pathsep.join(filter(None, [str(HERE), str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "parts", *names, "--out", str(out)]
    command += ["--seconds", str(max(limit - SPARE, 0.0)), *(["--dry"] if dry else [])]
    with (out / f"{names[0]}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=HERE,
            env={**os.environ, "PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that compile workers end with it
        )
        try:
            code = process.wait(max(limit, 1.0))
            why = f"exit code {code}, see {names[0]}.log" if code else ""
        except subprocess.TimeoutExpired:
            why = f"stopped at its limit of {limit:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return why


if __name__ == "__main__":
    sys.exit(main())
