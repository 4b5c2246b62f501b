"""What Python callers have beside ``compress``: whatever stands for a recipe or a text, and records to look at."""

import importlib.util
import json
import logging
import shutil
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparlow
from families import save_tiny
from sparlow.algorithms import _registry, algorithms, load_plugin
from sparlow.errors import InputError
from sparlow.recipe.recipe import GIVEN_TEXTS, Recipe, as_recipe
from sparlow.report.tabular import Tabular

TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(600))
QUICK = {"algorithm": "magnitude", "pattern": "2:4", "samples": 4, "seqlen": 16}
LAYER = "gpt_neox.layers.0.mlp.dense_h_to_4h"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    save_tiny("gpt_neox", place / "model")
    (place / "text.txt").write_text(TEXT)
    return place


@pytest.fixture(scope="module")
def texts(place):
    return {"calibration": str(place / "text.txt"), "evaluate": str(place / "text.txt")}


@pytest.fixture(scope="module")
def report(place, texts):
    return sparlow.compress(place / "model", QUICK, **texts, out=place / "out")


# Recipes and texts of any kind


def test_fields_stand_beside_a_recipe_or_for_one(tmp_path):
    (tmp_path / "recipe.toml").write_text(Recipe(**QUICK).to_toml())
    for given in (QUICK, Recipe(**QUICK), tmp_path / "recipe.toml", str(tmp_path / "recipe.toml")):
        assert as_recipe(given, {"pattern": 0.5}) == Recipe(**QUICK | {"pattern": "0.5"})
    assert as_recipe(None, QUICK) == Recipe(**QUICK)
    changed = as_recipe(Recipe(options={"effort": 0.1}), {"algorithm": "sparsegpt"})
    assert changed == Recipe(algorithm="sparsegpt")  # which has no such option


@pytest.mark.parametrize("call", [sparlow.compress, sparlow.plan])
def test_a_slip_in_a_field_is_told_with_what_was_meant(call, place, tmp_path):
    with pytest.raises(InputError, match="'patern'; did you mean 'pattern'"):
        call(place / "model", patern="2:4", out=tmp_path / "out")
    with pytest.raises(InputError, match="owl-spread"):
        call(place / "model", owl_spread=0.1, out=tmp_path / "out")


def test_a_fraction_is_a_pattern_as_a_number_too():
    assert Recipe(pattern=0.5) == Recipe(pattern="0.5") == Recipe.from_toml("pattern = 0.5")
    with pytest.raises(InputError, match="must be text"):
        Recipe(pattern=5)


def test_texts_in_memory_are_what_a_table_of_them_is(place, tmp_path):
    pieces = [TEXT[:300], TEXT[300:]]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in pieces))
    for calibration, out in ((pieces, "a"), (tmp_path / "text.jsonl", "b")):
        sparlow.compress(
            place / "model", calibration=calibration, out=tmp_path / out, evaluate=(), algorithm="wanda", **SHORT
        )
    a, b = ((tmp_path / out / "model-00001-of-00004.safetensors").read_bytes() for out in "ab")
    assert a == b
    assert Recipe.from_file(tmp_path / "a" / "recipe.toml").calibration == GIVEN_TEXTS
    with pytest.raises(InputError, match="was made for a list of texts"):
        sparlow.compress(place / "model", tmp_path / "a" / "recipe.toml", out=tmp_path / "c", evaluate=())
    with pytest.raises(InputError, match="The list of texts holds 600 tokens"):
        sparlow.compress(place / "model", calibration=pieces, out=tmp_path / "c", samples=100, seqlen=16)
    with pytest.raises(InputError, match="cannot be given as a list"):
        sparlow.compress(place / "model", calibration=[1], out=tmp_path / "c")


SHORT = {"samples": 4, "seqlen": 16}


def test_matrices_of_numpy():
    rng = np.random.default_rng(0)
    W, X = rng.standard_normal((8, 16)), rng.standard_normal((64, 16))
    H = 2 * X.T @ X
    found = sparlow.decompose(W, H, pattern=0.5, rank=2)
    same = sparlow.decompose(torch.from_numpy(W), torch.from_numpy(H), pattern="0.5", rank=2)
    assert torch.equal(found.S, same.S)
    assert found.S.dtype == torch.float64
    with pytest.raises(InputError, match="cannot be given as a list"):
        sparlow.decompose(W.tolist(), H, pattern=0.5, rank=2)
    with pytest.raises(InputError, match="cannot be given as a ndarray"):
        sparlow.decompose(W.astype(int), H, pattern=0.5, rank=2)


