"""What a run says of its texts: their source, what windows begin with, and what a caller may give for them."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import sparlow
from command_line import run, run_and_fail
from families import save_tiny, tiny, tiny_tokenizer
from samples import few_of
from sparlow.errors import InputError
from sparlow.recipe.recipe import Recipe, as_recipe
from sparlow.recipe.run_options import RunOptions, listed
from sparlow.report.compare_page import write_comparison
from sparlow.report.html_page import html
from sparlow.report.records import Report
from sparlow.report.summary import summary_rows
from sparlow.run import compress as compressing
from sparlow.run.compare import compare

TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(600))
QUICK = Recipe(algorithm="magnitude", samples=4, seqlen=16)
REMARK = "(in-domain: same source as the calibration text)"


def beginning_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model whose tokenizer adds BOS, one whose tokenizer does not, and texts, for reading only."""
    place = tmp_path_factory.mktemp("place")
    save_tiny("llama", place / "model")
    save_tiny("llama", place / "begins")
    beginning_tokenizer().save_pretrained(place / "begins")
    (place / "text.txt").write_text(TEXT)
    (place / "other.txt").write_text(TEXT[::-1])
    return place


@pytest.fixture
def calibrated_on(monkeypatch):
    """The calibration windows of every run that is begun."""
    seen = []
    real = compressing.windows_to_calibrate

    def watched(*given):
        seen.append(real(*given))
        return seen[-1]

    monkeypatch.setattr(compressing, "windows_to_calibrate", watched)
    return seen


def compressed(place, which="model", *, evaluate=(), calibration="text.txt", out=None, **changes):
    recipe = QUICK.changed(calibration=str(place / calibration) if "." in calibration else calibration, **changes)
    texts = [str(place / name) for name in evaluate]
    with tempfile.TemporaryDirectory() as scratch:
        return sparlow.compress(place / which, recipe, evaluate=texts, out=out or Path(scratch) / "out", force=True)


# source


def test_a_figure_on_the_source_of_the_calibration_text_says_so(place, tmp_path, capsys):
    text, other = str(place / "text.txt"), str(place / "other.txt")
    given = ["--calibration", text, "--evaluate", text, "--evaluate", other, "--algorithm", "magnitude", "--samples", 4]
    assert run("compress", place / "begins", "--out", tmp_path / "out", "--seqlen", 16, *given) == 0
    shown = capsys.readouterr().out
    report = Report.from_file(tmp_path / "out" / "report.json")
    assert list(report.dense["perplexity"]) == [text, f"{text}, with BOS", other, f"{other}, with BOS"]
    assert report.in_domain == [text, f"{text}, with BOS"]
    assert [warning for warning in report.warnings if warning.startswith(f"{text} comes from the same source as")]
    assert not [warning for warning in report.warnings if warning.startswith(other)]
    for page in (shown, html(report)):
        assert f"perplexity, {text} {REMARK}" in page
        assert f"perplexity, {other} {REMARK}" not in page
        assert "comes from the same source as the calibration text" in page


@pytest.mark.slow
def test_a_text_that_is_measured_later_says_so_too(place, tmp_path):
    recipes, text = {"magnitude": QUICK.changed(calibration=str(place / "text.txt"))}, str(place / "text.txt")
    file = tmp_path / "out" / "magnitude" / "report.json"
    for measured, expected in ((str(place / "other.txt"), []), (text, [text]), (text, [text])):
        compare(place / "model", recipes, out=tmp_path / "out", options=RunOptions(evaluate=(measured,)))
        report = Report.from_file(file)
        assert report.in_domain == expected
        assert sum("same source" in warning for warning in report.warnings) == len(expected)
    assert len(report.dense["perplexity"]) == 2


def test_the_demo_measures_on_another_source_than_it_calibrates_on():
    from sparlow.cli.demo import BITS, EVALUATION, QUICK
    from sparlow.text import same_source

    assert not same_source(QUICK.calibration, EVALUATION)
    assert BITS.calibration == QUICK.calibration


def test_comparing_on_the_source_of_the_calibration_text_says_so(place, tmp_path, capsys):
    text = str(place / "text.txt")
    given = ["--calibration", text, "--evaluate", text, "--algorithms", "magnitude", "--samples", 4, "--seqlen", 16]
    assert run("compare", place / "model", "--out", tmp_path / "out", *given, "--no-time", "--force") == 0
    assert f"perplexity, text.txt {REMARK}" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["evaluation"]["in_domain"] == [text]
    assert REMARK[1:-1] in (tmp_path / "out" / "compare.html").read_text()


def test_dollars_in_the_name_of_a_text_do_not_end_a_comparison(place, tmp_path):
    names = ["$\\notthere{$.txt", "a$b$c.txt", "$$.txt"]
    texts = [str(tmp_path / name) for name in names]
    for text in texts:
        Path(text).write_text(TEXT)
    recipes = {"magnitude": QUICK.changed(calibration=texts[0])}
    found = compare(place / "model", recipes, out=tmp_path / "out", options=RunOptions(evaluate=texts), force=True)
    odd = [replace(found.rows[0], name=name) for name in names]
    write_comparison(replace(found, rows=odd), tmp_path)
    page = (tmp_path / "compare.html").read_text()
    assert [name for name in names if name not in page] == []


# beginning of sequence

BEGINNINGS = [
    ("begins", "auto", True),
    ("begins", "always", True),
    ("begins", "never", False),
    ("model", "auto", False),
    ("model", "always", True),
    ("model", "never", False),
]


