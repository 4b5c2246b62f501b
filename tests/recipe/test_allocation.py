import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparlow
from families import linears, save_tiny, tiny
from sparlow.errors import InputError, RunError
from sparlow.linalg.patterns import NM, Unstructured, parse_pattern
from sparlow.model.artefact.describe import describe
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.forward.decoder import Decoder
from sparlow.recipe.allocation import (
    Budget,
    Offer,
    Rule,
    error_driven,
    matches,
    offered,
    owl_densities,
    ratio_rank,
    ratio_share,
    ratio_sparsity,
    require_total,
)
from sparlow.recipe.recipe import Recipe
from sparlow.run import job
from sparlow.run.output_dir import NAME
from sparlow.run.verify import verify_artefact

fractions = st.floats(0.01, 0.99)
shapes = st.tuples(st.integers(1, 4096), st.integers(1, 4096))
WINDOWS = torch.randint(2, 97, (8, 16), generator=torch.Generator().manual_seed(1))
OWL = Recipe(algorithm="wanda", pattern="0.5", allocate="owl", owl_threshold=2.0)
BY_ERROR = Recipe(algorithm="eora", options={"prune": "magnitude"}, rank=3, allocate="error")


# Arithmetic


@given(compression=fractions, share=fractions, shape=shapes)
def test_a_ratio_keeps_what_it_says(compression, share, shape):
    weights, line = shape[0] * shape[1], sum(shape)
    rank = ratio_rank(compression, share, shape)
    low_rank = share * (1 - compression) * weights
    assert low_rank - line - 1e-6 * weights <= rank * line <= low_rank * (1 + 1e-6) + 1e-6 * line
    sparse = (1 - ratio_sparsity(compression, share)) * weights
    assert sparse + low_rank == pytest.approx((1 - compression) * weights, rel=1e-9)


@given(compression=fractions, density=fractions)
def test_the_share_is_what_the_pattern_leaves(compression, density):
    pattern = Unstructured(1 - density)
    if pattern.density >= 1 - compression:  # 1 − (1 − density), rounded
        with pytest.raises(InputError, match=r"Give a (compression below|sparser pattern)"):
            ratio_share(compression, pattern)
    else:
        share = ratio_share(compression, pattern)
        assert ratio_sparsity(compression, share) == pytest.approx(1 - density, abs=1e-9)


@given(
    outliers=st.lists(st.floats(0, 1), min_size=1, max_size=40),
    sparsity=st.floats(0.3, 0.7),
    spread=st.floats(0, 0.12),
)
def test_owl_keeps_the_mean_and_the_order_and_spans_twice_the_spread(outliers, sparsity, spread):
    densities = owl_densities(outliers, [7] * len(outliers), sparsity, spread)
    assert sum(densities) / len(densities) == pytest.approx(1 - sparsity, abs=1e-9)
    span = 2 * spread if max(outliers) > min(outliers) else 0
    assert max(densities) - min(densities) == pytest.approx(span, abs=1e-9)
    for a, x in zip(outliers, densities, strict=True):
        for b, y in zip(outliers, densities, strict=True):
            assert a >= b or x <= y + 1e-11


def test_owl_counts_each_block_by_its_weights():
    sizes = [100, 900]
    densities = owl_densities([0.3, 0.1], sizes, 0.5, 0.08)
    assert sum(n * d for n, d in zip(sizes, densities, strict=True)) == pytest.approx(500)
    assert densities[0] - densities[1] == pytest.approx(0.16)


@pytest.mark.parametrize("kept", [0.4, 0.6])
def test_an_allocation_that_keeps_another_total_stops_the_run(kept):
    shapes = {"a": (100, 100), "b": (10, 100)}
    a, b = (Budget(Unstructured(0.5), 0).values(shape) for shape in shapes.values())
    require_total([a, b], 5500)
    other = Budget(Unstructured(1 - kept), 0).values(shapes["a"])
    with pytest.raises(RunError, match="where 5,500 were asked for"):
        require_total([other, b], 5500)
    if kept < 0.5:
        require_total([other, b], 5500, exactly=False)


def test_owl_keeps_the_sparsity_that_was_asked_for_where_blocks_differ():
    report = compress(tiny("jamba"), OWL.changed(algorithm="magnitude", owl_threshold=1.5, owl_spread=0.2))
    assert len({layer.density for layer in report.layers}) > 2
    per_block = [sum(math.prod(row.shape) for row in report.layers if row.block == i) for i in range(4)]
    assert max(per_block) > 1.5 * min(per_block)
    kept, of = report.values["linears_compressed"], report.values["linears_dense"]
    assert kept / of == pytest.approx(0.5, abs=2e-3)


