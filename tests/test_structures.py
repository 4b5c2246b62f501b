"""Ten kinds of blocks from end to end in one process; benchmarks/families.py tries every type that transformers has."""

import pytest
import torch

import sparlow
from families import save_tiny, tiny
from samples import few_of
from sparlow.evaluation.perplexity import perplexity
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.loading.source import open_model
from sparlow.progress import Clock
from sparlow.recipe.recipe import Recipe
from sparlow.run.passes import BlockwiseRunner

WINDOWS = torch.randint(2, 97, (6, 20), generator=torch.Generator().manual_seed(1))
TEN = (
    *("gemma4_text", "gemma4_moe", "qwen3_next", "deepseek_v3", "jetmoe"),
    *("gpt_oss", "falcon_h1", "mamba", "jamba", "gpt2"),
)


@pytest.mark.slow
@pytest.mark.parametrize("family", few_of(TEN, "gemma4_text", "gemma4_moe", "qwen3_next", "falcon_h1", "jamba"))
def test_a_structure_from_end_to_end(family, tmp_path):
    model = save_tiny(family, tmp_path / "dense")
    plain = perplexity(model, WINDOWS).value
    opened = open_model(str(tmp_path / "dense"), streamed=True)
    runner = BlockwiseRunner(opened, "auto", Clock(), lambda _: None)
    found = runner.measure("dense perplexity", WINDOWS, opened.weights).perplexity.value
    assert found == pytest.approx(plain, rel=1e-5)

    recipe = Recipe(algorithm="magnitude", pattern="0.5")
    report = sparlow.compress(tmp_path / "dense", recipe, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    in_memory = tiny(family)
    sparlow.compress(in_memory, recipe, calibration=WINDOWS, evaluate=(), inplace=True)
    with torch.no_grad():
        expected = in_memory(WINDOWS, use_cache=False).logits
        found = sparlow.load(tmp_path / "out")(WINDOWS, use_cache=False).logits
        assert not torch.equal(expected, model(WINDOWS, use_cache=False).logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    biases = sum(layer.bias.numel() for layer in compressed_layers(in_memory).values() if layer.bias is not None)
    counted = sum(row["parameters"] for row in report.not_compressed) + report.parameters["compressed"]
    assert counted + biases == report.parameters["model"]
    assert report.share_compressed > 0