@pytest.mark.parametrize(
    ("which", "bos", "begins", "calibration"),
    few_of(
        [(*case, calibration) for case in BEGINNINGS for calibration in ("text.txt", "self")],
        *[(*case, "text.txt") for case in BEGINNINGS],
        ("begins", "auto", True, "self"),
        ("model", "auto", False, "self"),
    ),
)
def test_calibration_windows_begin_as_the_tokenizer_begins_a_text(
    which, bos, begins, calibration, place, calibrated_on, tmp_path, monkeypatch
):
    monkeypatch.setenv("SPARLOW_CACHE", str(tmp_path))
    report = compressed(place, which, bos=bos, calibration=calibration)
    (windows,) = calibrated_on
    assert windows.shape == (4, 16)
    assert bool((windows[:, 0] == 0).all()) is begins
    assert report.recipe["bos"] == bos


def test_windows_given_directly_are_taken_as_they_are(place, calibrated_on, tmp_path):
    windows = torch.arange(2, 66).view(4, 16)
    recipe = QUICK.changed(bos="always")
    sparlow.compress(place / "begins", recipe, calibration=windows, evaluate=(), out=tmp_path / "out")
    assert torch.equal(calibrated_on[0], windows)


def test_both_figures_are_in_the_summary_where_they_differ(place):
    report = compressed(place, "begins", evaluate=["other.txt"])
    name = str(place / "other.txt")
    for factor, lines in ((1.01, 1), (1.5, 2)):
        for part in (report.dense, report.compressed):
            part["perplexity"][f"{name}, with BOS"] = part["perplexity"][name] * factor
        labels = [label for label, *_ in summary_rows(report) if label.startswith("perplexity")]
        assert labels == [f"perplexity, {name}", f"perplexity, {name}, with BOS"][:lines]


# what a caller may give


@pytest.mark.slow
def test_a_column_of_a_table_is_calibrated_and_measured_on(place, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("id,body\n" + "".join(f'{i},"{line}"\n' for i, line in enumerate(["a b c" * 20] * 20)))
    given = ["--algorithm", "magnitude", "--samples", 4, "--seqlen", 16, "--calibration", table, "--evaluate", table]
    command = ["compress", place / "model", "--out", tmp_path / "out", *given]
    assert "there is no field 'text', only: id, body. Choose one with --column." in run_and_fail(capsys, *command)
    assert run(*command, "--column", "body") == 0
    given = ["--evaluate", table, "--seqlen", 16]
    assert run("evaluate", place / "model", *given, "--column", "body") == 0
    assert "there is no field 'text'" in run_and_fail(capsys, "evaluate", place / "model", *given)


@pytest.mark.parametrize("given", [[[1, 2], [3, 4]], {"text": ["a"]}, 7])
def test_calibration_of_another_kind_says_what_is_taken(given):
    with pytest.raises(InputError, match=r"Calibration text cannot be given as a \w+\. Give the name of a corpus"):
        sparlow.compress(tiny("llama"), QUICK, calibration=given, tokenizer=tiny_tokenizer(), evaluate=(), inplace=True)


def test_a_recipe_may_be_given_as_a_dict_or_by_the_path_of_its_file(place, tmp_path):
    recipe = QUICK.changed(calibration=str(place / "text.txt"))
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    given = [recipe, recipe.to_dict(), tmp_path / "r.toml", str(tmp_path / "r.toml")]
    assert [as_recipe(one) for one in given] == [recipe] * 4
    assert as_recipe(None) == Recipe()
    with pytest.raises(InputError, match="A recipe cannot be given as a list"):
        as_recipe([recipe])
    options = {"tokenizer": str(place / "model"), "evaluate": str(place / "text.txt")}
    found = sparlow.compress(tiny("llama"), given[1], inplace=True, force=True, **options)
    assert list(found.dense["perplexity"]) == [str(place / "text.txt")]
    assert found.recipe == recipe.to_dict()


def test_names_of_texts_to_measure_on(place):
    assert listed("builtin") == listed(["builtin"]) == RunOptions(evaluate="builtin").evaluate == ("builtin",)
    assert listed("") == listed([]) == ()
    assert listed(place) == (str(place),)
    for wrong in (None, 3, [3], [None]):
        with pytest.raises(InputError, match="A corpus to evaluate on cannot be given as"):
            listed(wrong)


@pytest.mark.parametrize("option", ["--calibration", "--evaluate"])
def test_a_tokenizer_larger_than_the_embedding_is_said_before_the_run(option, tmp_path, capsys, place):
    model = tiny("llama")
    model.resize_token_embeddings(80)
    model.save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    (tmp_path / "capitals.txt").write_text("ABC DEF " * 40)
    texts = {"--calibration": tmp_path / "capitals.txt", "--evaluate": tmp_path / "capitals.txt"}
    texts[option] = place / "text.txt"
    given = [word for pair in texts.items() for word in pair]
    sizes = ["--algorithm", "magnitude", "--samples", 2, "--seqlen", 16]
    said = run_and_fail(capsys, "compress", tmp_path / "small", "--out", tmp_path / "out", *sizes, *given, "--quiet")
    assert "is outside the vocabulary, for the model's embedding has 80 rows" in said


def test_a_perplexity_that_is_no_number_ends_evaluate_with_1(place, tmp_path, capsys):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    text, file = str(place / "text.txt"), tmp_path / "found.json"
    given = ["--evaluate", text, "--evaluate", str(place / "other.txt"), "--seqlen", 16, "--json", file]
    said = run_and_fail(capsys, "evaluate", tmp_path / "nan", *given, code=1)
    assert f"The perplexity of {tmp_path / 'nan'} on {text} is nan" in said

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(file.read_text(), parse_constant=refuse)["perplexity"]
    assert list(found) == [text, str(place / "other.txt")]  # both of an option that is given twice
    assert found[text] == "nan"
