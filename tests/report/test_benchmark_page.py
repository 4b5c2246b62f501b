import json
from dataclasses import replace

import pytest
from pages import Page

from sparlow.report.benchmark_page import html, names_of
from sparlow.runtime.benchmark import Benchmark, Row


def row(model="/models/dense", mode="dense", *, compressed=False, speed=10.0, **changes):
    rates = {1: [speed, speed * 1.1, speed * 0.9], 4: [speed * 3] * 3}
    found = Row(model, mode, "float32", "", "kernel", compressed, bytes_read=500_000_000, interpreter=10**8, bound=0.01)
    found.peak, found.decode = {1: 10**9, 4: 2 * 10**9}, rates
    found.first, found.prefill = {1: [0.5] * 3, 4: [1.5] * 3}, {1: [200.0] * 3, 4: [400.0] * 3}
    found.difference = 1e-5
    return replace(found, **changes)


def benchmark(*rows):
    machine = {"cpu": "AMD EPYC", "threads": 1, "memory": 8 * 10**9}
    settings = {"models": ["a"], "repeats": 3, "threads": None}
    return Benchmark(list(rows), machine, {"sparlow": "0.2.0"}, settings, ["one is left out."])


ROWS = (
    row(),
    row(
        "/models/small",
        "packed",
        compressed=True,
        speed=25.0,
        bytes_read=120_000_000,
        peak={1: 4 * 10**8, 4: 5 * 10**8},
    ),
)


@pytest.mark.parametrize(
    "rows", [ROWS, ROWS[:1], (), (row("<script>x</script>"),), tuple(row(f"/m/{i}") for i in range(30))]
)
def test_the_page_is_whole_before_and_after_json(rows):
    found = benchmark(*rows).to_dict()
    text = html(found)
    assert Page(text).tags.count("script") == 1
    assert html(json.loads(json.dumps(found))) == text


def test_the_fastest_and_the_smallest_stand_on_top():
    shown = Page(html(benchmark(*ROWS).to_dict())).shown
    assert "small, packed is the fastest: 25.0 tokens a second, 2.50 times the fastest dense model." in shown
    for figure in ("400.0 MB", "120.0 MB", "0.5 s", "one is left out."):
        assert figure in shown
    assert "None" not in shown


def test_a_row_that_computes_something_else_is_a_warning():
    shown = Page(html(benchmark(*ROWS, row("/models/wrong", difference=0.5)).to_dict())).shown
    assert "wrong, dense computes something else than its weights in float32" in shown
    assert "NO (0.500)" in shown


def test_rows_are_told_apart_by_what_differs():
    rows = benchmark(row(), row(step="transformers"), row(dtype="bfloat16")).to_dict()["rows"]
    assert names_of(rows) == ["float32, kernel", "float32, transformers", "bfloat16, kernel"]