# Records


def records(place, report, texts):
    yield report
    yield sparlow.plan(place / "model", QUICK, **texts, timed=False)
    yield sparlow.inspect(place / "out")
    yield sparlow.verify(place / "out")


def test_every_record_can_be_read_written_and_put_into_a_table(place, report, texts, monkeypatch):
    for record in records(place, report, texts):
        assert isinstance(record, Tabular)
        shown, page = repr(record), record._repr_html_()
        assert shown.startswith(type(record).__name__)
        assert len(shown.splitlines()) == 1 + len(record.facts())
        assert page.count("<tr>") >= len(record.facts())
        json.dumps(record.to_dict(), allow_nan=False)
        if importlib.util.find_spec("pandas"):
            assert len(record.to_dataframe()) == len(record.table())
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "pandas", None)
            with pytest.raises(InputError, match="pip install pandas"):
                record.to_dataframe()
    assert json.loads(report.to_json()) == report.to_dict()


def test_names_of_strangers_do_no_harm_in_a_notebook(report):
    report.model, before = "<script>alert(1)</script>\x1b[2J", report.model
    assert "<script>" not in report._repr_html_()
    assert "\x1b" not in report._repr_html_() + repr(report)
    report.model = before


def test_inspect_says_what_the_report_says(place, report):
    found = sparlow.inspect(place / "out")
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert found.share_compressed == report.share_compressed
    assert {row["pattern"] for row in found.table()} == {"2:4"}
    assert len(found.layers) == len(report.layers) == 12


