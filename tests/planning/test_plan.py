import json
import re
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import sparlow
from families import save_tiny, tiny
from samples import few_of
from sparlow.errors import InputError
from sparlow.linalg.grid import make_grid
from sparlow.model.artefact.describe import describe
from sparlow.model.forward import fused_groups
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading.meta import meta_model
from sparlow.model.loading.source import open_model
from sparlow.model.training.packed_layer import packed, trained_parameters
from sparlow.planning import feasibility
from sparlow.planning import workload as planning
from sparlow.planning.choices import measured, opened_by
from sparlow.planning.duration import seconds
from sparlow.planning.feasibility import require_feasible
from sparlow.planning.memory import disk, stages
from sparlow.planning.microbenchmarks import BOUND, Solver, Speed
from sparlow.planning.workload import Structure, workload
from sparlow.recipe.recipe import GIVEN_WINDOWS, Recipe
from sparlow.recipe.run_options import RunOptions
from sparlow.run.compare import foresee

SIZES = {"samples": 4, "seqlen": 16, "calibration": GIVEN_WINDOWS}
QUICK = {"options": {"effort": 0.1, "max_steps": 1}, **SIZES}
RULES = ({"match": "mlp.*", "rank": 2}, {"match": "*.layers.1.*", "pattern": "4:8"})
RECIPES = {
    "pruner": Recipe(algorithm="magnitude", **SIZES),
    "unstructured": Recipe(algorithm="magnitude", pattern="0.3", **SIZES),
    "rank": Recipe(rank=3, **QUICK),
    "rules": Recipe(rank=4, ignore=("*.layers.0.*",), layers=RULES, **QUICK),
    "compression and pattern": Recipe(compression=0.4, pattern="2:4", **QUICK),
    "compression and share": Recipe(compression=0.5, rank_share=0.3, **QUICK),
}


