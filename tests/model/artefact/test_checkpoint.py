import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from artefacts import assert_same_bits, edit, spoil, trainer
from families import save_tiny, tiny, tiny_tokenizer
from sparlow.errors import InputError, RunError
from sparlow.files import INDEX, shard_filename
from sparlow.model.artefact import shards
from sparlow.model.artefact.checkpoint import CheckpointWriter, load, read_block
from sparlow.model.artefact.describe import describe, verify
from sparlow.model.artefact.hf_quantizer import attach
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.forward.compressible import compressible
from sparlow.model.forward.decoder import Decoder

LAYER = "model.layers.1.mlp.up_proj"
SHARD = "model-00002-of-00004.safetensors"  # that holds LAYER

LAYERS = Decoder("model.layers", torch.nn.ModuleList())  # the name is all that reading a block looks at


def shard(folder, i):
    (found,) = folder.glob(f"model-{i + 1:05d}-of-*.safetensors")
    return found


def two_of_four(W):
    group = W.reshape(len(W), -1, 4)
    return W.masked_fill((group.argsort(-1).argsort(-1) < 2).reshape(W.shape), 0)


def compress(model, rank=3):
    """Replace every linear of the blocks by random 2:4 plus random low rank."""
    generator = torch.Generator().manual_seed(0)
    for block in Decoder.of(model).blocks:
        for weight in compressible(block).values():
            W = weight.read()
            U, V = (torch.randn(shape, generator=generator).to(W) / 9 for shape in ((len(W), rank), (rank, W.shape[1])))
            weight.put(SparseLowRankLinear(two_of_four(W), U, V, weight.bias))
    return model


def opened_and_compressed(family, dtype, folder, rank=3):
    """Opened from a directory, because a model that was cast has other rotary tables than one that is opened."""
    save_tiny(family, folder, dtype=dtype)
    return compress(AutoModelForCausalLM.from_pretrained(folder), rank)


def write(model, folder, pattern="2:4"):
    decoder = Decoder.of(model)
    writer = CheckpointWriter(folder, model, decoder)
    records = [writer.write_block(i, block) for i, block in enumerate(decoder.blocks)]
    records.append(writer.write_rest(model))
    writer.finish(model, tiny_tokenizer(), patterns=dict.fromkeys(compressed_layers(model), pattern))
    return records


@pytest.fixture
def model(tmp_path_factory):
    return opened_and_compressed("llama", torch.bfloat16, tmp_path_factory.mktemp("dense"))


@pytest.fixture
def folder(model, tmp_path):
    write(model, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def ids():
    return torch.randint(2, 97, (2, 12), generator=torch.Generator().manual_seed(1))


# Round trips


@pytest.mark.parametrize(
    ("dtype", "rank"), [(torch.float32, 3), (torch.bfloat16, 3), (torch.float16, 3), (torch.bfloat16, 0)]
)
def test_comes_back_bit_for_bit(dtype, rank, tmp_path, ids):
    model = opened_and_compressed("qwen2", dtype, tmp_path / "dense", rank)  # with biases
    write(model, tmp_path / "out")
    opened = load(tmp_path / "out")
    assert_same_bits(model, opened)
    assert len(compressed_layers(opened)) == 21
    assert torch.equal(model(ids).logits, opened(ids).logits)
    assert_same_bits(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"}))
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **greedy), opened.generate(ids, **greedy))


