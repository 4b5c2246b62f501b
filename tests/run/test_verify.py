import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparlow
from families import tiny
from sparlow.errors import InputError
from sparlow.files import sha256
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import Report
from sparlow.run.output_dir import NAME
from sparlow.run.verify import recorded_patterns, verify_artefact

LAYER = "model.layers.1.mlp.up_proj"  # (48, 32), 2:4
SHARD = "model-00002-of-00004.safetensors"  # that holds LAYER
REST = "model-00004-of-00004.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    windows = torch.randint(2, 97, (8, 16), generator=torch.Generator().manual_seed(0))
    sparlow.compress(tiny("llama"), Recipe(algorithm="wanda", pattern="2:4"), calibration=windows, out=out, evaluate=())
    return out


@pytest.fixture
def folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def edit(folder, change):
    state = json.loads((folder / NAME).read_text())
    change(state)
    (folder / NAME).write_text(json.dumps(state))


def edit_record(folder, **changes):
    """Change what is recorded of LAYER."""
    edit(
        folder, lambda s: next(row for row in s["blocks"][1]["layers"] if row["name"] == "mlp.up_proj").update(changes)
    )


def rewrite(folder, change, *, honest):
    """Write other tensors into SHARD; an honest forger also renews its checksum."""
    with safe_open(folder / SHARD, "pt") as shard:
        metadata = shard.metadata()
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata)
    if not honest:
        record = {"bytes": (folder / SHARD).stat().st_size, "sha256": sha256(folder / SHARD)}
        edit(folder, lambda state: state["shards"].update({SHARD: record}))


def shift_mask(tensors):
    """Keep as many values, but three of one group of four and one of another, in the first row."""
    mask = tensors[f"{LAYER}.mask"]
    mask[0, 0] = 0b00010111


def set_nan(tensors):
    tensors[f"{LAYER}.weight"][0] = float("nan")


def test_a_result_as_it_was_written_has_no_problems(finished):
    assert verify_artefact(finished) == []


def test_dense_is_written_read_and_verified_under_its_name(tmp_path):
    rules = [{"match": "o_proj", "pattern": "dense"}]
    recipe = Recipe(pattern="dense", rank=2, layers=rules, options={"max_steps": 3})
    windows = torch.randint(2, 97, (8, 16), generator=torch.Generator().manual_seed(0))
    sparlow.compress(tiny("llama"), recipe, calibration=windows, out=tmp_path / "out", evaluate=())
    again = Recipe.from_file(tmp_path / "out" / "recipe.toml")
    assert (again.pattern, again.layers[0].pattern) == ("dense", "dense")
    assert {layer.pattern for layer in Report.from_file(tmp_path / "out" / "report.json").layers} == {"dense"}
    assert {*recorded_patterns(tmp_path / "out").values()} == {"dense"}
    assert verify_artefact(tmp_path / "out") == []


def test_patterns_come_from_the_record(finished, tmp_path):
    patterns = recorded_patterns(finished)
    assert len(patterns) == 21
    assert set(patterns.values()) == {"2:4"}
    assert LAYER in patterns
    assert recorded_patterns(tmp_path) == {}


@pytest.mark.parametrize("shard", [SHARD, REST])
@pytest.mark.parametrize("position", [0.0, 0.3, 0.6, 0.99])
def test_one_flipped_bit_is_found(shard, position, folder):
    path = folder / shard
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 1
    path.write_bytes(data)
    problems = verify_artefact(folder)
    assert any(shard in problem and "checksum" in problem for problem in problems)


def test_a_missing_shard_is_found(folder):
    (folder / SHARD).unlink()
    assert f"The shard {SHARD} is missing." in verify_artefact(folder)


def test_a_broken_pattern_is_found_even_if_the_checksum_was_renewed(folder):
    rewrite(folder, shift_mask, honest=False)
    assert verify_artefact(folder) == [f"{LAYER} keeps more than 2 of 4 in 1 groups."]


def test_a_broken_pattern_is_found_beside_the_checksum(folder):
    rewrite(folder, shift_mask, honest=True)
    problems = verify_artefact(folder)
    assert len(problems) == 2
    assert "checksum" in problems[0]
    assert LAYER in problems[1]


def test_numbers_that_are_not_finite_are_found(folder):
    rewrite(folder, set_nan, honest=False)
    assert verify_artefact(folder) == [f"{LAYER} holds numbers that are not finite."]


@pytest.mark.parametrize("density", [0.25, 0.499, 0.501, 0.0])
def test_another_density_in_the_record_is_found(density, folder):
    edit_record(folder, density=density)
    (problem,) = verify_artefact(folder)
    assert problem == f"{LAYER} has density 0.500000, but {density:.6f} is recorded."


def test_another_pattern_in_the_record_is_found(folder):
    edit_record(folder, pattern="1:2")
    (problem,) = verify_artefact(folder)
    assert problem.startswith(f"{LAYER} keeps more than 1 of 2")


def test_a_layer_without_record_is_found(folder):
    edit_record(folder, name="mlp.side_proj")
    assert set(verify_artefact(folder)) == {
        f"{LAYER} is compressed, but not recorded in {NAME}.",
        f"model.layers.1.mlp.side_proj is recorded in {NAME}, but not in the shards.",
    }


def test_a_shard_without_record_is_found(folder):
    edit(folder, lambda state: state["shards"].pop(REST))
    assert any(REST in problem for problem in verify_artefact(folder))


def test_a_pattern_that_is_none_is_a_problem_of_its_layer(folder):
    edit_record(folder, pattern="two of four")
    assert any(LAYER in problem for problem in verify_artefact(folder))


def test_what_is_no_result_of_ours(folder, tmp_path):
    with pytest.raises(InputError, match=f"has no {NAME}"):
        verify_artefact(tmp_path)
    tiny("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=f"has no {NAME}"):
        verify_artefact(tmp_path / "dense")
    (folder / "config.json").unlink()  # unfinished
    with pytest.raises(InputError, match=r"config.json is missing"):
        verify_artefact(folder)
    (folder / NAME).write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        verify_artefact(folder)
