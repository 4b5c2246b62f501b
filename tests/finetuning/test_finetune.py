import gc
import importlib.util
import json
import math
import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import sparlow
from coded import write_in_codes
from families import save_tiny, tiny, tiny_tokenizer
from results import write_result
from sparlow.cli.commands import main
from sparlow.errors import InputError, RunError
from sparlow.evaluation.perplexity import perplexity
from sparlow.exporting.export import MARK
from sparlow.exporting.lora import require_base_and_adapter
from sparlow.exporting.stored import Stored
from sparlow.files import CONFIG
from sparlow.finetuning.finetune import Parent
from sparlow.model.artefact.describe import changed_sparse_parts, describe
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading.source import open_model, upcast_for_cpu
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import Report
from sparlow.run.output_dir import NAME
from sparlow.run.verify import verify_artefact
from sparlow.text import evaluation_windows, training_windows

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from sparlow.finetuning.options import FinetuneOptions  # noqa: E402
from sparlow.finetuning.trainer import STAGE  # noqa: E402
from sparlow.model.artefact import peft_adapter  # noqa: E402 - after what they need is known to be there

SEQLEN = 16
# Words that follow each other in a fixed order: there is something to learn.
TEXT = "the sparse part stays and the low rank part learns what was lost. " * 8
QUICK = {"effort": 0.1, "max_steps": 4}
MIXED = ({"match": "q_proj", "rank": 2}, {"match": "k_proj", "rank": 0})  # beside rank 4
OPTIONS = {"steps": 3, "lr": 5e-3, "block_size": SEQLEN, "batch": 2, "accumulate": 1}
STEPS = 12  # of the run that is killed: with 4 windows each they cross the end of the text


# Function at step 0


def compressed(family, ranks):
    """A tiny model of random 2:4 and low-rank parts, the ranks in turn."""
    model = tiny(family)
    generator = torch.Generator().manual_seed(1)
    for i, (_, weight) in enumerate(list(Decoder.of(model).layers())):
        W = weight.read()
        S = W.masked_fill(torch.arange(W.numel()).view_as(W) % 4 < 2, 0)
        r = ranks[i % len(ranks)]
        U, V = (torch.randn(shape, generator=generator) / 9 for shape in ((len(W), r), (r, W.shape[1])))
        weight.put(SparseLowRankLinear(S, U, V, weight.bias))
    return model


