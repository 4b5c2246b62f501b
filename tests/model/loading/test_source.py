import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

import sparlow
from families import save_tiny, tiny, tiny_tokenizer
from sparlow.cli.compressing import tell_needs
from sparlow.errors import InputError
from sparlow.files import cache_folder
from sparlow.model.loading import source
from sparlow.model.loading.source import find_embedded_gguf, open_model
from sparlow.model.loading.weights import scan
from sparlow.recipe.recipe import GIVEN_WINDOWS, Recipe
from sparlow.recipe.run_options import RunOptions


def fingerprint(model):
    return scan([model.state_dict(keep_vars=True)]).fingerprint


@pytest.fixture
def folder(tmp_path):
    save_tiny("llama", tmp_path / "tiny", dtype=torch.bfloat16)
    return tmp_path / "tiny"


class TestDirectory:
    @pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon", "bloom", "gpt2"])
    def test_opens_what_was_saved(self, name, tmp_path):
        saved = save_tiny(name, tmp_path)
        opened = open_model(str(tmp_path))
        assert opened.name == str(tmp_path)
        assert not opened.model.training
        ids = torch.tensor([opened.tokenizer("two tokens a word").input_ids])
        with torch.no_grad():
            assert torch.equal(opened.model(ids).logits, saved(ids).logits)

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            ("auto", torch.bfloat16),
            ("float32", torch.float32),
            ("bfloat16", torch.bfloat16),
            ("float16", torch.float16),
        ],
    )
    def test_gives_the_dtype_asked_for(self, dtype, expected, folder):
        model = open_model(str(folder), dtype=dtype).model
        assert {p.dtype for p in model.parameters()} == {expected}

    def test_needs_no_tokenizer(self, tmp_path):
        tiny("llama").save_pretrained(tmp_path)
        assert open_model(str(tmp_path)).tokenizer is None

    def test_tokenizer_survives(self, folder):
        tokenizer = open_model(str(folder)).tokenizer
        assert tokenizer.decode(tokenizer("What? A {tiny} one!\n").input_ids) == "What? A {tiny} one!\n"
        assert len(tokenizer) <= tiny("llama").config.vocab_size