def windows(recipe):
    ids = torch.randint(2, 128, (recipe.samples, recipe.seqlen), generator=torch.Generator().manual_seed(0))
    return {"calibration": ids, "evaluate": ()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's directory, for reading only."""
    place = tmp_path_factory.mktemp("estimate")
    save_tiny("gpt_neox", place, dtype=torch.bfloat16)
    return place


def foreseen(folder, recipe, **options):
    return sparlow.plan(folder, recipe, evaluate=(), timed=False, **options)


def contents(folder):
    """Bytes of all tensors in the shards of a directory, headers left out."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - not a dict
            total += sum(tensor.nbytes for tensor in tensors)
    return total


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("gpt_neox", name) for name in RECIPES] + [("llama", "rank"), ("opt", "compression and pattern")],
)
def test_what_is_kept_is_what_is_written(family, recipe, tmp_path):
    save_tiny(family, tmp_path / "model", dtype=torch.bfloat16)
    recipe = RECIPES[recipe]
    if family != "gpt_neox":
        recipe = replace(recipe, ignore=(), layers=())
    plan = foreseen(tmp_path / "model", recipe)
    report = sparlow.compress(tmp_path / "model", recipe, out=tmp_path / "out", **windows(recipe))
    assert plan.bytes == report.bytes
    assert plan.bytes["compressed"] == plan.disk.out == contents(tmp_path / "out")
    assert plan.bits_per_weight == report.bits_per_weight
    assert plan.bits_per_parameter == report.bits_per_parameter
    assert plan.share_compressed == report.share_compressed
    rows = [(layer.name, tuple(layer.shape), layer.pattern, layer.rank) for layer in report.layers]
    compressed = {(k.name, k.shape, k.pattern, k.rank): k.count for k in plan.layers if k.pattern}
    assert compressed == {row: rows.count(row) for row in rows}
    stored = [row for row in describe(tmp_path / "out") if row.name.count(".") > 2]  # not the embedding and the head
    assert sum(k.bytes_kept for k in plan.layers if k.pattern) == sum(row.bytes for row in stored)
    kept = sum(row["parameters"] for row in report.not_compressed)
    assert sum(row["parameters"] for row in plan.not_compressed) == kept
    assert {row["why"] for row in plan.not_compressed} == {row["why"] for row in report.not_compressed}
    assert sum(row["count"] for row in plan.not_compressed) == len(report.not_compressed)


def test_no_weight_is_read(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    recipe = RECIPES["rank"]
    spoilt, whole = foreseen(tmp_path, recipe), foreseen(folder, recipe)
    assert (spoilt.layers, spoilt.bytes, spoilt.stages) == (whole.layers, whole.bytes, whole.stages)
    (tmp_path / "model.safetensors").unlink()
    assert foreseen(tmp_path, recipe).bytes == whole.bytes


def test_a_model_in_memory_is_planned_as_it_is(folder):
    model = tiny("gpt_neox", dtype=torch.bfloat16)
    plan = foreseen(model, RECIPES["rank"])
    assert plan.bytes == foreseen(folder, RECIPES["rank"]).bytes
    assert "opening" in {stage.name for stage in plan.stages}


def test_the_plan_as_json_and_its_time(folder):
    plan = sparlow.plan(folder, RECIPES["pruner"], evaluate=("builtin",), limit=2)
    found = json.loads(plan.to_json())
    assert found["version"] == 1
    assert found["bytes"] == plan.bytes
    spent = dict(found["seconds"])
    assert spent.pop("total") == pytest.approx(sum(spent.values()))
    assert spent["solve"] > 0
    assert spent["evaluate"] > 0
    assert found["peak_memory"]["rss"] == found["baseline"] + max(stage["cpu"] for stage in found["stages"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pattern": "2:5"}, "2:5"),
        ({"rank": 33}, "Rank 33"),
        ({"ignore": ("nothing",)}, "nothing"),
        ({"seqlen": 65}, "Lower --seqlen"),
        ({"dtype": "float31"}, "float31"),
    ],
)
def test_what_compress_refuses_the_plan_refuses(changes, said, folder):
    with pytest.raises(InputError, match=said):
        foreseen(folder, RECIPES["rank"].changed(**changes))


def test_packed_weights_are_not_guessed_at(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(InputError, match=r"are packed.*Give the dense model"):
        foreseen(tmp_path, RECIPES["rank"])


def worked(folder, recipe, **changes):
    options = RunOptions(device="cpu", offload=changes.pop("offload", "cpu"), evaluate=())
    return workload(Structure(meta_model(str(folder))), recipe, options, **changes)


def counted(work):
    return {stage.name: stage.cpu for stage in stages(work, BOUND)}


def test_hidden_states_are_counted_where_they_wait(folder):
    recipe = RECIPES["rank"].changed(samples=512, seqlen=64)
    here, away = worked(folder, recipe), worked(folder, recipe, offload="disk")
    copy = 512 * 64 * 32 * 4
    assert here.hidden == copy
    assert counted(here)["solving"] - counted(away)["solving"] == 2 * copy
    assert counted(here)["passing on"] - counted(away)["passing on"] == 3 * copy
    assert (disk(here).hidden, disk(away).hidden) == (0, 3 * copy)
    matched = worked(folder, recipe.changed(match=True))
    assert counted(matched)["solving"] - counted(here)["solving"] == copy


def test_what_the_c_library_keeps_is_counted_unless_the_environment_sends_it_back(folder, monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    work = worked(folder, RECIPES["rank"])
    kept = counted(work)
    for told, held in (("4096", 4096), ("1", 1), ("99999999999", work.largest * work.computing), ("a lot", None)):
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", told)
        less = 0 if held is None else 2 * (work.largest * work.computing - held)
        assert counted(work) == {name: size - less for name, size in kept.items()}, told


def test_what_the_dense_model_predicts_is_counted_where_it_waits(folder, tmp_path):
    (tmp_path / "long.txt").write_text("x" * 2**16)
    recipe, texts = RECIPES["rank"].changed(samples=8, seqlen=64), (str(tmp_path / "long.txt"), "novel")
    here, away = (
        workload(Structure(meta_model(str(folder))), recipe, RunOptions("cpu", offload, evaluate=texts, limit=9))
        for offload in ("cpu", "disk")
    )
    states = 2 * sum(here.evaluation.values()) * 64 * 32 * 4
    assert here.predictions == states > 0
    without = replace(here, evaluation={})
    assert counted(here)["solving"] - counted(without)["solving"] == states
    assert counted(here)["opening"] == counted(without)["opening"]
    assert counted(away)["solving"] < counted(here)["solving"] - states
    assert disk(away).hidden == states + 3 * max(away.hidden, away.evaluated_hidden)
    assert disk(here).hidden == 0


def test_each_option_that_takes_memory_is_counted(folder):
    plain = counted(worked(folder, RECIPES["rank"]))
    more = worked(folder, RECIPES["rank"].changed(match=True, calibration="self"))
    assert counted(more).keys() - plain.keys() == {"distilling", "writing calibration text"}
    by_block = worked(folder, RECIPES["rank"].changed(match=True, match_preset="blocks"))
    assert counted(by_block).keys() - plain.keys() == {"matching"}
    assert disk(by_block).second == 0
    state = 4 * 4 * sum(block.trained for block in more.blocks)
    assert disk(more).second == state + max(state, sum(block.kept_bytes(2) for block in more.blocks))
    assert disk(more).out == more.kept_bytes + disk(more).second
    whole = counted(worked(folder, RECIPES["rank"], streamed=False))
    assert all(whole[stage] > size for stage, size in plain.items() if stage in ("solving", "passing on", "saving"))


GRIDS = ({}, {"values": "int3", "pattern": "dense"}, {"values": "int4", "factors": "model", "group": 16})


@pytest.mark.parametrize("changes", few_of(GRIDS, GRIDS[0], GRIDS[2]))
@pytest.mark.parametrize("family", few_of(["llama", "opt", "mixtral", "gemma2", "mamba2"], "mixtral"))
def test_what_is_foreseen_as_trained_is_what_is_trained(family, changes, tmp_path):
    save_tiny(family, tmp_path / "model")
    plain = Recipe(algorithm="eora", rank=2, pattern="2:4", **SIZES)
    recipe = plain.changed(match=True, match_preset="blocks", **changes)
    model = open_model(str(tmp_path / "model")).model
    work = worked(tmp_path / "model", recipe)
    sparlow.compress(model, plain.changed(**changes), inplace=True, force=True, **windows(recipe))
    for block, known in zip(Decoder.of(model).blocks, work.blocks, strict=True):
        with packed(block):
            assert sum(p.numel() for p in trained_parameters(block)) == known.trained


def test_seconds_follow_from_what_was_measured(folder):
    work = worked(folder, RECIPES["rank"])
    speed = Speed(products=1e9, memory=1e9, hashing=1e9)
    spent = seconds(work, speed, Solver(product=1e-6, gram=0, entry=0, call=0, largest=64))
    steps = sum(out * features**2 for (out, features), _ in work.kinds)
    assert spent["solve"] == pytest.approx(1e-6 * steps)
    shared = seconds(work, speed, Solver(product=0, gram=1e-6, entry=0, call=0, largest=64))
    inputs = sum(features**3 for block in work.blocks for features in block.inputs.values())
    assert shared["solve"] == pytest.approx(1e-6 * inputs)
    twice = worked(folder, RECIPES["rank"].changed(samples=8))
    solver = Solver(product=1e-6, gram=0, entry=0, call=0, largest=64)
    loading = seconds(worked(folder, RECIPES["rank"], streamed=False), speed, solver)["walk"]
    assert seconds(replace(twice, streamed=False), speed, solver)["walk"] == pytest.approx(2 * loading)
    assert spent["total"] == pytest.approx(sum(value for stage, value in spent.items() if stage != "total"))


def test_experts_are_counted_by_the_tokens_that_reach_them(tmp_path, monkeypatch):
    save_tiny("mixtral", tmp_path)  # two of four experts for each token
    work = worked(tmp_path, RECIPES["rank"])
    up, down = 4 * 96 * 32, 4 * 48 * 32
    for block in work.blocks:
        assert block.parameters - block.passed == (up + down) // 2
        shares = {layer.name: layer.share for layer in block.layers}
        assert all(share == (0.5 if ".experts." in name else 1) for name, share in shares.items())
        (stage,) = block.stages
        assert stage.pools == {"mlp.experts.gate_up_proj": 32}
        assert stage.groups == [stage]
    behind = worked(tmp_path, RECIPES["rank"].changed(behind="layers")).blocks[0]
    assert [{layer.shown for layer in stage.layers} for stage in behind.stages[-2:]] == [
        {"mlp.experts.gate_up_proj.*"},
        {"mlp.experts.down_proj.*"},
    ]
    whole = counted(work)["Grams"]
    speed, solver = Speed(1e9, 1e15, 1e9), Solver(product=0, gram=0, entry=0, call=0, largest=64)
    walk = seconds(work, speed, solver)["walk"]
    monkeypatch.setattr(fused_groups, "TOGETHER", 1)
    assert [len(group.layers) for group in work.blocks[0].stages[0].groups] == [6, 2, 2, 2]
    assert counted(work)["Grams"] < whole
    assert seconds(work, speed, solver)["walk"] > 1.5 * walk
    found = sparlow.plan(tmp_path, RECIPES["rank"], timed=False)
    said = [note for note in found.notes if note.startswith("An expert of mlp.experts.gate_up_proj sees")]
    assert found.notes.count(said[0]) == len(said) == 1
    assert f" {work.tokens // 2:,} of the {work.tokens:,} calibration tokens (50.00%) if all see as many" in said[0]
    assert f" {work.tokens / 64:.2g} for each feature of its input" in said[0]
    assert {kind.name: kind.count for kind in found.layers if "experts" in kind.name} == {
        "mlp.experts.gate_up_proj.*": 12,
        "mlp.experts.down_proj.*": 12,
    }


def test_how_many_experts_a_token_goes_to_may_be_said_in_a_config_of_their_own(tmp_path):
    save_tiny("dbrx", tmp_path)
    layers = worked(tmp_path, RECIPES["rank"]).blocks[0].layers
    assert {layer.share for layer in layers if layer.role} == {2 / 12}
    assert {layer.share for layer in layers if not layer.role} == {1}


def test_layers_behind_each_other_take_more_passes_and_fewer_grams_at_a_time(tmp_path):
    save_tiny("llama", tmp_path)
    recipe = RECIPES["rank"].changed(samples=64)
    plain, behind = (worked(tmp_path, recipe.changed(behind=behind)) for behind in ("blocks", "layers"))
    assert [len(block.stages) for work in (plain, behind) for block in work.blocks] == [1, 1, 1, 4, 4, 4]
    assert [stage.inputs for stage in behind.blocks[0].stages] == [
        {"self_attn.q_proj": 32},
        {"self_attn.o_proj": 32},
        {"mlp.gate_proj": 32},
        {"mlp.down_proj": 48},
    ]
    assert behind.blocks[0].inputs == plain.blocks[0].inputs
    assert counted(behind)["Grams"] < counted(plain)["Grams"]
    assert counted(behind)["solving"] <= counted(plain)["solving"]
    speed, solver = (
        Speed(products=1e9, memory=1e15, hashing=1e9),
        Solver(product=0, gram=0, entry=0, call=0, largest=64),
    )
    before, after = (seconds(work, speed, solver) for work in (plain, behind))
    assert {stage for stage in before if before[stage] != after[stage]} == {"walk", "total"}
    attention, mlp = 32 * (32 + 16 + 16 + 32), 3 * 32 * 48
    rank = 3 * (2 * (32 + 32) + 2 * (32 + 16)), 3 * 2 * (32 + 48)
    passed = [32 * 64 + rank[0] - 3 * 64, attention + rank[0], attention + rank[0] + mlp * 2 // 3 + rank[1]]
    looks = behind.batch * (behind.blocks[0].parameters + 16 * 32) + sum(64 * 16 * (n + 16 * 32) for n in passed)
    more = 2 * (looks - 64 * 16 * (behind.blocks[0].parameters + 16 * 32)) / 1e9
    assert after["walk"] - before["walk"] == pytest.approx(3 * more, rel=1e-6)


def test_a_number_says_from_which_size_on_the_algorithm_is_tried(folder, monkeypatch):
    tried, one = [], foreseen(folder, Recipe(**QUICK))
    count = sum(kind.parameters for kind in one.layers)

    def planned(*_, timed):
        tried.append(timed)
        return one

    monkeypatch.setattr(sys.modules["sparlow.planning.plan"], "_planned", planned)
    for timed in (count, count + 1, True, False):
        sparlow.plan(folder, Recipe(**QUICK), timed=timed)
    assert tried == [True, False, True, False]


@pytest.mark.slow
def test_the_choices_are_sorted_say_what_fits_and_have_the_bytes_that_are_written(folder):
    every = foreseen(folder, Recipe(**QUICK)).choices
    assert len(every) > 2
    assert all(choice.fits is None for choice in every)
    assert [choice.bytes for choice in every] == sorted(choice.bytes for choice in every)
    for choice in every:
        alone = foreseen(folder, Recipe(**{**QUICK, **choice.recipe}))
        assert alone.bytes["compressed"] == choice.bytes
        assert alone.bits_per_weight == pytest.approx(choice.bits)
        assert "sparlow" in choice.opened_by
    within = foreseen(folder, Recipe(size=f"{every[-2].bytes}B", **QUICK)).choices
    assert [choice.fits for choice in within] == [choice.bytes <= every[-2].bytes for choice in every]
    assert {choice.fits for choice in within} == {True, False}


@pytest.mark.parametrize("asking", ["plan", "compare", "estimate"])
def test_a_model_is_run_without_weights_once_however_many_recipes_and_forms_there_are(
    asking, folder, tmp_path, monkeypatch
):
    counted = Counter()
    for name in ("kept_dense", "inputs_of"):
        real = getattr(planning, name)
        monkeypatch.setattr(planning, name, lambda *a, real=real, name=name: counted.update([name]) or real(*a))
    monkeypatch.setattr(feasibility, "known_ahead", feasibility.known_ahead.__wrapped__)  # not as in conftest.py
    recipes = {str(n): Recipe(algorithm="magnitude", pattern=f"{n}:4", **SIZES) for n in (1, 2, 3)}
    options = RunOptions("cpu", evaluate=())
    if asking == "plan":
        assert len(foreseen(folder, RECIPES["rank"]).choices) > 1
    elif asking == "compare":
        require_feasible(folder, {tmp_path / name: recipe for name, recipe in recipes.items()}, options)
    else:
        assert len(foresee(folder, recipes, out=tmp_path, options=options).seconds) == len(recipes)
    assert counted == {"kept_dense": 1, "inputs_of": 1}


def test_forms_that_a_model_cannot_take_are_named_with_the_reason(folder):
    """A method without a low-rank part has none of the forms with one; every form is either listed or left out."""
    pruner = {"algorithm": "magnitude", **SIZES}
    found = foreseen(folder, Recipe(**pruner))
    names = [name for left in found.left_out for name in left.names]
    assert sorted([*names, *(choice.name for choice in found.choices)]) == sorted(f["name"] for f in measured()["form"])
    assert names
    for left in found.left_out:
        rows = [row for row in measured()["form"] if row["name"] in left.names]
        for row in rows:
            with pytest.raises(sparlow.InputError, match=re.escape(left.why)):
                foreseen(folder, Recipe(**{**pruner, **row["recipe"]}))


def test_every_measured_form_is_a_recipe_and_the_figures_name_their_origin():
    about = measured()
    assert about["model"]
    assert "--evaluate" in about["command"]
    names = [row["name"] for row in about["form"]]
    assert len(set(names)) == len(names)
    for row in about["form"]:
        Recipe(**row["recipe"])
        assert row["perplexity"] == 0 or row["perplexity"] >= about["dense"]
        assert row["speed"]


def test_every_form_is_served_by_the_plug_in_and_a_mixture_by_none(folder, tmp_path):
    for grid in (make_grid("int4", "integer"), make_grid("int4", "half"), make_grid("int3", "book"), None):
        assert opened_by(grid)[:2] == ("sparlow", "vLLM with sparlow installed")
        assert opened_by(grid)[-1] == "any program at full size (merged)"
        assert opened_by(grid, served=False) == tuple(one for one in opened_by(grid) if "with sparlow" not in one)
    assert [one.split(" (")[-1] for one in opened_by(make_grid("int4", "integer"))[2:]] == [
        *("compressed-tensors)", "gguf)", "merged)")
    ]
    assert len(opened_by(make_grid("int4", "half"))) == 4
    assert len(opened_by(make_grid("int3", "book"))) == len(opened_by(None)) == 3
    assert all("vLLM with sparlow installed" in one.opened_by for one in foreseen(folder, Recipe(**QUICK)).choices)
    save_tiny("mixtral", tmp_path)
    mixture = foreseen(tmp_path, Recipe(**QUICK)).choices
    assert mixture
    assert not any("vLLM with sparlow installed" in one.opened_by for one in mixture)
