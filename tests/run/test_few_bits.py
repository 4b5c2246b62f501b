"""Runs with values on a grid, with bits or a size to keep to, and with an embedding in few bits."""

import json

import pytest
import torch

import sparlow
from families import save_tiny, tiny
from sparlow.errors import InputError
from sparlow.model.artefact.describe import describe
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import Report
from sparlow.run.verify import verify_artefact

WINDOWS = torch.randint(2, 97, (4, 16), generator=torch.Generator().manual_seed(1))
QUICK = {"options": {"effort": 0.1}}
ON = {"calibration": WINDOWS, "evaluate": ()}


def shards(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def dense(tmp_path, family="llama"):
    save_tiny(family, tmp_path / "dense", dtype=torch.bfloat16)
    return tmp_path / "dense"


@pytest.mark.parametrize(
    "options",
    [
        {"values": "int4", "pattern": "8:16", "rank": 2},
        {"values": "int3", "pattern": "dense", "rank": 2, "group": "row"},
        pytest.param(
            {"values": "int8", "pattern": "4:8", "rank": 2, "factors": "model", "levels": "integer"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"values": "int2", "pattern": "dense", "algorithm": "sparsegpt", "options": {}}, marks=pytest.mark.slow
        ),
        {"factors": "int8", "rank": 2},
    ],
)
def test_a_run_packs_values_on_their_grid_and_plan_and_report_count_the_same_bytes(options, tmp_path):
    source, recipe = dense(tmp_path), Recipe(**{**QUICK, **options, "embedding": "keep", "head": "keep"})
    report = sparlow.compress(source, recipe, out=tmp_path / "out", **ON)
    planned = sparlow.plan(source, recipe.changed(samples=4, seqlen=16), timed=False, evaluate=())
    assert {name: report.bytes[name] for name in planned.bytes} == planned.bytes
    wanted = recipe.values or "model"
    assert {row.value_type for row in report.layers} == {wanted}
    assert {row.factor_type for row in report.layers if row.rank} <= {"int8" if recipe.factors != "model" else "model"}
    assert sum(layer.bytes for layer in describe(tmp_path / "out")) == report.bytes["linears_compressed"]
    assert verify_artefact(tmp_path / "out") == []
    assert Report.from_file(tmp_path / "out" / "report.json").value_types.startswith(wanted)
    assert not [warning for warning in report.warnings if "grid" in warning]
    for name, module in sparlow.load(tmp_path / "out").named_modules():
        if hasattr(module, "sparse_weight"):
            assert module.stored is not None, name


def test_an_object_compressed_in_place_gives_the_same_numbers_as_a_directory(tmp_path):
    save_tiny("llama", tmp_path / "dense")
    recipe = Recipe(**QUICK, values="int4", rank=2)
    report = sparlow.compress(tmp_path / "dense", recipe, out=tmp_path / "out", **ON)
    model = tiny("llama")
    again = sparlow.compress(model, recipe, inplace=True, **ON)
    assert again.bytes == report.bytes
    assert report.bytes["outside_saved"] > 0
    found = sparlow.load(tmp_path / "out")
    ids = WINDOWS[:1]
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.get_input_embeddings().weight, model.get_input_embeddings().weight)


# Bits and sizes


@pytest.mark.parametrize("bits", [5.0, 6.5, 9.5])
def test_a_result_never_takes_more_bits_than_were_asked_for(bits, tmp_path):
    report = sparlow.compress(dense(tmp_path), Recipe(**QUICK, bits=bits), out=tmp_path / "out", **ON)
    assert 0.97 * bits < report.bits_per_weight <= bits
    assert report.notes[0].startswith(f"--bits {bits:g} picked dense, int")
    assert len(report.notes) == 1
    saved = report.bytes.get("outside_saved", 0)
    assert (saved > 0) == (bits < 9)
    stored = {row["why"].split()[0]: row.get("stored") for row in report.not_compressed if "emb" in row["why"]}
    assert set(stored.values()) == {"int8" if bits < 9 else None}


@pytest.mark.parametrize("share", [95, 75])
def test_a_result_never_takes_more_bytes_than_were_asked_for(share, tmp_path):
    source = dense(tmp_path)
    whole = shards(source)  # of tiny files much is headers
    size = f"{whole * share // 100}B"
    report = sparlow.compress(source, Recipe(**QUICK, size=size), out=tmp_path / "out", **ON)
    assert shards(tmp_path / "out") <= whole * share // 100
    assert report.notes[0].startswith(f"--size {size} picked ")


def test_a_run_without_bits_ends_by_saying_what_fewer_would_take(tmp_path):
    report = sparlow.compress(dense(tmp_path), Recipe(**QUICK, rank=2), out=tmp_path / "out", **ON)
    assert report.notes == json.loads((tmp_path / "out" / "report.json").read_text())["notes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "300"}, "not understood. Give bytes such as 300MB"),
        ({"size": "0MB"}, "not understood"),
        ({"size": "10XB"}, "not understood"),
        ({"size": "1GB", "bits": 4.0}, "--size decides how much is kept, and so does --bits"),
        ({"size": "1GB", "compression": 0.5, "pattern": "2:4"}, "--size decides how much is kept, and so does --comp"),
        ({"embedding": "int3"}, "no way to store an embedding 'int3'"),
        ({"head": "int2"}, "no way to store an output head 'int2'"),
    ],
)
def test_sizes_and_kinds_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Recipe(**changes)


def test_a_size_that_leaves_nothing_says_what_the_rest_takes(tmp_path):
    with pytest.raises(InputError, match=r"what is not compressed takes .* by itself"):
        sparlow.plan(dense(tmp_path), Recipe(size="1%", samples=4, seqlen=16), timed=False, evaluate=())


# The embedding and the head


@pytest.mark.parametrize(("embedding", "head"), [("int8", "keep"), ("keep", "int4"), ("int4", "int8")])
def test_the_embedding_and_the_head_are_stored_as_asked(embedding, head, tmp_path):
    recipe = Recipe(algorithm="magnitude", pattern="0.5", embedding=embedding, head=head)
    source = dense(tmp_path)
    report = sparlow.compress(source, recipe, out=tmp_path / "out", **ON)
    planned = sparlow.plan(source, recipe.changed(samples=4, seqlen=16), timed=False, evaluate=())
    assert planned.bytes == {name: report.bytes[name] for name in planned.bytes}
    stored = {row["why"]: row.get("stored", "keep") for row in report.not_compressed}
    assert (stored["embedding"], stored["output head"]) == (embedding, head)
    assert verify_artefact(tmp_path / "out") == []


def test_tied_weights_are_stored_in_one_way(tmp_path):
    source = dense(tmp_path, "gemma4_text")
    recipe = Recipe(algorithm="magnitude", pattern="0.5", embedding="int8", samples=4, seqlen=16)
    with pytest.raises(InputError, match="one tensor"):
        sparlow.plan(source, recipe.changed(head="int4"), timed=False, evaluate=())
    one = sparlow.plan(source, recipe, timed=False, evaluate=())
    both = sparlow.plan(source, recipe.changed(head="int8"), timed=False, evaluate=())
    assert one.bytes == both.bytes