@pytest.mark.parametrize(
    ("family", "ranks"),
    [
        ("llama", (4,)),
        ("llama", (1, 5, 0, 3)),
        ("opt", (3, 2)),
        ("gpt_neox", (2, 0)),
        ("falcon", (1, 32)),
        ("phi3", (7, 3)),
        ("gpt2", (4, 2)),
    ],
)
@torch.no_grad()
def test_the_function_is_unchanged_at_step_0(family, ranks):
    model = compressed(family, ranks)
    ids = torch.randint(2, 97, (2, SEQLEN), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    own = {
        name: (layer.S.clone(), layer.U.clone(), layer.V.clone()) for name, layer in compressed_layers(model).items()
    }
    parts = peft_adapter.take_apart(model)
    trained = {name: len(part.V) for name, part in parts.items() if len(part.V)}
    wrapped = peft_adapter.with_lora(model, {name: parts[name] for name in trained}, trained, seed=0)
    found = wrapped(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    # the parts themselves are not rounded, and nothing else can be trained
    for name in trained:
        layer = wrapped.get_base_model().get_submodule(name)
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        assert layer.scaling["default"] == 1
        for mine, theirs in zip((layer.base_layer.weight, B, A), own[name], strict=True):
            assert torch.equal(mine, theirs)
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(trained)
    assert all("lora_" in name for name in trainable)
    # and back
    model, after = peft_adapter.unwrap(wrapped, torch.float32)
    peft_adapter.put_together(model, parts | after)
    assert torch.equal(model(ids).logits, expected)
    for name, layer in compressed_layers(model).items():
        assert all(map(torch.equal, (layer.S, layer.U, layer.V), own[name]))


def test_a_fresh_adapter_adds_nothing_and_depends_on_the_seed_alone():
    ids = torch.randint(2, 97, (2, SEQLEN), generator=torch.Generator().manual_seed(0))
    starts = []
    for seed in (3, 3, 4):
        model = compressed("llama", (0,))
        with torch.no_grad():
            expected = model(ids).logits
            ranks = dict.fromkeys(peft_adapter.take_apart(model), 5)
            wrapped = peft_adapter.with_lora(model, {}, ranks, seed)
            assert torch.allclose(wrapped(ids).logits, expected, atol=1e-5)
        starts.append(peft_adapter.unwrap(wrapped, torch.float32)[1])
        torch.rand(1)  # what was drawn before must not matter
    name = next(iter(ranks))
    assert torch.equal(starts[0][name].V, starts[1][name].V)
    assert not torch.equal(starts[0][name].V, starts[2][name].V)


# A whole run


@pytest.fixture(scope="module", autouse=True)
def _little_garbage():
    """Trainer collects garbage at every start, which takes half a second beside all that is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A text, a model of mixed ranks and one that is only pruned; for reading only."""
    place = tmp_path_factory.mktemp("place")
    text = str(place / "text.txt")
    (place / "text.txt").write_text(TEXT)
    save_tiny("llama", place / "model")
    recipe = Recipe(rank=4, options=QUICK, samples=8, seqlen=SEQLEN, layers=MIXED, calibration=text)
    sparlow.compress(place / "model", recipe, out=place / "mixed", evaluate=(text,))
    save_tiny("opt", place / "half", dtype=torch.bfloat16)  # it has biases
    pruned = Recipe(algorithm="wanda", samples=8, seqlen=SEQLEN, calibration=text)
    sparlow.compress(place / "half", pruned, out=place / "pruned", evaluate=(text,))
    return place


def tune(place, name, out, **options):
    text = str(place / "text.txt")
    return sparlow.finetune(place / name, out, **{"dataset": text, "evaluate": (text,), **OPTIONS, **options})


@pytest.fixture(scope="module")
def tuned(place, tmp_path_factory):
    """A finished run with its adapter: directory, folder of the adapter, report, steps seen."""
    out = tmp_path_factory.mktemp("tuned")
    seen = []
    report = tune(place, "mixed", out / "out", steps=20, peft=out / "peft", notify=seen.append)
    return out / "out", out / "peft", report, seen


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - not a dict
    return found


def test_only_u_and_v_change(place, tuned):
    before, after = tensors(place / "mixed"), tensors(tuned[0])
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = torch.equal(tensor, after[name])
        assert same == (not name.endswith((".U", ".V")) or tensor.numel() == 0), name
    assert changed_sparse_parts(place / "mixed", tuned[0]) == []


def test_the_loss_falls_and_so_does_perplexity(tuned):
    _, _, report, seen = tuned
    loss = report.finetuning["loss"]
    assert len(loss) == 20
    assert sum(loss[-5:]) < 0.9 * sum(loss[:5])
    (before,), (after,) = (report.finetuning["perplexity"][when].values() for when in ("before", "after"))
    assert after < 0.7 * before
    assert before == next(iter(report.compressed["perplexity"].values()))
    assert [step.done for step in seen if step.stage == STAGE] == list(range(1, 21))


def test_the_result_is_an_artefact_like_any_other(place, tuned, capsys):
    out, _, report, _ = tuned
    assert verify_artefact(out) == []
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(out), "--verify"])
    assert not stop.value.code
    assert "verified" in capsys.readouterr().out
    assert {layer.name: (layer.kept, layer.rank) for layer in describe(out)} == {
        layer.name: (layer.kept, layer.rank) for layer in describe(place / "mixed")
    }
    assert (out / "config.json").read_text() == (place / "mixed" / "config.json").read_text()
    assert not (out / "checkpoints").exists()
    text = next(iter(report.finetuning["perplexity"]["after"]))
    windows = evaluation_windows(text, tiny_tokenizer(), seqlen=SEQLEN)
    assert perplexity(sparlow.load(out), windows).value == pytest.approx(report.finetuning["perplexity"]["after"][text])