class TestErrors:
    @pytest.mark.parametrize("dtype", ["float8", "bf16", ""])
    def test_unknown_dtype(self, dtype, folder):
        with pytest.raises(
            InputError, match=r"There is no data type .* Choose one of: auto, float32, bfloat16, float16"
        ):
            open_model(str(folder), dtype=dtype)

    def test_unknown_device(self, folder):
        with pytest.raises(InputError, match="There is no device 'nowhere'"):
            open_model(str(folder), device="nowhere")

    @pytest.mark.parametrize("name", ["./nothing-here", "/no/such/folder", "~/no/such/folder", "a/b/c"])
    def test_missing_directory(self, name):
        with pytest.raises(InputError, match=f"There is no directory {name}"):
            open_model(name)

    def test_missing_gguf(self, tmp_path):
        with pytest.raises(InputError, match="There is no file"):
            open_model(str(tmp_path / "model.gguf"))

    def test_no_model_directory(self, tmp_path):
        with pytest.raises(InputError, match=r"it has no config\.json"):
            open_model(str(tmp_path))

    def test_some_other_file(self, tmp_path):
        (tmp_path / "model.bin").touch()
        with pytest.raises(InputError, match=r"neither a directory nor a \.gguf file"):
            open_model(str(tmp_path / "model.bin"))

    def test_no_hub(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(
            InputError, match=r"Cannot open the model no-owner/of-that-name\. .* As an id of the hub: "
        ) as error:
            open_model("no-owner/of-that-name")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "unheard-of"}'])
    def test_unusable_config(self, config, folder):
        (folder / "config.json").write_text(config)
        with pytest.raises(InputError, match=r"Cannot open the model|config\.json cannot be read"):
            open_model(str(folder))

    def test_corrupt_weights(self, folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(InputError, match=r"model\.safetensors is damaged or cut short"):
            open_model(str(folder))

    def test_incomplete_weights(self, folder):
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"weights are missing \(1\), such as model\.layers\.1\.mlp\.up_proj"):
            open_model(str(folder))

    def test_pickled_weights_are_not_read(self, folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(InputError, match="Cannot open the model"):
            open_model(str(folder))

    def test_unusable_tokenizer(self, folder):
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(InputError, match="Cannot open the tokenizer"):
            open_model(str(folder))


class TestFingerprint:
    @pytest.mark.parametrize("name", ["opt", "gemma2", "falcon", "bloom", "gpt2"])
    def test_survives_saving_and_loading(self, name, tmp_path):
        model = tiny(name)
        model.save_pretrained(tmp_path)
        assert open_model(str(tmp_path)).fingerprint == fingerprint(model)

    def test_sees_every_bit_of_every_tensor(self):
        model = tiny("qwen2", dtype=torch.bfloat16)
        seen = {fingerprint(model)}
        for tensor in model.state_dict().values():
            tensor.view(torch.int16).view(-1)[-1] ^= 1
            seen.add(fingerprint(model))
        assert len(seen) == 1 + len(model.state_dict())

    def test_sees_names_dtypes_and_shapes(self):
        tensor = torch.zeros(2, 3)
        modules = [torch.nn.Module() for _ in range(4)]
        modules[0].register_buffer("a", tensor)
        modules[1].register_buffer("b", tensor)
        modules[2].register_buffer("a", tensor.T.contiguous())
        modules[3].register_buffer("a", tensor.int())
        assert len(set(map(fingerprint, modules))) == 4

    def test_counts_tied_weights_once(self):
        tied, untied = tiny("gemma2"), tiny("gemma2")
        untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
        assert fingerprint(tied) != fingerprint(untied)

    def test_takes_scalars_and_strided_tensors(self):
        module = torch.nn.Module()
        module.register_buffer("scalar", torch.tensor(3))
        module.register_buffer("strided", torch.arange(6.0).reshape(2, 3).T)
        before = fingerprint(module)
        module.strided = module.strided.contiguous()
        assert fingerprint(module) == before


def write_gguf(path, model, *, without=()):
    """Write a tiny llama and its tokenizer the way llama.cpp does, unquantised."""
    config, tokenizer = model.config, tiny_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    spelt = {" ": "\u0120", "\n": "\u010a"}  # as GPT-2 writes bytes that cannot be seen
    tokens = [*(spelt.get(t, t) for t in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))), "ab", "ba"]
    unused = [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens + unused)
    special, normal, not_used = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    writer.add_token_types([special] * 2 + [normal] * (len(tokens) - 2) + [not_used] * len(unused))
    writer.add_token_merges(["a b", "b a"])  # two: some releases take a single one apart
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name in model.state_dict().keys() - without:
        stored = tensor = model.state_dict()[name]
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp pairs rotary features differently
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            stored = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(stored.half().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny("llama"))
    return tmp_path / "tiny.gguf"


@pytest.fixture
def conversions(monkeypatch):
    done = []
    convert = source._convert
    monkeypatch.setattr(source, "_convert", lambda *args: (done.append(args), convert(*args)))
    return done