@pytest.mark.parametrize("family", ["opt", "falcon", "gemma2", "gpt_neox", "gpt2", "mixtral"])
def test_needs_to_know_no_architecture(family, tmp_path, ids):
    model = opened_and_compressed(family, torch.float32, tmp_path / "dense")
    write(model, tmp_path / "written")
    opened = load(tmp_path / "written")
    opened.save_pretrained(tmp_path / "saved")
    attach(model)  # as if it were opened
    model.save_pretrained(tmp_path / "attached")
    for again in (opened, load(tmp_path / "saved"), load(tmp_path / "attached")):
        assert_same_bits(model, again)
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.slow
def test_opens_in_a_new_process_and_a_shard_that_is_cut_off_ends_none_in_a_bus_error(model, folder, ids, tmp_path):
    """What is mapped and read past the end of its file ends in SIGBUS; read by both of what maps files."""
    code = (
        "import sys, torch; import sparlow; from transformers import AutoModelForCausalLM\n"
        "from pathlib import Path; from sparlow.model.artefact.describe import describe\n"
        "folder, ids, logits, *cut_off = map(Path, sys.argv[1:])\n"
        "torch.save(AutoModelForCausalLM.from_pretrained(folder)(torch.load(ids)).logits, logits)\n"
        "for read in (sparlow.load, describe):\n"
        "    for each in cut_off:\n"
        "        try: read(each)\n"
        "        except sparlow.InputError as error: print(error)"
    )
    torch.save(ids, tmp_path / "ids")
    data = (folder / SHARD).read_bytes()
    cut_off = [tmp_path / f"without {lost} bytes" for lost in (1, 100, len(data) // 2, int(0.99 * len(data)))]
    for each in cut_off:
        shutil.copytree(folder, each)
        (each / SHARD).write_bytes(data[: -int(each.name.split()[1])])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-c", code, folder, tmp_path / "ids", tmp_path / "logits", *cut_off]
    run = subprocess.run(  # noqa: PLW1510 - asserted below
        arguments, env=environment, timeout=120, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert torch.equal(torch.load(tmp_path / "logits"), model(ids).logits)
    said = run.stdout.splitlines()
    assert len(said) == 2 * len(cut_off)
    for each, line in zip(2 * cut_off, said, strict=True):
        assert SHARD in line
        assert "damaged" in line
        assert str(each) in line


def test_opens_without_the_head_and_in_another_dtype(model, folder, ids):
    body = AutoModel.from_pretrained(folder)
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
    wide = load(folder, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.equal(wide.get_submodule(LAYER).S, model.get_submodule(LAYER).S.float())


def test_the_tokenizer_comes_along(folder):
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids == tiny_tokenizer()("abc").input_ids


# On disk


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_each_tensor_is_stored_once_in_its_shard(family, tmp_path):
    model = compress(tiny(family))
    records = write(model, tmp_path)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family == "gemma2")
    *blocks, rest = (load_file(tmp_path / record.file) for record in records)
    assert rest.keys() == {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    for i, block in enumerate(blocks):
        assert all(name.startswith(f"model.layers.{i}.") for name in block)
    files = {name: record.file for record, shard in zip(records, [*blocks, rest], strict=True) for name in shard}
    assert json.loads((tmp_path / INDEX).read_text())["weight_map"] == files
    assert [record.file for record in records] == sorted(p.name for p in tmp_path.glob("*.safetensors"))


def test_two_of_four_costs_nine_bits_a_weight(model, folder):
    with safe_open(folder / SHARD, "pt") as shard:
        parts = {part: shard.get_tensor(f"{LAYER}.{part}") for part in ("weight", "mask", "U", "V")}
    weights = model.get_submodule(LAYER).S.numel()
    assert 8 * (parts["weight"].nbytes + parts["mask"].nbytes) == 9 * weights
    described = {layer.name: layer for layer in describe(folder)}[LAYER]
    assert described.bytes == sum(t.nbytes for t in parts.values())
    assert (described.shape, described.kept, described.density) == ((48, 32), weights // 2, 0.5)
    assert (described.rank, described.dtype) == (3, "bfloat16")
    assert len(describe(folder)) == 21


def test_tensors_in_the_same_memory_are_written_twice_if_the_model_would_not_tie_them(tmp_path):
    one = torch.arange(4.0)
    shards.write_shard(tmp_path / "a.safetensors", {"x": one, "y": one, "z": one[1:3]})
    read = load_file(tmp_path / "a.safetensors")
    assert torch.equal(read["x"], one)
    assert torch.equal(read["y"], one)
    assert torch.equal(read["z"], one[1:3])


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_killed_writer_leaves_nothing_that_looks_finished(model, tmp_path, monkeypatch, error):
    def dying(_tensors, path, *_):
        path.write_bytes(b"half a shard")
        raise error

    writer = CheckpointWriter(tmp_path, model, Decoder.of(model))
    writer.write_block(0, model.model.layers[0])
    monkeypatch.setattr(shards, "save_file", dying)
    with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt):
        writer.write_block(1, model.model.layers[1])
    assert [path.name for path in tmp_path.iterdir()] == ["model-00001-of-00004.safetensors"]
    with pytest.raises(RunError, match=f"{SHARD} is missing"):
        writer.finish(model)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(InputError, match="not a finished model"):
        load(tmp_path)


def test_a_block_that_was_never_loaded_is_not_written(model, tmp_path):
    writer = CheckpointWriter(tmp_path, model, Decoder.of(model))
    with pytest.raises((InputError, RunError), match=r"loaded|off-loaded"):
        writer.write_block(0, model.model.layers[0].to("meta"))
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        CheckpointWriter(tmp_path / "file", model, Decoder.of(model))


def test_shared_blocks_are_refused(model, tmp_path):
    model.all_tied_weights_keys["model.layers.1.mlp.up_proj.weight"] = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(InputError, match="shared"):
        CheckpointWriter(tmp_path / "out", model, Decoder.of(model))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_block_comes_back_into_a_dense_one(model, folder, device):
    (folder / "config.json").unlink()  # unfinished
    block = tiny("llama", seed=5).model.layers[1].to(device)
    read_block(shard(folder, 1), LAYERS, 1, block)
    assert_same_bits(block, model.model.layers[1])
    assert all(p.requires_grad and p.device.type == "cpu" for p in block.parameters())


def test_a_block_that_does_not_fit_is_refused(folder):
    with pytest.raises(InputError, match="There is no shard of block 9 on record"):
        read_block(None, LAYERS, 9, tiny("llama").model.layers[0])
    with pytest.raises(InputError, match="no linear layer"):
        read_block(shard(folder, 1), LAYERS, 1, tiny("opt").model.decoder.layers[0])
    with pytest.raises(InputError, match=r"does not fit block 1.*pre_feedforward_layernorm"):
        read_block(shard(folder, 1), LAYERS, 1, tiny("gemma2").model.layers[0])
    larger = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, intermediate_size=56))
    with pytest.raises(InputError, match="should have the shape"):
        read_block(shard(folder, 1), LAYERS, 1, larger.model.layers[1])
    with pytest.raises(InputError, match="does not fit block 3"):
        read_block(shard(folder, 3), LAYERS, 3, tiny("llama").model.layers[0])  # the shard of all the rest


# Use by other libraries


def test_trainer_keeps_the_support_and_its_checkpoints_open(model, folder, tmp_path):
    opened = load(folder)
    trainer(opened, tmp_path / "run", max_steps=3).train()
    for name, layer in compressed_layers(model).items():
        before, after = layer.S, opened.get_submodule(name).S
        assert torch.equal(before == 0, after == 0)
        assert not after[before == 0].signbit().any()
        assert not torch.equal(before, after)
    assert_same_bits(opened, load(tmp_path / "run" / "checkpoint-3"))
    resumed = load(folder)
    trainer(resumed, tmp_path / "run", max_steps=3).train(resume_from_checkpoint=True)
    assert_same_bits(opened, resumed)


def test_saving_counts_the_values_again(folder, tmp_path):
    opened = load(folder)
    layer = opened.get_submodule(LAYER)
    with torch.no_grad():
        layer.S[0] = 0
    opened.save_pretrained(tmp_path / "again")
    assert {row.name: row.kept for row in describe(tmp_path / "again")}[LAYER] == layer.S.count_nonzero()
    assert_same_bits(opened, load(tmp_path / "again"))


def test_a_model_that_is_partly_on_disk_computes_but_is_not_saved(model, folder, tmp_path, ids):
    places = {"model.layers.1": "disk"} | {f"model.layers.{i}": "cpu" for i in (0, 2)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    opened = load(folder, device_map=places, offload_folder=str(tmp_path / "offload"))
    assert torch.equal(opened(ids).logits, model(ids).logits)
    with pytest.raises(InputError, match="off-loaded"):
        opened.save_pretrained(tmp_path / "again")


def test_lm_eval_scores_it(model, folder):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    request = instance("loglikelihood", {}, ("abcabc", "abc"), 0)
    tokenizer = tiny_tokenizer()
    (score,) = huggingface.HFLM(load(folder), tokenizer=tokenizer, batch_size=1).loglikelihood(
        [request], disable_tqdm=True
    )
    tokens = tokenizer("abcabcabc", return_tensors="pt").input_ids
    log_p = model(tokens).logits[0].float().log_softmax(-1)
    expected = sum(log_p[i - 1, tokens[0, i]] for i in range(6, 9))
    # lm-eval adds up in bfloat16, from logits of other shapes: each of three log-probabilities near −5 may be four
    # units in the last place (2⁻⁵) off
    assert score[0] == pytest.approx(expected.item(), abs=3 * 4 * 2**-5)


# Directories that are not to be trusted


def opens():
    return {"load": load, "from_pretrained": AutoModelForCausalLM.from_pretrained}


@pytest.fixture(params=opens())
def opening(request):
    return opens()[request.param]


@pytest.mark.parametrize("where", ["../evil.safetensors", "{folder}/../evil.safetensors"])
def test_an_index_that_leads_out_of_the_directory(folder, opening, where):
    shutil.move(folder / SHARD, folder / "../evil.safetensors")
    there = where.format(folder=folder)
    edit(folder / INDEX, lambda index: index["weight_map"].update({f"{LAYER}.U": there, f"{LAYER}.V": there}))
    with pytest.raises(InputError, match="directory"):
        opening(folder)
    assert "evil" in verify(folder)[0]


@pytest.mark.parametrize("name", ["a/b.safetensors", r"a\b.safetensors", "..", "", "model.bin", r"C:x.safetensors", 3])
def test_names_that_are_no_plain_file_names(name):
    with pytest.raises(InputError, match="not the name of a safetensors file"):
        shard_filename(name)


def test_a_link_that_leads_out_of_the_directory(folder, opening, tmp_path):
    (folder / SHARD).rename(tmp_path / SHARD)
    (folder / SHARD).symlink_to(tmp_path / SHARD)
    with pytest.raises(InputError, match="leads out of the model's directory"):
        opening(folder)


def test_links_of_a_cache_of_the_hub_are_followed(folder, tmp_path, opening):
    (tmp_path / "repository" / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "repository" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(tmp_path / "repository" / "blobs" / path.name)
        (snapshot / path.name).symlink_to(tmp_path / "repository" / "blobs" / path.name)
    opening(snapshot)


def test_an_adapter_beside_the_model_is_not_opened(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/where"}')
    with pytest.raises(InputError, match="holds an adapter"):
        load(folder)


@pytest.mark.parametrize("number", [3, "2", None, 2.0, True])
def test_a_newer_format(folder, opening, number):
    edit(folder / "config.json", lambda config: config["quantization_config"].update(format=number, layers=[], more=1))
    with pytest.raises(InputError, match=r"newer sparlow \(format .*Upgrade"):
        opening(folder)


def test_an_older_format_is_to_be_compressed_again(folder, opening):
    old = {"quant_method": "sparlow", "format": 1, "layers": {LAYER: {"kept": 768, "rank": 3}}}
    edit(folder / "config.json", lambda config: config.update(quantization_config=old))
    with pytest.raises(InputError, match=r"written by an older sparlow \(format 1, .*Compress the model again"):
        opening(folder)


@pytest.mark.parametrize(
    "record", [[0, 5], [0, 1536], [0, 2**40], [1, 768], [-1, 768], [0], [0, -1], [0, 768, 1], [True, 768], 7]
)
def test_records_that_the_shards_do_not_bear_out(folder, opening, record):
    edit(folder / "config.json", lambda config: config["quantization_config"]["layers"].update({LAYER: record}))
    with pytest.raises(InputError, match=rf"^(cannot open .*: )?{re.escape(LAYER)}: "):
        opening(folder)


@pytest.mark.parametrize(
    "change",
    [
        *({"pattern": "dense"}, {"pattern": "1:4"}, {"pattern": "2:5"}, {"pattern": "spread"}),
        *({"values": "fp32"}, {"values": "int4", "levels": "half", "group": 128}, {"values": "fp8"}, {"values": [1]}),
        *(
            {"factors": "int8"},
            {"factors": "fp16"},
            {"rank": 2},
            {"rank": -1},
            {"rank": 2.0},
            {"group": 64},
            {"new": 1},
        ),
    ],
)
def test_a_scheme_that_is_not_known_or_not_true_is_refused_by_the_name_of_a_layer(folder, opening, change):
    edit(folder / "config.json", lambda config: config["quantization_config"]["schemes"][0].update(change))
    with pytest.raises(InputError, match=r"model\.layers\.\d\.\w+\.\w+"):
        opening(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"values": "int5"},
        {"factors": "int4"},
        {"new": 1},
        {"pattern": "spread"},
        {"levels": "half"},
        {"decoded": "bf16"},
    ],
)
def test_what_only_a_newer_sparlow_writes_is_named_as_such(folder, opening, change):
    edit(folder / "config.json", lambda config: config["quantization_config"]["schemes"][0].update(change))
    with pytest.raises(InputError, match="newer sparlow, or is not supported yet"):
        opening(folder)


def test_experts_in_one_tensor_are_named_as_not_supported_yet(folder, opening):
    edit(folder / "config.json", lambda config: config["quantization_config"]["layers"].update({LAYER: [0, [3, 4]]}))
    with pytest.raises(InputError, match=rf"{re.escape(LAYER)}: Its experts are stored in one tensor.*not supported"):
        opening(folder)


def test_an_unknown_key_of_the_config(folder, opening):
    edit(folder / "config.json", lambda config: config["quantization_config"].update(more=1))
    with pytest.raises(InputError, match="'more', which a newer sparlow wrote"):
        opening(folder)


def test_a_model_of_another_size(folder, opening):
    edit(folder / "config.json", lambda config: config.update(intermediate_size=56))
    with pytest.raises(InputError, match=r"down_proj: It keeps 768 values, which a \(32, 56\) weight"):
        opening(folder)


def test_layers_that_the_model_does_not_have(folder, opening):
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=2))
    with pytest.raises(InputError, match="no linear layer of this name"):
        opening(folder)


def drop_bit(tensors):
    mask = tensors[f"{LAYER}.mask"]
    mask[0, 0] &= mask[0, 0] - 1  # the lowest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_bit, "The mask keeps 767 entries, but there are 768"),
        (lambda tensors: tensors.pop(f"{LAYER}.U"), "should have the tensors"),
        (lambda tensors: tensors.update({f"{LAYER}.bias": torch.zeros(48)}), "should have the tensors"),
        (lambda tensors: tensors.update({f"{LAYER}.mask": torch.zeros(48, 4)}), "should have the shape"),
    ],
)
def test_damaged_layers(folder, opening, change, message):
    spoil(folder / SHARD, change)
    with pytest.raises(InputError, match=message):
        opening(folder)