@pytest.mark.parametrize(
    ("dtype", "lr", "undone"), [("bfloat16", 1e-7, 1), ("bfloat16", 1e-1, 0), ("float32", 1e-7, 0)]
)
def test_training_that_rounding_undid_is_told(dtype, lr, undone, place, tmp_path):
    save_tiny("llama", tmp_path / "model", dtype=getattr(torch, dtype))
    recipe = Recipe(rank=4, options=QUICK, samples=8, seqlen=SEQLEN, calibration=str(place / "text.txt"))
    sparlow.compress(tmp_path / "model", recipe, out=tmp_path / "start", evaluate=())
    text = str(place / "text.txt")
    options = OPTIONS | {"lr": lr, "steps": 2}
    report = sparlow.finetune(tmp_path / "start", tmp_path / "out", dataset=text, evaluate=(), **options)
    found = [warning for warning in report.warnings if "undid the training" in warning]
    assert len(found) == undone
    assert all("rounding to bfloat16" in warning and "--lr" in warning for warning in found)


def test_the_report_keeps_that_of_compression(place, tuned):
    old, new = Report.from_file(place / "mixed" / "report.json"), Report.from_file(tuned[0] / "report.json")
    for name in ("recipe", "dense", "compressed", "bytes", "values", "bits_per_weight", "layers", "not_compressed"):
        assert getattr(old, name) == getattr(new, name), name
    assert old.finetuning == {}
    assert new.finetuning == json.loads(json.dumps(tuned[2].finetuning))
    assert "Fine-tuning" in (tuned[0] / "report.html").read_text()
    state = json.loads((tuned[0] / NAME).read_text())
    assert state["fingerprint"]["parent"] == new.finetuning["parent_fingerprint"]
    assert state["fingerprint"]["finetuning"]["steps"] == 20


