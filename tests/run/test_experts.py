"""Mixtures of experts whose weights are fused: statistics of routed tokens, groups of experts, and the whole way."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sparlow
from families import save_tiny, tiny
from samples import few_of
from sparlow.distributed import ALONE
from sparlow.errors import InputError
from sparlow.linalg.error_curves import error_curve
from sparlow.linalg.gram import GramAccumulator
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.forward import fused_groups
from sparlow.model.forward.block_pass import BlockPass, run_block
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.forward.compressible import compressible, experts_apart
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.fused_groups import in_groups
from sparlow.model.forward.input_statistics import Stage, collect_statistics
from sparlow.progress import Clock
from sparlow.recipe.budgets import select
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import RunOptions
from sparlow.report.records import Report
from sparlow.run import pipeline, sensitivity
from sparlow.run.cases import recipes_for
from sparlow.run.compare import compare
from sparlow.run.experts import BORROWED, Pools, pools_of

WINDOWS = torch.randint(2, 97, (6, 20), generator=torch.Generator().manual_seed(1))
MAGNITUDE = Recipe(algorithm="magnitude", pattern="0.5", seqlen=20)
QUICK = Recipe(pattern="0.5", rank=2, seqlen=20, options={"effort": 0.1, "max_steps": 2})
SIX = ("mixtral", "gpt_oss", "dbrx", "jetmoe", "qwen3_next", "deepseek_v3")


def block_pass(family="mixtral", windows=WINDOWS):
    """The second block of a tiny model, dense, with what enters it; and the model."""
    model = tiny(family)
    decoder = Decoder.of(model)
    recording = capture_block_inputs(model, windows, micro_batch=2)
    return BlockPass(decoder.blocks[1], recording.calls[1], recording.hidden, decoder.label(1), 1), model


@torch.no_grad()
def routed(through):
    """What enters the experts, and the experts that were chosen for each token."""
    seen = []
    experts = through.block.get_submodule("mlp.experts")
    hook = experts.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    for i, x in enumerate(through.hidden):
        run_block(through.block, x, through.call(i))
    hook.remove()
    return [torch.cat(parts) for parts in zip(*seen, strict=True)]


def observed(through):
    names = tuple(compressible(through.block))
    experts_apart(through.block, names)
    stage = Stage(names, pools=pools_of(through.block, names))
    return collect_statistics(through, GramAccumulator, stage=stage)


def test_an_expert_is_observed_on_the_tokens_routed_to_it_and_no_others():
    through, _ = block_pass()
    hidden, chosen = routed(through)
    seen = observed(through)
    for number in range(4):
        own = hidden[(chosen == number).any(1)]
        statistic = seen.statistics[seen.owner[f"mlp.experts.gate_up_proj.{number}"]]
        assert statistic.tokens == len(own) > 0
        torch.testing.assert_close(statistic.second_moment(2), (own.T @ own))
        assert seen.statistics[seen.owner[f"mlp.experts.down_proj.{number}"]].tokens == len(own)
    everything = seen.statistics[seen.owner["mlp.experts (all tokens)"]]
    torch.testing.assert_close(everything.second_moment(2), hidden.T @ hidden)


def test_an_expert_borrows_from_all_tokens_the_less_the_more_it_has_seen():
    through, _ = block_pass()
    hidden, chosen = routed(through)
    seen = observed(through)
    pools = Pools(through.block, seen, ALONE)
    mean = (hidden.T @ hidden).double() / len(hidden)
    assert "mlp.experts (all tokens)" not in seen.owner
    for name, statistic in list(seen.statistics.items()):
        before, whole = statistic.second_moment(2), statistic.sum.clone()
        pools.shrink(name, statistic.sum, statistic.tokens)
        if "gate_up" in name:
            added = BORROWED * 32 * mean
            torch.testing.assert_close(statistic.second_moment(2), before + added.float())
        elif "down" in name:
            ratio = statistic.sum.diagonal() / whole.diagonal()
            torch.testing.assert_close(ratio, torch.full_like(ratio, 1 + BORROWED * 48 / statistic.tokens))
        else:
            assert torch.equal(statistic.sum, whole)
    torch.testing.assert_close(pools.instead("mlp.experts.gate_up_proj.2"), 2 * mean.float())
    assert pools.instead("mlp.experts.down_proj.2") is None
    assert pools.instead("self_attn.q_proj") is None
    assert (chosen < 4).all()


def test_groups_hold_the_layers_of_an_expert_together_and_no_more_than_fits(monkeypatch):
    features = {"q": 8, "e.up.0": 4, "e.up.1": 4, "e.up.2": 4, "e.gate.0": 4, "e.gate.1": 4, "e.gate.2": 4, "o": 8}
    assert in_groups(features, {"e.up", "e.gate"}) == [[*features]]
    monkeypatch.setattr(fused_groups, "TOGETHER", 2 * 2 * 16 * 8)
    assert in_groups(features, {"e.up", "e.gate"}) == [
        ["q", "e.up.0", "e.up.1", "e.gate.0", "e.gate.1", "o"],
        ["e.up.2", "e.gate.2"],
    ]
    monkeypatch.setattr(fused_groups, "TOGETHER", 1)
    assert [len(group) for group in in_groups(features, {"e.up", "e.gate"})] == [4, 2, 2]
    assert in_groups({}, ()) == [[]]


def compressed(recipe, family="mixtral"):
    through, model = block_pass(family)
    budgets = select(model, Decoder.of(model), recipe, StoredDtypes.of(model)).budgets
    pipeline.compress_block(through, recipe, budgets, StoredDtypes.of(model), Clock(), lambda _: None)
    return through.block.state_dict()


@pytest.mark.parametrize("behind", ["blocks", "layers"])
def test_several_passes_give_the_bits_of_one(behind, monkeypatch):
    recipe = Recipe(pattern="0.5", rank=2, options={"effort": 0.1, "max_steps": 2}, behind=behind)
    whole = compressed(recipe)
    monkeypatch.setattr(fused_groups, "TOGETHER", 1)
    parts = compressed(recipe)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_experts_that_no_token_reached_are_said_once_a_block_and_compressed_like_the_layer():
    model = tiny("hunyuan_v1_moe")
    windows = torch.arange(3, 7)[None]  # two of twelve experts for each of four tokens
    report = sparlow.compress(
        model, MAGNITUDE.changed(seqlen=4, samples=1), calibration=windows, evaluate=(), inplace=True
    )
    rows = {(row["block"], row["name"]): row for row in report.experts}
    assert rows.keys() == {(i, f"mlp.experts.{part}") for i in range(3) for part in ("gate_up_proj", "down_proj")}
    for (i, name), row in rows.items():
        assert row["experts"] == len(row["tokens"]) == 12
        assert sum(row["tokens"]) == 8
        assert sum(row["shares"]) == pytest.approx(1, abs=1e-4)
        assert len(row["unreached"]) >= 4
        told = [warning for warning in report.warnings if f"layers.{i}.{name}" in warning and "No calib" in warning]
        assert len(told) == 1
        assert f"{len(row['unreached'])} of 12 experts" in told[0]
    assert all(layer.S.isfinite().all() for layer in compressed_layers(model).values())


def test_an_allocation_by_error_sees_what_an_expert_without_tokens_borrows(monkeypatch):
    seen = []

    def noted(W, gram, *rest):
        seen.append(gram.H)
        return error_curve(W, gram, *rest)

    monkeypatch.setattr(sensitivity, "error_curve", noted)
    recipe = QUICK.changed(allocate="error", seqlen=4, samples=1)
    model = tiny("hunyuan_v1_moe", blocks=1)
    sparlow.compress(model, recipe, calibration=torch.arange(3, 7)[None], evaluate=(), inplace=True)
    without = [len(H) for H in seen if torch.equal(H, torch.eye(len(H)))]
    assert len(without) >= 4
    assert {*without} == {48}  # of down_proj: what others compute within themselves is nothing to borrow


@pytest.mark.parametrize("family", few_of(SIX, "mixtral"))
def test_a_mixture_goes_the_whole_way(family, tmp_path):
    model = save_tiny(family, tmp_path / "dense")
    report = sparlow.compress(tmp_path / "dense", QUICK, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    assert report.share_compressed > 0.9
    in_memory = tiny(family)
    sparlow.compress(in_memory, QUICK, calibration=WINDOWS, evaluate=(), inplace=True)
    with torch.no_grad():
        expected = in_memory(WINDOWS, use_cache=False).logits
        assert not torch.equal(expected, model(WINDOWS, use_cache=False).logits)
        opened = sparlow.load(tmp_path / "out")
        reloaded = opened(WINDOWS, use_cache=False).logits
        torch.testing.assert_close(reloaded, expected, rtol=1e-5, atol=1e-5)
        for mode in ("merged", "packed"):
            found = sparlow.load(tmp_path / "out", mode=mode)(WINDOWS, use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        sparlow.export(tmp_path / "out", tmp_path / "merged", form="merged")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(plain(WINDOWS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        opened.save_pretrained(tmp_path / "again")
        assert torch.equal(sparlow.load(tmp_path / "again")(WINDOWS, use_cache=False).logits, reloaded)
    for form in ("lora", "compressed-tensors", "gguf"):
        with pytest.raises(InputError, match=r"holds the weights of \d+ experts in one tensor.*Export merged"):
            sparlow.export(tmp_path / "out", tmp_path / form, form=form)
        assert not (tmp_path / form).exists()


@pytest.mark.parametrize("family", few_of(("gpt_oss", "dbrx"), "gpt_oss"))  # transposed, and flat too
def test_an_expert_that_is_left_out_stays_as_it_is_among_the_others(family, tmp_path):
    model = save_tiny(family, tmp_path / "dense")
    part = {"gpt_oss": "mlp.experts.down_proj", "dbrx": "ffn.experts.mlp.w2"}[family]
    recipe = MAGNITUDE.changed(ignore=(f"{part}.2",))
    sparlow.compress(tmp_path / "dense", recipe, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    in_memory = tiny(family)
    report = sparlow.compress(in_memory, recipe, calibration=WINDOWS, evaluate=(), inplace=True)
    row = next(row for row in report.experts if row["name"] == part)
    assert [number for number, tokens in enumerate(row["tokens"]) if tokens is None] == [2]
    left = [row["parameters"] for row in report.not_compressed if row["name"].endswith(f"{part}.2")]
    assert left == [in_memory.get_submodule(f"{Decoder.of(model).label(0)}.{part}.2").weight.numel()] * 3
    sparlow.export(tmp_path / "out", tmp_path / "merged", form="merged")
    merged = sparlow.load(tmp_path / "out", mode="merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = in_memory(WINDOWS, use_cache=False).logits
        assert torch.equal(sparlow.load(tmp_path / "out")(WINDOWS, use_cache=False).logits, expected)
        torch.testing.assert_close(merged(WINDOWS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain(WINDOWS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    experts = next(iter(report.experts))["experts"]
    for i in range(3):
        name = f"{Decoder.of(model).label(i)}.{part}"
        found = (one.get_parameter(name) for one in (model, merged, plain))
        before, *after = (p.unflatten(0, (experts, -1)) if p.ndim == 2 else p for p in found)
        assert all(torch.equal(one[2], before[2]) and not torch.equal(one[1], before[1]) for one in after)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{"match": True, "match_epochs": 1}, {"allocate": "error"}, {"allocate": "owl"}])
def test_experts_are_trained_and_allocated_like_other_layers_and_a_run_resumes_to_the_same_bits(recipe, tmp_path):
    save_tiny("mixtral", tmp_path / "dense")
    asked = Recipe.from_dict(QUICK.to_dict() | recipe | ({"rank": 0} if recipe.get("allocate") == "owl" else {}))

    def run(out, notify=lambda _: None):
        return sparlow.compress(
            tmp_path / "dense", asked, calibration=WINDOWS, evaluate=(), out=tmp_path / out, notify=notify
        )

    def stop(step):
        if step.stage == "blocks" and step.done == 2:
            raise KeyboardInterrupt

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop)
    run("parts")
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        one, other = load_file(file), load_file(tmp_path / "parts" / file.name)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_methods_are_compared_on_a_mixture(tmp_path):
    save_tiny("mixtral", tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(600)))
    base = Recipe(pattern="0.5", calibration=str(tmp_path / "text.txt"), samples=4, seqlen=16)
    recipes = recipes_for(base, ("magnitude", "wanda", "sparsegpt"), {})
    how = RunOptions(evaluate=[str(tmp_path / "text.txt")])
    found = compare(tmp_path / "model", recipes, out=tmp_path / "out", options=how, force=True)
    assert [row.name for row in found.rows] == ["magnitude", "wanda", "sparsegpt"]
    reports = [Report.from_file(tmp_path / "out" / row.name / "report.json") for row in found.rows]
    seen = [[row["tokens"] for row in report.experts if row["block"] == 0] for report in reports]
    assert seen[0] == seen[1] == seen[2]  # which the first block sees before any is compressed
    errors = [
        [layer.relative_error for layer in report.layers if ".experts." in layer.name and layer.block == 0]
        for report in reports
    ]
    assert all(len(one) == 8 for one in errors)  # four experts of two layers
    magnitude, wanda, sparsegpt = map(sum, errors)
    assert magnitude > wanda > sparsegpt > 0
