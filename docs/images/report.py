"""The pictures of the report: of the demo's run, and of that run beside its baseline.

`python docs/images/report.py runs/demo` takes what `lightning-fp demo` has left in that directory,
and writes `docs/images/report-*.png`. It needs Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from lightning_fp.report import write_report

PICTURES = Path(__file__).parent
WIDTH, TALLEST = 1000, 6000
MARGIN = 12
"""Pixels left above and beneath what is shown."""

ONLY = "<style>body > header, footer, section:not({shown}) {{ display: none }}</style></head>"
TOP = "<style>section:not(#loss), footer { display: none }</style></head>"
WHOLE = "<style>details, footer { display: none }</style></head>"


def shoot(page: Path, style: str, picture: Path, workplace: Path, *, dark: bool = False) -> None:
    """A picture of the part of a page that a style leaves, cut where it ends."""
    part = workplace / "part.html"
    part.write_text(page.read_text().replace("</head>", style, 1))
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))
    command = [
        chromium,
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        "--virtual-time-budget=4000",
        f"--user-data-dir={workplace / 'profile'}",
        f"--window-size={WIDTH},{TALLEST}",
        f"--screenshot={picture.resolve()}",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        part.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    image = Image.open(picture).convert("RGB")
    empty = Image.new("RGB", image.size, image.getpixel((0, TALLEST - 1)))
    box = ImageChops.difference(image, empty).getbbox()
    _, top, _, bottom = box or (0, 0, WIDTH, TALLEST)
    part_of_it = (0, max(0, top - MARGIN), WIDTH, min(TALLEST, bottom + MARGIN))
    image.crop(part_of_it).save(picture, optimize=True)


def main(demo: Path) -> None:
    """All five pictures."""
    rollout, baseline = demo / "rollout", demo / "baseline"
    with tempfile.TemporaryDirectory() as directory:
        workplace = Path(directory)
        one = write_report([rollout], workplace / "one.html", baseline=baseline)
        both = write_report([baseline, rollout], workplace / "both.html")
        shoot(one, TOP, PICTURES / "report-top.png", workplace)
        shoot(one, TOP, PICTURES / "report-dark.png", workplace, dark=True)
        shoot(one, ONLY.format(shown="#events"), PICTURES / "report-story.png", workplace)
        shoot(
            one, ONLY.format(shown="#formats, #stages"), PICTURES / "report-formats.png", workplace
        )
        shoot(one, ONLY.format(shown="#casts"), PICTURES / "report-casts.png", workplace)
        shoot(both, WHOLE, PICTURES / "report-compared.png", workplace)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
