import copy
import hashlib
import json
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import oracles
import sparlow
from families import VOCABULARY, linears, save_tiny, tiny, tiny_tokenizer
from samples import few_of
from sparlow.errors import InputError
from sparlow.model.artefact.describe import describe
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.artefact.shards import write_shard
from sparlow.model.forward.decoder import Decoder
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import Report
from sparlow.run.journal import Journal
from sparlow.run.output_dir import LOCK, NAME
from sparlow.text import calibration_windows

OPTIONS = {"effort": 0.1, "max_steps": 10}
QUICK = Recipe(pattern="2:4", rank=4, options=OPTIONS)
PRUNE = Recipe(algorithm="magnitude", pattern="2:4", seqlen=16)
TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(600))
KEYS = {  # of report.json: design 4b, and which model and which version of the keys it is
    "recipe",
    "answers",
    "date",
    "agreement",
    "versions",
    "machine",
    "dense",
    "compressed",
    "bytes",
    "values",
    "bits_per_weight",
    "bits_per_parameter",
    "share_compressed",
    "parameters",
    "seconds",
    "peak_memory",
    "layers",
    "experts",
    "matching",
    "distillation",
    "processes",
    "finetuning",
    "not_compressed",
    "notes",
    "in_domain",
    "counts",
    "warnings",
    "model",
    "version",
}
LAYER_KEYS = {
    "block",
    "name",
    "shape",
    "pattern",
    "density",
    "rank",
    "relative_error",
    "relative_error_per_token",
    "iterations",
    "seconds",
    "damping",
    "warnings",
    "tokens",
    "dead_inputs",
    "settled",
    "value_type",
    "levels",
    "group",
    "factor_type",
    "trace",
}


def tokens(seed=1, windows=8, seqlen=16):
    return torch.randint(2, 97, (windows, seqlen), generator=torch.Generator().manual_seed(seed))


WINDOWS = tokens()


def compress(model, recipe=QUICK, **options):
    """Compress on token windows, without a tokenizer and without measuring; a model object in place."""
    # whether memory suffices is asked in tests/planning and on the command line; here it would be a third of the time
    fixed = {"calibration": WINDOWS, "evaluate": (), "inplace": isinstance(model, PreTrainedModel), "force": True}
    options = fixed | options
    with tempfile.TemporaryDirectory() as scratch:
        place = {} if options["inplace"] else {"out": Path(scratch) / "out"}
        return sparlow.compress(model, recipe, **place | options)


def logits(model, ids=WINDOWS):
    with torch.no_grad():
        return model(ids).logits