def test_the_adapter_opens_with_peft_alone(tuned, monkeypatch):
    out, folder, _, _ = tuned
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert not compressed_layers(base)
    ids = torch.randint(2, 97, (2, SEQLEN), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = sparlow.load(out)(ids).logits
        assert not torch.allclose(base(ids).logits, expected, atol=1e-2)
        assert torch.allclose(peft.PeftModel.from_pretrained(base, folder)(ids).logits, expected, atol=1e-5)
        assert torch.allclose(sparlow.open_adapter(folder)(ids).logits, expected, atol=1e-5)
        monkeypatch.chdir(folder)  # the base is named by a path inside
        assert torch.allclose(peft.AutoPeftModelForCausalLM.from_pretrained(".")(ids).logits, expected, atol=1e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (8, 8, {}, {})


def test_the_adapter_is_the_one_that_export_writes_of_the_result(tuned, tmp_path):
    out, folder, _, _ = tuned
    sparlow.export(out, tmp_path / "lora", form="lora")
    (tmp_path / "lora" / MARK).unlink()
    files, exported = (
        {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        for top in (folder, tmp_path / "lora")
    )
    assert files == exported
    assert json.loads(files[f"base/{CONFIG}"])["rope_theta"] == 10000.0  # for readers that know no newer name


def test_an_adapter_that_no_server_would_take_is_refused_before_training(place, tmp_path, monkeypatch):
    monkeypatch.setattr("sparlow.exporting.adapter.RANKS", (2,))
    with pytest.raises(sparlow.InputError, match=r"The largest rank is \d, .* Leave out --peft"):
        tune(place, "mixed", tmp_path / "out", peft=tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("mixtral", {}, "experts in one tensor, which an adapter has no compressed form of"),
        (
            "llama",
            {"auto_map": {"AutoModelForCausalLM": "own.Own"}},
            "Python code of its own, which export does not run",
        ),
    ],
)
def test_an_adapter_whose_base_no_other_program_would_open_is_refused_before_training(family, changes, why, tmp_path):
    write_result(tmp_path / "in", family)
    config = json.loads((tmp_path / "in" / CONFIG).read_text())
    (tmp_path / "in" / CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(sparlow.InputError, match=rf"{why}\. Leave out --peft\.$"):
        require_base_and_adapter(Stored(tmp_path / "in"), {}, "Leave out --peft.")


def test_the_adapter_and_its_base_have_the_mode_of_new_files(tuned, tmp_path):
    (tmp_path / "new").touch()
    wanted = (tmp_path / "new").stat().st_mode
    files = [path for folder in tuned[:2] for path in folder.rglob("*") if path.is_file()]
    assert {"adapter_model.safetensors", "config.json"} <= {path.name for path in files}
    assert {path.name: path.stat().st_mode for path in files if path.stat().st_mode != wanted} == {}


def test_a_model_of_transposed_weights_is_tuned_and_its_adapter_opens_with_peft_alone(place, tmp_path):
    text = str(place / "text.txt")
    save_tiny("gpt2", tmp_path / "model")
    recipe = Recipe(rank=4, options=QUICK, samples=8, seqlen=SEQLEN, calibration=text)
    sparlow.compress(tmp_path / "model", recipe, out=tmp_path / "mixed", evaluate=(text,))
    report = sparlow.finetune(
        tmp_path / "mixed", tmp_path / "out", dataset=text, evaluate=(text,), peft=tmp_path / "peft", **OPTIONS
    )
    assert report.finetuning["loss"]
    assert verify_artefact(tmp_path / "out") == []
    ids = torch.randint(2, 97, (2, SEQLEN), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = sparlow.load(tmp_path / "out")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "base")
        assert {type(m).__name__ for _, m in base.named_modules() if hasattr(m, "nf")} == {"Conv1D"}
        assert torch.allclose(peft.PeftModel.from_pretrained(base, tmp_path / "peft")(ids).logits, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_stay_what_they_are_to_the_byte_and_trained_factors_are_floats(dtype, place, tmp_path):
    text = str(place / "text.txt")
    save_tiny("llama", tmp_path / "model", dtype=dtype)
    recipe = Recipe(rank=4, pattern="2:4", options=QUICK, samples=8, seqlen=SEQLEN, layers=MIXED, calibration=text)
    sparlow.compress(tmp_path / "model", recipe, out=tmp_path / "start", evaluate=())
    write_in_codes(tmp_path / "start", [("int3", "2:4"), ("int4", "2:4")])
    options = {"dataset": text, "evaluate": (), "peft": tmp_path / "peft", **OPTIONS}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not on the grid")
        sparlow.finetune(tmp_path / "start", tmp_path / "out", **options)
    before, after = tensors(tmp_path / "start"), tensors(tmp_path / "out")
    for name, tensor in before.items():
        if name.endswith((".U", ".V")) and tensor.numel():
            assert (tensor.dtype, after[name].dtype) == (torch.int8, dtype), name
        elif name.endswith(("U_scale", "V_scale")):
            assert name not in after
        else:
            assert torch.equal(tensor, after[name]), name
    assert verify_artefact(tmp_path / "start") == verify_artefact(tmp_path / "out") == []
    opened = sparlow.load(tmp_path / "out")
    opened.save_pretrained(tmp_path / "again")
    assert all(torch.equal(t, tensors(tmp_path / "again")[name]) for name, t in after.items())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "base")
    embedding, own = (model.get_input_embeddings().weight for model in (base, opened))
    assert torch.equal(embedding, own)
    ids = torch.randint(2, 97, (2, SEQLEN), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (m(ids).logits for m in (opened, peft.PeftModel.from_pretrained(base, tmp_path / "peft")))
    assert (found - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.05) * expected.abs().max()


@pytest.fixture(scope="module")
def short(place, tuned, tmp_path_factory):
    """A short run that starts where another has ended: directory, report."""
    out = tmp_path_factory.mktemp("short") / "out"
    return out, tune(place, tuned[0], out)


def test_a_result_can_be_tuned_again(tuned, short):
    out, report = short
    assert report.finetuning["perplexity"]["before"] == tuned[2].finetuning["perplexity"]["after"]
    assert report.finetuning["parent"] == str(tuned[0])
    assert verify_artefact(out) == []


# Half precision, fresh adapters


def test_a_pruned_model_in_half_precision_gets_a_fresh_adapter(place, tmp_path, monkeypatch):
    from sparlow.finetuning import job as finetuning_job

    types = []
    train = finetuning_job.train

    def watched(wrapped, *args):
        types.extend({p.dtype for p in wrapped.parameters()})
        return train(wrapped, *args)

    monkeypatch.setattr(finetuning_job, "train", watched)
    report = tune(place, "pruned", tmp_path / "out")
    rank = 16
    assert types == [torch.float32]
    before, after = tensors(place / "pruned"), tensors(tmp_path / "out")
    for name, tensor in after.items():
        assert tensor.dtype == (torch.uint8 if name.endswith(".mask") else torch.bfloat16)
        if name.endswith((".U", ".V")):
            assert rank in tensor.shape
            assert tensor.any()
        else:
            assert torch.equal(tensor, before[name]), name
    assert {layer.rank for layer in describe(tmp_path / "out")} == {rank} == {layer.rank for layer in report.layers}
    assert verify_artefact(tmp_path / "out") == []
    # the report counts what the adapter adds
    stored = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert report.bytes["compressed"] == pytest.approx(stored, rel=0.2)
    added = 2 * report.finetuning["trainable"]
    old = Report.from_file(place / "pruned" / "report.json")
    assert report.bytes["linears_compressed"] == old.bytes["linears_compressed"] + added
    assert report.bits_per_weight > old.bits_per_weight


def test_the_rank_of_a_fresh_adapter(place):
    parent = Parent.read(place / "pruned")
    assert set(parent.ranks_to_train(None).values()) == {16}
    assert set(parent.ranks_to_train(3).values()) == {3}
    assert len(parent.ranks_to_train(3)) == len(parent.ranks)


@pytest.mark.parametrize(("option", "tolerance"), [("gradient_checkpointing", 1e-5), ("bf16", 0.02)])
def test_other_ways_to_compute(place, short, tmp_path, option, tolerance):
    out = tmp_path / "out"
    loss = tune(place, short[1].finetuning["parent"], out, evaluate=(), **{option: True}).finetuning["loss"]
    assert loss == pytest.approx(short[1].finetuning["loss"], rel=tolerance)
    assert changed_sparse_parts(short[0], out) == []
    assert (out / "config.json").read_text() == (place / "mixed" / "config.json").read_text()


def test_the_settings_of_a_process_and_of_accelerate_decide_nothing(place, short, tmp_path, monkeypatch):
    """As under `accelerate launch --mixed_precision bf16`, in a program of another default type."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    draws, environment = torch.get_rng_state(), dict(os.environ)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            report = tune(place, short[1].finetuning["parent"], tmp_path / "out", evaluate=())
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert report.finetuning["loss"] == short[1].finetuning["loss"]
    found, clean = tensors(tmp_path / "out"), tensors(short[0])
    assert all(torch.equal(found[name], clean[name]) for name in clean)
    assert torch.equal(torch.get_rng_state(), draws)
    assert {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE")} == {
        name: value for name, value in environment.items() if name.startswith("ACCELERATE")
    }


# A run that is killed


class KilledError(Exception):
    pass


def kill_at(number):
    def notify(step):
        if step.stage == STAGE and step.done == number:
            raise KilledError

    return notify


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return out, tune(place, "mixed", out, steps=STEPS, accumulate=2).finetuning["loss"]


def shards(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_random_generators_come_back():
    from sparlow.finetuning import safe_trainer

    def draw():
        return np.random.rand(3).tolist(), np.random.randn(1).tolist(), torch.rand(3).tolist()  # noqa: NPY002 - these

    found = safe_trainer._generators()
    expected = draw()
    safe_trainer._set_generators(found)
    assert draw() == expected


@pytest.mark.parametrize("when", [3, 12])
def test_a_killed_run_ends_as_it_would_have(place, undisturbed, tmp_path, when):
    out = tmp_path / "out"
    text = str(place / "text.txt")
    assert len(training_windows(text, tiny_tokenizer(), samples=99, seqlen=SEQLEN, seed=0)) < 4 * (STEPS - 2)
    with pytest.raises(KilledError):
        tune(place, "mixed", out, steps=STEPS, accumulate=2, notify=kill_at(when))
    assert not (out / "config.json").exists()
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert {path.suffix for path in checkpoint.iterdir()} <= {".safetensors", ".json", ".md"}  # no pickle
    (out / "checkpoints" / "checkpoint-12").mkdir()  # one that was being written by something else
    seen = []
    report = tune(place, "mixed", out, steps=STEPS, accumulate=2, notify=seen.append)
    first = (when - 1) // 2 * 2 + 1  # a checkpoint is written after every second step
    assert [step.done for step in seen if step.stage == STAGE] == list(range(first, STEPS + 1))
    assert shards(out) == shards(undisturbed[0])
    assert report.finetuning["loss"] == undisturbed[1]
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("threads", [None, 99])
def test_a_killed_run_that_goes_on_elsewhere_says_so(threads, place, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KilledError):
        tune(place, "mixed", out, steps=STEPS, accumulate=2, notify=kill_at(3))
    state = json.loads((out / "sparlow.json").read_text())
    state["machines"][0]["threads"] = threads or state["machines"][0]["threads"]
    (out / "sparlow.json").write_text(json.dumps(state))
    report = tune(place, "mixed", out, steps=STEPS, accumulate=2)
    assert sum("its bits may differ" in warning for warning in report.warnings) == (threads is not None)
    assert report.finetuning["machine"]["threads"] == torch.get_num_threads()


def test_a_run_that_is_killed_while_it_writes_trains_nothing_again(place, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def killed(*_):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("sparlow.model.artefact.checkpoint.CheckpointWriter.write_rest", killed)
        with pytest.raises(KilledError):
            tune(place, "mixed", out, steps=STEPS, accumulate=2, peft=tmp_path / "peft")
    seen = []
    report = tune(place, "mixed", out, steps=STEPS, accumulate=2, peft=tmp_path / "peft", notify=seen.append)
    assert not [step for step in seen if step.stage == STAGE]
    assert shards(out) == shards(undisturbed[0])
    assert report.finetuning["loss"] == undisturbed[1]
    assert verify_artefact(out) == []


def test_another_run_is_not_gone_on_with(place, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KilledError):
        tune(place, "mixed", out, notify=kill_at(2))
    with pytest.raises(InputError, match=r"differs in lr \(0.005 there, 0.1 now\)"):
        tune(place, "mixed", out, lr=0.1)
    with pytest.raises(InputError, match="holds another run"):  # not even compression's, which shares the recipe
        sparlow.compress(place / "model", Recipe.from_file(place / "mixed" / "recipe.toml"), out=out, evaluate=())
    tune(place, "mixed", out, lr=0.1, steps=1, overwrite=True)
    assert verify_artefact(out) == []


def test_a_step_that_ruins_the_model_ends_the_run(place, tmp_path):
    with pytest.raises(RunError, match=r"not finite at step 3\. Lower --lr"):
        tune(place, "mixed", tmp_path / "out", lr=1e30)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_sparse_part_that_changed_is_noticed(place, tmp_path):
    def spoil(step):
        if step.stage == "perplexity after":
            layer = next(iter(compressed_layers(model[0]).values()))
            with torch.no_grad():
                layer.S.view(-1)[layer.S.view(-1).nonzero()[0]] += 1

    model = []
    real = peft_adapter.put_together
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparlow.finetuning.job.put_together", lambda m, parts: (real(m, parts), model.append(m)))
        with pytest.raises(RunError, match="has changed"):
            tune(place, "mixed", tmp_path / "out", steps=1, notify=spoil)
    assert not (tmp_path / "out" / "config.json").exists()


# What cannot be


def run_and_fail(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


BAD = {
    "no such directory": (["{tmp}/none"], "There is no directory"),
    "a dense model": (["{place}/model"], "sparlow.json is missing"),
    "a rank beside U V": (["--rank", "3"], "Leave out --rank"),
    "a rank too high": (["{place}/pruned", "--rank", "33"], "from 1 to 32"),
    "a rank too low": (["{place}/pruned", "--rank", "0"], "from 1 to 32"),
    "no steps": (["--steps", "0"], "steps must be at least 1"),
    "no learning": (["--lr", "nan"], "lr must be above 0"),
    "a long block": (["--block-size", "65"], "Lower --block-size"),
    "little text": (["--dataset", "{place}/short.txt"], "Lower --block-size, or give more text"),
    "no text": (["--dataset", "wikitext"], "Did you mean 'wikitext2'"),
    "no evaluation text": (["--evaluate", "wikitext"], "Did you mean 'wikitext2'"),
    "a reporter": (["--report-to", "pigeons"], "'pigeons' is unknown or not installed. Give --report-to"),
    "itself": (["--out", "{place}/mixed", "--overwrite"], "would replace"),
    "its parent": (["--out", "{place}", "--overwrite"], "holds no run of sparlow"),
    "a foreign directory": (["--out", "{place}/model"], "holds no run of sparlow"),
    "a foreign adapter": (["--peft", "{place}/model", "--overwrite"], "holds no adapter of sparlow"),
    "an unknown error": (["--require", "relative_error<=1"], "does not measure the error of layers"),
    "an unknown dense model": (
        ["--evaluate", "{place}/short.txt", "--require", "perplexity<=+9%"],
        "which compress did not measure on",
    ),
    "a bound on nothing": (["--evaluate", "", "--require", "perplexity<=9"], "no text is measured"),
    "a bound on no result": (["{place}/model", "--require", "bits<=9"], "holds no result of sparlow"),
    "the adapter in its place": (["--peft", "{tmp}/out"], "a folder of its own"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_said_in_one_sentence(case, place, tmp_path, capsys):
    (place / "short.txt").write_text("short")
    given, expected = BAD[case]
    given = [word.format(place=place, tmp=tmp_path) for word in given]
    folder = [] if not given[0].startswith("--") else [place / "mixed"]
    text = place / "text.txt"
    sizes = ["--dataset", text, "--evaluate", text, "--block-size", SEQLEN, "--out", tmp_path / "out"]
    if folder:
        line = run_and_fail(capsys, "finetune", *folder, *sizes, *given)
    else:
        line = run_and_fail(capsys, "finetune", given[0], *sizes, *given[1:])
    assert expected in line
    assert not (tmp_path / "out").exists()


def test_a_finished_result_is_never_lost(place, tuned, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(tuned[0], out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    line = run_and_fail(capsys, "finetune", place / "mixed", "--out", out, "--dataset", place / "text.txt")
    assert "holds a finished result" in line
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_an_unfinished_result_is_not_tuned(place, tmp_path):
    shutil.copytree(place / "mixed", tmp_path / "part")
    state = json.loads((tmp_path / "part" / NAME).read_text())
    (tmp_path / "part" / NAME).write_text(json.dumps(state | {"finished": False}))
    with pytest.raises(InputError, match="unfinished run"):
        sparlow.finetune(tmp_path / "part", tmp_path / "out")


def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(InputError, match=r"pip install 'sparlow\[finetune\]'"):
        sparlow.finetune(tmp_path / "none", tmp_path / "out")


def test_an_adapter_of_another_run_stays(place, tuned, tmp_path):
    shutil.copytree(tuned[1], tmp_path / "peft")
    with pytest.raises(InputError, match="holds another adapter"):
        tune(place, "mixed", tmp_path / "out", peft=tmp_path / "peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"lr": math.inf}, {"lr": 0.0}, {"batch": 0}, {"accumulate": 0}, {"seed": -1}])
def test_a_plan_that_makes_no_sense(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        FinetuneOptions(**changes)


# The command line


def test_the_command_says_what_came_of_it(place, tmp_path, capsys):
    text = place / "text.txt"
    words = ["--dataset", text, "--evaluate", text, "--block-size", SEQLEN, "--batch", 2, "--accumulate", 1]
    arguments = ["finetune", place / "mixed", "--out", tmp_path / "out", *words, "--steps", 5, "--lr", "1e-3"]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in [*arguments, "--require", "bits<=32", "--require", "perplexity<0.5%"]])
    assert stop.value.code == 1  # which nothing keeps to; all is written before
    shown = capsys.readouterr()
    *lines, last = shown.err.splitlines()
    assert re.fullmatch(r"error: The result was written, and .*: perplexity on .* \(dense [\d.]+\), and .*", last)
    assert "bits" not in last
    assert [line.split(" (")[0] for line in lines[:-1]] == [f"{STAGE}: {i} of 5" for i in range(1, 6)]
    assert "loss" in lines[0]
    report = json.loads((tmp_path / "out" / "report.json").read_text())["finetuning"]
    for when in ("before", "after"):
        assert f"{report['perplexity'][when][str(text)]:.2f}" in shown.out
    assert "5 steps of 2 windows" in shown.out
    assert report["lr"] == 1e-3


# Chats

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def chatting(place, tmp_path_factory):
    """A result whose tokenizer has a chat template, and chats of several lengths; for reading only."""
    folder = tmp_path_factory.mktemp("chatting")
    shutil.copytree(place / "mixed", folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    turns = [("1+1", "2"), ("capital of Italy?", "Rome"), ("x", "yy"), ("a long question about nothing" * 3, "none")]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    rows[2] += [{"role": "user", "content": "z"}, {"role": "assistant", "content": "and a further answer, too long"}]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return folder


@torch.no_grad()
def loss_of_answers(model, folder, chats):
    """By hand, one chat at a time: the mean over the tokens of all answers."""
    tokenizer = open_model(str(folder)).tokenizer
    losses = []
    for chat in chats:
        text, said = "", []
        for role, content in chat:
            text, said = text + f"{role}:", said + [False] * len(f"{role}:")
            text, said = text + content, said + [role == "assistant"] * (len(content) + 1)
            text += "</s>"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])[:, :48]
        found = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        losses.append(found[torch.tensor(said)[1 : ids.shape[1]]])
    return torch.cat(losses).mean().item()


def test_of_chats_the_loss_is_that_of_the_answers(chatting, tmp_path):
    options = {"dataset": str(chatting / "chats.jsonl"), "block_size": 48, "batch": 4, "lr": 1e-9, "steps": 1}
    report = sparlow.finetune(chatting / "model", tmp_path / "out", evaluate=(), accumulate=1, **options)
    turns = (
        [("user", "1+1"), ("assistant", "2")],
        [("user", "capital of Italy?"), ("assistant", "Rome")],
        [("user", "x"), ("assistant", "yy"), ("user", "z"), ("assistant", "and a further answer, too long")],
    )
    expected = loss_of_answers(sparlow.load(chatting / "model"), chatting / "model", turns)
    assert report.finetuning["loss"] == [pytest.approx(expected, rel=1e-5)]
    # by hand: "2</s>", "Rome</s>", "yy</s>" and what 48 tokens leave of the last answer
    answers = 2 + 5 + 3 + (48 - len("user:x_assistant:yy_user:z_assistant:"))
    counts = report.finetuning["chats"]
    assert (counts["answer_tokens"], counts["left_out"]) == (answers, 1)
    assert any(warning.startswith("1 chats have no answer within") for warning in report.warnings)
    assert any("chats are longer than 48 tokens" in warning for warning in report.warnings)


def test_answers_are_learnt_and_questions_are_not(chatting, tmp_path, capsys):
    words = ["--dataset", chatting / "chats.jsonl", "--evaluate", "", "--block-size", 48, "--batch", 3]
    more = ["--accumulate", 1, "--steps", 12, "--lr", "2e-2", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in ["finetune", chatting / "model", *words, *more]])
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "12 steps of 3 chats" in shown
    assert "tokens of 3 chats" in shown
    turn = [("user", "capital of Italy?"), ("assistant", "Rome")]
    before, after = (
        loss_of_answers(sparlow.load(f), chatting / "model", [turn]) for f in (chatting / "model", tmp_path / "out")
    )
    assert after < 0.7 * before


def test_what_fine_tuning_refuses_of_chats(chatting, place, tmp_path):
    options = OPTIONS | {"dataset": str(chatting / "chats.jsonl"), "evaluate": ()}
    with pytest.raises(InputError, match="has no chat template"):
        sparlow.finetune(place / "mixed", tmp_path / "out", **options)
    with pytest.raises(InputError, match="--bos is for plain text"):
        sparlow.finetune(chatting / "model", tmp_path / "out", bos="never", **options)
    assert not (tmp_path / "out").exists()


# The benchmark


def test_the_benchmark_compares_with_a_fresh_adapter(place, tmp_path, monkeypatch):
    file = Path(__file__).parents[2] / "benchmarks" / "finetuning.py"
    if not file.exists():
        pytest.skip("the benchmarks are in the repository only")
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location("benchmark_of_finetuning", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(importlib.import_module("sys").modules, spec.name, module)
    spec.loader.exec_module(module)
    text = str(place / "text.txt")
    words = ["--dataset", text, "--text", text, "--steps", "4", "--points", "2", "--block-size", str(SEQLEN)]
    module.main([str(place / "mixed"), "--out", str(tmp_path), "--batch", "2", "--lr", "5e-3", *words])
    found = json.loads((tmp_path / "finetuning.json").read_text())
    ours, fresh = found["runs"]
    assert (ours["start"], fresh["start"]) == ("U V", "fresh, on the same S")
    assert [point["step"] for point in ours["perplexity"]] == [0, 2, 4] == [p["step"] for p in fresh["perplexity"]]
    opened = open_model(str(place / "mixed"))
    compressed = perplexity(
        upcast_for_cpu(opened.model), evaluation_windows(text, opened.tokenizer, seqlen=SEQLEN)
    ).value
    assert ours["perplexity"][0]["value"] == pytest.approx(compressed, rel=1e-5)  # U V are there from the beginning
    assert fresh["perplexity"][0]["value"] != pytest.approx(compressed, rel=1e-2)
    assert ours["perplexity"][-1]["value"] < ours["perplexity"][0]["value"]
    assert ours["trainable"] == fresh["trainable"]
    assert "<svg" in (tmp_path / "finetuning.svg").read_text()
