import csv
import io
import math
import random
import xml.etree.ElementTree as ET  # our own files
from dataclasses import replace
from statistics import fmean, stdev

import pytest
from pages import Page

from sparlow.recipe.recipe import Recipe
from sparlow.report.compare_page import as_csv, as_latex, charts, html, task_table, write_comparison
from sparlow.report.comparison import Comparison, Row
from sparlow.report.differences import best, groups, paired
from sparlow.report.records import Agreement

METHODS = {"magnitude": (6, 96.0), "wanda": (40, 71.2), "sparsegpt": (75, 47.5), "3basil": (180, 41.4)}


def row(name, seconds=10.0, perplexity=40.0, **changes):
    recipe = Recipe(pattern="2:4").to_dict() | {"algorithm": name.split(" ")[0].removesuffix("+match")}
    chance = random.Random(name)
    found = Row(
        name=name,
        perplexity={"novel": perplexity},
        mean_relative_error=perplexity / 4000,
        seconds=seconds,
        bytes=180_000_000 + int(seconds * 1e4),
        bits_per_weight=9.7,
        bits_per_parameter=11.1,
        share_compressed=0.99,
        peak_memory=10**9,
        layers=[(block, kind, perplexity / 4000 * (block + 1)) for block in range(6) for kind in ("q_proj", "up_proj")],
        agreement={"novel": Agreement(0.1, 0.01, 0.8, math.log(perplexity / 27), 0.006)},
        losses={"novel": [math.log(perplexity) + chance.gauss(0, 0.05) for _ in range(16)]},
        recipe=recipe,
    )
    return replace(found, **changes)


def comparison(**changes):
    rows = [row(name, seconds, value) for name, (seconds, value) in METHODS.items()]
    rows += [row(f"{name}+match", 900 + seconds, value * 0.75) for name, (seconds, value) in METHODS.items()]
    found = Comparison(
        model="/home/somebody/SmolLM2-135M.gguf",
        recipe=rows[0].recipe,
        evaluation={"seqlen": 512, "windows": {"novel": 16}, "in_domain": []},
        dense={"perplexity": {"novel": 26.98}, "bytes": 269_000_000},
        rows=rows,
        versions={"sparlow": "0.2.0"},
        machine={"cpu": "AMD EPYC", "threads": 2},
    )
    return replace(found, **changes)


ODD = {
    "usual": {},
    "nothing": {"rows": [], "dense": {}},
    "all failed": {"rows": [], "failed": {"wanda": "a <b>factorisation</b> failed"}},
    "one": {"rows": [row("wanda")]},
    "seeds": {"rows": [row(f"wanda seed={i}", perplexity=40.0 + i) for i in range(3)]},
    "infinite": {"rows": [row("wanda", perplexity=1e300), row("magnitude", perplexity=math.inf, agreement={})]},
    "older": {"rows": [row("wanda", agreement={}, losses={}, recipe={})]},
    "markup": {"rows": [row("<script>alert(1)</script>")], "model": "<i>m</i>"},
    "tasks": {"rows": [row("wanda", tasks={"piqa": {"metric": "acc", "value": 0.6, "stderr": None}})]},
    "no text": {"rows": [row("wanda", perplexity=40.0)], "dense": {"perplexity": {}, "bytes": 3}},
}


@pytest.mark.parametrize("name", ODD)
def test_every_comparison_has_a_whole_page_and_files(name, tmp_path):
    found = comparison(**ODD[name])
    paths = write_comparison(found, tmp_path)
    page = Page((tmp_path / "compare.html").read_text("utf-8"))
    assert page.tags.count("script") == 1
    assert "somebody" not in page.shown.replace("% /home/somebody", "")
    for path in paths:
        if path.suffix == ".svg":
            ET.parse(path)  # noqa: S314 - our own file
    lines = list(csv.reader(io.StringIO((tmp_path / "compare.csv").read_text("utf-8"))))
    assert len({len(line) for line in lines if line}) <= 1
    assert len(lines) - 1 == len(found.rows) or not found.rows


def test_the_page_names_the_best_and_its_price():
    shown = Page(html(comparison())).shown
    assert "3basil+match ends lowest on novel: perplexity 31.05, +15.1 % against the dense model's 26.98" in shown
    assert "Worse than 3basil+match, on novel" in shown
    assert "18 min" in shown


def test_both_pictures_have_arrows_from_every_method_to_its_matched_one():
    found = {chart.name: chart for chart in charts(comparison())}
    assert list(found) == ["perplexity_against_time", "perplexity_against_bytes", "relative_error"]
    for name in ("perplexity_against_time", "perplexity_against_bytes"):
        assert found[name].svg.count('class="arrow"') == 4


