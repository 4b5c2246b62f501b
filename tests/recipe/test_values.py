"""Values on a grid and factors in int8, as options: what they mean for a layer, what that takes, what is refused."""

import math
from itertools import product

import pytest
import torch

import sparlow
from families import save_tiny, tiny
from sparlow.algorithms import solve
from sparlow.errors import InputError
from sparlow.linalg import grid as grids
from sparlow.linalg.grid import Grid, make_grid
from sparlow.linalg.patterns import NM, Unstructured
from sparlow.model.artefact.bitmask import pack
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.forward.decoder import Decoder
from sparlow.planning import microbenchmarks
from sparlow.recipe.allocation import LEVELS, VALUES, Budget, Rule, cost, error_driven, offered
from sparlow.recipe.allocation import Offer as Offered
from sparlow.recipe.budgets import select
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import LayerRecord


def without_grid(*args, grid=None, int8_factors=False):
    """Solve as if nothing were on a grid: what is planned does not depend on it."""
    del grid, int8_factors
    return solve(*args)


INT4, INT3 = make_grid("int4"), make_grid("int3")


def test_the_words_are_those_of_the_grid():
    assert ("model", *grids.BITS) == VALUES
    assert ("auto", *grids.LEVELS) == LEVELS


# What they mean for a layer


def test_values_on_a_grid_bring_factors_in_int8():
    assert Recipe(rank=4).budget("any", (64, 64)) == Budget(NM(16, 32), 4)
    assert Recipe(rank=4, values="model").budget("any", (64, 64)) == Budget(NM(16, 32), 4)
    assert Recipe(rank=4, values="int4").budget("any", (64, 64)) == Budget(NM(16, 32), 4, INT4, int8_factors=True)
    assert Recipe(rank=4, factors="int8").budget("any", (64, 64)) == Budget(NM(16, 32), 4, int8_factors=True)
    assert Recipe(rank=4, values="int3", factors="model").budget("any", (64, 64)) == Budget(NM(16, 32), 4, INT3)
    assert Recipe(algorithm="wanda", values="int3").budget("any", (64, 64)) == Budget(NM(16, 32), 0, INT3)


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({"values": "int8"}, Grid(8, "integer", 128)),
        ({"values": "int2", "levels": "half", "group": "64"}, Grid(2, "half", 64)),
        ({"values": "int4", "group": "row"}, Grid(4, "book", None)),
        ({"values": "int4", "group": 32}, Grid(4, "book", 32)),
    ],
)
def test_levels_and_groups(options, grid):
    assert Recipe(**options).budget("any", (64, 64)).grid == grid


def test_a_rule_gives_layers_values_of_their_own():
    rules = [Rule("down", values="int8"), Rule("gate", values="model"), Rule("up", pattern="2:4")]
    recipe = Recipe(values="int4", levels="integer", rank=2, layers=rules)
    found = {name: recipe.budget(f"mlp.{name}", (64, 64)) for name in ("down", "gate", "up", "other")}
    assert found == {
        "down": Budget(NM(16, 32), 2, Grid(8, "integer"), int8_factors=True),
        "gate": Budget(NM(16, 32), 2),
        "up": Budget(NM(2, 4), 2, Grid(4, "integer"), int8_factors=True),
        "other": Budget(NM(16, 32), 2, Grid(4, "integer"), int8_factors=True),
    }
    assert Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": "book"}, "--levels has no effect without --values"),
        ({"group": "64"}, "--group has no effect without --values"),
        ({"group": "64", "values": "model"}, "--group has no effect without --values"),
        ({"values": "int4", "group": "0"}, "shared by 0 columns"),
        ({"values": "int4", "group": "wide"}, "shared by wide columns. Give a number of columns, or row"),
        ({"values": "int5"}, "no type of values 'int5'; did you mean 'int"),
        ({"values": "int4", "levels": "books"}, "no kind of levels 'books'; did you mean 'book'"),
        ({"factors": "int8", "rank": 0}, "--factors has no effect without a low-rank part"),
        ({"factors": "model", "rank": 0, "values": "int4"}, "--factors has no effect without a low-rank part"),
        ({"factors": "int8", "algorithm": "wanda"}, "--factors has no effect without a low-rank part"),
        (
            {"layers": [{"match": "q", "values": "int5"}]},
            "rule for q gives values of the unknown type 'int5'; did you mean 'int",
        ),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Recipe(**changes)


@pytest.mark.parametrize("changes", [{"values": "int4"}, {"bits": 3.5}, {"factors": "int8", "rank": 4}])
def test_what_lies_on_a_grid_may_be_matched(changes):
    assert Recipe(**changes, match=True).changed(match_preset="blocks").match


def test_what_has_an_effect_through_a_rule_is_not_refused():
    assert Recipe(levels="integer", layers=[Rule("q", values="int4")]).budget("q", (32, 32)).grid == Grid(4, "integer")
    assert Recipe(rank=0, factors="int8", layers=[Rule("q", rank=3)]).budget("q", (32, 32)).int8_factors


# What they take