def checksums(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stored_bytes(folder):
    """Bytes of all tensors in a directory's shards, headers left out."""
    total = 0
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        total += len(content) - 8 - int.from_bytes(content[:8], "little")
    return total


def assert_two_of_four(S):
    assert ((S != 0).reshape(-1, 4).sum(1) <= 2).all()


def strict_json(text):
    """Parse JSON as the standard has it: without NaN and Infinity."""

    def refuse(word):
        pytest.fail(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's directory, for reading only; of a family with few linear layers, all of them with biases."""
    path = tmp_path_factory.mktemp("dense") / "model"
    save_tiny("gpt_neox", path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def whole(folder, text, tmp_path_factory):
    """The main job: a directory, text, an output directory; for reading only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    recipe = QUICK.changed(calibration=str(text), samples=8, seqlen=16)
    return out, sparlow.compress(str(folder), recipe, out=out, evaluate=(str(text),))


# The main job


def test_the_directory_holds_all_that_is_promised(whole):
    out, _ = whole
    files = {path.name for path in out.iterdir()}
    shards = {f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)}
    assert shards == {name for name in files if name.endswith(".safetensors")}
    assert files >= {"config.json", "model.safetensors.index.json", "generation_config.json", "tokenizer.json"}
    assert files >= {"sparlow.json", "recipe.toml", "report.json", "report.html"}
    assert not [name for name in files if "partial" in name]
    assert AutoTokenizer.from_pretrained(out)("abc").input_ids == tiny_tokenizer()("abc").input_ids


def test_the_recipe_in_the_directory_is_the_one_used(whole, text):
    out, report = whole
    recipe = QUICK.changed(calibration=str(text), samples=8, seqlen=16)
    assert Recipe.from_file(out / "recipe.toml") == recipe
    assert report.recipe == recipe.to_dict()


def test_report_json_has_the_keys_of_version_1(whole):
    out, report = whole
    found = strict_json((out / "report.json").read_text())
    assert found.keys() == KEYS
    assert found["version"] == 1
    assert found["bytes"].keys() == {"dense", "compressed", "linears_dense", "linears_compressed"}
    assert found["seconds"].keys() == {"total", "walk", "statistics", "solve", "matching", "save", "evaluate"}
    assert found["peak_memory"].keys() == {"rss", "device"}
    assert found["versions"].keys() == {"sparlow", "torch", "transformers", "safetensors", "python"}
    assert found["dense"].keys() == found["compressed"].keys() == {"perplexity", "perplexity_stderr", "losses"}
    assert len(found["layers"]) == 12
    assert all(row.keys() == LAYER_KEYS for row in found["layers"])
    assert all(row.keys() == {"name", "parameters", "why", "trained"} for row in found["not_compressed"])
    assert Report.from_file(out / "report.json") == report


def test_seconds_and_memory_are_measured(whole):
    _, report = whole
    seconds = report.seconds
    parts = sum(value for name, value in seconds.items() if name != "total")
    assert 0 < parts <= seconds["total"]
    assert all(seconds[name] > 0 for name in ("walk", "statistics", "solve", "save", "evaluate"))
    assert sum(layer.seconds for layer in report.layers) <= seconds["solve"]
    assert report.peak_memory["rss"] > 10 * report.bytes["dense"]  # Python and torch alone are larger


def test_what_the_report_says_of_a_layer_is_true(whole):
    out, report = whole
    opened = sparlow.load(out)
    layers = compressed_layers(opened)
    assert {f"gpt_neox.layers.{row.block}.{row.name}" for row in report.layers} == layers.keys()
    for row in report.layers:
        layer = layers[f"gpt_neox.layers.{row.block}.{row.name}"]
        assert row.shape == tuple(layer.S.shape)
        assert row.pattern == "2:4"
        assert row.density == pytest.approx((layer.S != 0).sum().item() / layer.S.numel())
        assert row.rank == layer.rank == 4
        assert 0 < row.relative_error < 0.2
        assert row.iterations == 10
        assert_two_of_four(layer.S)


def test_a_shard_is_the_same_file_every_time(tmp_path):
    tensors = {"x": torch.ones(3)}
    assert len({write_shard(tmp_path / "x.safetensors", tensors).sha256 for _ in range(30)}) == 1


def test_perplexities_are_those_of_the_two_models(whole, folder, text):
    out, report = whole
    name = str(text)
    for model, found in (
        (AutoModelForCausalLM.from_pretrained(folder), report.dense),
        (sparlow.load(out), report.compressed),
    ):
        again = sparlow.evaluate(model, tiny_tokenizer(), evaluate=[name], seqlen=16)
        assert found["perplexity"][name] == pytest.approx(again["perplexity"][name], rel=1e-6)
    assert report.dense["perplexity"][name] != report.compressed["perplexity"][name]


def test_a_perplexity_has_its_standard_error_unless_an_older_version_measured_it(folder, text, tmp_path):
    def run():
        return compress(folder, PRUNE, evaluate=(str(text),), out=tmp_path / "out")

    first, name = run(), str(text)
    for part in (first.dense, first.compressed):
        assert 0 < part["perplexity_stderr"][name] < part["perplexity"][name]
    record = json.loads((tmp_path / "out" / NAME).read_text()) | {"finished": False}  # killed before the last write
    del record["dense_stderr"], record["dense_losses"]
    (tmp_path / "out" / NAME).write_text(json.dumps(record))
    later = run()
    assert later.dense == {"perplexity": first.dense["perplexity"], "perplexity_stderr": {name: None}}
    assert later.compressed == first.compressed


def test_one_name_is_one_text_and_is_not_read_letter_by_letter(folder, text):
    report = compress(folder, PRUNE, evaluate=str(text))
    assert list(report.dense["perplexity"]) == list(report.compressed["perplexity"]) == [str(text)]
    assert compress(folder, PRUNE, evaluate="").dense["perplexity"] == {}
    for call in (compress, sparlow.plan):
        with pytest.raises(InputError, match=r"cannot be given as 3\. Give names"):
            call(folder, PRUNE, evaluate=[3])


def test_perplexity_can_be_limited_to_the_first_windows(folder, text):
    report = compress(folder, PRUNE, evaluate=(str(text),), limit=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = sparlow.evaluate(model, tiny_tokenizer(), evaluate=[str(text)], seqlen=16, limit=3)
    assert report.dense["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)


def test_a_dense_model_no_better_than_chance_is_remarked(whole, text):
    _, report = whole
    (warning,) = [w for w in report.warnings if "no better than chance" in w]
    assert str(text) in warning
    assert report.dense["perplexity"][str(text)] > VOCABULARY


def test_a_model_object_a_directory_and_a_text_give_the_same_bytes(whole, folder, text, tmp_path):
    out, _ = whole
    windows = calibration_windows(str(text), tiny_tokenizer(), samples=8, seqlen=16, seed=0)
    compress(tiny("gpt_neox"), calibration=windows, out=tmp_path / "object")
    compress(folder, QUICK.changed(samples=8, seqlen=16), calibration=text, out=tmp_path / "path")
    assert checksums(tmp_path / "object") == checksums(tmp_path / "path") == checksums(out)


def test_nothing_is_asked_of_the_network(folder, text, tmp_path, monkeypatch):
    asked = []

    def connect(_, address):
        asked.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: connect(None, host))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    recipe = PRUNE.changed(calibration=str(text), samples=4, seqlen=16)
    sparlow.compress(folder, recipe, out=tmp_path / "out", evaluate=(str(text), "builtin"), limit=2)
    sparlow.evaluate(sparlow.load(tmp_path / "out"), tiny_tokenizer(), evaluate=[str(text)], seqlen=16)
    assert asked == []


def test_counts_are_those_of_the_layers(whole):
    _, report = whole
    assert report.counts == {
        "layers": 12,
        "extra_damping": sum(row.damping > 0 for row in report.layers),
        "dead_inputs": 0,
        "unsettled": sum(not row.settled for row in report.layers),
        "without_data": 0,
    }
    assert report.counts["unsettled"] == sum(any("settled" in w for w in row.warnings) for row in report.layers) > 0
    assert {row.tokens for row in report.layers} == {8 * 16}


def test_in_place_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny("gpt_neox")
    assert len(compress(model, PRUNE).layers) == len(compressed_layers(model))
    assert not list(tmp_path.iterdir())


def test_steps_are_told_in_order(text):
    steps = []
    recipe = PRUNE
    sparlow.compress(
        tiny("gpt_neox"),
        recipe,
        calibration=WINDOWS,
        tokenizer=tiny_tokenizer(),
        evaluate=[str(text)],
        notify=steps.append,
        inplace=True,
    )
    stages = ["prompts", "dense perplexity", "blocks", "compressed perplexity"]
    assert list(dict.fromkeys(step.stage for step in steps)) == stages
    for stage, total in (
        ("dense perplexity", 4),  # the blocks, and what is behind them
        ("blocks", 3),
        ("compressed perplexity", 4),
    ):
        mine = [step for step in steps if step.stage == stage]
        assert {step.total for step in mine} == {total}
        assert [step.done for step in mine] == sorted(step.done for step in mine)
        assert mine[-1].done == total
    layers = [(step.done, step.layer.block, step.layer.name) for step in steps if step.layer]
    names = list(linears(tiny("gpt_neox").gpt_neox.layers[0]))
    assert [(done, block) for done, block, _ in layers] == [(i, i) for i in range(3) for _ in names]
    assert sorted(name for *_, name in layers[: len(names)]) == sorted(names)


# Any family


FAMILIES = ("llama", "opt", "gpt_neox", "gemma3_text", "mixtral", "falcon", "bloom")


@pytest.mark.parametrize("family", few_of(FAMILIES, "llama", "opt", "bloom"))
def test_every_family_end_to_end(family, tmp_path):
    model, dense = tiny(family), tiny(family)
    expected = dict(Decoder.of(dense).layers())
    report = compress(model, out=tmp_path)
    layers = compressed_layers(model)
    assert (
        layers.keys() == expected.keys() == {Decoder.of(model).layer_name(row.block, row.name) for row in report.layers}
    )
    for key, layer in layers.items():
        assert_two_of_four(layer.S)
        assert (layer.U.shape[1], layer.V.shape[0]) == (4, 4)
        assert (layer.bias is None) == (expected[key].bias is None)
    assert all(0.4 < row.density <= 0.5 and 0 < row.relative_error < 0.1 for row in report.layers)
    for opened in (sparlow.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(opened), logits(model))
    assert not torch.equal(logits(model), logits(dense))

    # every parameter is either in a compressed layer or accounted for
    linear = sum(w.read().numel() + (0 if w.bias is None else w.bias.numel()) for w in expected.values())
    kept = sum(row["parameters"] for row in report.not_compressed)
    assert linear + kept == sum(p.numel() for p in dense.parameters())
    assert sum(row.shape[0] * row.shape[1] for row in report.layers) <= linear

    # bytes
    assert report.bytes["dense"] == sum(p.numel() * p.element_size() for p in dense.parameters())
    assert report.bytes["linears_dense"] == 4 * linear
    assert report.bytes["linears_compressed"] == sum(row.bytes for row in describe(tmp_path))
    assert report.bytes["compressed"] == stored_bytes(tmp_path)
    assert report.bits_per_weight * sum(w.read().numel() for w in expected.values()) == pytest.approx(
        8 * report.bytes["linears_compressed"]
    )


def test_experts_that_a_recipe_leaves_out_are_reported_and_stay_one_tensor():
    model = tiny("mixtral")
    experts = {name: m for name, m in model.named_modules() if name.endswith(".experts")}
    state = {name: p.clone() for name, p in model.named_parameters() if ".experts." in name}
    ignored = ("experts.gate_up_proj", "experts.down_proj")
    left_out = Recipe(algorithm="magnitude", pattern="2:4", seqlen=16, ignore=ignored)
    rows = {row["name"]: row for row in compress(model, left_out).not_compressed}
    assert len(experts) == 3
    for name, module in experts.items():
        assert rows[name]["parameters"] == sum(p.numel() for p in module.parameters())
        assert rows[name]["why"] == "experts that were not selected"
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], before) for name, before in state.items())


@pytest.mark.parametrize("algorithm", ["magnitude", "wanda"])
def test_pruners_have_no_low_rank_part(algorithm, tmp_path):
    model = tiny("llama")
    report = compress(model, Recipe(algorithm=algorithm), out=tmp_path)
    assert {row.rank for row in report.layers} == {0}
    for layer in compressed_layers(model).values():
        assert (layer.U.shape[1], layer.V.shape[0]) == (0, 0)
    assert torch.equal(logits(sparlow.load(tmp_path)), logits(model))
    assert report.bytes["compressed"] == stored_bytes(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "density"), [("4:8", 0.5), ("1:4", 0.25), ("0.5", 0.5), ("0.7", 0.3), ("dense", 1.0)]
)
def test_the_density_is_that_of_the_pattern(pattern, density):
    report = compress(tiny("llama"), PRUNE.changed(pattern=pattern))
    for row in report.layers:
        assert row.pattern == pattern
        assert row.density * row.shape[0] * row.shape[1] == pytest.approx(
            density * row.shape[0] * row.shape[1], abs=0.6
        )


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A directory in bfloat16, for reading only."""
    path = tmp_path_factory.mktemp("half") / "model"
    save_tiny("gpt_neox", path, dtype=torch.bfloat16)
    return path


def test_a_bfloat16_object_computes_and_is_stored_in_bfloat16(half, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(half)
    report = compress(model, out=tmp_path)
    opened = sparlow.load(tmp_path)
    for each in (model, opened):
        assert {p.dtype for p in each.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(opened), logits(model))
    assert report.bytes["compressed"] == stored_bytes(tmp_path)


def test_a_bfloat16_directory_gives_a_bfloat16_directory(half, text, tmp_path):
    recipe = QUICK.changed(seqlen=16)
    report = compress(half, recipe, out=tmp_path, evaluate=[str(text)])
    assert {row.dtype for row in describe(tmp_path)} == {"bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    opened = sparlow.load(tmp_path)
    assert {p.dtype for p in opened.parameters()} == {torch.bfloat16}
    assert report.bytes["dense"] == 2 * sum(p.numel() for p in tiny("gpt_neox").parameters())
    assert report.bytes["linears_compressed"] == sum(row.bytes for row in describe(tmp_path))
    assert report.bytes["compressed"] == stored_bytes(tmp_path)
    # what was measured is what was stored, not something finer
    wide = sparlow.load(tmp_path, dtype=torch.float32)
    found = sparlow.evaluate(wide, tiny_tokenizer(), evaluate=[str(text)], seqlen=16)
    assert report.compressed["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)
    assert max(row.relative_error for row in report.layers) < 0.1


def test_what_a_bfloat16_run_stores_is_what_it_went_on_with(half, tmp_path):
    interrupted(half, tmp_path / "out", Stop("blocks", 2))
    compress(half, out=tmp_path / "out")
    compress(half, out=tmp_path / "undisturbed")
    assert checksums(tmp_path / "out") == checksums(tmp_path / "undisturbed")


def mixture(folder):
    """A directory in bfloat16 of a family that keeps a bias of its router in float32 on purpose."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8, "vocab_size": 128}
    depth = {"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **sizes, **depth, **experts))
    model = model.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.normal_(0, 0.2, generator=generator)
    for module in model.modules():
        if "e_score_correction_bias" in dict(module.named_buffers(recurse=False)):
            module.e_score_correction_bias = torch.rand(4, generator=generator)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: save_tiny("gemma3_text", folder, dtype=torch.bfloat16),
        lambda folder: save_tiny("qwen2", folder, dtype=torch.float16),
        lambda folder: save_tiny("bloom", folder),
        pytest.param(
            mixture,
        ),
    ],
    ids=["bfloat16", "float16", "float32", "mixture"],
)
def test_what_is_not_compressed_is_stored_bit_for_bit(make, tmp_path):
    make(tmp_path / "dense")
    report = compress(tmp_path / "dense", PRUNE, out=tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    name = Decoder.of(before).name
    weights = {f"{name}.{row.block}.{row.name}.weight" for row in report.layers}
    weights |= {f"{name}.{row['block']}.{row['name']}" for row in report.experts}
    expected, found = before.state_dict(), sparlow.load(tmp_path / "out").state_dict()
    shards = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        shards |= load_file(path)
    for key in expected.keys() - weights:
        assert torch.equal(found[key], expected[key]), key
        assert key not in shards or shards[key].dtype == expected[key].dtype, key


def test_float32_on_a_bfloat16_directory(half, tmp_path):
    report = compress(half, PRUNE.changed(dtype="float32"), out=tmp_path)
    assert {row.dtype for row in describe(tmp_path)} == {"float32"}
    opened = sparlow.load(tmp_path)
    assert {p.dtype for p in opened.parameters()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
    assert report.bytes["dense"] == sum(4 * p.numel() for p in model.parameters())
    compress(model, PRUNE)
    assert torch.equal(logits(opened), logits(model))


def test_a_model_compressed_in_memory_saves_itself(tmp_path):
    model = tiny("qwen2")
    compress(model, PRUNE)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(sparlow.load(tmp_path)), logits(model))


def test_warnings_name_their_layer():
    model = tiny("opt")
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.bias.fill_(100.0)
        model.model.decoder.layers[1].fc1.bias[:5] = -100.0  # five features that ReLU never lets through
    report = compress(model, PRUNE)
    (warning,) = [w for w in report.warnings if w.startswith("model.decoder.layers.1.fc2: ")]
    (row,) = [row for row in report.layers if (row.block, row.name) == (1, "fc2")]
    assert row.warnings == (warning.removeprefix("model.decoder.layers.1.fc2: "),)
    assert warning.split(": ")[1].startswith("5 input features were always zero")


# What each block is calibrated on


def second_moment(model, layer, windows):
    """H = (2 / windows) Σ x xᵀ of what a layer of a model reads, by a hook and by hand."""
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    logits(model, windows)
    hook.remove()
    X = torch.cat(seen).double()  # (tokens, in)
    return (2 / len(windows) * X.T @ X).float()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # one mask for all blocks; masks that differ
def test_a_block_is_calibrated_on_what_the_compressed_blocks_before_it_give(family):
    windows = tokens(seed=3, windows=16, seqlen=12)
    dense, model = tiny(family), tiny(family)
    report = compress(model, calibration=windows)
    name, blocks = Decoder.of(model).name, Decoder.of(model).blocks
    half = copy.deepcopy(dense)  # block 0 compressed, the others dense
    Decoder.of(half).blocks[0] = blocks[0]
    records = {row.name: row for row in report.layers if row.block == 1}
    assert records.keys() == linears(Decoder.of(dense).blocks[1]).keys()
    told_apart = 0
    for key, record in records.items():
        layer = f"{name}.1.{key}"
        W, compressed = dense.get_submodule(layer).weight.detach(), model.get_submodule(layer)
        residual = W - compressed.sparse_weight() - compressed.low_rank_weight()
        errors = {}
        for which, prefix in (("compressed", half), ("dense", dense)):
            H = second_moment(prefix, layer, windows)
            damped = oracles.damp(H)
            errors[which] = oracles.objective(residual, damped) / oracles.objective(W, damped)
            found = sparlow.decompose(W, H, pattern="2:4", rank=4, **OPTIONS)
            if which == "compressed":
                same = (found.S != 0) == (compressed.S != 0)
                assert same.float().mean() > 0.99
                assert found.stats["relative_error"] == pytest.approx(record.relative_error, rel=1e-2)
        assert record.relative_error == pytest.approx(errors["compressed"], rel=1e-4)
        told_apart += abs(record.relative_error / errors["dense"] - 1) > 1e-2
    assert told_apart >= len(records) - 1


# Stop and go on


class Stop:
    """Interrupts like Ctrl-C at one step of a run."""

    def __init__(self, stage, done, layers=0):
        self.at = (stage, done, layers)
        self.layers = 0

    def __call__(self, step):
        self.layers = self.layers + 1 if step.layer else 0
        if (step.stage, step.done, self.layers) == self.at:
            raise KeyboardInterrupt


def comparable(report):
    """A report without what depends on the clock."""
    data = json.loads(report.to_json())
    for key in ("seconds", "peak_memory"):
        data.pop(key)
    for row in data["layers"]:
        row.pop("seconds")
    return data


def interrupted(folder, out, stop, **options):
    with pytest.raises(KeyboardInterrupt):
        compress(folder, out=out, notify=stop, **options)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return out, compress(folder, out=out)


@pytest.mark.parametrize(
    ("stop", "done"),
    [
        (Stop("blocks", 1), 1),
        (Stop("blocks", 2), 2),
        (Stop("blocks", 3), 3),
        (Stop("blocks", 0, layers=3), 0),
        (Stop("blocks", 1, layers=4), 1),
    ],
    ids=["after 1", "after 2", "after 3", "within 1", "within 2"],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(stop, done, folder, undisturbed, tmp_path):
    out = tmp_path / "out"
    interrupted(folder, out, stop)
    assert not (out / "config.json").exists()
    assert len(json.loads((out / NAME).read_text())["blocks"]) == done
    finished = checksums(out)
    assert len(finished) == done
    stamps = {name: (out / name).stat().st_mtime_ns for name in finished}
    solved = []  # by the second run
    report = compress(folder, out=out, notify=lambda step: solved.append(step.layer))
    assert {layer.block for layer in solved if layer} == set(range(done, 3))
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == stamps  # not even written again
    assert checksums(out) == checksums(undisturbed[0])
    assert comparable(report) == comparable(undisturbed[1])
    ours, theirs = everything(out), everything(undisturbed[0])
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {NAME, "report.json", "report.html"}


def test_a_run_may_be_interrupted_again_and_again(folder, undisturbed, tmp_path):
    for stop in (Stop("blocks", 1), Stop("blocks", 1, layers=2), Stop("blocks", 2)):
        interrupted(folder, tmp_path / "out", stop)
    compress(folder, out=tmp_path / "out")
    assert checksums(tmp_path / "out") == checksums(undisturbed[0])


def test_a_shard_that_was_not_recorded_is_written_again(folder, undisturbed, tmp_path, monkeypatch):
    note = Journal.note_block

    def dying(self, shard, *rest):
        if shard.file.startswith("model-00002"):
            (self.folder / shard.file).write_bytes(b"half")
            raise KeyboardInterrupt
        note(self, shard, *rest)

    monkeypatch.setattr(Journal, "note_block", dying)
    interrupted(folder, tmp_path / "out", lambda _: None)
    monkeypatch.setattr(Journal, "note_block", note)
    compress(folder, out=tmp_path / "out")
    assert checksums(tmp_path / "out") == checksums(undisturbed[0])


def measured(folder, text, out, **options):
    """A run with a perplexity before and after."""
    return compress(folder, PRUNE, out=out, evaluate=(str(text),), **options)


def test_the_dense_perplexity_is_not_measured_twice(folder, text, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measured(folder, text, tmp_path / "out", notify=Stop("blocks", 1))
    stages = []
    report = measured(folder, text, tmp_path / "out", notify=lambda step: stages.append(step.stage))
    assert set(stages) == {"prompts", "dense predictions", "blocks", "compressed perplexity"}
    assert comparable(report) == comparable(measured(folder, text, tmp_path / "new"))


def test_the_dense_perplexity_of_another_text_is_not_taken_for_this_one(folder, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    with pytest.raises(KeyboardInterrupt):
        measured(folder, text, out, notify=Stop("blocks", 1))
    text.write_text(TEXT[::-1])
    assert comparable(measured(folder, text, out)) == comparable(measured(folder, text, tmp_path / "new"))


def test_interrupted_before_the_first_block_leaves_nothing(folder, text, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measured(folder, text, tmp_path / "out", notify=Stop("dense perplexity", 4))
    assert not (tmp_path / "out").exists()


def test_interrupted_while_the_result_is_measured(folder, text, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measured(folder, text, tmp_path / "out", notify=Stop("compressed perplexity", 4))
    report = measured(folder, text, tmp_path / "out")
    assert Report.from_file(tmp_path / "out" / "report.json") == report
    assert report.compressed["perplexity"].keys() == {str(text)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": QUICK.changed(seed=1)}, r"differs in seed \(0 there, 1 now\)"),
        ({"recipe": QUICK.changed(options={**OPTIONS, "effort": 0.2})}, "differs in options"),
        ({"recipe": QUICK.changed(rank=3)}, r"differs in rank \(4 there, 3 now\)"),
        ({"recipe": QUICK.changed(damping=0.01)}, r"differs in damping \(0.005 there, 0.01 now\)"),
        ({"calibration": tokens(seed=2)}, "differs in calibration"),
        ({"calibration": WINDOWS[:4]}, r"differs in samples \(8 there, 4 now\)"),
    ],
    ids=["seed", "effort", "rank", "damping", "windows", "fewer windows"],
)
def test_another_run_does_not_go_on(change, named, folder, tmp_path):
    out = tmp_path / "out"
    interrupted(folder, out, Stop("blocks", 1))
    before = everything(out)
    with pytest.raises(InputError, match=named):
        compress(folder, **{"out": out} | change)
    assert everything(out) == before


def test_another_seed_is_named_where_it_chooses_the_text(folder, text, tmp_path):
    recipe = PRUNE.changed(samples=4)
    with pytest.raises(KeyboardInterrupt):
        compress(folder, recipe, calibration=text, out=tmp_path / "out", notify=Stop("blocks", 1))
    with pytest.raises(InputError, match=r"differs in seed \(0 there, 1 now\)"):
        compress(folder, recipe.changed(seed=1), calibration=text, out=tmp_path / "out")


def test_another_weight_is_another_model(folder, tmp_path):
    interrupted(folder, tmp_path / "out", Stop("blocks", 1))
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.gpt_neox.layers[2].mlp.dense_4h_to_h.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"differs in model\."):
        compress(tmp_path / "other", out=tmp_path / "out")


def test_another_dtype_is_named(folder, tmp_path):
    interrupted(folder, tmp_path / "out", Stop("blocks", 1))
    with pytest.raises(InputError, match=r"differs in .*(dtype|recipe)"):
        compress(folder, QUICK.changed(dtype="bfloat16"), out=tmp_path / "out")


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [flip, lambda path: path.unlink()], ids=["one bit", "missing"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_shard_is_written_again_and_no_other(spoil, number, folder, undisturbed, tmp_path):
    interrupted(folder, tmp_path, Stop("blocks", 2))
    spoil(tmp_path / f"model-0000{number}-of-00004.safetensors")
    solved = []
    report = compress(folder, out=tmp_path, notify=lambda step: solved.append(step.layer))
    assert {layer.block for layer in solved if layer} == {number - 1, 2}
    assert checksums(tmp_path) == checksums(undisturbed[0])
    (warning,) = set(report.warnings) - set(undisturbed[1].warnings)
    assert f"The shard of block {number - 1} was damaged" in warning


@pytest.mark.parametrize(
    "change", [{"threads": 99}, {"cpu": "Another", "instruction_sets": []}, {"torch": "1.0"}, {"device": "cuda"}, {}]
)
def test_a_run_that_goes_on_elsewhere_says_so(change, folder, undisturbed, tmp_path):
    interrupted(folder, tmp_path, Stop("blocks", 2))
    state = json.loads((tmp_path / NAME).read_text())
    state["machines"][0] |= change
    (tmp_path / NAME).write_text(json.dumps(state))
    report = compress(folder, out=tmp_path)
    assert checksums(tmp_path) == checksums(undisturbed[0])
    found = [warning for warning in report.warnings if "its bits may differ" in warning]
    assert len(found) == bool(change)
    assert all(f"{name.replace('_', ' ')} (" in warning for warning in found for name in change)
    assert set(report.warnings) - set(undisturbed[1].warnings) == set(found)
    assert json.loads((tmp_path / "report.json").read_text())["warnings"] == report.warnings


def test_blocks_after_one_that_comes_out_differently_are_done_again(folder, undisturbed, tmp_path):
    interrupted(folder, tmp_path, Stop("blocks", 2))
    state = json.loads((tmp_path / NAME).read_text())
    state["shards"]["model-00001-of-00004.safetensors"]["sha256"] = "0" * 64  # as of another machine
    (tmp_path / NAME).write_text(json.dumps(state))
    solved = []
    compress(folder, out=tmp_path, notify=lambda step: solved.append(step.layer))
    assert {layer.block for layer in solved if layer} == {0, 1, 2}
    assert checksums(tmp_path) == checksums(undisturbed[0])


def test_a_replacement_that_is_killed_while_it_clears_leaves_nothing_of_the_old(old, folder, undisturbed, monkeypatch):
    out, _ = old
    unlink, removed = Path.unlink, []

    def dying(self, **options):
        if self.parent == out and not self.name.startswith("."):
            if len(removed) == 3:
                raise KeyboardInterrupt
            removed.append(self)
        unlink(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        interrupted(folder, out, lambda _: None, overwrite=True)
    compress(folder, out=out)  # the same, without being told to overwrite again
    assert checksums(out) == checksums(undisturbed[0])
    assert everything(out).keys() == everything(undisturbed[0]).keys()


def test_two_runs_do_not_write_to_one_directory(folder, undisturbed, tmp_path):
    refused = []

    def second(step):
        if (step.stage, step.done) == ("blocks", 1) and not refused:
            with pytest.raises(InputError, match=f"Another process is writing to {tmp_path / 'out'}") as caught:
                compress(folder, out=tmp_path / "out", overwrite=True)
            refused.append(caught)

    compress(folder, out=tmp_path / "out", notify=second)
    assert refused
    assert checksums(tmp_path / "out") == checksums(undisturbed[0])
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_directory_that_cannot_be_locked(folder, tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(InputError, match="cannot be written to and locked"):
        compress(folder, out=tmp_path)


# Results that are there already


@pytest.fixture(scope="module")
def pruned(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "out"
    compress(folder, PRUNE, out=out)
    return out


@pytest.fixture
def old(pruned, tmp_path):
    """A copy of a finished result, and what is in it."""
    out = tmp_path / "old"
    shutil.copytree(pruned, out)
    return out, everything(out)


def test_a_finished_result_is_kept(old, folder):
    out, before = old
    with pytest.raises(InputError, match=r"finished result.*--overwrite"):
        compress(folder, PRUNE, out=out)
    assert everything(out) == before


def test_a_finished_result_is_replaced_if_asked_for(old, folder, undisturbed):
    out, _ = old
    (out / "model-00009-of-00009.safetensors").touch()  # of some longer model before
    compress(folder, out=out, overwrite=True)
    assert checksums(out) == checksums(undisturbed[0])
    assert everything(out).keys() == everything(undisturbed[0]).keys()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_left_alone(overwrite, folder, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "thesis.txt").write_text("the only copy")
    with pytest.raises(InputError, match="holds no run of sparlow"):
        compress(folder, PRUNE, out=tmp_path, overwrite=overwrite)
    assert everything(tmp_path) == {"deep/thesis.txt": b"the only copy"}


def with_nan(folder, where):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.gpt_neox.layers[1].attention.dense.weight[3, 4] = float("nan")
    model.save_pretrained(where)
    return where


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "./nothing-here"}, "There is no directory"),
        ({"recipe": PRUNE.changed(dtype="float31")}, "There is no data type"),
        ({"recipe": PRUNE.changed(pattern="2:5")}, "2:5"),
        ({"recipe": QUICK.changed(rank=33)}, "Rank 33"),
        ({"calibration": "no-such-file.txt"}, "no-such-file.txt"),
        ({"calibration": torch.full((2, 16), VOCABULARY)}, "vocabulary"),
        ({"evaluate": ["no-such-file.txt"]}, "no-such-file.txt"),
        ({"device": "nowhere"}, "nowhere"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_leaves_the_old_result(change, message, old, folder, monkeypatch):
    out, before = old
    monkeypatch.chdir(folder.parent)
    with pytest.raises(InputError, match=message):
        compress(**{"model": folder, "recipe": PRUNE, "out": out, "overwrite": True} | change)
    assert everything(out) == before


def test_a_damaged_model_leaves_the_old_result(old, folder, tmp_path):
    out, before = old
    damaged = with_nan(folder, tmp_path / "nan")
    with pytest.raises(InputError, match=r"gpt_neox.layers.1.attention.dense: the weight holds NaN"):
        compress(damaged, PRUNE, out=out, overwrite=True)
    assert everything(out) == before


# Input that cannot be used


@pytest.mark.parametrize(
    "windows",
    [
        torch.zeros(4, 8),
        torch.zeros(4, 8, dtype=torch.int32),
        torch.zeros(8, dtype=torch.int64),
        torch.zeros(0, 8, dtype=torch.int64),
        torch.zeros(4, 0, dtype=torch.int64),
        torch.full((4, 8), -1),
        torch.full((4, 8), VOCABULARY),
    ],
    ids=["float", "int32", "one dimension", "no window", "no token", "negative", "too large"],
)
def test_windows_that_are_none(windows):
    model = tiny("llama")
    with pytest.raises(InputError, match="Calibration windows"):
        compress(model, calibration=windows)
    assert not compressed_layers(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate": ("builtin",)}, "has no tokenizer. Give token windows"),
        ({"calibration": "builtin"}, "has no tokenizer. Give token windows"),
        ({"calibration": None, "recipe": PRUNE.changed(calibration="windows")}, "token windows given directly"),
    ],
    ids=["evaluate", "calibration", "neither"],
)
def test_text_needs_a_tokenizer(options, message):
    model = tiny("llama")
    with pytest.raises(InputError, match=message):
        compress(**{"model": model, "recipe": PRUNE} | options)
    assert not compressed_layers(model)


def test_a_model_without_layers_that_can_be_compressed(tmp_path):
    model = tiny("llama")
    for name, _ in list(Decoder.of(model).layers()):
        model.set_submodule(name, torch.nn.Identity())
    with pytest.raises(InputError, match="nothing to compress"):
        compress(model, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_compressed_is_not_compressed_again(old, tmp_path):
    with pytest.raises(InputError, match=r"nothing to compress: .*are packed already\. Give the dense model"):
        compress(old[0], PRUNE, out=tmp_path / "twice")


def test_windows_longer_than_the_context(tmp_path):
    with pytest.raises(InputError, match="64"):
        compress(tiny("opt"), calibration=tokens(seqlen=80), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_model_that_gives_no_number_is_refused(text, tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e38)
        model.model.layers[1].mlp.gate_proj.weight.fill_(1e38)
    options = {"tokenizer": tiny_tokenizer(), "evaluate": [str(text)], "out": tmp_path / "out"}
    with pytest.raises(InputError, match=r"model.layers.1: the input of mlp.down_proj is not finite"):
        compress(model, PRUNE, **options)
    assert not (tmp_path / "out").exists()
    assert not compressed_layers(model)


def test_a_damaged_head_is_told_from_a_damaged_block(text, tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    options = {"tokenizer": tiny_tokenizer(), "evaluate": [str(text)], "out": tmp_path / "out"}
    with pytest.raises(InputError, match="lm_head: the weight holds NaN"):
        compress(model, PRUNE, **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def ruined(text, tmp_path_factory):
    """The result for a model that is sure of nonsense: both perplexities are infinite."""
    model, out = tiny("llama"), tmp_path_factory.mktemp("ruined") / "out"
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    options = {"calibration": WINDOWS, "tokenizer": tiny_tokenizer(), "evaluate": [str(text)]}
    return out, sparlow.compress(model, PRUNE, out=out, inplace=True, **options)


def test_an_infinite_perplexity_is_reported(ruined, text):
    out, report = ruined
    assert report.dense["perplexity"] == {str(text): float("inf")}
    assert any("no better than chance" in warning for warning in report.warnings)
    assert "inf" in (out / "report.html").read_text()
    strict_json((out / "report.json").read_text())


def test_an_infinite_perplexity_is_recorded_as_json(ruined):
    strict_json((ruined[0] / NAME).read_text())


def test_an_infinite_perplexity_is_read_back(ruined):
    assert Report.from_file(ruined[0] / "report.json") == ruined[1]


def test_what_is_evaluated_may_have_windows_of_another_length(folder, text):
    def report(**options):
        return compress(folder, PRUNE, evaluate=(str(text),), **options)

    assert report(evaluate_seqlen=16).dense == report().dense  # the recipe's seqlen is 16
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = sparlow.evaluate(model, words, evaluate=(str(text),), seqlen=8, limit=5)
    assert report(evaluate_seqlen=8, limit=5).dense["perplexity"] == pytest.approx(expected["perplexity"])
    with pytest.raises(InputError, match="Lower --seqlen"):
        report(evaluate_seqlen=65)