class TestGguf:
    @pytest.mark.transformers
    def test_gives_the_model_in_the_file(self, gguf_file, cache):
        opened = open_model(str(gguf_file))
        half = tiny("llama").half()
        weights = dict(opened.model.named_parameters())
        assert all(torch.equal(weights[name], p) for name, p in half.named_parameters())
        assert {type(m) for m in opened.model.modules()} == {type(m) for m in half.modules()}
        ids = opened.tokenizer("ab ba").input_ids
        assert opened.tokenizer.decode(ids) == "ab ba"
        assert (opened.tokenizer.bos_token, opened.tokenizer.eos_token) == ("<s>", "</s>")
        (entry,) = cache.iterdir()
        assert "quantization_config" not in json.loads((entry / "config.json").read_text())

    def test_is_converted_once(self, gguf_file, cache, conversions):  # noqa: ARG002 - cache is set
        first, second = open_model(str(gguf_file)), open_model(str(gguf_file), dtype="float32")
        assert len(conversions) == 1
        assert first.model.dtype == torch.float16
        assert second.model.dtype == torch.float32
        assert first.name == second.name == str(gguf_file)

    def test_another_process_may_be_quicker(self, gguf_file, cache, conversions, monkeypatch):
        rename = Path.rename

        def late(made, entry):
            shutil.copytree(made, entry)
            return rename(made, entry)

        monkeypatch.setattr(Path, "rename", late)
        assert open_model(str(gguf_file)).tokenizer is not None
        assert (len(conversions), len(list(cache.iterdir()))) == (1, 1)

    def test_is_read_once_by_all_of_a_command(self, gguf_file, cache, monkeypatch, tmp_path):  # noqa: ARG002 - cache is set
        done = []
        for owner, name in ((gguf.GGUFReader, "__init__"), (source, "sha256")):
            real = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *a, real=real, name=name: done.append(name) or real(*a))
        recipe = Recipe(algorithm="magnitude", calibration=GIVEN_WINDOWS, samples=2, seqlen=8)
        tell_needs(str(gguf_file), recipe, RunOptions("cpu", evaluate=()), tmp_path / "out")
        windows = torch.zeros(2, 8, dtype=torch.int64)
        sparlow.compress(gguf_file, recipe, calibration=windows, evaluate=(), out=tmp_path / "out")
        assert sorted(done) == ["__init__", "sha256"]
        assert gguf.GGUFReader.__name__ == "GGUFReader"  # it is as it was

    def test_is_converted_again_when_the_file_changes(self, gguf_file, cache, conversions):
        before = open_model(str(gguf_file)).fingerprint
        write_gguf(gguf_file, tiny("llama", seed=1))
        assert open_model(str(gguf_file)).fingerprint != before
        assert len(conversions) == len(list(cache.iterdir())) == 2

    def test_an_interrupted_conversion_is_not_taken_for_whole(self, gguf_file, cache, conversions, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedTokenizerBase, "save_pretrained", interrupted)  # called after the model's
            with pytest.raises(KeyboardInterrupt):
                open_model(str(gguf_file))
        assert not list(cache.iterdir())
        assert open_model(str(gguf_file)).tokenizer is not None
        assert len(conversions) == 2

    def test_what_a_killed_conversion_left_is_ignored(self, gguf_file, cache, conversions):
        digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
        half_done = cache / ".converting-killed" / f"tiny-{digest[:16]}"
        half_done.mkdir(parents=True)
        (half_done / "config.json").write_text("{}")
        assert open_model(str(gguf_file)).model.dtype == torch.float16
        assert len(conversions) == 1

    @pytest.mark.parametrize("size", [0, 4, 100, 1000, -1000])
    def test_refuses_a_broken_file(self, size, gguf_file, cache):
        gguf_file.write_bytes(gguf_file.read_bytes()[:size])
        with pytest.raises(InputError, match=r"Cannot open the (model|tokenizer)"):
            open_model(str(gguf_file))
        assert not list(cache.iterdir())

    def test_refuses_a_file_without_all_weights(self, gguf_file, cache):
        write_gguf(gguf_file, tiny("llama"), without={"model.layers.1.mlp.up_proj.weight"})
        with pytest.raises(InputError, match=r"weights are missing \(1\), such as model\.layers\.1\.mlp\.up_proj"):
            open_model(str(gguf_file))
        assert not list(cache.iterdir())

    @pytest.mark.parametrize("package", ["gguf", "accelerate"])
    def test_names_the_package_that_is_missing(self, package, gguf_file, cache, monkeypatch):  # noqa: ARG002 - cache is set
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
        with pytest.raises(InputError, match=rf"package {package}\. Run: pip install .sparlow\[gguf\]"):
            open_model(str(gguf_file))


class TestFolders:
    def test_cache_is_where_the_environment_says(self, tmp_path, monkeypatch):
        monkeypatch.delenv("SPARLOW_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_folder() == tmp_path / ".cache" / "sparlow"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder() == tmp_path / "xdg" / "sparlow"
        monkeypatch.setenv("SPARLOW_CACHE", str(tmp_path / "own"))
        assert cache_folder() == tmp_path / "own"

    def test_finds_a_gguf_file_in_a_package_without_importing_it(self, tmp_path, monkeypatch):
        package = tmp_path / "package_with_model"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError")
        monkeypatch.syspath_prepend(tmp_path)
        assert find_embedded_gguf("package_with_model") is None
        (package / "some.gguf").touch()
        assert find_embedded_gguf("package_with_model") == package / "some.gguf"
        assert find_embedded_gguf("package_that_is_not_there") is None
