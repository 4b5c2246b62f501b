"""benchmarks/leaderboard.py: rows come from results, the table stays short and sorted, the log grows."""

import importlib
import json
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from sparlow.errors import InputError
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import LayerRecord, Report

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are in the repository only")
WIKI, C4 = "texts/wikitext2_test.raw", "c4.jsonl#601-800"
AGREEMENT = {
    "divergence": 0.31234,
    "divergence_stderr": 0.0051,
    "same_first_choice": 0.7,
    "loss_difference": 0.2,
    "loss_difference_stderr": 0.01,
}
TEXTS = {"wikitext2": None, "c4": None}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("leaderboard")


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("_board")


def finished(folder, **changes):
    """A result of 8 weights in 2 layers, of a model of 20 parameters."""
    folder.mkdir(exist_ok=True)
    recipe = Recipe(pattern="2:4", rank=1, calibration="c4.jsonl#1-600")
    layers = [LayerRecord(0, name, (2, 2), "2:4", 0.5, 1, 0.1, 3, 0.1, 0.0) for name in ("q", "k")]
    report = Report(
        recipe.to_dict(),
        model="models/tiny",
        machine={"cpu": "Some CPU", "accelerator": None},
        compressed={"perplexity": {WIKI: 29.994, C4: 33.0}, "perplexity_stderr": {WIKI: 0.416, C4: None}},
        bytes={"dense": 40, "linears_dense": 16, "linears_compressed": 4},
        parameters={"model": 20, "blocks": 8},
        seconds={"total": 150.0, "evaluate": 30.0},
        layers=layers,
    )
    report.add_up()
    data = json.loads(report.to_json()) | changes
    (folder / "report.json").write_text(json.dumps(data))
    (folder / "recipe.toml").write_text(recipe.to_toml())
    return folder


def evaluated(path, model, **changes):
    found = {"model": model, "seqlen": 1024, "perplexity": {C4: 31.5}, "agreement": {C4: AGREEMENT}}
    path.write_text(json.dumps(found | changes))
    return path


