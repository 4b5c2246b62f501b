"""Layers that are compressed behind those of their own block."""

import copy

import pytest
import torch

import sparlow
from families import save_tiny, tiny
from sparlow.linalg.gram import Gram, GramAccumulator
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.forward.block_pass import BlockPass, pass_through, run_block
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.decoder import Decoder
from sparlow.progress import Clock
from sparlow.recipe.budgets import select
from sparlow.recipe.recipe import Recipe
from sparlow.run import pipeline

WINDOWS = torch.randint(2, 97, (6, 20), generator=torch.Generator().manual_seed(1))
QUICK = Recipe(pattern="0.5", rank=2, options={"effort": 0.1, "max_steps": 2})
STAGES = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


@pytest.fixture
def solved(monkeypatch):
    """The Gram and the weight of every solve, in order."""
    found, solve = [], pipeline.solve

    def noting(algorithm, W, gram, *args, **options):
        found.append((W.clone(), gram.H.clone()))
        return solve(algorithm, W, gram, *args, **options)

    monkeypatch.setattr(pipeline, "solve", noting)
    return found


def compressed_block(recipe, outputs=None):
    """A dense block with its inputs, and the same after it was compressed."""
    model = tiny("llama")
    decoder, storage = Decoder.of(model), StoredDtypes.of(model)
    recording = capture_block_inputs(model, WINDOWS, micro_batch=2)
    dense = BlockPass(decoder.blocks[1], recording.calls[1], recording.hidden, decoder.label(1), 1)
    through = BlockPass(copy.deepcopy(dense.block), dense.calls, dense.hidden, dense.label, 1)
    budgets = select(model, decoder, recipe, storage).budgets
    pipeline.compress_block(through, recipe, budgets, storage, Clock(), lambda _: None, outputs)
    return dense, through


@torch.no_grad()
def gram_of(through, name):
    """The Gram of a layer's input in a plain forward of the block."""
    sums = GramAccumulator(through.block.get_submodule(name).in_features, torch.device("cpu"))
    hook = through.block.get_submodule(name).register_forward_pre_hook(lambda _, args: sums.add(args[0]))
    for i, x in enumerate(through.hidden):
        run_block(through.block, x, through.call(i))
    hook.remove()
    return Gram.damped(sums.second_moment(len(WINDOWS)), absolute=0.005, relative=0.005).H


@pytest.mark.parametrize("behind", ["layers", "blocks"])
def test_statistics_are_those_of_a_forward_with_the_layers_before_replaced(behind, solved):
    through, after = compressed_block(QUICK.changed(behind=behind))
    weights = {name: through.block.get_submodule(name).weight for stage in STAGES for name in stage}
    answers = compressed_layers(after.block)
    assert len(solved) == len(answers) == 7
    grams = {next(n for n, W in weights.items() if torch.equal(W, given)): H for given, H in solved}
    for stage in STAGES:
        for name in stage:
            torch.testing.assert_close(grams[name], gram_of(through, name), rtol=1e-5, atol=1e-6)
        if behind == "layers":
            for name in stage:
                through.block.set_submodule(name, answers[name])


def test_the_outputs_that_are_kept_are_those_of_the_dense_block():
    dense, _ = compressed_block(QUICK)
    outputs = dense.hidden.fresh()
    compressed_block(QUICK.changed(behind="layers"), outputs)
    with torch.no_grad():
        assert all(torch.equal(x, y) for x, y in zip(outputs, pass_through(dense), strict=True))


def test_the_order_decides_all_layers_but_those_of_the_first_stage_of_the_first_block():
    one, other = (tiny("llama") for _ in range(2))
    for model, behind in ((one, "blocks"), (other, "layers")):
        sparlow.compress(model, QUICK.changed(behind=behind), calibration=WINDOWS, evaluate=(), inplace=True)
    layers = zip(compressed_layers(one).items(), compressed_layers(other).values(), strict=True)
    same = [name for (name, layer), twin in layers if torch.equal(layer.S, twin.S) and torch.equal(layer.U, twin.U)]
    assert same == [f"model.layers.0.{name}" for name in STAGES[0]]


def test_the_published_order_looks_for_no_other(monkeypatch):
    monkeypatch.setattr(pipeline, "observe_dependences", lambda *_: 1 / 0)
    compressed_block(QUICK.changed(behind="blocks"))
    with pytest.raises(ZeroDivisionError):
        compressed_block(QUICK.changed(behind="layers"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "falcon_alibi", "qwen2_moe", "mamba", "gemma3n_text"])
def test_a_structure_from_end_to_end(family, tmp_path):
    save_tiny(family, tmp_path / "dense")
    recipe = Recipe(algorithm="sparsegpt", pattern="0.5", behind="layers")
    report = sparlow.compress(tmp_path / "dense", recipe, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    in_memory = tiny(family)
    sparlow.compress(in_memory, recipe, calibration=WINDOWS, evaluate=(), inplace=True)
    with torch.no_grad():
        expected = in_memory(WINDOWS, use_cache=False).logits
        found = sparlow.load(tmp_path / "out")(WINDOWS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not any("behind each other" in warning for warning in report.warnings)


def test_why_a_block_has_one_stage_stands_in_the_report(monkeypatch, tmp_path):
    save_tiny("llama", tmp_path / "dense")
    plain = pipeline.observe_dependences

    def circular(through, names):
        found = plain(through, names)
        found.before["self_attn.q_proj"].add("mlp.down_proj")
        return found

    monkeypatch.setattr(pipeline, "observe_dependences", circular)
    recipe = QUICK.changed(behind="layers")
    report = sparlow.compress(tmp_path / "dense", recipe, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    said = [warning for warning in report.warnings if "were not compressed behind each other, because" in warning]
    assert [warning.split(":")[0] for warning in said] == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
