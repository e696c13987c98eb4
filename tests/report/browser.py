"""A headless Chromium, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")

FRAME = """<!doctype html><meta charset="utf-8"><body>
<iframe id="f" width="{width}" height="900" style="border:0" src="{url}"></iframe><script>
const f = document.getElementById("f"), out = document.body.dataset;
f.onload = () => setTimeout(() => {{
  const w = f.contentWindow, d = f.contentDocument, root = d.documentElement;
  out.overflow = String(root.scrollWidth - root.clientWidth);
  out.background = w.getComputedStyle(d.body).backgroundColor;
  let told = 0, keys = 0;
  const tip = d.getElementById("tip");
  for (const chart of d.querySelectorAll("[data-chart]")) {{
    const box = chart.getBoundingClientRect();
    const at = {{ clientX: box.left + box.width * 0.7, clientY: box.top + box.height * 0.6 }};
    chart.dispatchEvent(new w.PointerEvent("pointermove", at));
    if (!tip.hidden && /step/.test(tip.textContent)) told++;
    chart.dispatchEvent(new w.FocusEvent("blur"));
    chart.dispatchEvent(new w.KeyboardEvent("keydown", {{ key: "ArrowRight" }}));
    if (!tip.hidden) keys++;
    chart.dispatchEvent(new w.FocusEvent("blur"));
  }}
  Object.assign(out, {{ told, keys, errors: root.dataset.errors, charts: root.dataset.charts }});
}}, 300);
</script>"""
"""A page in a frame, as narrow as a phone: a window of Chromium cannot be."""


def chromium() -> str:
    """Its path; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium: the report is not looked at in a browser")
    return found


def look_at(page: Path, workplace: Path, *, width: int, dark: bool = False) -> dict[str, str]:
    """Open a page, touch every chart, and say what was found; on the console too ("console")."""
    frame = workplace / f"frame{width}.html"
    frame.write_text(FRAME.format(width=width, url=page.resolve().as_uri()))
    command = [
        chromium(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
        f"--user-data-dir={workplace / 'profile'}",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        "--dump-dom",
        frame.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', done.stdout))
    lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {**found, "console": "\n".join(lines)}
