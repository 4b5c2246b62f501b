"""What holds on an accelerator: the same commands, the results of the CPU within rounding, the same bits again.

What the methods themselves promise there is in ``algorithms/``.
"""

import math

import pytest
import torch
from safetensors.torch import load_file

import sparlow
from families import FAMILIES, save_tiny, tiny
from sparlow.evaluation.perplexity import perplexity
from sparlow.model.artefact.describe import changed_sparse_parts
from sparlow.progress import Progress
from sparlow.recipe.recipe import Recipe
from sparlow.run.verify import verify_artefact

pytestmark = pytest.mark.gpu

TEXT = "the sparse part stays and the low rank part learns what was lost. " * 12
QUICK = Recipe(rank=4, options={"effort": 0.1, "max_steps": 10}, samples=12, seqlen=16)
MATCH = {preset: QUICK.changed(match=True, match_preset=preset) for preset in ("logits", "blocks", "paper")}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def model(tmp_path):
    save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    return tmp_path / "model"


def compress(model, out, text, recipe=QUICK, **options):
    return sparlow.compress(model, recipe, calibration=text, out=out, evaluate=(text,), **{"device": "cuda"} | options)


def measured(report, when="compressed"):
    (found,) = getattr(report, when)["perplexity"].values()
    return found


def shards(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert all(torch.equal(tensor, other[name][key]) for key, tensor in tensors.items()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_a_model_is_compressed_as_on_the_cpu(family, dtype, text, tmp_path):
    save_tiny(family, tmp_path / "model", dtype=dtype)
    here, there = (compress(tmp_path / "model", tmp_path / d, text, device=d) for d in ("cpu", "cuda"))
    assert verify_artefact(tmp_path / "cuda") == []
    near = 1e-3 if dtype == torch.float32 else 0.03
    assert measured(there, "dense") == pytest.approx(measured(here, "dense"), rel=near)
    assert [(row.name, row.pattern, row.rank) for row in there.layers] == [
        (row.name, row.pattern, row.rank) for row in here.layers
    ]
    errors = [sum(row.relative_error for row in report.layers) for report in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)  # each block reads what other roundings made before it
    assert there.peak_memory["device"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_through_in_half_precision(family, text, tmp_path):
    save_tiny(family, tmp_path / "model", dtype=torch.bfloat16)
    assert math.isfinite(measured(compress(tmp_path / "model", tmp_path / "out", text, MATCH["logits"])))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_it_does_not_matter_where_hidden_states_wait(offload, model, text, tmp_path):
    compress(model, tmp_path / "auto", text)
    compress(model, tmp_path / offload, text, offload=offload)
    assert_same_bits(shards(tmp_path / "auto"), shards(tmp_path / offload))


class Stop:
    """Break off when so many blocks are done."""

    def __init__(self, blocks):
        self.blocks = blocks

    def __call__(self, step: Progress):
        if step.stage == "blocks" and step.done == self.blocks:
            raise KeyboardInterrupt


@pytest.mark.parametrize("recipe", [QUICK, *MATCH.values()], ids=["solves", *MATCH])
def test_a_run_that_was_broken_off_ends_in_the_same_bits(recipe, model, text, tmp_path):
    compress(model, tmp_path / "whole", text, recipe)
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", text, recipe, notify=Stop(2))
    compress(model, tmp_path / "out", text, recipe)
    assert_same_bits(shards(tmp_path / "whole"), shards(tmp_path / "out"))


@pytest.mark.parametrize("preset", MATCH)
@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matching_lowers_its_loss(dtype, family, preset, text, tmp_path):
    save_tiny(family, tmp_path / "model", dtype=dtype)
    recipe = MATCH[preset].changed(match_lr=5e-4, match_epochs=8)
    report = compress(tmp_path / "model", tmp_path / "out", text, recipe)
    rows = [report.distillation] if preset == "logits" else report.matching
    assert sum(row["loss_after"] for row in rows) < 0.99 * sum(row["loss_before"] for row in rows)
    assert verify_artefact(tmp_path / "out") == []


def test_perplexity_is_that_of_the_cpu():
    ids = torch.randint(2, 97, (5, 16), generator=torch.Generator().manual_seed(0))
    there, here = perplexity(tiny("llama").cuda(), ids), perplexity(tiny("llama"), ids)
    assert there.value == pytest.approx(here.value, rel=1e-4)


def test_fine_tuning_lowers_perplexity_and_leaves_the_support(model, text, tmp_path):
    pytest.importorskip("peft")
    compress(model, tmp_path / "out", text)
    options = {"dataset": text, "evaluate": (text,), "steps": 12, "lr": 5e-3, "block_size": 16, "batch": 2}
    report = sparlow.finetune(tmp_path / "out", tmp_path / "tuned", accumulate=1, device="cuda", bf16=True, **options)
    (before,), (after,) = (report.finetuning["perplexity"][when].values() for when in ("before", "after"))
    assert after < before
    assert changed_sparse_parts(tmp_path / "out", tmp_path / "tuned") == []


def test_the_model_writes_its_own_text(model, tmp_path):
    recipe = QUICK.changed(calibration="self")
    reports = [sparlow.compress(model, recipe, out=tmp_path / d, evaluate=(), device="cuda") for d in ("one", "two")]
    assert [row.relative_error for row in reports[0].layers] == [row.relative_error for row in reports[1].layers]


def test_memory_of_the_accelerator_is_foreseen(model, text):
    plan = sparlow.plan(model, QUICK, evaluate=(text,), device="cuda", timed=False)
    assert 0 < plan.peak_memory["device"] < plan.available["device"]
