"""What layers keep by default is fitted to them, and what decides instead of computing stays dense."""

import math
from types import MethodType

import pytest
import torch

import sparlow
from families import save_tiny, tiny
from samples import few_of
from sparlow.errors import InputError
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.forward import roles
from sparlow.model.forward.decoder import Decoder
from sparlow.model.forward.roles import READ
from sparlow.recipe.budgets import select
from sparlow.recipe.recipe import Recipe

WINDOWS = torch.randint(2, 97, (4, 16), generator=torch.Generator().manual_seed(1))
EXPERTS = "linear layer with an output for each of 12 experts"
GATE = "linear layer with fewer than 8 outputs (1)"
DECIDING = {
    "gemma4_moe": ("router.proj", EXPERTS),
    "afmoe": ("mlp.router.gate", EXPERTS),
    "hunyuan_v1_moe": ("mlp.gate.wg", EXPERTS),
    "jetmoe": ("mlp.router.layer", EXPERTS),
    "dbrx": ("ffn.router.layer", EXPERTS),
    "qwen2_moe": ("mlp.shared_expert_gate", GATE),
    "qwen3_next": ("mlp.shared_expert_gate", GATE),
    "mamba": ("mixer.dt_proj", READ),
    "jamba": ("mamba.dt_proj", READ),
}


def chosen(model, **recipe):
    return select(model, Decoder.of(model), Recipe(**recipe), StoredDtypes.of(model))


def foresee(folder, recipe):
    return sparlow.plan(folder, recipe.changed(samples=4, seqlen=16), timed=False, evaluate=())


@pytest.mark.parametrize("family", few_of(DECIDING, "afmoe", "qwen2_moe", "mamba"))  # one for each reason
def test_routers_gates_and_weights_that_are_read_stay_dense_with_the_reason(family, tmp_path):
    layer, why = DECIDING[family]
    save_tiny(family, tmp_path / "dense")
    recipe = Recipe(algorithm="magnitude", pattern="0.5")
    options = {"calibration": WINDOWS, "evaluate": ()}
    report = sparlow.compress(tmp_path / "dense", recipe, out=tmp_path / "out", **options)
    assert report.layers
    assert not [row.name for row in report.layers if row.name == layer]
    said = {row["name"]: row["why"] for row in report.not_compressed if row["name"].endswith(f".{layer}")}
    assert said
    assert set(said.values()) == {why}
    foreseen = foresee(tmp_path / "dense", recipe)
    assert {row["why"]: row["count"] for row in foreseen.not_compressed if row["name"].endswith(layer)} == {
        why: len(said)
    }
    assert {kind.pattern for kind in foreseen.layers if kind.name == layer} == {None}
    in_memory = sparlow.compress(tiny(family), recipe, inplace=True, **options)
    assert in_memory.not_compressed == report.not_compressed


def test_a_rule_that_names_a_router_wins():
    model = tiny("afmoe")
    assert chosen(
        model, algorithm="magnitude", layers=[{"match": "router.gate", "pattern": "0.25"}]
    ).budgets.keys() >= {
        "model.layers.1.mlp.router.gate",
        "model.layers.2.mlp.router.gate",
    }
    assert "model.layers.1.mlp.router.gate" in chosen(model, algorithm="magnitude").dense


def test_a_depthwise_convolution_is_no_set_of_experts():
    dense = chosen(tiny("mamba2"), algorithm="magnitude").dense  # the kernel of its convolution has three dimensions
    assert dense == {}


def test_what_only_looks_at_a_type_or_size_reads_no_weight(monkeypatch):
    model = tiny("llama")
    kind = type(model.model.layers[0].mlp)
    plain = kind.forward

    def looking(self, x):
        assert self.up_proj.weight.shape[1] == x.shape[-1]
        return plain(self, x.to(self.up_proj.weight.dtype))

    monkeypatch.setattr(kind, "forward", looking)
    assert chosen(model, algorithm="magnitude").dense == {}
    monkeypatch.setattr(kind, "forward", lambda self, x: plain(self, x) + 0 * self.up_proj.weight.sum())
    assert set(chosen(model, algorithm="magnitude").dense.values()) == {READ}


