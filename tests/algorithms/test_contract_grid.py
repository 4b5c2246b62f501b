"""Laws that every algorithm obeys when the values of S are put on a grid, and U and V into int8."""

from functools import cache
from operator import attrgetter

import pytest
import torch

import oracles
import oracles_methods
from sparlow.algorithms import algorithms, decompose, find, solve
from sparlow.algorithms.sparsegpt import sparsegpt
from sparlow.errors import InputError, RunError
from sparlow.linalg.gram import Gram
from sparlow.linalg.grid import BITS, Grid, make_grid
from sparlow.linalg.grid_target import GridTarget
from sparlow.linalg.patterns import NM, Unstructured

OUT, IN, RANK, GROUP, DEAD = 24, 64, 4, 24, 5  # the last group of a row is shorter
QUICK = {"effort": 0.3, "rounds": 8}
DENSE = Unstructured(0.0)
PATTERNS = {"2:4": NM(2, 4), "16:32": NM(16, 32), "0.5": Unstructured(0.5), "dense": DENSE}
FAST = {("2:4", "int4"), ("16:32", "int3"), ("0.5", "int8"), ("dense", "int2"), ("dense", "int4")}

every_case = pytest.mark.parametrize(
    ("pattern", "values"),
    [
        pytest.param(pattern, values, marks=() if (pattern, values) in FAST else pytest.mark.slow)
        for pattern in PATTERNS
        for values in BITS
    ],
)
both_kinds = pytest.mark.parametrize("pattern", ["2:4", "dense"])


@pytest.fixture(params=algorithms(), ids=attrgetter("name"))
def algorithm(request):
    return request.param


def layer(seed=0, shape=(OUT, IN), **changes):
    W, H = oracles.problem(*shape, seed, **changes)
    return W, Gram.damped(H)


def run(algorithm, W, gram, pattern, values="int3", rank=None, **options):
    """Solve with quick options, on a grid unless ``values`` is "model"; factors are in int8 then."""
    grid = make_grid(values, options.pop("levels", "auto"), options.pop("group", GROUP))
    quick = {name: value for name, value in QUICK.items() if name in algorithm.options}
    chosen = rank if rank is not None else RANK if algorithm.kind == "decomposer" else 0
    pattern = PATTERNS.get(pattern, pattern)
    return solve(algorithm, W, gram, pattern, chosen, quick | options, grid=grid, int8_factors=grid is not None)


@cache
def solved(name, pattern, values):
    return run(find(name)[0], *layer(), pattern, values)


def on_its_grid(found):
    """Whether S is what its codes decode to, exactly."""
    codes = found.values.encode(found.S)
    exact = found.values.decode(codes).to(found.S.dtype)
    used = found.S != 0 if found.values.masked else torch.ones_like(found.S, dtype=torch.bool)
    return torch.equal(exact[used], found.S[used]) and bool(torch.isin(codes, found.values.usable()).all())


def rounded_after(W, gram, found, grid):
    """Relative error of the same U and V with every kept value rounded to the nearest, nothing clipped."""
    levels = torch.arange(2**grid.bits) - 2 ** (grid.bits - 1) + (0.0 if grid.levels == "integer" else 0.5)
    levels = levels[1:] if grid.levels == "integer" else levels
    levels = levels[levels != 0] if (found.S == 0).any() else levels
    S = found.S.clone()
    for row in S:
        for part in row.split(grid.group):
            if part.any():
                step = (part.abs().max() / levels.max()).bfloat16().float()
                nearest = levels[(part[:, None] / step - levels).abs().argmin(1)] * step
                part.copy_(torch.where(part == 0, 0.0, nearest))
    rest = W.double() - S.double() - found.U.double() @ found.V.double()
    return oracles.objective(rest, gram.H) / oracles.objective(W, gram.H)


@every_case
def test_lies_on_the_grid_and_the_pattern_exactly(algorithm, pattern, values):
    found, chosen = solved(algorithm.name, pattern, values), PATTERNS[pattern]
    assert on_its_grid(found)
    assert found.values.grid == make_grid(values, group=GROUP)
    assert found.values.masked == (chosen is not DENSE)
    assert found.values.scale.dtype == found.values.levels.dtype == torch.bfloat16
    assert found.values.scale.shape == (OUT, 3)
    assert found.values.levels.shape == (2 ** BITS[values],)
    assert (found.values.levels.float().diff() > 0).all()
    assert found.values.scale.min() > 0
    if chosen is not DENSE:  # of integers, one may be 0 where everything is kept
        assert found.S.count_nonzero() == chosen.kept((OUT, IN))
        assert not found.S[~chosen.mask(found.S.abs())].any()


