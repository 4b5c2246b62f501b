"""The table of docs/distributed.md is that of its figures, and the figures are what the script counts now."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "benchmarks/results/many_devices.json"
NAMES = {
    "Llama-3-8B": "llama-3-8b",
    "Llama-3-70B": "llama-3-70b",
    "Llama-3-405B": "llama-3-405b",
    "Qwen3-235B-A22B, 128 experts": "qwen3-235b-a22b",
}
COUNTS, PLACES = (1, 8, 64), ("A100 80GB", "H100 SXM")

pytestmark = pytest.mark.skipif(not FIGURES.exists(), reason="the figures are in the repository only")


def rows():
    """What the page says of each model: hours in two places, gigabytes of memory, terabytes sent."""
    text = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[1] == "1, 8, 64":
            yield cells[0], [re.findall(r"[\d.]+", cell) for cell in cells[2:]]


def agrees(shown, value):
    """Whether a number is another one, rounded to the digits that are shown."""
    digits = len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.5000001 * 10**-digits


@pytest.mark.parametrize(("model", "cells"), [*rows()], ids=lambda part: part if isinstance(part, str) else "")
def test_the_table_shows_the_figures(model, cells):
    found = json.loads(FIGURES.read_text())[NAMES[model]]["shared"]
    *hours, memory, sent = cells
    for place, shown in zip(PLACES, hours, strict=True):
        assert all(agrees(s, found[f"{n} {place}"]["hours"]) for s, n in zip(shown, COUNTS, strict=True)), shown
    for place in PLACES:
        assert all(agrees(s, found[f"{n} {place}"]["memory"] / 1e9) for s, n in zip(memory, COUNTS, strict=True))
        assert all(agrees(s, found[f"{n} {place}"]["sent"] / 1e12) for s, n in zip(sent, COUNTS, strict=True))


def test_every_model_has_a_row():
    assert {model for model, _ in rows()} == {*NAMES}


@pytest.mark.slow
def test_the_script_counts_the_same_now(tmp_path):
    command = [sys.executable, "scale.py", "--side", "64", "--json", str(tmp_path / "found.json")]
    subprocess.run(command, cwd=ROOT / "benchmarks", check=True, capture_output=True)
    now, then = json.loads((tmp_path / "found.json").read_text()), json.loads(FIGURES.read_text())
    for name in NAMES.values():
        for case, figures in then[name]["shared"].items():
            assert now[name]["shared"][case] == pytest.approx(figures, rel=0.01), (name, case)