def call(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", *map(str, words)])
    script.main()


def a_row(pages, size, wikitext2="", c4="", model="tiny"):
    given = dict.fromkeys((field.name for field in fields(pages.Row)), "")
    given |= {"bits_a_weight": f"{size / 10:.2f}", "bytes": f"{size:,}", "model": model, "command": f"make {size} {c4}"}
    return pages.Row(**given | {"wikitext2": wikitext2, "c4": c4})


def test_a_row_tells_what_its_result_holds(script, tmp_path):
    row = script.row_of(
        finished(tmp_path / "out"), "sparlow  compress \\\n  tiny", None, TEXTS, "0123456789abcdef-dirty"
    )
    assert row == script.Row(
        bits_a_weight="4.00",
        bits_a_parameter="11.20",
        bytes="28",
        wikitext2="29.99 ± 0.42",
        c4="33.00",
        divergence="",
        minutes="2.0",
        model="tiny",
        what="3basil, 2:4, rank 1",
        commit="0123456789-dirty",
        processor="Some CPU",
        command="sparlow compress tiny",
    )


def test_an_evaluation_goes_before_the_report(script, tmp_path):
    file = evaluated(tmp_path / "found.json", "elsewhere/out", perplexity_stderr={C4: 0.25})
    row = script.row_of(finished(tmp_path / "out"), "make", file, TEXTS, "0")
    assert (row.wikitext2, row.c4, row.divergence) == ("", "31.50 ± 0.25", "0.3123 ± 0.0051")


@pytest.mark.skipif(
    "agreement" not in {field.name for field in fields(Report)}, reason="reports do not tell agreement yet"
)
def test_the_divergence_of_a_report_is_that_on_c4(script, tmp_path):
    other = AGREEMENT | {"divergence": 5.0}
    result = finished(tmp_path / "out", agreement={WIKI: other, C4: AGREEMENT})
    assert script.row_of(result, "make", None, TEXTS, "0").divergence == "0.3123 ± 0.0051"


def test_a_fine_tuned_result_is_evaluated_for_its_row(script, tmp_path):
    result = finished(tmp_path / "out", finetuning={"seconds": 60.0})
    with pytest.raises(InputError, match=r"before its fine-tuning\. Give --evaluation"):
        script.row_of(result, "make", None, TEXTS, "0")
    row = script.row_of(result, "make", evaluated(tmp_path / "found.json", "out"), TEXTS, "0")
    assert (row.minutes, row.what) == ("3.0", "3basil, 2:4, rank 1, fine-tuned")


@pytest.mark.parametrize(
    ("changes", "texts", "message"),
    [
        ({"compressed": {"perplexity": {}}}, {}, "neither WikiText-2 nor C4"),
        ({"compressed": {"perplexity": {C4: 3.0, "c4.jsonl#801-900": 3.0}}}, {}, "Give --c4"),
        ({"compressed": {"perplexity": {C4: 3.0}}}, {"c4": "c4"}, f"Choose one of: {C4}"),
        ({"compressed": {"perplexity": {"c4.jsonl": 3.0}}}, {}, "shares records with the calibration text"),
        ({"compressed": {"perplexity": {"c4.jsonl#600-700": 3.0}}}, {}, "shares records with the calibration text"),
        ({"compressed": {"perplexity": {C4: float("inf")}}}, {}, "The perplexity on .* is inf"),
        ({"parameters": {}}, {}, "does not tell parameters"),
    ],
)
def test_a_result_that_is_no_row_is_refused(script, tmp_path, changes, texts, message):
    with pytest.raises(InputError, match=message):
        script.row_of(finished(tmp_path / "out", **changes), "make", None, TEXTS | texts, "0")


def test_an_evaluation_of_another_model_is_refused(script, tmp_path):
    with pytest.raises(InputError, match=r"is about other, not about .*out\. Evaluate"):
        script.row_of(finished(tmp_path / "out"), "make", evaluated(tmp_path / "found.json", "other"), TEXTS, "0")
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(InputError, match="is not what sparlow evaluate --json writes"):
        script.row_of(finished(tmp_path / "out"), "make", broken, TEXTS, "0")


@pytest.mark.parametrize("command", ["a | b", "echo `date` | tee", "plain", "``", r"a \| b"])
def test_the_table_is_read_as_it_was_written(pages, tmp_path, command):
    rows = [replace(a_row(pages, size, "9.10 ± 0.20"), command=command) for size in (1000, 2000)]
    (tmp_path / "board.md").write_text(pages.board(rows))
    assert pages.read_board(tmp_path / "board.md") == rows
    assert pages.read_board(tmp_path / "none.md") == []


@pytest.mark.parametrize(
    ("before", "after"), [("bytes |", "octets |"), ("1,000", "many"), ("9.10", "nine"), ("| tiny ", "")]
)
def test_a_table_that_was_edited_is_not_overwritten(pages, tmp_path, before, after):
    text = pages.board([a_row(pages, 1000, "9.10")])
    assert before in text
    (tmp_path / "board.md").write_text(text.replace(before, after))
    with pytest.raises(InputError, match="Restore the file from git"):
        pages.read_board(tmp_path / "board.md")


def test_of_sixteen_rows_the_most_dominated_goes(pages):
    rows = [a_row(pages, size, f"{500 - size}.00") for size in range(100, 115)]
    worse, worst = a_row(pages, 120, "400.00"), a_row(pages, 119, "401.00")
    kept, dropped = pages.with_row(rows, worse)
    assert dropped == [worse]
    kept, dropped = pages.with_row([*rows[:14], worse], worst)
    assert dropped == [worst]
    assert kept == [*rows[:14], worse]
    assert kept == sorted(kept, key=lambda row: row.size)


def test_without_dominated_rows_the_one_goes_that_gains_least_for_its_bytes(pages):
    rows = [a_row(pages, 100 + 2 * i, f"{1000 * 0.5**i:.2f}") for i in range(15)]
    little = a_row(pages, 109, f"{1000 * 0.5**4 - 1:.2f}")
    assert pages.with_row(rows, little)[1] == [little]


def test_rows_of_other_models_and_texts_do_not_compare(pages):
    row = a_row(pages, 200, "50.00")
    assert pages.dominated(row, [row, a_row(pages, 100, "20.00", model="other")]) < -1e300
    assert pages.dominated(row, [row, a_row(pages, 100, c4="20.00")]) < -1e300
    both = a_row(pages, 100, "25.00", "20.00")
    assert pages.dominated(row, [row, both]) == pytest.approx(0.6931, abs=1e-4)
    assert pages.dominated(both, [row, both]) < -1e300  # the larger one does not dominate


def test_pages_from_the_command_line(script, pages, tmp_path, monkeypatch, capsys):
    given = (finished(tmp_path / "out"), "--folder", tmp_path, "--commit", "abc")
    call(script, monkeypatch, *given, "--command", "make it", "--note", "A first\ntry.")
    call(script, monkeypatch, *given, "--command", "make it")
    call(script, monkeypatch, "--folder", tmp_path, "--commit", "abc", "--note", "Rotation of v and o gains nothing.")
    assert [row.command for row in pages.read_board(tmp_path / "LEADERBOARD.md")] == ["make it"]
    log = (tmp_path / "EXPERIMENTS.md").read_text()
    assert log.startswith("# Experiments\n")
    first, second, third = (line for line in log.splitlines() if line.startswith("* "))
    assert re.fullmatch(
        r"\* 20\d\d-\d\d-\d\d, abc: tiny, 3basil, 2:4, rank 1, 4.00 bits a weight, 28 bytes; WikiText-2 29.99 ± 0.42; "
        r"C4, held out 33.00; in the table. A first try. `make it`",
        first,
    )
    assert "in the table, in the place of an earlier figure. `make it`" in second
    assert re.fullmatch(r"\* 20\d\d-\d\d-\d\d, abc: Rotation of v and o gains nothing.", third)
    assert "in the table, which has 1 rows" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [((), "Give a result, or --note"), (("{out}",), "Give --command")])
def test_what_is_missing_is_said(script, tmp_path, monkeypatch, capsys, words, message):
    out = finished(tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        call(script, monkeypatch, "--folder", tmp_path, *(word.format(out=out) for word in words))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.md"))


def test_a_row_that_is_dominated_most_is_dropped_at_once_and_noted(script, pages, tmp_path, monkeypatch):
    rows = [a_row(pages, size, f"{size}.00", f"{size}.00") for size in range(1, 16)]  # all of them smaller and better
    (tmp_path / "LEADERBOARD.md").write_text(pages.board(rows))
    perplexities = {"perplexity": {WIKI: 900.0, C4: 900.0}}
    result = finished(tmp_path / "out", compressed=perplexities)
    call(script, monkeypatch, result, "--folder", tmp_path, "--command", "make it")
    assert pages.read_board(tmp_path / "LEADERBOARD.md") == rows
    assert "dropped at once: dominated most" in (tmp_path / "EXPERIMENTS.md").read_text()