def test_runs_of_one_method_are_told_apart_where_each_has_a_line():
    rows = [row("3basil pattern=2:4"), row("3basil+match pattern=2:4"), row("3basil bits=4.5", perplexity=30.0)]
    found = comparison(rows=rows)
    assert ": 3 runs" in Page(html(found)).shown
    assert ": 8 methods" in Page(html(comparison())).shown
    keys = {chart.name: dict(chart.key) for chart in charts(found)}
    assert list(keys["relative_error"].values()) == ["3basil pattern=2:4", "3basil bits=4.5"]
    assert list(keys["perplexity_against_time"].values()) == ["3basil"]
    many = [row(f"3basil rank={rank}") for rank in range(9)]  # more than there are colours
    (errors,) = (chart for chart in charts(comparison(rows=many)) if chart.name == "relative_error")
    assert [name for _, name in errors.key] == ["3basil"]


def test_a_paired_difference_is_over_windows():
    first, second = [1.0, 2.0, 3.5], [0.5, 1.0, 3.0]
    apart = [0.5, 1.0, 0.5]
    found = paired(first, second)
    assert (found.mean, found.stderr) == pytest.approx((fmean(apart), stdev(apart) / math.sqrt(3)))
    assert paired(first, second[:2]) is None
    assert paired([], []) is None
    assert paired([math.inf, 1.0], [1.0, 1.0]) is None


def test_windows_that_differ_much_hide_nothing_of_a_small_difference():
    chance = random.Random(0)
    hard = [chance.gauss(3, 1) for _ in range(50)]
    found = paired([loss + 0.01 + chance.gauss(0, 0.002) for loss in hard], hard)
    assert found.mean > 10 * found.stderr
    assert stdev(hard) / math.sqrt(50) > 10 * found.mean  # by their own means nothing could be said


def test_seeds_of_a_method_are_one_line_with_their_spread():
    rows = [row(f"wanda seed={i}", perplexity=40.0 + i) for i in range(3)] + [row("magnitude")]
    first, second = groups(rows)
    assert (first.name, len(first.rows), second.name) == ("wanda", 3, "magnitude")
    assert (first.mean("novel"), first.spread("novel"), second.spread("novel")) == (41.0, 1.0, 0.0)
    assert "41.00 ± 1.00 (3 seeds)" in Page(html(comparison(rows=rows))).shown


def test_the_table_for_other_programs_is_in_full_precision():
    found = comparison()
    lines = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [line["name"] for line in lines] == [one.name for one in found.rows]
    for line, one in zip(lines, found.rows, strict=True):
        assert float(line["perplexity novel"]) == one.perplexity["novel"]
        assert float(line["seconds"]) == one.seconds
        assert line["pattern"] == "2:4"
        assert float(line["loss above best novel"]) >= 0 or one is not best(found.rows, "novel")


def test_tasks_have_a_table_with_their_errors_and_mean():
    scored = {
        "piqa": {"metric": "acc", "value": 0.6, "stderr": 0.02},
        "rte": {"metric": "acc_norm", "value": 0.5, "stderr": None},
    }
    some = [row("wanda", tasks=scored), row("magnitude", tasks={"piqa": scored["piqa"]}), row("oats")]
    found = comparison(rows=some, dense={"perplexity": {}, "bytes": 3, "tasks": scored})
    head, rows = task_table(found)
    assert head == ["method", "piqa, acc", "rte, acc_norm", "mean"]
    assert rows == [
        ("dense", "0.6000 ± 0.0200", "0.5000", "0.5500"),
        ("wanda", "0.6000 ± 0.0200", "0.5000", "0.5500"),
        ("magnitude", "0.6000 ± 0.0200", "–", "–"),  # whose mean would be of other questions
    ]
    assert "rte, acc\\_norm & mean" in as_latex(found)
    keys = {chart.name: {name: colour for colour, name in chart.key} for chart in charts(found)}
    assert keys["tasks"].items() >= {"wanda": keys["relative_error"]["wanda"]}.items()
    assert keys["tasks"]["magnitude"] == keys["relative_error"]["magnitude"]
    assert len(set(keys["tasks"].values())) == 3  # the dense model has one of its own
    assert task_table(comparison()) == (["method"], [])
    other = {"words": {"metric": "word_perplexity", "value": 9.0, "stderr": None}}
    assert task_table(comparison(rows=[row("wanda", tasks=scored | other)], dense={}))[1][0][-1] == "–"


def test_the_table_for_latex_escapes_what_is_special():
    text = as_latex(comparison(rows=[row("a_b & 50%")]))
    assert r"a\_b \& 50\%" in text
    assert text.count(r"\\") == 3  # the head, the dense model, the row
    assert r"\begin{tabular}{lrrrrrr}" in text
