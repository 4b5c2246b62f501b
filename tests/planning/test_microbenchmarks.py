import pytest
import torch

from sparlow.algorithms import find, variants
from sparlow.linalg.gram import RIDGES_KEPT
from sparlow.linalg.grid import make_grid
from sparlow.linalg.patterns import parse_pattern
from sparlow.planning import microbenchmarks
from sparlow.planning.microbenchmarks import (
    BOUND,
    Workspace,
    _LiveBytes,
    _non_negative,
    _problem,
    _solve,
    solver,
    typical,
    workspace,
)
from sparlow.recipe.allocation import Budget
from sparlow.recipe.recipe import Recipe

SHORT = {"effort": 0.1, "rounds": 2, "iterations": 2}  # of whatever option there is: memory does not depend on them


def short(name):
    known = find(name)[0].options
    return Recipe(algorithm=name, options={option: SHORT[option] for option in SHORT if option in known})


def like(recipe, shape=(512, 512)):
    return shape, Budget(parse_pattern("2:4"), 0 if recipe.found_algorithm.kind == "pruner" else shape[0] // 16)


@pytest.mark.parametrize("name", variants())
def test_every_algorithm_stays_below_the_bound(name):
    recipe = short(name)
    found = workspace(recipe, like(recipe), torch.bfloat16)
    for shape in ((1024, 1024), (4096, 1024), (256, 4096)):
        assert found.bytes(shape) < BOUND.bytes(shape)
    assert found.levels <= BOUND.levels


@pytest.mark.parametrize("name", ["3basil", "sparsegpt", "oats"])
def test_small_layers_tell_what_larger_ones_take(name):
    recipe = short(name)
    shape, budget = like(recipe, (192, 384))
    W, H = _problem(shape, torch.device("cpu"))
    with _LiveBytes(W, H) as seen:
        gram = _solve(recipe, W, H, budget)
    found = workspace(recipe, (shape, budget), torch.float32)
    assert found.remembered(shape[1]) == pytest.approx(gram.remembered, abs=2 * 4 * shape[1] ** 2)
    assert found.bytes(shape) == pytest.approx(seen.peak, rel=0.15)


@pytest.mark.parametrize("shape", [(192, 384), (768, 1536), (1536, 512)])
def test_what_a_grid_looks_at_at_a_time_does_not_grow_with_the_layer(shape):
    recipe, budget = short("sparsegpt"), Budget(parse_pattern("dense"), 0, make_grid("int4"))
    W, H = _problem(shape, torch.device("cpu"))
    with _LiveBytes(W, H) as seen:
        _solve(recipe, W, H, budget, remember=0)
    found = workspace(recipe, (shape, budget), torch.float32)
    assert found.bytes(shape) - found.remembered(shape[1]) == pytest.approx(seen.peak, rel=0.25)


def test_a_long_solve_is_not_followed_to_its_end(monkeypatch):
    monkeypatch.setattr(microbenchmarks, "WATCHED", 0.0)
    recipe = short("3basil")
    assert workspace(recipe, like(recipe), torch.float32).levels == BOUND.levels


def test_tensors_are_counted_while_they_live():
    given = torch.zeros(1000)
    with _LiveBytes(given) as seen:
        for _ in range(5):
            kept = torch.zeros(1000)
            del kept
        view = given[:10]
        assert seen.peak == 4000
        pair = [torch.zeros(1000), torch.zeros(500).view(5, 100)]
    assert seen.peak == 6000
    assert view.shape[0] + len(pair) == 12


def test_a_gram_remembers_no_more_than_it_does():
    space = Workspace(square=0, matrix=0, levels=16)
    assert space.remembered(1024) == 16 * 4 * 1024**2
    assert space.remembered(4096) == RIDGES_KEPT // (4 * 4096**2) * 4 * 4096**2
    assert space.remembered(2**14) == 0


def test_factors_are_found_again_and_none_is_negative():
    rows = [[4.0, 1.0, 2.0], [2.0, 8.0, 1.0], [3.0, 3.0, 9.0], [7.0, 5.0, 1.0]]
    exact = [sum(f * x for f, x in zip((0.5, 2.0, 3.0), row, strict=True)) for row in rows]
    assert _non_negative(rows, exact) == pytest.approx([0.5, 2.0, 3.0])
    fallen = _non_negative(rows, [row[0] - 0.1 * row[1] for row in rows])
    assert all(factor >= 0 for factor in fallen)
    assert fallen[0] > 0


def test_a_solver_takes_longer_for_larger_layers():
    recipe = Recipe(algorithm="sparsegpt")
    found = solver(recipe, like(recipe), torch.device("cpu"))
    assert 0 < found.seconds((256, 256), first=True) < found.seconds((1024, 1024), first=True)
    assert found.seconds((1024, 1024), first=False) <= found.seconds((1024, 1024), first=True)
    assert found.largest >= 128


def test_the_typical_layer_is_the_one_in_the_middle():
    budget = Budget(parse_pattern("2:4"), 1)
    assert typical([((8, 8), budget), ((4, 4), budget), ((8, 16), budget)]) == ((8, 8), budget)