@every_case
def test_loses_no_more_than_rounding_after_the_solve(algorithm, pattern, values):
    W, gram = layer()
    plain = run(algorithm, W, gram, pattern, "model")
    assert plain.values is plain.factors is None
    bound = rounded_after(W, gram, plain, make_grid(values, group=GROUP))
    assert solved(algorithm.name, pattern, values).stats.relative_error <= bound * 1.01 + 1e-9


@every_case
def test_factors_are_in_int8(algorithm, pattern, values):
    found = solved(algorithm.name, pattern, values)
    if algorithm.kind == "pruner":
        assert found.factors is None
        return
    for codes in (found.U / found.factors.U.float(), found.V / found.factors.V.float()[:, None]):
        torch.testing.assert_close(codes, codes.round(), rtol=1e-6, atol=0)
        assert 126.5 < codes.abs().max() < 127.5


@every_case
def test_reports_the_error_of_what_is_stored(algorithm, pattern, values):
    W, gram = layer()
    found = solved(algorithm.name, pattern, values)
    rest = W.double() - found.values.decode(found.values.encode(found.S)).double() * (found.S != 0)
    rest -= found.U.double() @ found.V.double()
    exact = oracles.objective(rest, gram.H) / oracles.objective(W, gram.H)
    assert found.stats.relative_error == pytest.approx(exact, rel=1e-3, abs=1e-8)


@both_kinds
def test_is_deterministic_and_leaves_its_inputs_alone(algorithm, pattern):
    W, gram = layer()
    shared = [W, gram.H, gram.scale, gram.correlation, gram.inverse_cholesky]
    before = [tensor.clone() for tensor in shared]
    found, first = run(algorithm, W, gram, pattern), solved(algorithm.name, pattern, "int3")
    assert all(torch.equal(now, then) for now, then in zip(shared, before, strict=True))
    assert all(torch.equal(getattr(found, part), getattr(first, part)) for part in "SUV")
    assert torch.equal(found.values.scale, first.values.scale)
    assert torch.equal(found.values.levels, first.values.levels)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_is_stored_in_the_type_of_the_weight(algorithm, pattern, dtype):
    W, gram = layer()
    found = run(algorithm, W.to(dtype), gram, pattern)
    assert {part.dtype for part in (found.S, found.U, found.V)} == {dtype}
    assert found.values.scale.dtype == (torch.bfloat16 if dtype == torch.float64 else dtype)
    assert on_its_grid(found)
    plain = solved(algorithm.name, pattern, "int3").stats.relative_error
    assert found.stats.relative_error == pytest.approx(plain, rel=0.15)


@both_kinds
@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_scales_keep_their_range(algorithm, pattern, factor):
    W, gram = layer()
    found = run(algorithm, W * factor, gram, pattern)
    assert on_its_grid(found)
    plain = solved(algorithm.name, pattern, "int3").stats.relative_error
    assert found.stats.relative_error == pytest.approx(plain, rel=0.25)


def test_scales_that_do_not_fit_half_precision_are_refused(algorithm):
    W, gram = layer()
    with pytest.raises(RunError, match="do not fit"):
        run(algorithm, (W * 2e-6).half(), gram, "dense")


@both_kinds
def test_a_dead_input_counts_for_nothing(algorithm, pattern):
    W, H = oracles.problem(OUT, IN, 0)
    H[DEAD] = H[:, DEAD] = 0
    found = run(algorithm, W, Gram.damped(H * 1e-6), pattern)  # a dead input then has by far the largest H
    assert on_its_grid(found)
    assert found.stats.relative_error < 0.1
    assert found.dense()[:, DEAD].abs().max() <= 2 * found.values.scale.max()  # a grid may have no zero


@both_kinds
def test_a_layer_without_data_is_rounded_well(algorithm, pattern):
    W, _ = layer()
    gram = Gram.identity(IN)
    found = run(algorithm, W, gram, pattern)
    assert on_its_grid(found)
    plain = run(algorithm, W, gram, pattern, "model")
    assert found.stats.relative_error <= 1.01 * rounded_after(W, gram, plain, make_grid("int3", group=GROUP))


@both_kinds
@pytest.mark.parametrize("shape", [(1, 64), (3, 4), (40, 8)])
@pytest.mark.parametrize("group", [128, "row", 4])
def test_every_shape_will_do(algorithm, pattern, shape, group):
    W, gram = layer(1, shape)
    found = run(algorithm, W, gram, pattern, rank=0, group=group)
    assert on_its_grid(found)
    assert found.factors is None
    assert found.stats.relative_error < 1


