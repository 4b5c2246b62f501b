"""What a result goes into, and which model objects are taken: nothing is lost, and nothing changed unasked."""

import copy
import json
import tempfile
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import sparlow
from families import save_tiny, tiny, tiny_tokenizer
from samples import few_of
from sparlow.errors import InputError
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.loading.source import open_model
from sparlow.recipe.recipe import Recipe

QUICK = Recipe(pattern="2:4", rank=4, options={"effort": 0.1, "max_steps": 10})
PRUNE = Recipe(algorithm="magnitude", pattern="2:4", seqlen=16)
WINDOWS = torch.randint(2, 97, (8, 16), generator=torch.Generator().manual_seed(1))
TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(600))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def folder(place):
    save_tiny("llama", place / "model")
    return place / "model"


@pytest.fixture(scope="module")
def text(place):
    (place / "text.txt").write_text(TEXT)
    return place / "text.txt"


def compress(model, recipe=QUICK, **options):
    """Compress on token windows, without measuring; a model object in place."""
    # whether memory suffices is asked in tests/planning and on the command line; here it would be a third of the time
    fixed = {"calibration": WINDOWS, "evaluate": (), "inplace": isinstance(model, PreTrainedModel), "force": True}
    options = fixed | options
    with tempfile.TemporaryDirectory() as scratch:
        place = {} if options["inplace"] else {"out": Path(scratch) / "out"}
        return sparlow.compress(model, recipe, **place | options)


def logits(model):
    with torch.no_grad():
        return model(WINDOWS).logits


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("given", ["directory", "object"])
def test_a_result_that_would_be_lost_is_not_computed(given, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = folder if given == "directory" else tiny("llama")
    with pytest.raises(InputError, match=r"The result would be lost\. Give out= with a directory"):
        sparlow.compress(model, PRUNE, calibration=WINDOWS, evaluate=())
    with pytest.raises(InputError, match="inplace=True is for a model object"):
        sparlow.compress(folder, PRUNE, calibration=WINDOWS, evaluate=(), inplace=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("match", "training"),
    few_of(product([None, "blocks", "logits"], [True, False]), ("blocks", True), ("logits", False)),
)
def test_a_model_object_stays_as_it_is_unless_it_is_said_in_place(match, training, text, tmp_path):
    model = tiny("llama")
    model.train(training)
    model.model.layers[1].mlp.eval()
    recipe = QUICK if match is None else QUICK.changed(match=True, match_preset=match)
    before = dict(model.named_parameters())
    values, modes = copy.deepcopy(model.state_dict()), {name: m.training for name, m in model.named_modules()}
    tokenizer = tiny_tokenizer()
    options = {"calibration": WINDOWS, "tokenizer": tokenizer, "evaluate": [str(text)], "limit": 3}
    apart = sparlow.compress(model, recipe, out=tmp_path / "apart", **options)
    assert not compressed_layers(model)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(p is before[name] for name, p in model.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict().get("quantization_config") is None
    within = sparlow.compress(model, recipe, out=tmp_path / "within", inplace=True, **options)
    assert len(compressed_layers(model)) == len(apart.layers)
    assert shards(tmp_path / "apart") == shards(tmp_path / "within")
    assert apart.compressed == within.compressed
    assert apart.not_compressed == within.not_compressed
    assert model.training is training
    assert model.model.layers[0].mlp.up_proj.training is training
    assert not model.model.layers[1].mlp.training
    opened = sparlow.load(tmp_path / "apart")
    assert torch.equal(logits(opened), logits(model.eval()))


@pytest.mark.parametrize(
    "options", [{"recipe": QUICK.changed(dtype="bfloat16")}, {"device": "cuda:7"}], ids=["dtype", "device"]
)
def test_a_model_object_is_not_asked_to_be_otherwise_without_effect(options):
    with pytest.raises(InputError, match="has no effect on a model object"):
        compress(tiny("llama"), **options)


def test_windows_that_contradict_the_recipe_are_refused():
    for name, there in (("samples", 8), ("seqlen", 16)):
        with pytest.raises(InputError, match=f"The recipe says {name} = 9, and the windows given have {there}"):
            compress(tiny("llama"), QUICK.changed(**{name: 9}))


@pytest.mark.parametrize("made", ["wrapped", "added", "base"])
def test_a_model_with_an_adapter_is_refused_before_anything_is_written(made, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if made == "added":
        model.add_adapter(config)
    else:
        wrapped = peft.get_peft_model(model, config)
        model = wrapped if made == "wrapped" else wrapped.get_base_model()
    for call in (sparlow.compress, sparlow.plan):
        with pytest.raises(InputError, match="Merge it first"):
            call(model, QUICK, out=tmp_path / "out", evaluate=())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_a_model_whose_weights_are_elsewhere_is_refused(where, tmp_path):
    from accelerate import cpu_offload, disk_offload

    model = tiny("llama")
    if where == "disk":
        disk_offload(model, str(tmp_path / "offloaded"), execution_device="cpu")
    else:
        cpu_offload(model, execution_device="cpu")
    with pytest.raises(InputError, match=r"not in memory .* Give the directory"):
        sparlow.compress(model, QUICK, calibration=WINDOWS, out=tmp_path / "out", evaluate=())
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_said_to_be_none(tmp_path):
    with pytest.raises(InputError, match="not Linear"):
        sparlow.compress(torch.nn.Linear(4, 4), QUICK, out=tmp_path / "out")


def test_weights_that_opening_rounds_are_told(tmp_path):
    save_tiny("llama", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    (warning,) = compress(tmp_path / "model", PRUNE).warnings
    assert "stored as float32, but were opened (and so rounded) as bfloat16" in warning
    assert "--dtype float32" in warning
    assert open_model(str(tmp_path / "model")).warnings == (warning,)
    for dtype in ("float32", "bfloat16"):  # asked for
        assert compress(tmp_path / "model", PRUNE.changed(dtype=dtype)).warnings == []


UNDONE, LARGE_STEPS, EXACT = ("bfloat16", 1e-6, True), ("bfloat16", 1e-2, False), ("float32", 1e-6, False)


@pytest.mark.parametrize(
    ("dtype", "lr", "undone", "preset"),
    few_of(
        [(*case, preset) for case in (UNDONE, LARGE_STEPS, EXACT) for preset in ("blocks", "logits")],
        *[(*case, "blocks") for case in (UNDONE, LARGE_STEPS, EXACT)],
        (*UNDONE, "logits"),
    ),
)
def test_training_that_rounding_undid_is_told(dtype, lr, undone, preset, tmp_path):
    save_tiny("llama", tmp_path, dtype=getattr(torch, dtype))
    recipe = QUICK.changed(match=True, match_preset=preset, match_lr=lr)
    found = [w for w in compress(tmp_path, recipe).warnings if "undid the training" in w]
    assert len(found) == undone, found
    assert all("rounding to bfloat16" in w and "--match-lr" in w for w in found)
