"""What so many bits a weight buy: never more, nearly all of it, and the forms that were measured to be the best."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparlow
from families import save_tiny, tiny
from sparlow.errors import InputError
from sparlow.linalg.patterns import NM, Unstructured
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.forward.decoder import Decoder
from sparlow.recipe.allocation import Rule
from sparlow.recipe.bits import Asked, Layer, alternatives, pick
from sparlow.recipe.budgets import select, would_take
from sparlow.recipe.recipe import Recipe

WIDTH, WIDE, NARROW = 576, 1536, 192
BLOCK = {
    "q": (WIDTH, WIDTH),
    "k": (NARROW, WIDTH),
    "v": (NARROW, WIDTH),
    "o": (WIDTH, WIDTH),
    "gate": (WIDE, WIDTH),
    "up": (WIDE, WIDTH),
    "down": (WIDTH, WIDE),
}  # of SmolLM2
LAYERS = {f"{i}.{name}": Layer(shape, 2) for i in range(4) for name, shape in BLOCK.items()}
WHOLE = Unstructured(0.0)


def bytes_of(choice, layers):
    return sum(budget.bytes(layers[name].shape, layers[name].size) for name, budget in choice.budgets.items())


def picked(bits, **asked):
    choice = pick(LAYERS, Asked(bits, **asked))
    grid = choice.form.grid
    return str(choice.form.pattern), grid and grid.name, grid and grid.group


# The arithmetic


@settings(max_examples=40, deadline=None)
@given(bits=st.floats(1.3, 15.5), low_rank=st.booleans(), values=st.sampled_from([None, None, "int4", "int3", "model"]))
def test_no_choice_takes_more_than_was_asked_for_and_one_with_ranks_takes_nearly_all(bits, low_rank, values):
    try:
        choice = pick(LAYERS, Asked(bits, low_rank=low_rank, values=values))
    except InputError:
        assert bits < 1.8
        return
    assert choice.budgets.keys() == LAYERS.keys()
    assert choice.bytes == bytes_of(choice, LAYERS) <= bits * choice.weights / 8
    assert choice.bits == 8 * choice.bytes / choice.weights
    for name, budget in choice.budgets.items():
        shape = LAYERS[name].shape
        assert budget.bytes(shape, 2) <= 2 * math.prod(shape)
        assert budget.rank <= min(shape)
        assert low_rank or not budget.rank
    if low_rank and not all(is_full(budget, LAYERS[name].shape) for name, budget in choice.budgets.items()):
        assert choice.bits > 0.97 * bits


def is_full(budget, shape):
    """Whether one more of rank would be beyond the matrix, or beyond its dense bytes."""
    more = replace(budget, rank=budget.rank + 1)
    return budget.rank == min(shape) or more.bytes(shape, 2) > 2 * math.prod(shape)


def test_more_bits_never_buy_fewer_bytes_nor_a_grid_of_fewer_bits():
    asked = [1.4 + step / 20 for step in range(240)]
    found = [pick(LAYERS, Asked(bits)) for bits in asked]
    sizes = [choice.bytes for choice in found]
    assert sizes == sorted(sizes)
    grids = [choice.form.grid.bits for choice in found]
    assert grids == sorted(grids)
    for bits in {*grids}:
        density = [choice.form.pattern.density for choice in found if choice.form.grid.bits == bits]
        assert density == sorted(density)


def test_ranks_are_the_same_up_to_a_quarter_of_the_shorter_side():
    ranks = {name: budget.rank for name, budget in pick(LAYERS, Asked(3.5)).budgets.items()}
    assert max(ranks.values()) - min(ranks.values()) <= 1
    assert min(ranks.values()) >= 14
    ranks = {name: budget.rank for name, budget in pick(LAYERS, Asked(6.0)).budgets.items()}
    assert ranks["0.k"] == ranks["0.v"] == NARROW // 4
    assert abs(ranks["0.q"] - ranks["0.gate"]) <= 1
    assert ranks["0.q"] > NARROW // 4


def test_beside_values_in_the_models_type_ranks_grow_with_the_layer():
    choice = pick(LAYERS, Asked(9.74, pattern=NM(13, 32), values="model"))
    ranks = {name.partition(".")[2]: budget.rank for name, budget in choice.budgets.items()}
    assert ranks["gate"] == ranks["up"] == ranks["down"]
    for name, shape in BLOCK.items():
        size = math.prod(shape) / sum(shape) / (WIDTH * WIDE / (WIDTH + WIDE))
        assert abs(ranks[name] - ranks["down"] * size**0.6) <= 1.5
    assert 0.999 * 9.74 < choice.bits <= 9.74
    small = {"wide": Layer((512, 512), 2), "flat": Layer((8, 512), 2)}  # whose side is short
    assert pick(small, Asked(9.74, pattern=NM(13, 32), values="model")).budgets["flat"].rank <= 8


def test_a_bias_counts_with_its_layer():
    biased = {name: Layer(layer.shape, 2, bias=2 * layer.shape[0]) for name, layer in LAYERS.items()}
    choice = pick(biased, Asked(3.5))
    assert choice.bytes == bytes_of(choice, LAYERS) + sum(layer.bias for layer in biased.values())
    assert 0.97 * 3.5 < choice.bits <= 3.5


def test_layers_too_small_for_even_ranks_share_what_is_left():
    small = {str(i): Layer((48, 64), 2) for i in range(9)}
    choice = pick(small, Asked(5.0))
    ranks = {budget.rank for budget in choice.budgets.values()}
    assert max(ranks) - min(ranks) == 1
    assert 0.97 * 5 < choice.bits <= 5


# The rule


@pytest.mark.parametrize(
    ("bits", "form"),
    [
        (2.5, ("dense", "int2", 128)),
        (2.75, ("dense", "int2", 128)),
        (3.0, ("18:32", "int3", 128)),
        (3.2, ("dense", "int3", 128)),
        (3.5, ("dense", "int3", 128)),
        (4.0, ("dense", "int3", 64)),
        (4.25, ("dense", "int4", 128)),
        (4.5, ("dense", "int4", 128)),
        (5.4, ("dense", "int4", 32)),
        (8.2, ("dense", "int8", 128)),
    ],
)
def test_every_entry_is_kept_but_where_int3_nearly_fits(bits, form):
    pattern, *grid = picked(bits)
    assert (pattern.replace("0.0", "dense"), *grid) == form


def test_below_two_bits_values_are_pruned():
    pattern, values, _ = picked(1.8)
    assert pattern.endswith(":32")
    assert values == "int2"


def test_values_of_the_models_type_want_more_rank_than_values():
    choice = pick(LAYERS, Asked(9.74, values="model"))
    assert choice.form.pattern in (NM(13, 32), NM(14, 32))
    assert choice.form.grid is None
    assert not choice.form.int8
    assert choice.budgets["0.q"].rank == pytest.approx(WIDTH / 14, abs=10)


def test_without_a_low_rank_part_what_is_left_goes_to_smaller_groups():
    assert picked(4.2, low_rank=False)[1:] == ("int4", 128)
    assert picked(4.3, low_rank=False)[1:] == ("int4", 64)
    assert picked(4.6, rank=0)[1:] == ("int4", 32)
    assert picked(4.6, rank=0, group="row")[1:] == ("int4", None)


def test_what_is_given_is_obeyed():
    assert picked(3.5, pattern=NM(16, 32))[:2] == ("16:32", "int4")
    assert picked(3.5, values="int4")[1] == "int4"
    assert NM(1, 32).density < pick(LAYERS, Asked(3.5, values="int4")).form.pattern.density < 1
    assert picked(3.5, group="64")[2] == 64
    fixed = pick(LAYERS, Asked(4.6, rank=8))
    assert {budget.rank for budget in fixed.budgets.values()} == {8}
    assert not pick(LAYERS, Asked(4.5, factors="model")).form.int8


def test_patterns_fit_layers_that_32_does_not_divide():
    layers = {"a": Layer((64, 48), 2), "b": Layer((64, 30), 2), "c": Layer((64, 64), 2)}
    found = pick(layers, Asked(9.0, values="model")).budgets
    assert isinstance(found["a"].pattern, NM)
    assert found["a"].pattern.m == 16
    assert isinstance(found["b"].pattern, Unstructured)
    for name, budget in found.items():
        budget.pattern.check(layers[name].shape)


def test_a_rule_is_obeyed_and_the_others_make_up_for_it():
    layers = LAYERS | {"0.down": Layer(BLOCK["down"], 2, lambda budget: type(budget)(NM(1, 2), 0))}
    choice = pick(layers, Asked(3.5))
    assert choice.budgets["0.down"].grid is None
    assert choice.bytes == bytes_of(choice, layers) <= 3.5 * choice.weights / 8
    assert choice.bits > 0.97 * 3.5
    others = {name: layer for name, layer in layers.items() if name != "0.down"}
    without = pick(LAYERS, Asked(3.5)).budgets
    sizes = [sum(found[n].bytes(others[n].shape, 2) for n in others) for found in (choice.budgets, without)]
    assert sizes[0] < sizes[1]


def test_bits_that_cannot_be_are_refused_with_those_that_can():
    with pytest.raises(InputError, match=r"too few for these layers\. Ask for at least 1\.2"):
        pick(LAYERS, Asked(0.5))
    with pytest.raises(InputError, match=r"16 would save nothing"):
        pick(LAYERS, Asked(16.0))
    with pytest.raises(InputError, match=r"Ask for at least 2\.1"):
        pick(LAYERS, Asked(1.5, pattern=NM(16, 32)))


def test_alternatives_take_no_more_bits_and_are_others():
    asked = Asked(3.5)
    chosen = pick(LAYERS, asked)
    others = alternatives(LAYERS, asked, chosen)
    assert len(others) == 3
    assert all(3.3 < other.bits <= 3.5 for other in others)
    assert {str(other.form.pattern) for other in others} > {"16:32"}
    assert len({*map(str, [chosen, *others])}) == 4


# As an option


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression": 0.5, "pattern": "2:4"}, "so does --compression. Give one of them"),
        ({"rank_share": 0.5}, "so does --rank-share"),
        ({"pattern": "2:4", "values": "int4", "rank": 4}, "--bits has nothing to choose"),
        ({"pattern": "2:4", "values": "int4", "algorithm": "wanda"}, "--bits has nothing to choose"),
        ({"values": "model", "group": "64"}, "--group has no effect"),
        ({"bits": 0}, "bits must be above 0"),
        ({"allocate": "owl"}, "Give an unstructured --pattern"),
    ],
)
def test_options_that_contradict_bits_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Recipe(**{"bits": 4.0, **changes})


def test_levels_and_factors_apply_to_what_is_chosen():
    model = tiny("llama", dtype=torch.bfloat16)
    recipe = Recipe(bits=6, levels="integer", factors="model")
    for budget in select(model, Decoder.of(model), recipe, StoredDtypes.of(model)).budgets.values():
        assert budget.grid.levels == "integer"
        assert not budget.int8_factors


def test_a_selection_keeps_to_its_bits_with_rules_and_says_what_was_picked():
    model = tiny("llama", dtype=torch.bfloat16)
    shapes = {name: weight.shape for name, weight in Decoder.of(model).layers()}
    recipe = Recipe(bits=6, layers=[Rule("down_proj", values="int8")], ignore=["k_proj"])
    found = select(model, Decoder.of(model), recipe, StoredDtypes.of(model))
    assert {budget.value_type for name, budget in found.budgets.items() if "down" in name} == {"int8"}
    assert {budget.value_type for name, budget in found.budgets.items() if "up" in name} != {"int8"}
    sizes = [budget.bytes(shapes[name], 2) for name, budget in found.budgets.items()]
    bits = 8 * sum(sizes) / sum(math.prod(shapes[name]) for name in found.budgets)
    assert 0.97 * 6 < bits <= 6
    assert found.picked.startswith("--bits 6 picked dense, int")
    assert f"({bits:.2f} bits). Others would have been: " in found.picked
    assert not any("not the default" in warning for warning in found.warnings)


def test_a_plan_says_what_was_picked(tmp_path):
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    found = sparlow.plan(tmp_path, Recipe(algorithm="eora", bits=9, values="model", samples=4, seqlen=16), timed=False)
    assert found.notes[0].startswith("--bits 9 picked ")
    assert found.bits_per_weight <= 9


def test_a_run_without_bits_ends_by_saying_what_fewer_would_take():
    (line,) = would_take(LAYERS, Recipe(), 10**6)
    size = 10**6 + pick(LAYERS, Asked(4.5)).bytes
    assert line.startswith(
        f"The whole model in fewer bits: sparlow compress … --bits 4.5 would take {size / 1e6:.1f} MB, "
    )
    assert would_take({"a": Layer((4, 4), 2)}, Recipe(), 0) == []