def test_owl_out_of_range_is_refused():
    with pytest.raises(InputError, match="Lower --owl-spread"):
        owl_densities([0.0, 0.1, 0.1, 0.1], [1, 1, 1, 1], 0.95, 0.08)


def offers(curves):
    """Offers of layers whose errors at 0, 1, 2, … values are given."""
    return {
        name: [Offer(Budget(NM(2, 4), values), values, error) for values, error in enumerate(curve)]
        for name, curve in curves.items()
    }


falling = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(
    lambda drops: [float(sum(sorted(drops)[:n])) for n in range(len(drops), -1, -1)]  # steep first: convex
)


@given(curves=st.dictionaries(st.text("abcd", min_size=1, max_size=2), falling, min_size=1, max_size=4), data=st.data())
def test_errors_of_even_price_are_brought_down_as_far_as_any_choice_can(curves, data):
    values = data.draw(st.integers(0, sum(len(curve) - 1 for curve in curves.values())))
    chosen = error_driven(offers(curves), values)
    assert sum(budget.rank for budget in chosen.values()) <= values
    choices = product(*(range(len(curve)) for curve in curves.values()))
    best = min(
        sum(curve[n] for curve, n in zip(curves.values(), choice, strict=True))
        for choice in choices
        if sum(choice) <= values
    )
    assert sum(curves[name][budget.rank] for name, budget in chosen.items()) == pytest.approx(best)


def test_an_offer_above_the_line_between_its_neighbours_is_never_taken():
    curves = {"a": [9.0, 8.9, 0.0], "b": [5.0, 4.0, 3.5]}
    assert [error_driven(offers(curves), n)["a"].rank for n in range(5)] == [0, 0, 2, 2, 2]
    assert [error_driven(offers(curves), n)["b"].rank for n in range(5)] == [0, 1, 0, 1, 2]


def test_offers_lie_around_the_uniform_budget():
    found = offered(Budget(Unstructured(0.5), 8), (64, 48), 2, low_rank=True)
    assert {pattern.sparsity for pattern in found} == {0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7}
    assert found[Unstructured(0.7)] == list(
        range(0, 18, 2)
    )  # 18 * (64 + 48) and a mask is more than the weight has to spare
    assert offered(Budget(NM(2, 4), 8), (64, 48), 2, low_rank=True) == {NM(2, 4): list(range(0, 14, 2))}
    assert offered(Budget(NM(2, 4), 0), (64, 48), 2, low_rank=True) == {NM(2, 4): [0]}
    assert (
        offered(Budget(NM(2, 4), 13), (16, 12), 2, low_rank=True)[NM(2, 4)][-1] == 13
    )  # what was asked for is offered


@pytest.mark.parametrize("pattern", ["2:4", "0.5", "0.512345678901", "dense"])
def test_a_budget_in_a_file(pattern):
    budget = Budget(parse_pattern(pattern), 3)
    assert budget.to_dict()["pattern"] == pattern
    assert Budget.from_dict(budget.to_dict()) == budget


def test_values_of_a_budget():
    assert Budget(NM(2, 4), 3).values((10, 8)) == 40 + 54
    assert Budget(Unstructured(0.75), 0).values((10, 8)) == 20


@pytest.mark.parametrize(
    ("pattern", "name", "right"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("attn.q_proj", "model.layers.0.self_attn.q_proj", False),  # only at a dot
        ("self_attn", "model.layers.0.self_attn.q_proj", False),  # only at the end
        ("self_attn.*", "model.layers.0.self_attn.q_proj", True),
        ("layers.1.*", "model.layers.11.self_attn.q_proj", False),
        ("model.layers.?.*.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("Q_proj", "model.layers.0.self_attn.q_proj", False),
    ],
)
def test_names_match_at_their_end(pattern, name, right):
    assert matches(pattern, name) is right


# In a run


def compress(model, recipe, **options):
    usual = {"calibration": WINDOWS, "evaluate": (), "inplace": "out" not in options}
    return sparlow.compress(model, recipe, **usual | options)


def direct_densities(model, threshold, sparsity, spread):
    """OWL as the paper has it, with every input held in memory."""
    shares = []
    blocks = Decoder.of(model).blocks
    inputs = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, x: inputs.__setitem__(m, x[0]))
        for b in blocks
        for m in linears(b).values()
    ]
    with torch.no_grad():
        model(WINDOWS)
    for hook in hooks:
        hook.remove()
    for block in blocks:
        scores = torch.cat(
            [
                (m.weight.abs() * inputs[m].reshape(-1, m.in_features).square().sum(0).sqrt()).flatten()
                for m in linears(block).values()
            ]
        )
        shares.append((scores > threshold * scores.mean()).float().mean().item())
    assert max(shares) > min(shares)
    raw = [2 * spread * (s - min(shares)) / (max(shares) - min(shares)) for s in shares]
    return [1 - sparsity + r - sum(raw) / len(raw) for r in raw]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_owl_gives_each_block_the_density_of_the_paper(family):
    expected = direct_densities(tiny(family), 2.0, 0.5, 0.08)
    report = compress(tiny(family), OWL)
    for layer in report.layers:
        weights = layer.shape[0] * layer.shape[1]
        assert layer.density == pytest.approx(expected[layer.block], abs=1 / min(layer.shape) + 1 / weights)


