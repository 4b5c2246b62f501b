"""What sparlow needs of transformers, and what becomes of it where a release has changed that.

``make test-transformers`` runs what is marked with the oldest and the newest release: end to end, few and quick.
"""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparlow
from families import save_tiny, tiny
from samples import few_of
from sparlow.errors import InputError
from sparlow.model import _transformers as private
from sparlow.model.artefact.hf_quantizer import SparlowConfig
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.loading.meta import meta_model
from sparlow.model.loading.source import open_model
from sparlow.planning.workload import Structure, workload
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import RunOptions

QUICK = Recipe(pattern="2:4", rank=2, options={"effort": 0.1, "max_steps": 5})
WINDOWS = torch.randint(2, 97, (6, 12), generator=torch.Generator().manual_seed(1))
SOURCES = sorted(Path(sparlow.__file__).parent.rglob("*.py"))


def held_whole(warnings):
    return [warning for warning in warnings if "The whole model was held in memory" in warning]


def logits(model):
    with torch.no_grad():
        return model(WINDOWS).logits


# Any release


# tied embeddings, fused projections, masks by position, experts that transformers merges
@pytest.mark.transformers
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "falcon_alibi", "mixtral"])
def test_what_is_compressed_opens_saves_and_opens_again(family, tmp_path):
    save_tiny(family, tmp_path / "dense")
    in_memory = open_model(str(tmp_path / "dense")).model
    sparlow.compress(in_memory, QUICK, calibration=WINDOWS, evaluate=(), inplace=True)
    expected = logits(in_memory)

    report = sparlow.compress(tmp_path / "dense", QUICK, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    assert not held_whole(report.warnings)  # it was read part by part
    assert not torch.equal(expected, logits(open_model(str(tmp_path / "dense")).model))
    opened = sparlow.load(tmp_path / "out")
    assert torch.equal(logits(opened), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)

    opened.save_pretrained(tmp_path / "saved")
    in_memory.save_pretrained(tmp_path / "from memory")
    for folder in ("saved", "from memory"):
        again = sparlow.load(tmp_path / folder)
        assert compressed_layers(again).keys() == compressed_layers(in_memory).keys()
        assert torch.equal(logits(again), expected)


@pytest.mark.transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_another_type_can_be_asked_for(dtype, tmp_path):
    save_tiny("llama", tmp_path / "dense", dtype=torch.bfloat16)
    sparlow.compress(tmp_path / "dense", QUICK, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    assert {p.dtype for p in sparlow.load(tmp_path / "out").parameters()} == {torch.bfloat16}
    opened = sparlow.load(tmp_path / "out", dtype=dtype)
    assert {p.dtype for p in opened.parameters()} == {dtype}
    opened.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(sparlow.load(tmp_path / "saved")), logits(opened))


def test_the_oldest_release_that_may_be_installed_is_tried():
    root = Path(__file__).parents[2]
    (allowed,) = re.findall(r'"transformers>=([\d.]+),', (root / "pyproject.toml").read_text("utf-8"))
    (tried,) = re.findall(r"^TRANSFORMERS \?= ([\d.]+) ", (root / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert tried == f"{allowed}.0"


# Names that transformers may change


def imported(path):
    """(module, name) of all that a file imports from modules of transformers."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("transformers."))


PRIVATE = Path(private.__file__)
NAMES = sorted(set(imported(PRIVATE)))
TRAINING = {  # looked for when they are needed
    "get_available_reporting_integrations": private.reporting_integrations,
    "is_torch_bf16_gpu_available": private.accelerator_takes_bf16,
    "DynamicLayer": private.cache_layer,
}


def test_private_names_are_imported_in_one_place():
    public = {  # documented, as is all that can be imported from the top
        ("transformers.utils", "logging"),
        ("transformers.generation.streamers", "BaseStreamer"),
        ("transformers.modeling_outputs", "CausalLMOutputWithPast"),
    }
    elsewhere = {found for path in SOURCES if path != PRIVATE for found in imported(path)}
    assert {(module, name) for module, name in elsewhere if module != "transformers"} == public


WITHOUT_A_NAME = """
import importlib, json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, Trainer
from transformers.quantizers import auto

model, names, results = Path(sys.argv[1]), json.loads(sys.argv[2]), {}
from transformers.models.llama import modeling_llama  # transformers has its own names before one is taken away
for module, name in names:
    for loaded in [m for m in sys.modules if m.split(".")[0] == "sparlow"]:
        del sys.modules[loaded]
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        mapping.pop("sparlow", None)
    owner = importlib.import_module(module)
    kept = getattr(owner, name)
    delattr(owner, name)
    import sparlow, sparlow.finetuning.finetune, sparlow.run.compress
    setattr(owner, name, kept)  # transformers itself goes on under another name
    found = sparlow.decompose(torch.randn(8, 8), torch.eye(8), pattern="2:4", rank=2)
    entry = results[name] = {"decomposes": found.S.count_nonzero().item() == 32}
    out = model.parent / name
    recipe = sparlow.Recipe(pattern="2:4", rank=2, options={"effort": 0.1, "max_steps": 5})
    windows = torch.arange(48).reshape(4, 12)
    try:
        entry["warnings"] = sparlow.compress(model, recipe, calibration=windows, evaluate=(), out=out).warnings
        entry["layers"] = len(sparlow.load(out).config.quantization_config.records)
    except sparlow.InputError as problem:
        entry["problem"] = str(problem)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def without(request, tmp_path_factory):
    """What happens where a name is missing, by the name; for all that the tests of this session ask for."""
    asked = {item.callspec.params["name"] for item in request.session.items if "without" in item.fixturenames}
    folder = tmp_path_factory.mktemp("without")
    save_tiny("llama", folder / "dense")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [folder / "dense", json.dumps([pair for pair in NAMES if pair[1] in asked])]
    command = [sys.executable, "-c", WITHOUT_A_NAME, *arguments]
    ended = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=300)
    return json.loads(ended.stdout)


STREAMING = {  # what only reading part by part needs
    "LoadStateDictConfig",
    "WeightRenaming",
    "cached_file",
    "convert_and_load_state_dict_in_model",
    "get_checkpoint_shard_files",
    "get_model_conversion_mapping",
    "rename_source_key",
    "revert_weight_conversion",
}


MISSING = [name for _, name in NAMES if name not in TRAINING]
QUICK_TO_TRY = [next(name for name in MISSING if (name in STREAMING) is streaming) for streaming in (True, False)]


@pytest.mark.slow
@pytest.mark.parametrize("name", few_of(MISSING, *QUICK_TO_TRY))
def test_a_name_that_is_missing(name, without):
    found = without[name]
    assert found["decomposes"]  # what needs no model works
    if name in STREAMING:
        (warning,) = held_whole(found["warnings"])
        assert warning.startswith(f"The whole model was held in memory, because transformers {private.VERSION} ")
        assert re.search(rf"cannot import name '{name}' from '[\w.]+'\.$", warning)
        assert found["layers"] == 21
    else:
        assert f"cannot import name '{name}'" in found["problem"]
        assert found["problem"].startswith("Compressed models cannot be opened or written: transformers ")


@pytest.mark.parametrize("name", TRAINING)
def test_a_name_that_training_misses(name, monkeypatch):
    (module,) = (module for module, found in NAMES if found == name)
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(InputError, match=name):
        TRAINING[name]()


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_replaced_for_a_while_may_be_gone(whole, monkeypatch):
    if whole:
        monkeypatch.setattr(private, "import_module", lambda name: importlib.import_module(f"{name}_of_old"))
    else:
        monkeypatch.delattr("transformers.core_model_loading.log_conversion_errors", raising=False)
        monkeypatch.delattr("transformers.masking_utils.find_packed_sequence_indices", raising=False)
    with private.raising_out_of_memory(), private.texts_of_their_own():
        assert "transformers.core_model_loading" in sys.modules


@pytest.mark.parametrize("name", ["rename_source_key", "get_model_conversion_mapping", "LoadStateDictConfig"])
def test_a_name_that_takes_something_else(name, tmp_path, monkeypatch):
    save_tiny("llama", tmp_path)
    monkeypatch.setattr(private, name, lambda *, other: other)
    opened = open_model(str(tmp_path), streamed=True)
    (warning,) = held_whole(opened.warnings)
    assert warning.startswith(f"The whole model was held in memory, because transformers {private.VERSION} read them")
    assert opened.on_disk is None
    assert torch.equal(logits(opened.model), logits(tiny("llama")))


def test_the_plan_knows_that_a_model_will_be_held_whole(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path)
    recipe, options = QUICK.changed(seqlen=12), RunOptions(device="cpu")
    assert workload(Structure(meta_model(str(tmp_path))), recipe, options).streamed
    monkeypatch.setattr("sparlow.planning.workload.NO_STREAMING", "it is another release")
    assert not workload(Structure(meta_model(str(tmp_path))), recipe, options).streamed


def test_nothing_is_opened_or_begun_where_the_format_is_not_known(tmp_path, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(private, "NO_FORMAT", "it is another release")
    for attempt in (
        lambda: sparlow.load(tmp_path),
        lambda: sparlow.compress(model, QUICK, calibration=WINDOWS, evaluate=(), inplace=True),
        SparlowConfig,
    ):
        with pytest.raises(InputError, match="Compressed models cannot be opened or written: it is another release"):
            attempt()
    assert not compressed_layers(model)
