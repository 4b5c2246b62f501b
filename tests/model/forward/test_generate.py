"""Text that a model writes itself: from its beginning, full windows, the same for the same seed."""

import math

import pytest
import torch
from safetensors.torch import load_file, save
from torch.nn import functional

import sparlow
from families import save_tiny, tiny
from sparlow.errors import InputError
from sparlow.model.forward import generate
from sparlow.model.forward.generate import own_windows
from sparlow.recipe.recipe import Recipe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARLOW_CACHE", str(tmp_path / "cache"))


def draw(model, samples=6, seqlen=12, seed=0, fingerprint="abc", **begun):
    return own_windows(model, samples=samples, seqlen=seqlen, seed=seed, fingerprint=fingerprint, **begun)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_windows_begin_with_the_beginning_and_never_end(family):
    model = tiny(family)
    windows = draw(model, samples=20, seqlen=40)
    assert windows.shape == (20, 40)
    assert windows.dtype == torch.int64
    assert (windows[:, 0] == 0).all()  # bos
    assert (windows[:, 1:] != 1).all()  # eos
    assert len({tuple(row) for row in windows.tolist()}) == 20


def test_the_same_seed_writes_the_same_text():
    model, state = tiny("llama"), torch.random.get_rng_state()
    first = draw(model, fingerprint="a")
    assert torch.equal(first, draw(model, fingerprint="b"))  # not from the cache
    assert not torch.equal(first, draw(model, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_windows_are_kept_for_the_run_that_is_resumed(monkeypatch):
    model = tiny("llama")
    first = draw(model)
    monkeypatch.setattr(generate, "_draw", lambda *_: pytest.fail("written again"))
    assert torch.equal(draw(model), first)


def test_another_run_may_write_the_same_text_at_the_same_time(tmp_path, monkeypatch):
    """As several processes of one machine did."""
    write, quicker, file = generate.save_file, [], tmp_path / "cache" / "self.safetensors"

    def interleaved(tensors, partial):
        write(tensors, partial)
        if not quicker:
            quicker.append(1)
            generate._keep(tensors["windows"], file)

    monkeypatch.setattr(generate, "save_file", interleaved)
    generate._keep(torch.arange(4), file)
    assert torch.equal(load_file(file)["windows"], torch.arange(4))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_broken_or_foreign_file_in_the_cache_is_not_believed(tmp_path):
    model = tiny("llama")
    first = draw(model)
    (file,) = (tmp_path / "cache").iterdir()
    good = file.read_bytes()
    for content in (
        b"",
        good[:-8],
        b"[" * 200_000,
        save({"windows": first.int()}),
        save({"windows": first[:, 1:].contiguous()}),
        save({"windows": first + 128}),
        save({"windows": first - 1}),
        save({"windows": first.clamp(min=5)}),
        save({"other": first}),
    ):
        file.write_bytes(content)
        assert torch.equal(draw(model), first)
        assert file.read_bytes() == good


def test_windows_without_their_beginning_are_what_follows_it():
    model = tiny("llama")
    whole = draw(model, seqlen=13)
    assert torch.equal(draw(model, kept=False), whole[:, 1:])
    two = draw(model, begin=(5, 0))
    assert (two[:, :2] == torch.tensor([5, 0])).all()
    assert two.shape == (6, 12)
    with pytest.raises(InputError, match="seqlen must be at least 2, not 1"):
        draw(model, begin=(5, 0), seqlen=1)


def test_batches_are_as_large_as_they_may_be(monkeypatch):
    sizes = []
    real = generate._draw
    monkeypatch.setattr(generate, "AT_ONCE", 4)

    def counting(model, start, count, *rest):
        sizes.append(count)
        return real(model, start, count, *rest)

    monkeypatch.setattr(generate, "_draw", counting)
    assert draw(tiny("llama"), samples=10).shape == (10, 12)
    assert sizes == [4, 4, 2]


def test_tokens_are_drawn_from_the_models_own_distribution():
    model = tiny("llama")
    with torch.no_grad():
        for p in model.get_output_embeddings().parameters():
            p.mul_(5)  # neither uniform nor one token alone
        windows = draw(model, samples=200, seqlen=2)
        logits = model(torch.zeros(1, 1, dtype=torch.int64)).logits[0, 0]
    logits[1] = -math.inf  # the end is not drawn
    expected = functional.softmax(logits, 0)
    seen = torch.bincount(windows[:, 1], minlength=len(expected)) / 200
    assert (expected * (1 - expected)).sum() > 0.2
    assert (seen - expected).abs().max() < 4 * (0.25 / 200) ** 0.5


def test_a_model_without_a_beginning():
    model = tiny("llama")
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = None
    with pytest.raises(InputError, match="no beginning-of-text token"):
        draw(model)


def test_compressing_without_any_text(tmp_path):
    save_tiny("llama", tmp_path / "model")
    recipe = Recipe(algorithm="wanda", calibration="self", samples=4, seqlen=8)
    report = sparlow.compress(tmp_path / "model", recipe, evaluate=(), out=tmp_path / "out")
    assert report.recipe["calibration"] == "self"
    again = sparlow.compress(tmp_path / "model", recipe, evaluate=(), out=tmp_path / "again")
    assert [layer.relative_error for layer in report.layers] == [layer.relative_error for layer in again.layers]
