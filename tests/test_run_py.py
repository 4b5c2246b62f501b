"""The paper's command line: every documented argument, its four commands, and the errors."""

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

import sparlow
from families import save_tiny
from sparlow.algorithms import find
from sparlow.cli import commands
from sparlow.model.artefact.layers import compressed_layers
from sparlow.recipe.recipe import Recipe
from sparlow.run.output_dir import NAME

ROOT = Path(__file__).parents[1]
TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(600))
COMMANDS = {  # as the paper's README has them, model and output directory left out
    "3basil 50 % + 128, matching": """--do_eval --per_device_eval_batch_size 8 --compression_alg 3basil
        --compression_ratio 0.5 --prunen 0 --prunem 0 --rank_ratio -1 --lora_num_ranks 128
        --enable_transformer_matching True --seqlen 2048 --nsamples 128 --percdamp 0.005 --hess_diag True
        --hess_percdamp 0.005 --seed 42 --n_iters_oats_hassle_free 40""",
    "3basil 70 % + 128": """--do_eval --per_device_eval_batch_size 8 --compression_alg 3basil
        --compression_ratio 0.7 --prunen 0 --prunem 0 --rank_ratio -1 --lora_num_ranks 128
        --enable_transformer_matching False --seqlen 2048 --nsamples 128 --percdamp 0.005 --hess_diag True
        --hess_percdamp 0.005 --seed 42 --n_iters_oats_hassle_free 40""",
    "3basil 70 % + 64, OWL, matching": """--do_eval --per_device_eval_batch_size 8 --compression_alg 3basil
        --compression_ratio 0.7 --prunen 0 --prunem 0 --rank_ratio -1 --lora_num_ranks 64 --enable_owl_deltas True
        --enable_transformer_matching True --seqlen 2048 --nsamples 128 --percdamp 0.005 --hess_diag True
        --hess_percdamp 0.005 --seed 42 --n_iters_oats_hassle_free 40""",
    "sparsegpt 2:4, matching": """--do_eval --per_device_eval_batch_size 8 --compression_alg sparsegpt
        --prunen 2 --prunem 4 --compression_ratio -1 --rank_ratio -1 --enable_transformer_matching True
        --seqlen 2048 --nsamples 128 --percdamp 0.005 --hess_diag True --hess_percdamp 0.005 --seed 42""",
}
MATCHED = {"match": True, "match_preset": "paper", "match_epochs": 20, "match_lr": 2e-5, "match_batch": 8}
KEPT = {"embedding": "keep", "head": "keep"}
COMMON = {
    **KEPT,
    "bos": "never",
    "samples": 128,
    "seqlen": 2048,
    "seed": 42,
    "damping": 0.005,
    "relative_damping": 0.005,
}
RECIPES = {
    "3basil 50 % + 128, matching": Recipe(pattern="0.5", rank=128, **COMMON, **MATCHED),
    "3basil 70 % + 128": Recipe(pattern="0.7", rank=128, **COMMON),
    "3basil 70 % + 64, OWL, matching": Recipe(pattern="0.7", rank=64, allocate="owl", **COMMON, **MATCHED),
    "sparsegpt 2:4, matching": Recipe(algorithm="sparsegpt", pattern="2:4", **COMMON, **MATCHED),
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("paper_run", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    save_tiny("llama", place / "model")
    (place / "text.txt").write_text(TEXT)
    return place


def recipe_of(script, words, *more):
    required = ["--model_name_or_path", "model", "--output_dir", "out"]
    return script.recipe_of(script._parser().parse_args([*required, *shlex.split(words), *more]))


PRUNED = "--compression_alg wanda --compression_ratio 0.5 --lora_num_ranks 9"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (COMMANDS["3basil 50 % + 128, matching"], ["n_iters_oats_hassle_free"]),
        (COMMANDS["sparsegpt 2:4, matching"], []),
        ("--prunen 2 --prunem 4 --compression_ratio 0.5", ["compression_ratio"]),
        ("--prunen 2 --prunem 4 --compression_ratio 0.5 --rank_ratio 0.2", []),
        ("--compression_ratio 0.5 --rank_ratio 0.2 --lora_num_ranks 9", ["lora_num_ranks"]),
        (f"{PRUNED} --rank_ratio 0.2", ["rank_ratio", "lora_num_ranks"]),
        (f"{PRUNED} --do_train", []),
        ("--prunen 2 --prunem 4 --enable_owl_deltas True", ["enable_owl_deltas"]),
        ("--compression_ratio 0.5 --hess_percdamp 0.1", ["hess_percdamp"]),
        ("--compression_ratio 0.5 --enable_transformer_matching False --lr_init 1e-3", ["lr_init"]),
        ("--compression_ratio 0.5 --limit 3 --train_steps 5", ["train_steps", "limit"]),
        ("--compression_alg dense --do_eval --nsamples 5 --seqlen 64", ["nsamples"]),
    ],
)
def test_arguments_without_effect_are_told_in_one_line(script, words, said):
    args = script._parser().parse_args(["--model_name_or_path", "m", "--output_dir", "o", *shlex.split(words)])
    assert sorted(script.without_effect(args)) == sorted(said)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_of_the_paper_word_for_word(script, name):
    assert recipe_of(script, COMMANDS[name]) == RECIPES[name]


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("--compression_ratio 0.6", {"pattern": "0.6"}),
        ("--prunen 4 --prunem 8", {"pattern": "4:8"}),
        ("--prunen 2 --prunem 8 --lora_num_ranks 3", {"pattern": "2:8", "rank": 3}),
        ("--rank_ratio 0.2", {"pattern": None, "rank": None, "compression": 0.5, "rank_share": 0.2}),
        (
            "--prunen 2 --prunem 4 --rank_ratio 0.2 --compression_ratio 0.4",
            {"pattern": "2:4", "rank": None, "compression": 0.4},
        ),
        ("--lora_num_ranks 7", {"rank": 7}),
        ("--enable_transformer_matching False", {name: getattr(Recipe(), name) for name in MATCHED}),
        ("--chunk_size 4", {"match_batch": 4}),
        ("--n_iters 3", {"match_epochs": 3}),
        ("--lr_init 1e-3", {"match_lr": 1e-3}),
        ("--enable_owl_deltas True", {"allocate": "owl"}),
        ("--enable_owl_deltas True --prunen 2 --prunem 4", {"pattern": "2:4"}),  # not possible with N:M
        ("--nsamples 5", {"samples": 5}),
        ("--seqlen 64", {"seqlen": 64}),
        ("--calibration_dataset ptb", {"calibration": "ptb"}),
        ("--percdamp 0.3", {"damping": 0.3}),
        ("--hess_diag True", {"relative_damping": 0.005}),
        ("--hess_diag True --hess_percdamp 0.2", {"relative_damping": 0.2}),
        ("--hess_percdamp 0.2", {}),  # without --hess_diag of no effect
        ("--seed 1", {"seed": 1}),
        ("--compression_alg oats", {"algorithm": "oats", "options": {"rounds": 80}}),
        (
            "--compression_alg hassle-free-alps --n_iters_oats_hassle_free 40",
            {"algorithm": "hassle-free-alps", "options": {"rounds": 40}},
        ),
        ("--n_iters_oats_hassle_free 40", {}),
        ("--compression_alg wanda", {"algorithm": "wanda", "rank": None}),
        ("--compression_alg wanda --rank_ratio 0.2", {"algorithm": "wanda", "rank": None}),
    ],
)
def test_what_an_argument_stands_for(script, words, changes):
    base = {
        **KEPT,
        "bos": "never",
        "pattern": "0.5",
        "rank": 64,
        "seed": 42,
        "damping": 0.01,
        "relative_damping": 0.0,
        **MATCHED,
    }
    assert recipe_of(script, "--compression_ratio 0.5 " + words) == Recipe(**(base | changes))


