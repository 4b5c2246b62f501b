"""Pages as a browser shows them. Without a browser (apt-get install chromium) these are skipped, and named as such."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made import layers, report
from test_benchmark_page import ROWS, benchmark
from test_compare_page import comparison

from sparlow.report import benchmark_page, compare_page, html_page

FOLDER = Path(__file__).parents[2] / "benchmarks"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER / "pages.py").exists(), reason="the benchmarks are in the repository only"),
]


@pytest.fixture(scope="module")
def pages():
    found = _by_path(FOLDER / "pages.py")
    if found.browser() is None:
        pytest.skip(f"no browser: none of {', '.join(found.NAMES)} is installed")
    return found


def _by_path(path):
    spec = importlib.util.spec_from_file_location("benchmark_pages", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def made():
    tasks = {name: {"metric": "acc", "value": 0.5, "stderr": 0.01} for name in ("piqa", "hellaswag", "arc_easy")}
    run = report()
    run.dense["tasks"] = run.compressed["tasks"] = tasks
    deep = report(layers=layers(200), model="m" * 80, warnings=["w" * 300] * 20)
    tuned = {"before": {"novel": 31.4}, "after": {"novel": 29.9}}
    finetuning = {"loss": [3.0 - 0.01 * i for i in range(100)], "perplexity": tuned, "in_domain": [], "seconds": 300.0}
    return {
        "run": html_page.html(run, "compressed"),
        "deep": html_page.html(deep, "compressed"),
        "tuned": html_page.html(replace(run, finetuning=finetuning), "tuned"),
        "comparison": compare_page.html(comparison()),
        "benchmark": benchmark_page.html(benchmark(*ROWS).to_dict()),
    }


def test_pages_are_right_on_a_desk_and_on_a_phone_light_and_dark(pages, tmp_path):
    files = []
    for name, text in made().items():
        files.append(tmp_path / f"{name}.html")
        files[-1].write_text(text, "utf-8")
    looked = list(pages.look_at(pages.browser(), files))
    assert len(looked) == 4 * len(files)
    assert [(page.name, width, scheme, seen.problems) for page, width, scheme, seen in looked if seen.problems] == []


def test_a_page_that_is_wrong_is_told(pages, tmp_path):
    wide = '<div style="width:3000px">too wide</div><script>throw new Error("it broke")</script>'
    chart = '<svg role="img" aria-label="chart" width="50" height="20"><text x="0" y="15">longer than that</text></svg>'
    (tmp_path / "wrong.html").write_text(f"<!doctype html><html><body>{wide}{chart}</body></html>")
    (_, _, _, seen), *_ = pages.look_at(pages.browser(), [tmp_path / "wrong.html"])
    said = " ".join(seen.problems)
    for what in ("console", "too wide", "pixels wider", "longer than that"):
        assert what in said
