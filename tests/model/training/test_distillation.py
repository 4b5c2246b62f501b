"""Laws of the last pass over all blocks: nearer to the answer, the same support, the same bits after a kill."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import sparlow
from families import linears, save_tiny, tiny
from samples import few_of
from sparlow.errors import RunError
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.forward.block_pass import BlockPass, pass_through
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading.source import open_model
from sparlow.model.training import distillation
from sparlow.model.training.distillation import distill
from sparlow.model.training.loop import MicroBatches
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.training_plan import PRESETS
from sparlow.run.journal import DISTILLED, Journal
from sparlow.run.verify import verify_artefact

PLAN = PRESETS["logits"].plan
WINDOWS = torch.randint(2, 97, (10, 16), generator=torch.Generator().manual_seed(1))


def compressed(family):
    """A model whose linears lost half of their entries, and its dense twin."""
    model = tiny(family)
    draw = torch.Generator().manual_seed(0)
    for block in Decoder.of(model).blocks:
        for name, linear in linears(block).items():
            W = linear.weight.detach()
            keep = torch.rand(W.shape, generator=draw) < 0.5
            U, V = (torch.randn(shape, generator=draw) * 0.01 for shape in ((len(W), 2), (2, W.shape[1])))
            block.set_submodule(name, SparseLowRankLinear(W * keep, U, V, linear.bias))
    return model, tiny(family)


def problem(family):
    model, dense = compressed(family)
    recording = capture_block_inputs(dense, WINDOWS, micro_batch=2, apart=2)
    wanted = recording.hidden
    with torch.no_grad():
        for block, calls in zip(Decoder.of(dense).blocks, recording.calls, strict=True):
            wanted = pass_through(BlockPass(block, calls, wanted))
    return model, dense, recording, wanted


def divergence(model, dense, windows):
    """From its definition, on whole logits."""
    with torch.no_grad():
        goal = functional.log_softmax(dense(windows).logits, -1)
    found = functional.log_softmax(model(windows).logits, -1)
    return (goal.exp() * (goal - found)).sum(-1).mean()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_losses_and_gradients_are_those_of_the_definition(family, monkeypatch):
    monkeypatch.setattr("sparlow.model.forward.capture.LOGITS_AT_ONCE", 3 * 2 * 97)  # many pieces
    model, dense, recording, wanted = problem(family)
    by_hand = copy.deepcopy(model)
    chain = distillation._Chain(list(Decoder.of(model).blocks), recording.calls)
    loss = distillation._Divergence(chain, model, recording.output)(0, recording.hidden[0], wanted[0])
    loss.backward()
    expected = divergence(by_hand, dense, WINDOWS[:2])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for p, q in zip(Decoder.of(model).blocks.parameters(), Decoder.of(by_hand).blocks.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-7)


def test_the_answer_comes_nearer_and_the_support_stays():
    model, dense, recording, wanted = problem("llama")
    blocks = list(Decoder.of(model).blocks)
    outside = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("model.layers.")}
    kept = {name: layer.S != 0 for name, layer in compressed_layers(model).items()}
    with torch.no_grad():
        before = divergence(model, dense, WINDOWS[8:])
    data = MicroBatches(recording.hidden, wanted, held_out=1)
    found = distill(model, blocks, recording, data, replace(PLAN, epochs=4, lr=2e-3, low_rank_lr=5e-4))
    with torch.no_grad():
        after = divergence(model, dense, WINDOWS[8:])
    assert found.loss_before == pytest.approx(before.item(), rel=1e-4)
    assert found.loss_after == pytest.approx(after.item(), rel=1e-3)
    assert after < 0.9 * before
    assert all(torch.equal(layer.S != 0, kept[name]) for name, layer in compressed_layers(model).items())
    assert all(torch.equal(p, outside[n]) for n, p in model.named_parameters() if n in outside)
    assert all(p.requires_grad for p in model.parameters())


def test_a_loss_that_is_not_finite_stops():
    model, _, recording, wanted = problem("llama")
    data = MicroBatches(recording.hidden, wanted)
    with pytest.raises(RunError, match="Distillation diverged"):
        distill(model, list(Decoder.of(model).blocks), recording, data, replace(PLAN, lr=1e30, low_rank_lr=1e30))


# In a run


def run(folder, out, **options):
    recipe = Recipe(algorithm="wanda", match=True, match_epochs=2, seed=3)
    options |= {"calibration": WINDOWS, "evaluate": (), "out": out, "inplace": out is None, "force": True}
    return sparlow.compress(folder, recipe, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    save_tiny("llama", place / "model", dtype=torch.bfloat16)
    return place / "model", place / "out", run(place / "model", place / "out")


def same_shards(a, b):
    names = {path.name for path in a.glob("*.safetensors")}
    assert names == {path.name for path in b.glob("*.safetensors")}
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_a_run_writes_what_it_trained(whole, tmp_path):
    model, out, report = whole
    assert verify_artefact(out) == []
    assert not (out / DISTILLED).exists()
    assert report.distillation["loss_after"] < report.distillation["loss_before"]
    plain = Recipe(algorithm="wanda", seed=3)
    without = sparlow.compress(model, plain, calibration=WINDOWS, evaluate=(), out=tmp_path / "plain")
    assert without.distillation == {}
    dense, (a, b) = tiny("llama"), (sparlow.load(folder, dtype=torch.float32) for folder in (out, tmp_path / "plain"))
    for name, layer in compressed_layers(a).items():
        assert torch.equal(layer.S != 0, compressed_layers(b)[name].S != 0)
    with torch.no_grad():
        assert divergence(a, dense, WINDOWS) < divergence(b, dense, WINDOWS)


def test_a_model_in_memory_ends_alike(whole):
    model = open_model(str(whole[0])).model.float()
    report = run(model, None, inplace=True)
    assert report.distillation["loss_after"] == pytest.approx(whole[2].distillation["loss_after"], rel=0.02)


@pytest.mark.parametrize("family", ["llama", "opt"])  # the second has dropout
def test_a_model_in_memory_is_in_eval_mode_afterwards(family):
    model = tiny(family)
    run(model, None, inplace=True)
    assert not [name for name, module in model.named_modules() if module.training]


@pytest.mark.parametrize("when", ["trained", "written", "recorded", "moved"])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(when, whole, tmp_path, monkeypatch):
    model, out, _ = whole

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "trained":
            patch.setattr("sparlow.run.recovery.Recovery._round", stop)
        elif when == "written":
            patch.setattr(Journal, "note_distilled", stop)
        elif when == "recorded":
            settle = Journal.settle
            patch.setattr(Journal, "settle", lambda self: stop() if self.record.distillation else settle(self))
        else:
            patch.setattr("sparlow.run.job.Job.finish_files", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out")
    if when == "recorded":  # and one shard has been moved
        (tmp_path / "out" / DISTILLED / "model-00001-of-00004.safetensors").replace(
            tmp_path / "out" / "model-00001-of-00004.safetensors"
        )
    if when in ("recorded", "moved"):
        monkeypatch.setattr("sparlow.run.recovery.distill", lambda *_, **__: pytest.fail("trained again"))
    run(model, tmp_path / "out")
    assert same_shards(out, tmp_path / "out")
    assert verify_artefact(tmp_path / "out") == []


@pytest.mark.parametrize("kept", few_of([1, 5, 7, 10], 5, 7))  # five steps an epoch
def test_a_run_that_is_killed_within_the_training_goes_on_there(kept, whole, tmp_path, monkeypatch):
    model, out, report = whole
    monkeypatch.setattr("sparlow.model.training.resume_state.EVERY", 0)
    numbers, keep = [], Journal.keep_training

    def spy(journal, tensors):
        keep(journal, tensors)
        numbers.append(journal.training.name)
        if len(numbers) == kept:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "keep_training", spy)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("training-*")] == [f"training-{kept}.safetensors"]
    again = run(model, tmp_path / "out")
    assert numbers == [f"training-{i}.safetensors" for i in range(1, 11)]  # no step was done twice
    assert same_shards(out, tmp_path / "out")  # and no state of the training is left
    assert {**again.distillation, "seconds": 0} == {**report.distillation, "seconds": 0}


def test_a_state_of_the_training_that_is_damaged_is_not_gone_on_from(whole, tmp_path, monkeypatch):
    model, out, _ = whole
    with monkeypatch.context() as patch:
        patch.setattr("sparlow.model.training.resume_state.EVERY", 0)
        patch.setattr("sparlow.run.recovery.Recovery._round", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out")
    (state,) = (tmp_path / "out").glob("training-*")
    content = bytearray(state.read_bytes())
    content[-9] ^= 255
    state.write_bytes(content)
    run(model, tmp_path / "out")
    assert same_shards(out, tmp_path / "out")


def test_a_shard_that_is_damaged_after_the_pass_brings_the_whole_run_again(whole, tmp_path, monkeypatch):
    model, out, _ = whole
    with monkeypatch.context() as patch:
        patch.setattr("sparlow.run.job.Job.finish_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out")
    (tmp_path / "out" / "model-00002-of-00004.safetensors").write_bytes(b"damaged")
    run(model, tmp_path / "out")
    assert same_shards(out, tmp_path / "out")