def test_every_documented_argument_is_there(script):
    documented = [
        "model_name_or_path",
        "output_dir",
        "do_eval",
        "do_train",
        "per_device_eval_batch_size",
        "compression_alg",
        "compression_ratio",
        "prunen",
        "prunem",
        "rank_ratio",
        "lora_num_ranks",
        "enable_transformer_matching",
        "seqlen",
        "nsamples",
        "calibration_dataset",
        "percdamp",
        "hess_diag",
        "hess_percdamp",
        "seed",
        "n_iters_oats_hassle_free",
        "chunk_size",
        "n_iters",
        "lr_init",
        "enable_owl_deltas",
        "dataset_name",
    ]
    assert set(documented) == {a.name for a in script.ARGUMENTS} | {"do_eval", "do_train"}
    for name in script.ALGORITHMS:
        assert name == "dense" or find(name)


@pytest.mark.parametrize("name", RECIPES)
def test_the_printed_command_stands_for_the_same_recipe(script, name, monkeypatch, tmp_path):
    seen, model = [], tmp_path / "a model"
    model.mkdir()
    (model / "config.json").write_text("{}")

    class Enough(Exception):  # noqa: N818 - stops the command once it knows what to do
        pass

    def noted(_, recipe, **__):
        seen.append(recipe)
        raise Enough

    monkeypatch.setattr("sparlow.run.compress.compress", noted)
    words = script.command_of(str(model), "out", RECIPES[name])
    with pytest.raises(Enough):
        commands.main(shlex.split(shlex.join(words))[1:])
    assert seen == [RECIPES[name]]


