"""A result leaves sparlow: what other programs open computes the same, and what cannot be is refused beforehand."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sparlow
from artefacts import edit
from command_line import run
from results import byte_tokenizer, logits, write_result
from sparlow.cli import display
from sparlow.exporting import _registry
from sparlow.exporting.adapter import RANKS, common_rank, targets
from sparlow.exporting.directory import with_older_names
from sparlow.exporting.export import MARK
from sparlow.exporting.lora import require_adapter
from sparlow.files import CONFIG

KINDS = ("sliding_attention", "full_attention")
FAMILIES = ("llama", "qwen2", "gemma2", "opt", "gpt2", "bloom")
TRAVEL = {"LICENSE", "chat_template.jinja", "preprocessor_config.json", "generation_config.json", "tokenizer.json"}
OLDER = {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # names before transformers 5


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A result with layers of the ranks 3, 0 and 9; for reading only."""
    folder = tmp_path_factory.mktemp("llama")
    write_result(folder, ranks=(3, 0, 9))
    return folder


def opened(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def require_plain(folder, source):
    """Nothing of sparlow is left in a directory, and all that belongs to any form of the model is there."""
    config = json.loads((folder / CONFIG).read_text())
    assert config.get("quantization_config", {}).get("quant_method") != "sparlow"
    assert {path.name for path in folder.iterdir()} >= TRAVEL
    assert not any((folder / name).exists() for name in ("sparlow.json", "recipe.toml", "report.json"))
    kept = json.loads((source / CONFIG).read_text())
    assert all(config[key] == value for key, value in kept.items() if key != "quantization_config")
    assert config.keys() - kept.keys() <= {"quantization_config", *OLDER}
    assert (
        AutoTokenizer.from_pretrained(folder)("Ab").input_ids == AutoTokenizer.from_pretrained(source)("Ab").input_ids
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_opens_as_any_model_and_computes_the_same(family, tmp_path):
    write_result(tmp_path / "in", family, embedding="int8")
    found = sparlow.export(tmp_path / "in", tmp_path / "out", form="merged")
    model = opened(tmp_path / "out")
    expected = sparlow.load(tmp_path / "in")
    assert type(model) is type(expected)
    assert torch.allclose(logits(model), logits(expected), atol=1e-4)
    require_plain(tmp_path / "out", tmp_path / "in")
    assert found.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "plain": ("llama", {"rope_type": "default", "rope_theta": 1e5}, {"rope_theta": 1e5}),
    "scaled": (
        "llama",
        SCALED | {"rope_theta": 5e5, "original_max_position_embeddings": 8192},
        {"rope_theta": 5e5, "rope_scaling": SCALED | {"original_max_position_embeddings": 8192}},
    ),
    "partial": (
        "phi3",
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "two of them": ("gemma3_text", {kind: {"rope_type": "default", "rope_theta": 1e6} for kind in KINDS}, {}),
}


@pytest.mark.parametrize("case", ROPES)
def test_programs_that_know_only_the_older_names_find_the_rotary_embedding(case):
    kind, rope, older = ROPES[case]
    config = AutoConfig.for_model(kind, rope_parameters=rope).to_dict()
    written = with_older_names({**config, "text_config": config})
    assert {key: written[key] for key in OLDER & written.keys()} == older
    assert written["text_config"] == {key: value for key, value in written.items() if key != "text_config"}
    assert all(written[key] == value for key, value in config.items())
    again = AutoConfig.for_model(**written["text_config"])
    assert again.rope_parameters == config["rope_parameters"]


def test_merged_rounds_once_to_the_type_of_the_model(tmp_path):
    write_result(tmp_path / "in", dtype=torch.bfloat16, values="int4", group=16)
    sparlow.export(tmp_path / "in", tmp_path / "out", form="merged")
    merged, state = opened(tmp_path / "out"), sparlow.load(tmp_path / "in")
    for name, layer in state.named_modules():
        if hasattr(layer, "low_rank_weight"):
            W = (layer.S.float() + layer.U.float() @ layer.V.float()).bfloat16()
            assert torch.equal(merged.get_submodule(name).weight, W), name


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_keeps_s_u_and_v_bit_for_bit(family, tmp_path):
    peft = pytest.importorskip("peft")
    write_result(tmp_path / "in", family, ranks=(3, 0, 9))
    sparlow.export(tmp_path / "in", tmp_path / "out", form="lora")
    require_plain(tmp_path / "out" / "base", tmp_path / "in")
    expected, base = sparlow.load(tmp_path / "in"), opened(tmp_path / "out" / "base")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, layer in expected.named_modules():
        if not hasattr(layer, "low_rank_weight"):
            continue
        S = base.get_submodule(name).weight
        assert torch.equal(S.T if type(base.get_submodule(name)).__name__ == "Conv1D" else S, layer.S), name
        A, B = (tensors.get(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        assert (A is None) == (layer.rank == 0), name
        if A is not None:
            assert A.shape[0] == B.shape[1] == 16
            assert torch.equal(A[: layer.rank], layer.V), name
            assert torch.equal(B[:, : layer.rank], layer.U), name
            assert not A[layer.rank :].any(), name
            assert not B[:, layer.rank :].any(), name
    with_adapter = peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert torch.allclose(logits(with_adapter), logits(expected), atol=1e-4)
    assert torch.allclose(logits(sparlow.open_adapter(tmp_path / "out")), logits(expected), atol=1e-4)


def scale_in_vllm(config):
    """vLLM's PEFTHelper: scale lora_alpha / r, only r up to a bound, nothing else is known of a layer."""
    assert config["r"] in {1, 8, 16, 32, 64, 128, 256, 320, 512}
    assert config["bias"] == "none"
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    return config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])


def scales_in_llama_cpp(config, tensors):
    """llama.cpp: one alpha a file, divided by the rank of each tensor."""
    return {name: config["lora_alpha"] / t.shape[1] for name, t in tensors.items() if name.endswith("lora_B.weight")}


def test_readers_that_know_only_r_and_alpha_get_the_scale_one(llama, tmp_path):
    sparlow.export(llama, tmp_path / "out", form="lora")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert scale_in_vllm(config) == 1
    assert set(scales_in_llama_cpp(config, tensors).values()) == {1.0}
    names = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    with safe_open(next((tmp_path / "out" / "base").glob("*1-of*.safetensors")), "pt") as shard:
        assert {f"{name}.weight" for name in names if ".0." in name} <= set(shard.keys())
    for name in names:  # servers look whether the last part is a module they know
        assert any(name == target or name.endswith(f".{target}") for target in config["target_modules"])
    assert not config["base_model_name_or_path"].startswith("/")
    assert re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config["base_model_name_or_path"].removeprefix("./"))
    assert config["base_model_name_or_path"].startswith("./")  # no id of a hub


def test_ranks_are_filled_up_to_one_that_servers_have():
    assert [common_rank([rank]) for rank in (1, 8, 9, 64, 65, 257, 321, 512)] == [8, 8, 16, 64, 128, 320, 512, 512]
    assert common_rank([3, 60, 17]) == 64
    assert set(RANKS) <= {1, 8, 16, 32, 64, 128, 256, 320, 512}
    with pytest.raises(sparlow.InputError, match=r"513, and servers take adapters of 512 at most. Export merged"):
        common_rank([4, 513])


def test_modules_are_named_by_their_ends_only_where_no_other_ends_alike():
    assert targets(["a.0.q", "a.1.q"], ["a.0.q", "a.1.q", "norm"]) == ["q"]
    assert targets(["a.0.q"], ["a.0.q", "a.1.q", "norm"]) == ["a.0.q"]


def test_one_adapter_is_not_for_weights_stored_both_ways():
    def stored(transposed):
        layers = {str(i): SimpleNamespace(scheme=SimpleNamespace(transposed=one)) for i, one in enumerate(transposed)}
        return SimpleNamespace(layers=layers)

    ranks = {"1": 3, "2": 3}
    for kinds in ((True, False, False), (False, True, True)):  # the first has no low-rank part
        assert require_adapter(stored(kinds), ranks) == 8
    with pytest.raises(sparlow.InputError, match=r"^Some layers of this model are stored as .* only. Export merged.$"):
        require_adapter(stored((True, True, False)), ranks)


def test_an_adapter_is_not_joined_to_another_base(llama, tmp_path):
    pytest.importorskip("peft")
    sparlow.export(llama, tmp_path / "out", form="lora")
    shard = tmp_path / "out" / "base" / "model-00001-of-00004.safetensors"
    tensors = load_file(shard)
    save_file({name: t + 1 for name, t in tensors.items()}, shard, {"format": "pt"})
    with pytest.raises(sparlow.InputError, match="is not the file that the adapter was made with"):
        sparlow.open_adapter(tmp_path / "out")
    shard.unlink()
    with pytest.raises(sparlow.InputError, match="is missing, so"):
        sparlow.open_adapter(tmp_path / "out")
    with pytest.raises(sparlow.InputError, match=r"sparlow-adapter.json is missing"):
        sparlow.open_adapter(tmp_path)


def test_what_cannot_be_expressed_is_refused_before_anything_is_written(llama, tmp_path, monkeypatch):
    write_result(tmp_path / "pruned", ranks=(0,))
    refused = {
        "lora": (tmp_path / "pruned", "nothing to put into an adapter"),
        "nothing": (llama, "There is no form 'nothing'"),
    }
    for form, (folder, said) in refused.items():
        with pytest.raises(sparlow.InputError, match=said):
            sparlow.export(folder, tmp_path / "out", form=form)
    monkeypatch.setattr("sparlow.exporting.adapter.RANKS", (8,))
    with pytest.raises(sparlow.InputError, match="The largest rank is 9"):
        sparlow.export(llama, tmp_path / "out", form="lora")
    with pytest.raises(sparlow.InputError, match="has no option 'rank'"):
        sparlow.export(llama, tmp_path / "out", form="merged", options={"rank": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_nothing_is_overwritten_unasked(llama, tmp_path):
    out = tmp_path / "out"
    sparlow.export(llama, out, form="merged")
    with pytest.raises(sparlow.InputError, match=r"holds an export. Choose another --out, or add --overwrite"):
        sparlow.export(llama, out, form="lora")
    assert json.loads((out / MARK).read_text())["form"] == "merged"
    sparlow.export(llama, out, form="lora", overwrite=True)
    assert not (out / CONFIG).exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for folder, said in {
        tmp_path / "mine": "holds no export of sparlow",
        llama: "lie in each other",
        llama / "inside": "lie in each other",
        llama.parent: "lie in each other",
        tmp_path / "mine" / "thesis.txt": "is no directory",
    }.items():
        with pytest.raises(sparlow.InputError, match=said):
            sparlow.export(llama, folder, form="merged", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert not (llama / "inside").exists()


def test_an_export_that_fails_leaves_nothing_and_the_old_one_as_it_was(tmp_path, monkeypatch):
    write_result(tmp_path / "in", ranks=(3,))
    sparlow.export(tmp_path / "in", tmp_path / "out", form="merged")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparlow.exporting.directory.write_shard", full)
    with pytest.raises(sparlow.RunError, match="No space left"):
        sparlow.export(tmp_path / "in", tmp_path / "out", form="merged", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_damage_is_told_with_the_name_of_the_layer(tmp_path):
    write_result(tmp_path / "in", values="int4", group=16)
    shard = tmp_path / "in" / "model-00002-of-00004.safetensors"
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.scale"].fill_(torch.nan)
    save_file(tensors, shard, metadata)
    with pytest.raises(
        sparlow.InputError, match=r"layers\.1\.mlp\.up_proj: Its scale holds numbers that are not finite"
    ):
        sparlow.export(tmp_path / "in", tmp_path / "out", form="merged")
    assert not (tmp_path / "out").exists()
    edit(tmp_path / "in" / CONFIG, lambda config: config.pop("quantization_config"))
    with pytest.raises(sparlow.InputError, match="is not a model that sparlow compressed"):
        sparlow.export(tmp_path / "in", tmp_path / "out", form="merged")
    (tmp_path / "in" / CONFIG).unlink()
    with pytest.raises(sparlow.InputError, match="is not a finished model"):
        sparlow.export(tmp_path / "in", tmp_path / "out", form="merged")


def test_the_command_lists_what_is_registered_and_exports(llama, tmp_path, capsys, monkeypatch):
    _registry.forms()  # or they would be registered in the copy alone
    monkeypatch.setattr(_registry, "_FORMS", dict(_registry._FORMS))

    @_registry.form("mine", keeps="a lot", loses="a bit", opened_by=("my program",))
    def mine(stored, *, size: int = 3):
        """A form of a test."""
        raise NotImplementedError

    monkeypatch.setattr(display.out, "_width", 400)  # nothing is wrapped
    assert run("export", "--list") == 0
    shown = capsys.readouterr().out
    for one in _registry.forms():
        for text in (one.name, one.keeps, one.loses, *one.opened_by, one.summary, *one.options):
            assert text in shown, text
    assert run("export", llama, "--out", tmp_path / "out", "--as", "lora") == 0
    shown = capsys.readouterr().out
    assert f"api_server --model {tmp_path / 'out'}/base --enable-lora --max-lora-rank 16" in " ".join(shown.split())
    assert run("export", llama, "--as", "lora") == 2
    assert "--out is missing" in capsys.readouterr().err


FORMS = {
    "merged": {},
    "lora": {},
    "compressed-tensors": {},
    "gguf": {"type": "q8_0", "weights": "sparse"},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_is_told_before_anything_is_written(form, tmp_path, monkeypatch):
    """What is said to be needed is what the large files take: their headers are all that comes on top."""
    if form == "gguf":
        pytest.importorskip("gguf")
    options = {"values": "int4", "levels": "integer", "group": 16, "pattern": "dense", "embedding": "int8"}
    write_result(tmp_path / "in", ranks=(3, 0, 9), tokenizer=byte_tokenizer(), **options)
    monkeypatch.setattr("sparlow.exporting.export.disk_available", lambda _: 1000)
    with pytest.raises(
        sparlow.InputError, match=r"^The export takes \d+\.\d [KM]B, and 1.0 KB are free for .*out. Free"
    ):
        sparlow.export(tmp_path / "in", tmp_path / "out", form=form, options=FORMS[form])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    monkeypatch.undo()
    asked = []
    monkeypatch.setattr("sparlow.exporting.export._require_space", lambda _, needed: asked.append(needed))
    sparlow.export(tmp_path / "in", tmp_path / "out", form=form, options=FORMS[form])
    files = [file for file in (tmp_path / "out").rglob("*") if file.suffix in (".safetensors", ".gguf")]
    headers = {".safetensors": lambda file: 8 + int.from_bytes(file.read_bytes()[:8], "little"), ".gguf": gguf_header}
    taken = sum(file.stat().st_size - headers[file.suffix](file) for file in files)
    assert asked[0] <= taken <= 1.02 * asked[0]  # GGUF fills up tensors to 32 bytes


def gguf_header(file):
    from gguf import GGUFReader

    return GGUFReader(file).data_offset