def test_models_of_one_code_and_one_size_are_run_without_weights_once(monkeypatch):
    looked, real = [], roles._read_elsewhere
    monkeypatch.setattr(roles, "_KNOWN", {})
    monkeypatch.setattr(roles, "_read_elsewhere", lambda model: looked.append(model) or real(model))
    for blocks in (None, None, 2, None):
        assert chosen(tiny("llama", blocks=blocks), algorithm="magnitude").dense == {}
    assert len(looked) == 2
    for _ in range(2):
        model = tiny("llama")
        mlp = model.model.layers[0].mlp
        mlp.forward = MethodType(lambda own, x: type(own).forward(own, x) + 0 * own.up_proj.weight.sum(), mlp)
        assert set(chosen(model, algorithm="magnitude").dense.values()) == {READ}
    assert len(looked) == 4  # code of its own is none of its class


def test_the_default_rank_never_stops_a_model_and_never_takes_more_than_dense(tmp_path):
    model = save_tiny("qwen2", tmp_path, dtype=torch.bfloat16)
    found = chosen(model)
    shapes = {name: weight.shape for name, weight in Decoder.of(model).layers()}
    for name, budget in found.budgets.items():
        size = math.prod(shapes[name]) * 2
        assert 0 < budget.rank < 64
        assert (
            budget.bytes(shapes[name], 2) <= size < type(budget)(budget.pattern, budget.rank + 1).bytes(shapes[name], 2)
        )
    assert any(
        "have a rank from 4 to 8 and not the default of 64, which is too large for them" in w for w in found.warnings
    )
    report = sparlow.compress(
        tmp_path, Recipe(options={"effort": 0.1}), calibration=WINDOWS, evaluate=(), out=tmp_path / "o"
    )
    assert report.bytes["linears_compressed"] <= report.bytes["linears_dense"]
    assert set(found.warnings) <= set(report.warnings)
    assert set(found.warnings) <= set(foresee(tmp_path, Recipe()).notes)


def test_a_rank_that_was_asked_for_is_obeyed_and_warned_about(tmp_path):
    save_tiny("qwen2", tmp_path)
    recipe = Recipe(rank=12, pattern="2:4", algorithm="eora", options={"prune": "magnitude"})
    report = sparlow.compress(tmp_path, recipe, calibration=WINDOWS, evaluate=(), out=tmp_path / "out")
    assert {row.rank for row in report.layers} == {12}
    said = [w for w in report.warnings if "layers take more than dense" in w]
    most = "21 of 21 layers take more than dense, the most model.layers.0.self_attn.k_proj with 166%. "
    assert said == [f"{most}Give them a lower rank or a sparser pattern, or leave them out with --ignore."]
    assert said[0] in foresee(tmp_path, recipe).notes


@pytest.mark.parametrize("compression", [0.05, 0.3])
def test_a_compression_never_takes_more_than_dense(compression):
    model = tiny("llama", dtype=torch.bfloat16)
    shapes = {name: weight.shape for name, weight in Decoder.of(model).layers()}
    found = chosen(model, compression=compression, rank_share=0.3)
    for name, budget in found.budgets.items():
        assert budget.bytes(shapes[name], 2) <= 2 * math.prod(shapes[name])
    with pytest.raises(
        InputError, match=r"every layer stays dense, model\.layers\.0.* that would take more than dense"
    ):
        chosen(model, compression=0.01, pattern="0.03")


def test_layers_whose_inputs_no_default_pattern_divides_stay_dense_and_others_are_counted():
    model = tiny("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj = torch.nn.Linear(46, 32, bias=False)
            block.mlp.gate_proj = torch.nn.Linear(32, 46, bias=False)
            block.mlp.up_proj = torch.nn.Linear(32, 46, bias=False)
            block.self_attn.o_proj = torch.nn.Linear(48, 32, bias=False)
    found = chosen(model, rank=4)
    why = "linear layer of 46 inputs, no multiple of 4 as the default patterns need"
    assert found.dense == {f"model.layers.{i}.mlp.down_proj": why for i in range(3)}
    assert "Of 18 layers 3 take 8:16, because 32 does not divide their inputs." in found.warnings
    with pytest.raises(InputError, match=r"down_proj: Pattern 2:4 needs a multiple of 4"):
        chosen(model, rank=4, pattern="2:4")