def test_missing_and_broken_shards(folder, opening):
    (folder / SHARD).write_bytes(b"no shard")
    with pytest.raises(InputError, match="damaged"):
        opening(folder)
    (folder / SHARD).unlink()
    with pytest.raises(InputError, match="missing"):
        opening(folder)


def test_a_missing_norm_is_not_made_up(folder):
    norm = "model.layers.1.input_layernorm.weight"
    spoil(folder / SHARD, lambda tensors: tensors.pop(norm))
    edit(folder / INDEX, lambda index: index["weight_map"].pop(norm))
    with pytest.raises(InputError, match=norm):
        load(folder)


def test_what_is_not_there_or_not_finished_is_called_so(tmp_path):
    with pytest.raises(InputError, match="There is no directory"):
        load(tmp_path / "none")
    (tmp_path / "sparlow.json").write_text('{"finished": false}')
    with pytest.raises(InputError, match="is an unfinished run"):
        load(tmp_path)


def test_directories_of_others(tmp_path):
    with pytest.raises(InputError, match="not a finished model"):
        load(tmp_path)
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not a model that sparlow compressed"):
        load(tmp_path)


# verify


def test_verify_finds_nothing_wrong_with_what_was_written(model, tmp_path):
    records = write(model, tmp_path)
    journal = {"shards": {r.file: {"bytes": r.bytes, "sha256": r.sha256} for r in records}}
    (tmp_path / "sparlow.json").write_text(json.dumps(journal))
    seen = {}
    assert verify(tmp_path, lambda name, S: seen.update({name: S})) == []
    assert seen.keys() == compressed_layers(model).keys()
    assert torch.equal(seen[LAYER], model.get_submodule(LAYER).S)


def test_verify_finds_what_is_wrong(model, tmp_path):
    records = write(model, tmp_path)
    journal = {"shards": {r.file: {"bytes": r.bytes, "sha256": r.sha256} for r in records}}
    (tmp_path / "sparlow.json").write_text(json.dumps(journal))
    spoil(tmp_path / SHARD, lambda tensors: tensors[f"{LAYER}.weight"].fill_(torch.nan))
    spoil(tmp_path / records[0].file, lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"))
    found = verify(
        tmp_path, lambda name, S: f"{name} is {len(S)} high" if name == "model.layers.2.mlp.up_proj" else None
    )
    assert found == [
        f"The shard {records[0].file} is not the one that was written: its checksum differs.",
        f"The shard {SHARD} is not the one that was written: its checksum differs.",
        f"model.layers.0.input_layernorm.weight is not in {records[0].file}.",
        f"{LAYER} holds numbers that are not finite.",
        "model.layers.2.mlp.up_proj is 48 high",
    ]
    (tmp_path / records[0].file).unlink()
    assert verify(tmp_path)[0] == f"The shard {records[0].file} is missing."