@pytest.mark.parametrize(
    ("pattern", "values", "shape"),
    product(["16:32", "2:4", "32:32"], ["int8", "int4", "int3", "int2"], [(8, 64), (24, 192), (5, 320)]),
)
def test_the_bytes_of_s_are_those_of_its_parts(pattern, values, shape):
    budget = Recipe(pattern=pattern, values=values, rank=0).budget("any", shape)
    rows, columns = shape
    S = torch.randn(shape)
    S *= budget.pattern.mask(S.abs())
    kept, mask = pack(S)
    codes = rows * grids.packed_row_bytes(len(kept) // rows, grids.BITS[values])
    scales = rows * math.ceil(columns / 128) * 2
    book = 2 * 2 ** grids.BITS[values] if values != "int8" else 0
    assert budget.bytes(shape, 2) == codes + scales + book + (0 if pattern == "32:32" else mask.numel())


def test_where_all_is_kept_there_is_no_mask():
    assert Budget(Unstructured(0.0), 0).bytes((10, 9), 2) == 180
    assert Budget(Unstructured(0.5), 0).bytes((10, 9), 2) == 90 + 20


def test_the_bytes_of_factors():
    assert Budget(NM(2, 4), 3).low_rank_bytes((10, 8), 2) == 3 * 18 * 2
    assert Budget(NM(2, 4), 3, int8_factors=True).low_rank_bytes((10, 8), 2) == 3 * 18 + 2 * 3 * 2
    assert Budget(NM(2, 4), 0, int8_factors=True).low_rank_bytes((10, 8), 2) == 0


def test_the_tables_of_the_measurements_count_the_same_bits():
    shape = (1536, 576)
    bits = {  # bits a weight of gate
        ("int3", 16, 1.0): 3.45,
        ("int4", 16, 1.0): 4.45,
        ("int4", 16, 0.5): 3.45,
        ("int3", 0, 1.0): 3.14,
    }
    for (values, rank, density), expected in bits.items():
        pattern = NM(16, 32) if density < 1 else Unstructured(0.0)
        found = 8 * Budget(pattern, rank, make_grid(values), int8_factors=True).bytes(shape, 2) / math.prod(shape)
        assert found == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("grid", [None, INT4, Grid(3, "book", None), Grid(8, "half", 64)])
@pytest.mark.parametrize("int8", [False, True])
def test_a_budget_in_a_file_keeps_its_grid(grid, int8):
    budget = Budget(NM(2, 4), 3, grid, int8)
    assert Budget.from_dict(budget.to_dict()) == budget


# Layers never grow unasked


def test_a_default_rank_beside_values_on_a_grid_is_cut_to_the_bytes_of_dense():
    model = tiny("qwen2", dtype=torch.bfloat16)
    found = select(model, Decoder.of(model), Recipe(values="int8"), StoredDtypes.of(model)).budgets
    for name, weight in Decoder.of(model).layers():
        dense, budget = 2 * math.prod(weight.shape), found[name]
        assert budget.int8_factors
        assert 0 < budget.rank < 64
        more = Budget(budget.pattern, budget.rank + 1, budget.grid, budget.int8_factors)
        assert budget.rank == min(weight.shape) or budget.bytes(weight.shape, 2) <= dense < more.bytes(weight.shape, 2)


# Allocation by error counts bytes


def test_offers_of_values_on_a_grid_are_counted_in_bytes():
    shape, size = (64, 128), 2
    sparse = Budget(NM(16, 32), 8, INT4, int8_factors=True)
    found = offered(sparse, shape, size, low_rank=True)
    assert cost(sparse, shape, size) == sparse.bytes(shape, size)
    ranks = found[NM(16, 32)]
    assert ranks == list(range(0, 65, 2))
    offers = [
        Offered(b, cost(b, shape, size), 1 / (1 + r))
        for r in ranks
        for b in (Budget(NM(16, 32), r, INT4, int8_factors=True),)
    ]
    chosen = error_driven(
        {"a": offers, "b": [Offered(o.budget, o.cost, 10 * o.error) for o in offers]}, 2 * offers[4].cost
    )
    assert sum(budget.bytes(shape, size) for budget in chosen.values()) <= 2 * offers[4].cost
    assert chosen["b"].rank > chosen["a"].rank
    assert chosen["b"].grid == INT4


def test_no_density_below_one_is_offered_beside_values_on_a_grid_that_are_all_kept():
    whole = Budget(Unstructured(0.0), 8, INT4, int8_factors=True)
    assert list(offered(whole, (64, 128), 2, low_rank=True)) == [Unstructured(0.0)]
    assert len(offered(Budget(Unstructured(0.0), 8), (64, 128), 2, low_rank=True)) > 1


# What is told


def test_a_plan_says_the_type_of_values_and_counts_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(microbenchmarks, "solve", without_grid)
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    recipe = Recipe(algorithm="eora", pattern="4:8", rank=2, values="int4", group="row", samples=4, seqlen=16)
    plain = sparlow.plan(tmp_path, Recipe(algorithm="eora", pattern="4:8", rank=2, samples=4, seqlen=16), timed=False)
    found = sparlow.plan(tmp_path, recipe, timed=False)
    assert {kind.values for kind in found.layers} == {"int4 book, all columns a scale"}
    assert {kind.values for kind in plain.layers} == {"model"}
    for kind in found.layers:
        assert kind.bytes_kept == kind.count * recipe.budget(kind.name, kind.shape).bytes(kind.shape, 2)
    assert found.bits_per_weight < plain.bits_per_weight / 1.9


def test_records_of_layers_come_back_from_a_file():
    record = LayerRecord(
        *(0, "q", (4, 4), "dense", 1.0, 2, 0.1, 1, 0.1, 0.0),
        value_type="int3",
        levels="book",
        group=64,
        factor_type="int8",
    )
    data = {name: getattr(record, name) for name in record.__dataclass_fields__}
    assert LayerRecord.from_dict({**data, "shape": [4, 4]}) == record
    assert record.shown_values == "int3 book, 64 columns a scale"
    for name, wrong in [("value_type", 3), ("levels", 1), ("group", "64"), ("factor_type", None)]:
        with pytest.raises(TypeError, match=name):
            LayerRecord.from_dict({**data, name: wrong})
