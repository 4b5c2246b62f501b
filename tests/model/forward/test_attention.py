"""Attention that holds a score for every pair of tokens sees fewer windows at a time."""

import pytest
import torch
from transformers import AutoConfig

import sparlow
from families import save_tiny, tiny
from sparlow.evaluation.perplexity import perplexity
from sparlow.model.forward import attention
from sparlow.model.forward.attention import SCORES_AT_ONCE, TOKENS_AT_ONCE, unfused_heads, windows_at_once
from sparlow.model.loading.meta import meta_model
from sparlow.planning.workload import Structure, workload
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import RunOptions

WINDOWS = torch.randint(2, 97, (40, 16), generator=torch.Generator().manual_seed(1))
BOUND = 3 * 4 * 16 * 16  # scores of three windows and four heads
RECIPE = Recipe(algorithm="sparsegpt", pattern="0.5", samples=40, seqlen=16)
MATCHING = [{}, {"match": True, "match_preset": "blocks", "match_batch": 8}, {"match": True, "match_batch": 8}]


def largest_scores(model):
    """A list that takes the number of scores of every call of an attention from now on."""
    found = []
    for module in model.modules():
        if hasattr(module, "sinks"):
            module.register_forward_hook(lambda _m, _x, output: found.append(output[1][..., :16].numel()))
    return found


@pytest.mark.parametrize("changes", MATCHING)
def test_scores_of_attention_without_a_fused_kernel_are_bounded_in_every_pass(changes, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", BOUND)
    model = tiny("gpt_oss")
    assert unfused_heads(model.config) == 4
    found = largest_scores(model)
    sparlow.compress(model, RECIPE.changed(**changes), calibration=WINDOWS, evaluate=(), inplace=True)
    assert max(found) == BOUND
    found.clear()
    perplexity(model, WINDOWS)
    assert max(found) == BOUND


def test_fewer_windows_at_a_time_change_a_result_by_rounding_only(monkeypatch):
    def run():
        model = tiny("gpt_oss")
        report = sparlow.compress(model, RECIPE, calibration=WINDOWS, evaluate=(), inplace=True)
        return report, perplexity(model, WINDOWS)

    (at_once, value), _ = run(), monkeypatch.setattr(attention, "SCORES_AT_ONCE", BOUND)
    split, other = run()
    assert other.value == pytest.approx(value.value, rel=1e-4)
    errors = [[layer.relative_error for layer in report.layers] for report in (at_once, split)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert [layer.tokens for layer in at_once.layers] == [layer.tokens for layer in split.layers]


@pytest.mark.parametrize("changes", MATCHING)
def test_the_plan_counts_the_windows_that_pass_at_a_time(changes, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", BOUND)
    save_tiny("gpt_oss", tmp_path)
    options = RunOptions("cpu", "cpu", evaluate=())
    work = workload(Structure(meta_model(str(tmp_path))), RECIPE.changed(**changes), options)
    assert work.batch == 3 * 16
    assert work.at_once(16) == 3


def test_a_fused_kernel_and_short_windows_pass_as_before():
    assert windows_at_once(16, 0) == TOKENS_AT_ONCE // 16
    assert windows_at_once(128, 8) == TOKENS_AT_ONCE // 128
    assert windows_at_once(512, 32) == 2
    assert windows_at_once(512, 32) * 32 * 512**2 == SCORES_AT_ONCE
    assert windows_at_once(10**6, 32) == windows_at_once(10**6, 0) == 1
    llama = AutoConfig.for_model("llama", num_attention_heads=4)
    for kernel, heads in (("sdpa", 0), ("eager", 4), ("paged|eager", 4), ("paged|flash_attention_2", 0)):
        llama._attn_implementation_internal = kernel
        assert unfused_heads(llama) == heads