@both_kinds
def test_rows_of_zeros_stay_zero(algorithm, pattern):
    W, gram = layer()
    W[3] = 0
    W[4, :GROUP] = 0
    found = run(algorithm, W, gram, pattern, rank=0)
    assert on_its_grid(found)
    assert not found.S[3].any()
    nothing = run(algorithm, torch.zeros_like(W), gram, pattern)
    assert not nothing.S.any()
    assert nothing.stats.relative_error == 0


@pytest.mark.parametrize("levels", ["integer", "half", "book"])
@pytest.mark.parametrize("values", ["int4", "int2", pytest.param("int8", marks=pytest.mark.slow)])
def test_levels_are_those_that_were_asked_for(levels, values):
    found = run(find("3basil")[0], *layer(), "dense", values, levels=levels)
    bits = BITS[values]
    assert found.values.grid == Grid(bits, levels, GROUP)
    assert on_its_grid(found)
    if levels != "book":
        assert torch.equal(found.values.levels.float(), Grid(bits, levels).uniform())
    assert found.stats.relative_error < {"int8": 1e-4, "int4": 0.01, "int2": 0.1}[values]


# --- what single methods promise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "16:32", "0.5", "dense"])
@pytest.mark.parametrize("values", ["int4", "int3", "int2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_grid_inside_the_solve_ends_below_one_fitted_afterwards(pattern, values, seed):
    W, gram = layer(seed, (96, 128))
    grid, algorithm = make_grid(values, group=64), find("3basil")[0]
    inside = solve(algorithm, W, gram, PATTERNS[pattern], 8, {}, grid=grid, int8_factors=True)
    prune = find("eora")[0]
    after = solve(prune, W, gram, PATTERNS[pattern], 8, {}, grid=grid, int8_factors=True)
    assert inside.stats.relative_error < 0.9 * after.stats.relative_error


@pytest.mark.parametrize("values", ["int4", "int3", "int2"])
@pytest.mark.parametrize("changes", [{}, {"massive": 3}, {"outliers": 12}], ids=str)
def test_without_a_low_rank_part_3basil_is_never_above_gptq(values, changes):
    W, gram = layer(5, (48, 96), **changes)
    ours, gptq = (
        run(find(name)[0], W, gram, "dense", values, 0).stats.relative_error for name in ("3basil", "sparsegpt")
    )
    assert ours <= gptq * (1 + 1e-6)


def test_at_density_1_sparsegpt_is_gptq():
    W, gram = layer()
    W, gram = W.double(), Gram(gram.H.double(), gram.dead)
    target = GridTarget(make_grid("int4", "integer", 16), masked=False)
    found = sparsegpt(W, gram, DENSE, target, blocksize=48)
    plain = oracles_methods.gptq(W, gram.H, found.values.scale.double(), 16)
    torch.testing.assert_close(found.S, plain, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)], ids=str)
def test_sparsegpt_rounds_while_it_sweeps(pattern):
    W, gram = layer(2, (48, 96))
    rounded = run(find("sparsegpt")[0], W, gram, pattern, "int3", group=32).stats.relative_error
    plain = run(find("sparsegpt")[0], W, gram, pattern, "model")
    assert rounded < 0.8 * rounded_after(W, gram, plain, make_grid("int3", group=32))


def test_the_papers_schedules_take_a_grid_afterwards():
    W, gram = layer()
    for schedule in ("paper", "literal"):
        found = run(find("3basil")[0], W, gram, "2:4", "int4", schedule=schedule)
        assert on_its_grid(found)


# --- one matrix ------------------------------------------------------------------------------------------------------


def test_decompose_takes_the_words_of_the_command_line():
    W, H = oracles.problem(OUT, IN, 0)
    found = decompose(W, H, pattern=DENSE, rank=RANK, values="int4", levels="book", group="row", effort=0.3)
    assert found.values.grid == Grid(4, "book", None)
    assert found.factors is not None
    kept = decompose(W, H, pattern=DENSE, rank=RANK, values="int4", factors="model", effort=0.3)
    assert kept.factors is None
    only = decompose(W, H, pattern="2:4", rank=RANK, factors="int8", effort=0.3)
    plain = decompose(W, H, pattern="2:4", rank=RANK, effort=0.3)
    assert only.values is None
    assert only.factors.U.shape == only.factors.V.shape == (RANK,)
    assert torch.equal(only.S, plain.S)
    assert only.stats.relative_error < 1.2 * plain.stats.relative_error


@pytest.mark.parametrize("wrong", [{"values": "int5"}, {"values": "int4", "levels": "odd"}, {"factors": "int4"}])
def test_decompose_refuses_what_there_is_not(wrong):
    W, H = oracles.problem(OUT, IN, 0)
    with pytest.raises(InputError, match=r"There (is|are) no"):
        decompose(W, H, pattern="2:4", rank=0, **wrong)
