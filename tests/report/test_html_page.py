import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from sparlow.errors import InputError
from sparlow.recipe.recipe import Recipe
from sparlow.report.html_page import html, summary_head, summary_rows, write_reports
from sparlow.report.records import LayerRecord, Report

EVIL = "<script>alert(1)</script>"
QUOTES = """"><img src=x onerror='alert(2)'>&amp;"""


def layer(block, name="mlp.up_proj", **changes):
    record = LayerRecord(
        block,
        name,
        shape=(48, 32),
        pattern="2:4",
        density=0.5,
        rank=4,
        relative_error=0.01 * (block + 1),
        iterations=50,
        seconds=1.25,
        damping=0.0,
    )
    return replace(record, **changes)


def report(**changes):
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


class Page(HTMLParser):
    """What a browser would see: tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def hostile(text):
    """Every string that comes from outside is hostile."""
    return report(
        recipe=Recipe().to_dict() | {"calibration": text},
        versions={text: text},
        model=text,
        dense={"perplexity": {text: 20.0}},
        compressed={"perplexity": {text: 21.0}},
        layers=[layer(0, text, pattern=text)],
        not_compressed=[{"name": text, "parameters": 1, "why": text}],
        warnings=[text],
    )


@pytest.mark.parametrize("text", [EVIL, QUOTES])
def test_everything_from_outside_is_shown_as_text(text):
    page, plain = Page(html(hostile(text))), Page(html(hostile("plain")))
    assert page.tags == plain.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]
    shown = "".join(page.text)
    assert shown.count(text) == "".join(plain.text).count("plain") == 14


def test_the_page_is_whole_and_needs_nothing_else():
    text = html(report())
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "action", "onload"}
    assert not any(word in text for word in ("http", "url(", "@import", "//"))


def test_the_page_shows_the_run():
    shown = "|".join(Page(html(report(warnings=["take care", "and more"]))).text)
    for fact in (
        "tiny: 3basil, 2:4",
        "20.00",
        "21.50",
        "3.0 MB",
        "1.5 MB",
        "take care",
        "and more",
        "lm_head",
        "4,096",
    ):
        assert fact in shown
    assert shown.count("48 × 32") == 6  # a row a layer
    assert "perplexity, builtin" in shown


def bars(text):
    rectangles, now = [], {}
    for name, value in Page(text).attributes:
        if name == "class" and value == "bar":
            now = {}
            rectangles.append(now)
        elif name in ("x", "y", "width", "height"):
            now.setdefault(name, float(value))
    return rectangles


def test_a_bar_a_layer_as_high_as_its_error():
    found = bars(html(report(layers=[layer(0), layer(1), layer(2)])))  # errors 1 : 2 : 3
    heights = [bar["height"] for bar in found]
    assert heights == pytest.approx([heights[2] / 3, heights[2] / 3 * 2, heights[2]], abs=0.06)
    assert len({bar["y"] + bar["height"] for bar in found}) == 1  # they stand on one line
    assert len({bar["x"] for bar in found}) == 3


def test_layers_without_error_have_bars_of_no_height():
    assert [bar["height"] for bar in bars(html(report(layers=[layer(0, relative_error=0.0)])))] == [0]


def test_the_summary_sets_dense_beside_compressed():
    rows = {name: (dense, compressed) for name, dense, compressed in summary_rows(report())}
    assert rows["perplexity, builtin"] == ("20.00", "21.50")
    assert rows["linear layers"] == ("3.0 MB", "1.5 MB")
    assert rows["whole model"] == ("4.0 MB", "2.5 MB")
    assert rows["bits a linear weight"] == ("16.00", "8.00")
    assert rows["mean relative error"] == ("0", "0.02000")


def test_after_fine_tuning_the_numbers_of_now_are_on_top():
    tuned = report(finetuning={"perplexity": {"before": {"builtin": 21.5}, "after": {"builtin": 20.7, "other": 9.5}}})
    rows = {name: (dense, now) for name, dense, now in summary_rows(tuned)}
    assert rows["perplexity, builtin"] == ("20.00", "20.70")
    assert rows["perplexity, other"] == ("–", "9.50")
    assert rows["mean relative error before fine-tuning"] == ("0", "0.02000")
    assert summary_head(tuned) == ("", "dense", "fine-tuned")
    assert summary_head(report()) == ("", "dense", "compressed")


def test_a_perplexity_that_is_not_there_yet_is_a_dash():
    rows = summary_rows(report(compressed={"perplexity": {}}))
    assert rows[0] == ("perplexity, builtin", "20.00", "–")


# Files


def test_reports_come_back_from_their_file(tmp_path):
    before = report(layers=[layer(0, warnings=("one", "two"))])
    write_reports(before, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert (tmp_path / "report.html").read_text("utf-8") == html(before)
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