@pytest.mark.usefixtures("report")
def test_verify_is_true_until_a_bit_is_flipped(place, tmp_path):
    assert sparlow.verify(place / "out")
    shutil.copytree(place / "out", tmp_path / "out")
    shard = next((tmp_path / "out").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    found = sparlow.verify(tmp_path / "out")
    assert not found
    assert shard.name in found.problems[0]
    assert f"{len(found.problems)} problems" in repr(found)


# Measuring and comparing


def test_evaluate_opens_what_is_named(place, report, texts):
    folder = place / "out"
    named = sparlow.evaluate(folder, evaluate=texts["evaluate"], seqlen=16)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert named == sparlow.evaluate(model, tokenizer, evaluate=texts["evaluate"], seqlen=16)
    assert named["perplexity"] == report.compressed["perplexity"]
    with pytest.raises(InputError, match="device meta has no effect on a model object"):
        sparlow.evaluate(model, tokenizer, evaluate=(), device="meta")


def test_a_model_in_training_comes_back_in_training(place, texts):
    model = AutoModelForCausalLM.from_pretrained(place / "model").train()
    model.gpt_neox.layers[1].eval()
    modes = [module.training for module in model.modules()]
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    sparlow.evaluate(model, tokenizer, evaluate=texts["evaluate"], seqlen=16)
    assert [module.training for module in model.modules()] == modes
    sparlow.compress(model, QUICK, **texts, tokenizer=tokenizer, inplace=True)
    assert model.training
    assert all(module.training for name, module in model.named_modules() if not name.startswith("gpt_neox.layers.1"))


def test_evaluate_tells_how_far_it_is(place, texts):
    steps = []
    sparlow.evaluate(place / "model", evaluate=texts["evaluate"], seqlen=16, notify=steps.append)
    assert (steps[-1].stage, steps[-1].done, steps[-1].total) == ("perplexity, text.txt", 37, 37)


@pytest.mark.slow
def test_compare_takes_names_or_recipes(place, texts, tmp_path):
    found = sparlow.compare(place / "model", ["magnitude", "wanda"], QUICK, **texts, out=tmp_path / "a")
    assert [row["name"] for row in found.table()] == ["magnitude", "wanda"]
    assert f"perplexity, {texts['evaluate']}" in found.table()[0]
    assert "magnitude, wanda" in repr(found)
    methods = {"half": QUICK, "quarter": {**QUICK, "pattern": "1:4"}}
    recipes = sparlow.run.methods._given(methods, {"calibration": texts["calibration"]})
    assert {name: recipe.pattern for name, recipe in recipes.items()} == {"half": "2:4", "quarter": "1:4"}
    for wrong in ({"methods": {}}, {"methods": methods, "match": "both"}, {"methods": ["wandaa"]}):
        with pytest.raises(InputError):
            sparlow.compare(place / "model", out=tmp_path / "b", **wrong)


# Statistics


def test_statistics_are_those_that_compression_sees(place, texts, tmp_path):
    kept = sparlow.statistics(place / "model", calibration=texts["calibration"], out=tmp_path / "stats", **SHORT)
    assert len(kept) == 12
    assert sorted(kept) == sorted(layer.name for layer in sparlow.inspect(place / "out").layers)
    opened = sparlow.Statistics(tmp_path / "stats")
    W, gram = opened[LAYER]
    report = sparlow.compress(
        place / "model", algorithm="wanda", pattern="2:4", **texts, **SHORT, out=tmp_path / "wanda"
    )
    found = sparlow.decompose(W, gram, pattern="2:4", rank=0, algorithm="wanda")
    row = next(row for row in report.layers if (row.block, row.name) == (0, "mlp.dense_h_to_4h"))
    assert found.stats.relative_error == pytest.approx(row.relative_error, rel=1e-6)
    assert found.stats.relative_error_per_token == pytest.approx(row.relative_error_per_token, rel=1e-6)
    assert opened[LAYER].gram is gram  # as of layers that share an input
    with pytest.raises(KeyError):
        opened["nothing"]
    with pytest.raises(InputError, match="is not empty"):
        sparlow.statistics(place / "model", calibration=texts["calibration"], out=tmp_path / "stats", **SHORT)
    (tmp_path / "stats" / "block-00001.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"block-00001\.safetensors cannot be read"):
        sparlow.Statistics(tmp_path / "stats")[LAYER]


# Algorithms of one's own

PLUGIN = """
import torch, sparlow

@sparlow.pruner("{name}")
def keep_large(W, gram, pattern):
    "Keep what is large."
    return W * pattern.mask(W.abs())
"""


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(_registry, "_ALGORITHMS", dict(_registry._ALGORITHMS))  # for the other tests


@pytest.mark.usefixtures("own_registry")
def test_a_file_of_ones_own_is_run_once_and_told_apart(place, texts, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN.format(name="mine-of-this-test"))
    load_plugin(tmp_path / "mine.py")
    load_plugin(tmp_path / "mine.py")
    assert "mine-of-this-test" in {algorithm.name for algorithm in algorithms()}
    report = sparlow.compress(
        place / "model", algorithm="mine-of-this-test", pattern="2:4", **texts, **SHORT, out=tmp_path / "out"
    )
    own = sparlow.compress(place / "model", algorithm="magnitude", pattern="2:4", **texts, **SHORT, out=tmp_path / "m")
    assert report.compressed == own.compressed
    solver = json.loads((tmp_path / "out" / "sparlow.json").read_text())["fingerprint"]["solver"]
    assert solver != json.loads((tmp_path / "m" / "sparlow.json").read_text())["fingerprint"]["solver"]


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "registers no algorithm"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        (PLUGIN.format(name="wanda"), "Two algorithms are called 'wanda'"),
    ],
)
def test_a_file_that_cannot_be_used(text, said, tmp_path):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(InputError, match=said):
        load_plugin(tmp_path / "bad.py")
    with pytest.raises(InputError, match="There is no Python file"):
        load_plugin(tmp_path / "none.py")


# What a run says


def test_a_run_is_quiet_but_for_programs_that_listen(place, texts, tmp_path, capfd, caplog):
    sparlow.compress(place / "model", QUICK, **texts, out=tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    with caplog.at_level(logging.INFO, logger="sparlow"):
        sparlow.compress(place / "model", QUICK, **texts, out=tmp_path / "b")
    assert any(line.startswith("blocks: 3 of 3") and "mean relative squared error" in line for line in caplog.messages)
