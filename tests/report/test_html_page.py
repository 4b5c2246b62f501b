import json
import re
from dataclasses import replace

import pytest
from made import layer, layers
from made import report as rich
from pages import Page

from sparlow.errors import InputError
from sparlow.recipe.recipe import Recipe
from sparlow.report.charts import charts_of_run
from sparlow.report.expert_rows import expert_rows
from sparlow.report.html_page import html, write_reports
from sparlow.report.layer_rows import HEAD, layer_rows
from sparlow.report.records import Report
from sparlow.report.summary import summary_head, summary_rows
from sparlow.report.wording import short

EVIL = "<script>alert(1)</script>"
QUOTES = """"><img src=x onerror='alert(2)'>&amp;"""


def report(**changes):
    """A small run, as an older version left it."""
    whole = Report(
        recipe=Recipe(rank=4, options={"effort": 0.1}).to_dict(),
        versions={"sparlow": "0.1.0", "torch": "2.13.0"},
        machine={"system": "Linux", "threads": 1, "accelerator": None},
        model="tiny",
        dense={"perplexity": {"builtin": 20.0}, "perplexity_stderr": {"builtin": 0.3}},
        compressed={"perplexity": {"builtin": 21.5}, "perplexity_stderr": {"builtin": None}},
        bytes={
            "dense": 4_000_000,
            "compressed": 2_500_000,
            "linears_dense": 3_000_000,
            "linears_compressed": 1_500_000,
        },
        values={"linears_dense": 1_500_000, "linears_compressed": 760_000},
        bits_per_weight=8.0,
        seconds={"total": 12.0, "solve": 9.5},
        peak_memory={"rss": 10**9, "device": 0},
        layers=[layer(block, name) for block in range(3) for name in ("mlp.up_proj", "mlp.down_proj")],
        not_compressed=[{"name": "lm_head", "parameters": 4096, "why": "output head"}],
        warnings=["take care"],
    )
    return replace(whole, **changes)


def hostile(text):
    """Every string that comes from outside is hostile."""
    return rich(
        recipe=Recipe().to_dict() | {"calibration": text, "algorithm": text},
        versions={text: text},
        machine={"cpu": text, text: text},
        model=text,
        dense={"perplexity": {text: 20.0}},
        compressed={"perplexity": {text: 21.0}, "tasks": {text: {"value": 0.5, "stderr": 0.1}}},
        agreement={},
        layers=[layer(0, text, pattern=text, trace=((1, 0.5), (2, 0.25)))],
        not_compressed=[{"name": text, "parameters": 1, "why": text, "stored": text}],
        warnings=[text],
        notes=[text],
        in_domain=[text],
        answers={"rows": [{"prompt": text, "dense": text, "compressed": "other"}], "why": text},
        date=text,
    )


@pytest.mark.parametrize("text", [EVIL, QUOTES])
def test_everything_from_outside_is_shown_as_text(text):
    page, plain = Page(html(hostile(text), text)), Page(html(hostile("plain"), "plain"))
    assert page.tags == plain.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]
    assert "".join(page.text).count(text.rsplit("/", 1)[-1]) > 25  # of charts the beginning may be left out