def test_owl_spends_as_much_as_uniform():
    uniform = compress(tiny("llama"), OWL.changed(allocate="uniform", algorithm="magnitude"))
    owl = compress(tiny("llama"), OWL.changed(algorithm="magnitude"))
    assert owl.values["linears_compressed"] == pytest.approx(uniform.values["linears_compressed"], rel=1e-3)
    assert owl.values["linears_dense"] == uniform.values["linears_dense"]


@pytest.mark.parametrize("pattern", ["2:4", "0.6"])
def test_an_allocation_by_error_keeps_no_more_and_errs_less(pattern):
    uniform = compress(tiny("llama"), BY_ERROR.changed(pattern=pattern, allocate="uniform"))
    by_error = compress(tiny("llama"), BY_ERROR.changed(pattern=pattern))
    assert len({(layer.pattern, layer.rank) for layer in by_error.layers}) > 3
    kept, allowed = (report.values["linears_compressed"] for report in (by_error, uniform))
    assert 0.99 * allowed < kept <= allowed
    if pattern == "0.6":  # at 2:4 all layers of a random model are as hard as each other
        assert by_error.mean_relative_error < 0.98 * uniform.mean_relative_error


def test_an_allocation_by_error_moves_densities_of_a_pruner():
    recipe = Recipe(algorithm="wanda", pattern="0.5", allocate="error")
    report = compress(tiny("llama"), recipe)
    assert {layer.rank for layer in report.layers} == {0}
    densities = [layer.density for layer in report.layers]
    assert max(densities) - min(densities) > 0.05


def test_an_allocation_by_error_leaves_layers_with_a_rule_alone():
    rules = (Rule("down_proj", rank=2), Rule("q_proj", pattern="4:8"))
    report = compress(tiny("llama"), BY_ERROR.changed(layers=rules))
    found = {layer.name: (layer.pattern, layer.rank) for layer in report.layers}
    assert found["mlp.down_proj"] == ("8:16", 2)
    assert found["self_attn.q_proj"] == ("4:8", 3)


def test_an_allocation_by_error_needs_something_to_move():
    with pytest.raises(InputError, match="moves ranks, and there is no low-rank part"):
        Recipe(algorithm="wanda", allocate="error")
    with pytest.raises(InputError, match="moves ranks, and there is no low-rank part"):
        Recipe(rank=0, allocate="error")


@pytest.mark.parametrize(
    "recipe", [pytest.param(OWL, id="owl", marks=pytest.mark.slow), pytest.param(BY_ERROR, id="error")]
)
def test_what_the_data_decided_is_not_measured_again(recipe, tmp_path, monkeypatch):
    save_tiny("gpt_neox", tmp_path / "model")
    whole = compress(tmp_path / "model", recipe, out=tmp_path / "whole")

    def stop(step):
        if step.stage == "blocks" and step.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "model", recipe, out=tmp_path / "out", notify=stop)
    monkeypatch.setattr("sparlow.run.job.allocate_by_data", lambda *_: pytest.fail("measured again"))
    report = compress(tmp_path / "model", recipe, out=tmp_path / "out")
    assert [(layer.density, layer.rank) for layer in report.layers] == [
        (layer.density, layer.rank) for layer in whole.layers
    ]
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
    assert verify_artefact(tmp_path / "out") == []
    assert (tmp_path / "out" / NAME).exists()