def small(place, out, words, *more):
    """One of the paper's commands on a tiny model and local text."""
    text = str(place / "text.txt")
    return [
        *("--model_name_or_path", str(place / "model"), "--output_dir", str(out)),
        *shlex.split(words),
        *("--nsamples", "4", "--seqlen", "16", "--calibration_dataset", text, "--eval_datasets", text),
        *("--eval_tasks", "", "--n_iters", "1", *more),
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_of_the_paper_on_a_tiny_model(script, name, place, tmp_path, capsys):
    words = COMMANDS[name].replace("--lora_num_ranks 128", "--lora_num_ranks 4").replace("ranks 64", "ranks 2")
    assert script.main(small(place, tmp_path / "out", words)) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["perplexity"].keys() == {str(place / "text.txt")}
    state = json.loads((tmp_path / "out" / NAME).read_text())
    assert state["finished"]
    assert bool(state["blocks"][0]["matching"]) == ("matching True" in words.replace("_matching", " matching"))
    assert "sparlow compress" in capsys.readouterr().out
    assert sparlow.load(tmp_path / "out")


def test_dense_is_only_measured(script, place, tmp_path):
    words = "--compression_alg dense --do_eval"
    assert script.main(small(place, tmp_path / "out", words)) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--compression_alg 3basil", "Give --compression_ratio, or --prunen and --prunem"),
        ("--prunen 2", "Only one of"),
        ("--prunen 2 --prunem 5", "Pattern 2:5"),
        ("--compression_ratio 1.5", "sparsity of 1.5"),
        ("--compression_alg dense --do_train", "Choose another --compression_alg"),
    ],
)
def test_bad_input_is_one_sentence(script, words, said, place, tmp_path, capsys):
    assert script.main(small(place, tmp_path / "out", words)) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_a_finished_result_is_replaced_only_if_asked_for(script, place, tmp_path, capsys):
    words = "--compression_alg wanda --compression_ratio 0.5 --enable_transformer_matching False"
    arguments = small(place, tmp_path / "out", words)
    assert script.main(arguments) == 0
    assert script.main(arguments) == 2
    assert "finished result" in capsys.readouterr().err
    assert script.main([*arguments, "--overwrite_output_dir"]) == 0


@pytest.mark.parametrize("algorithm", ["wanda", "3basil"])
def test_fine_tuning_goes_on_from_what_was_compressed(script, algorithm, place, tmp_path):
    words = f"--compression_alg {algorithm} --compression_ratio 0.5 --lora_num_ranks 2 --do_train --do_eval"
    more = ["--dataset_name", str(place / "text.txt"), "--train_steps", "1", "--block_size", "16"]
    assert script.main(small(place, tmp_path / "out", words, *more)) == 0
    tuned = sparlow.load(tmp_path / "out-finetuned")
    assert {layer.rank for layer in compressed_layers(tuned).values()} == {2}
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["model"] == str(tmp_path / "out-finetuned")


def test_a_wrong_task_is_noticed_before_anything_is_compressed(script, place, tmp_path, capsys):
    words = "--compression_alg wanda --compression_ratio 0.5 --do_eval"
    (tmp_path / "empty").mkdir()
    more = ["--eval_tasks", "piqa", "--task_path", str(tmp_path / "empty")]
    assert script.main(small(place, tmp_path / "out", words, *more)) == 2
    assert "holds no task file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
