"""The studies of benchmarks/study: what they select, what they tell, and that they go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.study import reproduce, thesis
from benchmarks.study.pages import put
from benchmarks.study.running import Clock, rows


def row(net_format: str, lr: float, seed: int, final: float, arm: str = "unprotected") -> dict:
    return {
        "id": f"{net_format}-{lr}-{seed}-{arm}",
        "format": net_format,
        "lr": lr,
        "seed": seed,
        "arm": arm,
        "diverged": False,
        "first_loss": 5.5,
        "final_loss": final,
        "steps": 200,
        "kept": 1.0,
        "replayed": 0,
        "rolled_back": 0,
    }


BAD, FINE = 3.5, 2.6


def scanned() -> dict[str, list[dict]]:
    """At 0.01 nothing fails; at 0.03 e8m3 does now and then; at 0.1 everything does."""
    of_gpt = []
    for seed in range(3):
        for format in ("bf16", *thesis.FORMATS):
            of_gpt.append(row(format, 0.01, seed, 2.5))
            sometimes = format == "e8m3" and seed == 0
            of_gpt.append(row(format, 0.03, seed, BAD if sometimes else FINE))
            of_gpt.append(row(format, 0.1, seed, BAD))
    return {"gpt": of_gpt}


def test_only_what_fails_now_and_then_is_compared() -> None:
    assert thesis.undecided(scanned()) == [("gpt", "e8m3", 0.03)]


def test_a_line_for_each_arm() -> None:
    common = {"net": "gpt", "cell": "e8m3"}
    told = []
    for seed in (100, 101):
        told.append({**row("bf16", 0.03, seed, 2.6), **common})
        told.append({**row("e8m3", 0.03, seed, 3.6 if seed == 100 else 2.6), **common})
        arm = {**row("e8m3", 0.03, seed, 2.7 if seed == 100 else 2.6, "fallback"), **common}
        told.append({**arm, "kept": 0.5})
    lines = {line["arm"]: line for line in thesis.summary(scanned(), told)}
    assert lines["bf16"]["failed"] == 0
    assert lines["unprotected"]["failed"] == 1
    assert lines["fallback"]["failed"] == 0
    assert lines["fallback"]["recovered"] == pytest.approx(0.9)
    assert (lines["fallback"]["needless"], lines["fallback"]["fine"]) == (1, 1)
    text = thesis.table(list(lines.values()))
    assert text.count("\n") == 2 + 3
    assert "0/2 [0%, 66%]" in text


def test_a_study_goes_on_where_its_time_was_over(tmp_path: Path) -> None:
    options = {"formats": ["bf16"], "lrs": [1e-2], "seeds": range(2), "steps": 10}
    assert rows("llama", tmp_path, Clock(0), **options) == []
    found = rows("llama", tmp_path, Clock(300), **options)
    assert len(found) == 2
    assert rows("llama", tmp_path, Clock(0), **options) == found
    assert "| `bf16` | 0.01 | 0/2 [0%, 66%] | 0 |" in reproduce.table(found)


def test_the_outlier_grows_without_changing_high_precision(tmp_path: Path) -> None:
    options = {"formats": ["fp32"], "lrs": [1e-3], "seeds": [0], "steps": 12}
    plain, grown = (
        rows("growing", tmp_path / str(bits), Clock(300), **options, axes={"bits": [bits]})[0]
        for bits in (0, 1.0)
    )
    assert grown["final_loss"] == pytest.approx(plain["final_loss"], rel=0.02)


def test_tables_are_put_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n")
    put(page, "x", "| new |\n")
    put(page, "x", "| new |\n")
    assert page.read_text() == "a\n<!-- begin x -->\n\n| new |\n\n<!-- end x -->\nb\n"
    with pytest.raises(ValueError, match="no place for y"):
        put(page, "y", "")