def test_a_rule_for_a_pattern_is_left_alone_by_owl():
    recipe = OWL.changed(layers=(Rule("mlp.down_proj", pattern="2:4"),))
    patterns = {(layer.name, layer.pattern) for layer in compress(tiny("llama"), recipe).layers}
    assert ("mlp.down_proj", "2:4") in patterns
    assert len(patterns) > 7  # the others differ from block to block


def test_rules_and_ignored_layers_in_a_result(tmp_path):
    save_tiny("llama", tmp_path / "model")
    recipe = Recipe(
        rank=2,
        options={"effort": 0.1, "max_steps": 5},
        ignore=("k_proj", "layers.1.*"),
        layers=[{"match": "down_proj", "rank": 5}, {"match": "layers.2.*.up_proj", "pattern": "0.25", "rank": 0}],
    )
    report = compress(tmp_path / "model", recipe, out=tmp_path / "out")
    found = {f"{layer.block}.{layer.name}": (layer.pattern, layer.rank) for layer in report.layers}
    assert len(found) == 12
    assert not any(".k_proj" in name or name.startswith("1.") for name in found)
    assert found["0.mlp.down_proj"] == ("8:16", 5)
    assert found["2.mlp.up_proj"] == ("0.25", 0)
    assert found["0.mlp.up_proj"] == ("16:32", 2)
    assert verify_artefact(tmp_path / "out") == []
    dense, loaded = tiny("llama"), sparlow.load(tmp_path / "out")
    assert len(compressed_layers(loaded)) == 12
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"):
        assert torch.equal(loaded.get_submodule(name).weight, dense.get_submodule(name).weight)
    ignored = [row for row in report.not_compressed if row["name"].endswith("k_proj")]
    assert [row["why"] for row in ignored] == ["linear layer that was not selected"] * 3
    sizes = [shape[0] * shape[1] for shape in (layer.shape for layer in report.layers)]
    assert report.bytes["linears_dense"] == 4 * sum(sizes)
    assert report.values["linears_dense"] == sum(sizes)
    assert report.values["linears_compressed"] == sum(
        layer.kept + layer.rank * sum(layer.shape) for layer in describe(tmp_path / "out")
    )


@pytest.mark.parametrize(
    ("ignored", "passed"), [((), [0, 1]), (("layers.1.*",), [0, 1]), (("layers.1.*", "layers.2.*"), [])]
)
def test_nothing_passes_through_blocks_that_nobody_looks_behind(ignored, passed, monkeypatch):
    model, seen = tiny("llama"), []
    blocks = list(model.model.layers)
    plain = job.pass_through

    def spied(through, **options):
        seen.append(blocks.index(through.block))
        return plain(through, **options)

    monkeypatch.setattr(job, "pass_through", spied)
    compress(model, Recipe(algorithm="magnitude", ignore=ignored))
    assert seen == passed


@pytest.mark.parametrize(
    "ignored", [("layers.0.*", "layers.1.*"), pytest.param(("layers.1.*",), marks=pytest.mark.slow)]
)
def test_a_run_with_whole_blocks_ignored_is_resumed(ignored, tmp_path):
    save_tiny("llama", tmp_path / "model")
    recipe = Recipe(algorithm="magnitude", ignore=ignored)
    compress(tmp_path / "model", recipe, out=tmp_path / "whole")

    def stop(step):
        if step.stage == "blocks" and step.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "model", recipe, out=tmp_path / "out", notify=stop)
    compress(tmp_path / "model", recipe, out=tmp_path / "out")
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ignore": ("kproj",)}, "No layer's name ends in 'kproj'. The first layer is model.layers.0"),
        ({"layers": [Rule("mlp.gate", rank=1)]}, "No layer's name ends in 'mlp.gate'"),
        ({"layers": [Rule("q_proj", rank=1)], "ignore": ("self_attn.*",)}, "'q_proj' has no effect: every layer it"),
        (
            {"layers": [Rule("q_proj", rank=1), Rule("self_attn.*", rank=2)]},
            "'q_proj' has no effect: later rules decide",
        ),
        ({"ignore": ("*",)}, "ignores every layer"),
        ({"layers": [Rule("down_proj", rank=99)]}, "model.layers.0.mlp.down_proj: Rank 99 is not possible"),
        ({"layers": [Rule("down_proj", pattern="2:5")]}, "model.layers.0.mlp.down_proj: Pattern 2:5"),
    ],
)
def test_exceptions_that_fit_nothing(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        compress(tiny("llama"), Recipe(rank=2, **changes), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