@pytest.mark.parametrize("found", [report(), rich()])
def test_the_page_is_whole_and_needs_nothing_else(found):
    text = html(found, "out")
    page = Page(text)
    assert page.tags.count("script") == 1  # for the buttons that copy
    assert not {"link", "img", "iframe", "object", "base", "form", "button"} & set(page.tags)
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "action", "onload", "onclick"}
    assert not any(word in text for word in ("http:", "https:", "url(", "@import", "//"))
    (policy,) = (value for _, value in page.attributes if value and value.startswith("default-src 'none'"))
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'$", policy)
    assert ("name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_nothing_is_written_as_python_would():
    found = rich(recipe=rich().recipe | {"rank": None, "ignore": (), "fingerprint": "ab" * 32})
    shown = Page(html(found)).shown
    for word in ("None", "True", "False", "nan", "inf", "{", "abab" * 16, "542.26284", "somebody"):
        assert word not in shown.replace("information", "")


def test_the_page_shows_the_run():
    shown = Page(html(report(warnings=["take care", "and more"]))).shown
    for fact in ("tiny, 2:4 plus rank 4", "20.00 → 21.50", "rises by 7.5 %", "4.0 MB", "2.5 MB", "8.00", "12 s"):
        assert fact in shown
    for fact in ("take care", "and more", "lm_head", "4,096"):
        assert fact in shown
    assert shown.count("48 × 32") == 6  # a row a layer


def test_layers_that_differ_in_a_number_share_a_row_where_there_are_many():
    seen = [layer(0, f"mlp.experts.up_proj.{i}", rank=i, tokens=100 * i, relative_error=i / 64) for i in range(64)]
    rows = [*layer_rows([layer(0, "self_attn.q_proj"), *seen, layer(1, "mlp.experts.up_proj.3", pattern="dense")])]
    shown = [dict(zip(HEAD, row, strict=True)) for row in rows]
    assert [(row["block"], row["layer"]) for row in shown] == [
        ("0", "self_attn.q_proj"),
        ("0", "mlp.experts.up_proj.* (64)"),
        ("1", "mlp.experts.up_proj.3"),
    ]
    experts = shown[1]
    assert (experts["rank"], experts["tokens"]) == ("0 to 63", "0 to 6,300")
    assert (experts["shape"], experts["pattern"]) == ("48 × 32", "2:4")
    assert experts["relative squared error"] == "0.492 (at most 0.984)"  # the mean, and the worst
    assert shown[0]["relative squared error"] == short(layer(0, "self_attn.q_proj").relative_error)
    assert experts["time"] == "1 min 20 s"  # of all
    assert [row[1] for row in layer_rows(seen[:2])] == ["mlp.experts.up_proj.0", "mlp.experts.up_proj.1"]


def test_how_many_tokens_experts_saw_is_on_the_page():
    saw = {"block": 0, "name": "mlp.experts.up_proj", "experts": 4, "tokens": [0, 1500, 300, None]}
    rows = [
        saw | {"shares": [0.0, 0.83333, 0.16667, None], "unreached": [0]},
        saw | {"name": "mlp.experts.w2", "tokens": [None] * 4, "shares": [None] * 4, "unreached": []},
    ]
    assert [*expert_rows(rows)] == [
        ("0", "mlp.experts.up_proj", "4", "0 to 1,500", "0.0 % to 83.3 %", "1"),
        ("0", "mlp.experts.w2", "4", "–", "–", "0"),
    ]
    shown = html(report(experts=rows))
    assert "<summary>Experts" in shown
    assert "0.0 % to 83.3 %" in shown
    assert "<summary>Experts" not in html(report())


def test_the_four_numbers_are_those_of_the_text_that_does_not_flatter():
    shown = Page(html(rich())).shown
    assert "26.98 → 31.42" in shown
    assert "± 0.17 (paired)" in shown  # 31.4159 × 0.0053
    assert "24 min 14 s" in shown
    assert "SmolLM2-135M was compressed by 3basil to 16:32 plus rank 16" in shown


def test_prompts_stand_with_both_answers():
    shown = Page(html(rich())).shown
    assert "The capital of France is" in shown
    assert ", there was a little girl named Lily. She| loved to play in the" in shown
    assert "Three prompts" not in Page(html(report())).shown
    skipped = rich(answers={"rows": [], "why": "The model does not fit in memory."})
    assert "The model does not fit in memory." in Page(html(skipped)).shown


ODD = {
    "one block": {"layers": [layer(0)]},
    "no layer": {"layers": []},
    "no perplexity": {"dense": {"perplexity": {}}, "compressed": {"perplexity": {}}, "agreement": {}},
    "an infinite perplexity": {"compressed": {"perplexity": {"novel": float("inf"), "builtin": 1e300}}},
    "a dense one that is not known": {"dense": {"perplexity": {}}},
    "200 blocks": {"layers": layers(200)},
    "many experts": {"layers": layers(2, {f"mlp.experts.{i}.up_proj": (8, 8) for i in range(64)})},
    "no error at all": {"layers": [layer(0, relative_error=0.0), layer(1, relative_error=0.0)]},
    "long names": {"model": "m" * 300, "layers": [layer(0, "very.long" * 40)], "warnings": ["w" * 500]},
    "no parameters": {"parameters": {}, "bits_per_parameter": 0.0},
    "no time": {"seconds": {}},
    "a loss of nothing": {"distillation": {"loss_before": 0.0, "loss_after": 0.0, "epochs": 0}},
    "blocks that were matched": {
        "distillation": {},
        "matching": [{"block": i, "loss_before": 0.2, "loss_after": 0.1, "epochs": 3} for i in range(40)],
    },
    "a hundred warnings": {"warnings": [f"warning {i}" for i in range(100)]},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_runs_have_whole_pages(name):
    text = html(rich(**ODD[name]))
    page = Page(text)
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", text.split("</style>")[1].lower())
    assert page.tags.count("h1") == 1
    for kind, value in page.attributes:
        if kind in ("x", "y", "width", "height", "cx", "cy", "r"):
            assert float(value.rstrip("%")) >= -1  # and none is nan or inf, which would not be greater


def cells(text):
    return [value for kind, value in Page(text).attributes if kind == "fill-opacity"]


def test_a_cell_a_layer_the_stronger_the_larger_its_error():
    found = charts_of_run(report(layers=[layer(block, "a") for block in range(3)]))[0]  # errors 1 : 2 : 3
    shades = [float(value) for value in cells(found.svg)[:3]]
    assert shades[0] == pytest.approx(0.07)
    assert shades[2] == pytest.approx(1)
    assert shades[0] < shades[1] < shades[2]
    assert "block 1, a: 0.0200" in found.svg


def test_every_chart_has_its_figures():
    names = [chart.name for chart in charts_of_run(rich())]
    assert names == ["relative_error", "depth", "convergence", "matching", "time", "memory"]
    assert [chart.name for chart in charts_of_run(report(layers=[]))] == ["time", "memory"]


def test_the_loss_of_every_epoch_is_drawn():
    (chart,) = (chart for chart in charts_of_run(rich()) if chart.name == "matching")
    (points,) = re.findall('points="([^"]*)"', chart.svg)
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert len(heights) == 9  # before, and after each of eight
    assert heights == sorted(heights)  # falls: y goes down the page


def test_the_summary_sets_dense_beside_compressed():
    rows = {name: (dense, compressed) for name, dense, compressed in summary_rows(report())}
    assert rows["perplexity, builtin"] == ("20.00", "21.50")
    assert rows["linear layers"] == ("3.0 MB", "1.5 MB")
    assert rows["whole model"] == ("4.0 MB", "2.5 MB")
    assert rows["bits a linear weight"] == ("16.00", "8.00")
    assert rows["mean relative squared error"] == ("0", "0.02000")


def test_after_fine_tuning_the_numbers_of_now_are_on_top():
    tuned = report(finetuning={"perplexity": {"before": {"builtin": 21.5}, "after": {"builtin": 20.7, "other": 9.5}}})
    rows = {name: (dense, now) for name, dense, now in summary_rows(tuned)}
    assert rows["perplexity, builtin"] == ("20.00", "20.70")
    assert rows["perplexity, other"] == ("–", "9.50")
    assert rows["mean relative squared error before fine-tuning"] == ("0", "0.02000")
    assert summary_head(tuned) == ("", "dense", "fine-tuned")
    assert summary_head(report()) == ("", "dense", "compressed")


def test_a_perplexity_that_is_not_there_yet_is_a_dash():
    rows = summary_rows(report(compressed={"perplexity": {}}))
    assert rows[0] == ("perplexity, builtin", "20.00", "–")


# Files


def test_the_page_of_a_model_that_was_not_kept_says_how_to_repeat_it_and_nothing_else():
    kept, gone = (
        html(report(model="owner/name"), "out"),
        html(report(model="owner/name"), "out", recipe="reports/out.toml"),
    )
    for command in ("from_pretrained", "sparlow generate", "sparlow evaluate", "sparlow export"):
        assert command in kept
        assert command not in gone
    assert "sparlow compress owner/name --recipe out/recipe.toml --out out-again" in kept
    assert "sparlow compress owner/name --recipe reports/out.toml --out out" in gone
    assert "<h2>Do it again</h2>" in gone


def test_reports_come_back_from_their_file(tmp_path):
    before = report(layers=[layer(0, warnings=("one", "two"))])
    write_reports(before, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert (tmp_path / "report.html").read_text("utf-8") == html(before, tmp_path.name)
    assert Report.from_file(tmp_path / "report.json") == before
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["version"] == 1


def test_a_report_of_an_older_version_has_no_standard_errors(tmp_path):
    data = json.loads(report().to_json())
    del data["dense"]["perplexity_stderr"]
    (tmp_path / "report.json").write_text(json.dumps(data))
    assert Report.from_file(tmp_path / "report.json").dense == {
        "perplexity": {"builtin": 20.0},
        "perplexity_stderr": {"builtin": None},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=2), "has version 2, and this sparlow reads version 1. Upgrade"),
        (lambda data: data.pop("version"), "is not a report of sparlow"),
        (lambda data: data.update(surprise=1), "is not a report of sparlow"),
        (lambda data: data["layers"][0].pop("rank"), "is not a report of sparlow"),
        (lambda data: data["layers"][0].update(shape=[3]), "is not a report of sparlow"),
    ],
)
def test_reports_that_are_none(change, message, tmp_path):
    data = json.loads(report().to_json())
    change(data)
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        Report.from_file(tmp_path / "report.json")


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", '"text"'])
def test_files_that_are_no_report(content, tmp_path):
    (tmp_path / "report.json").write_text(content)
    for path in (tmp_path / "report.json", tmp_path / "none.json"):
        with pytest.raises(InputError, match="is not a report of sparlow"):
            Report.from_file(path)
