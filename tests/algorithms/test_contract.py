"""Laws that every registered algorithm obeys; one that is added is tested from the moment its file is there."""

from functools import cache
from itertools import pairwise, product
from operator import attrgetter

import pytest
import torch

import oracles
from samples import few_of
from sparlow.algorithms import Decomposition, Pruned, SolveStats, algorithms, find, solve
from sparlow.algorithms._registry import Algorithm
from sparlow.errors import InputError, RunError
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import NM, Unstructured, parse_pattern

OUT, IN, RANK, DEAD = 24, 40, 4, 5
PATTERNS = [
    parse_pattern(text) for text in ("2:4", "4:8", "2:8", "1:4", "0.5", "0.7")
]  # all of them whole numbers a row
QUICK = {"effort": 0.3, "rounds": 8}  # by the name of an option: enough for laws, which hold at any effort

every_pattern = pytest.mark.parametrize("pattern", few_of(PATTERNS, NM(2, 4), NM(2, 8), Unstructured(0.5)), ids=str)
both_kinds = pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)

PRUNERS, DECOMPOSERS = ([a for a in algorithms() if a.kind == kind] for kind in ("pruner", "decomposer"))
every_pruner = pytest.mark.parametrize("algorithm", PRUNERS, ids=attrgetter("name"))
every_decomposer = pytest.mark.parametrize("algorithm", DECOMPOSERS, ids=attrgetter("name"))


@pytest.fixture(params=algorithms(), ids=attrgetter("name"))
def algorithm(request):
    return request.param


def run(algorithm, W, gram, pattern, rank=None):
    """Solve with quick options, at rank 4 unless the algorithm has no low-rank part."""
    options = {name: value for name, value in QUICK.items() if name in algorithm.options}
    chosen = rank if rank is not None else RANK if algorithm.kind == "decomposer" else 0
    return solve(algorithm, W, gram, pattern, chosen, options)


def layer(seed=0, **changes):
    W, H = oracles.problem(OUT, IN, seed, **changes)
    return W, Gram.damped(H)


@cache
def solved(name, pattern):
    """The plain problem, solved once for all laws that only look at the answer."""
    return run(find(name)[0], *layer(), pattern)


def relative_error(W, found, gram):
    dense = found.S.double() + found.U.double() @ found.V.double()
    return oracles.objective(W.double() - dense, gram.H) / oracles.objective(W, gram.H)


def fits(S, pattern):
    """Whether S is zero wherever a mask of the pattern, made for S, is."""
    return not S[~pattern.mask(S.float().abs())].any()


def finite(found):
    return all(torch.isfinite(part).all() for part in (found.S, found.U, found.V))


# --- the answer ------------------------------------------------------------------------------------------------------


@every_pattern
def test_meets_its_pattern_exactly(algorithm, pattern):
    S = solved(algorithm.name, pattern).S
    assert fits(S, pattern)
    assert S.count_nonzero() == pattern.kept((OUT, IN))  # random numbers: nothing that is kept is 0 by chance
    assert not torch.signbit(S[S == 0]).any()


@every_pattern
def test_has_the_rank_that_was_asked_for(algorithm, pattern):
    found = solved(algorithm.name, pattern)
    rank = RANK if algorithm.kind == "decomposer" else 0
    assert [tuple(part.shape) for part in (found.S, found.U, found.V)] == [(OUT, IN), (OUT, rank), (rank, IN)]
    assert all(part.is_contiguous() for part in (found.S, found.U, found.V))


@every_pattern
def test_reports_the_error_of_what_it_returns(algorithm, pattern):
    W, gram = layer()
    found = solved(algorithm.name, pattern)
    assert found.stats["relative_error"] == pytest.approx(relative_error(W, found, gram), rel=1e-3)
    assert found.stats["iterations"] >= 1
    assert found.stats["seconds"] > 0
    assert found.stats["damping"] == found.stats["dead_columns"] == 0
    assert all(isinstance(value, float | int | str | bool) for value in found.stats.values())


@every_pattern
def test_loses_no_more_than_magnitude_pruning(algorithm, pattern):
    W, gram = layer()
    baseline = oracles.objective(W - W * pattern.mask(W.abs()), gram.H) / oracles.objective(W, gram.H)
    assert relative_error(W, solved(algorithm.name, pattern), gram) <= baseline * (1 + 1e-6)


@every_pattern
def test_is_deterministic_and_leaves_the_global_generator_alone(algorithm, pattern):
    first = solved(algorithm.name, pattern)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        before = torch.get_rng_state()
        again = run(algorithm, *layer(), pattern)
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(getattr(first, part), getattr(again, part)) for part in "SUV")


@every_pattern
def test_leaves_its_inputs_alone(algorithm, pattern):
    W, gram = layer()
    shared = [W, gram.H, gram.dead, gram.scale, gram.correlation, gram.cholesky]  # other layers read them next
    before = [tensor.clone() for tensor in shared]
    run(algorithm, W, gram, pattern)
    assert all(torch.equal(now, then) for now, then in zip(shared, before, strict=True))


# --- what may be given -----------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_answers_in_the_type_and_on_the_device_of_the_weight(algorithm, pattern, dtype):
    W, gram = layer()
    W = W.to(dtype)
    found = run(algorithm, W, gram, pattern)
    assert {part.dtype for part in (found.S, found.U, found.V)} == {dtype}
    assert {part.device for part in (found.S, found.U, found.V)} == {W.device}
    assert fits(found.S, pattern)
    assert found.stats["relative_error"] == pytest.approx(relative_error(W, found, gram), rel=1e-3)


@both_kinds
def test_a_weight_may_be_a_parameter_and_a_view(algorithm, pattern):
    W, gram = layer()
    view = W.T.contiguous().requires_grad_().T
    found = run(algorithm, view, gram, pattern)
    assert not any(part.requires_grad for part in (found.S, found.U, found.V))
    plain = solved(algorithm.name, pattern).stats["relative_error"]
    assert found.stats["relative_error"] == pytest.approx(plain, rel=0.02)  # sums may run in another order


@both_kinds
def test_a_dead_column_gets_no_weight(algorithm, pattern):
    W, H = oracles.problem(OUT, IN, 0)
    H[DEAD] = H[:, DEAD] = 0
    found = run(algorithm, W, Gram.damped(H), pattern)
    assert finite(found)
    assert not found.S[:, DEAD].any()
    assert found.dense()[:, DEAD].abs().max() <= 1e-6 * W.abs().max()
    assert fits(found.S, pattern)
    assert found.stats["dead_columns"] == 1


@both_kinds
def test_fewer_tokens_than_features_will_do(algorithm, pattern):
    W, gram = layer(tokens=IN // 3)
    found = run(algorithm, W, gram, pattern)
    assert fits(found.S, pattern)
    assert found.stats["relative_error"] == pytest.approx(relative_error(W, found, gram), rel=1e-2)
    assert found.stats["relative_error"] < 1


@both_kinds
@pytest.mark.parametrize("tokens", [1, IN // 3, IN - 1])
def test_an_undamped_singular_gram_is_solved_or_refused(algorithm, pattern, tokens):
    W, H = oracles.problem(OUT, IN, 0, tokens=tokens)
    try:
        found = run(algorithm, W, Gram.damped(H, absolute=0, relative=0), pattern)
    except (InputError, RunError):
        return
    assert finite(found)
    assert fits(found.S, pattern)
    assert found.stats["relative_error"] < 1  # comparisons with NaN are false


@both_kinds
def test_nothing_is_made_of_nothing(algorithm, pattern):
    W, gram = layer()
    found = run(algorithm, torch.zeros_like(W), gram, pattern)
    assert not found.dense().any()
    assert found.stats["relative_error"] == 0


@every_decomposer
@both_kinds
def test_the_low_rank_part_may_be_empty_or_full_and_helps(algorithm, pattern):
    W, gram = layer()
    none, some, full = (run(algorithm, W, gram, pattern, rank) for rank in (0, RANK, min(OUT, IN)))
    assert (none.U.shape, none.V.shape) == ((OUT, 0), (0, IN))
    assert (full.U.shape, full.V.shape) == ((OUT, OUT), (OUT, IN))
    assert none.stats["relative_error"] > some.stats["relative_error"] > full.stats["relative_error"]
    assert full.stats["relative_error"] < 1e-4


@every_pruner
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(2, 8)], ids=str)
def test_a_pruner_leaves_a_weight_alone_that_fits_already(algorithm, pattern):
    W, gram = layer()
    W = W * pattern.mask(W.abs())
    assert run(algorithm, W, gram, pattern).stats["relative_error"] < 1e-9


@pytest.mark.gpu
@every_pattern
def test_an_accelerator_finds_what_the_cpu_finds(algorithm, pattern):
    W, gram = layer()
    first, again = (run(algorithm, W.cuda(), Gram(gram.H.cuda(), gram.dead.cuda()), pattern) for _ in range(2))
    assert {part.device.type for part in (first.S, first.U, first.V)} == {"cuda"}
    assert all(torch.equal(getattr(first, part), getattr(again, part)) for part in "SUV")
    assert fits(first.S.cpu(), pattern)
    assert first.S.count_nonzero() == pattern.kept((OUT, IN))
    plain = solved(algorithm.name, pattern)
    assert first.stats["relative_error"] == pytest.approx(plain.stats["relative_error"], rel=0.15)
    assert ((first.S != 0).cpu() == (plain.S != 0)).float().mean() > 0.7  # near equals may be chosen otherwise


# --- symmetries ------------------------------------------------------------------------------------------------------


@every_pattern
def test_scaling_the_weight_scales_the_answer(algorithm, pattern):
    W, gram = layer()
    plain = solved(algorithm.name, pattern)
    halved, tripled = (run(algorithm, factor * W, gram, pattern) for factor in (2.0**-6, 3.0))
    torch.testing.assert_close(halved.dense() * 2**6, plain.dense(), rtol=1e-4, atol=1e-5)  # a power of 2 rounds alike
    # by 3 it does not, and an iteration may choose otherwise between near equals
    assert tripled.stats["relative_error"] == pytest.approx(plain.stats["relative_error"], rel=0.05)


@every_pattern
def test_the_units_of_the_activations_do_not_matter(algorithm, pattern):
    W, H = oracles.problem(OUT, IN, 0)
    found = run(algorithm, W, Gram.damped(H * 2**-6), pattern)
    torch.testing.assert_close(found.dense(), solved(algorithm.name, pattern).dense(), rtol=1e-4, atol=1e-5)


@every_pattern
def test_permuting_the_rows_permutes_the_answer(algorithm, pattern):
    W, gram = layer()
    plain = solved(algorithm.name, pattern)
    order = torch.randperm(OUT, generator=torch.Generator().manual_seed(0))
    found = run(algorithm, W[order], gram, pattern)
    # sums run in another order, and an iteration may then choose otherwise between near equals
    assert found.stats["relative_error"] == pytest.approx(plain.stats["relative_error"], rel=0.05)
    same = (found.S != 0) == (plain.S[order] != 0)
    assert same.float().mean() > 0.95


# --- the low-rank part -----------------------------------------------------------------------------------------------

# Few common factors and a rank of a third of the width or more: the columns that a low-rank step orthonormalises are
# then dependent but for their rounding.
FEW = {"factors": 6, "noise": 0.03}
HARD, RANKS = (48, 64), (4, 12, 26)
EFFORTS = [
    {"effort": 0.1, "rounds": 4},
    {"effort": 0.35, "rounds": 12},
    {"effort": 0.5, "rounds": 24},
    {"effort": 1.0, "rounds": 160},
]
OF_ITS_OWN = {"oats": torch.diag}  # a method whose paper minimises in another metric than H, made of diag(H)


@cache
def hard(name, pattern, rank, effort, seed=0):
    """W, the damped Gram and what an algorithm makes of them."""
    W, H = oracles.problem(*HARD, seed, **FEW)
    algorithm, gram = find(name)[0], Gram.damped(H)
    options = {option: value for option, value in EFFORTS[effort].items() if option in algorithm.options}
    return W, gram, solve(algorithm, W, gram, pattern, rank, options)


@every_decomposer
@both_kinds
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("effort", range(len(EFFORTS)))
def test_the_low_rank_part_is_the_best_for_the_sparse_part(algorithm, pattern, rank, effort):
    W, gram, found = hard(algorithm.name, pattern, rank, effort)
    own = OF_ITS_OWN.get(algorithm.name)
    metric = own(gram.H.diagonal()) if own else gram.H
    # the papers' rounds end on S, so L is the best only for an S that has settled
    bound = 1.02 if own is None or effort == len(EFFORTS) - 1 else 1.25
    best = oracles.objective(W - found.S - oracles.weighted_low_rank(W - found.S, metric, rank), metric)
    residual = W.double() - found.S.double() - found.U.double() @ found.V.double()
    assert oracles.objective(residual, metric) <= bound * best


@every_decomposer
@both_kinds
@pytest.mark.parametrize("seed", few_of([0, 1, 2], 0))
def test_more_effort_and_more_rank_never_end_higher(algorithm, pattern, seed):
    errors = [
        [hard(algorithm.name, pattern, rank, effort, seed)[2].stats["relative_error"] for rank in RANKS]
        for effort in range(len(EFFORTS))
    ]
    for less, more in pairwise(errors):
        assert all(later <= 1.02 * earlier for earlier, later in zip(less, more, strict=True))
    for row in errors:
        assert all(larger <= 1.02 * smaller for smaller, larger in pairwise(row))


# --- range -----------------------------------------------------------------------------------------------------------


FACTORS = product([1e-30, 1e-25, 1e-6, 1, 1e6, 1e30], [1e-30, 1e-6, 1, 1e6, 1e15, 1e30])
CORNERS = product([1e-30, 1e30], repeat=2)


@both_kinds
@pytest.mark.parametrize(("of_W", "of_H"), few_of(FACTORS, *CORNERS, (1e-25, 1e15), (1e6, 1e-6)))
def test_no_factor_of_weight_or_inputs_changes_the_answer(algorithm, pattern, of_W, of_H):
    W, H = oracles.problem(OUT, IN, 0)
    W, H = (W.double() * of_W).float(), (H.double() * of_H).float()
    found = run(algorithm, W, Gram.damped(H), pattern)
    assert finite(found)
    # rounded anew, an iteration may choose otherwise between near equals
    assert found.stats["relative_error"] == pytest.approx(
        solved(algorithm.name, pattern).stats["relative_error"], rel=0.1
    )
    dense = found.S.double() + found.U.double() @ found.V.double()
    H = oracles.damp(H.double() / of_H)
    exact = oracles.objective((W.double() - dense) / of_W, H) / oracles.objective(W.double() / of_W, H)
    assert found.stats["relative_error"] == pytest.approx(exact, rel=2e-3)


@both_kinds
def test_a_factor_that_is_a_power_of_two_changes_no_bit(algorithm, pattern):
    W, H = oracles.problem(OUT, IN, 0)
    found = run(algorithm, W * 2.0**-80, Gram.damped(H * 2.0**60), pattern)
    plain = solved(algorithm.name, pattern)
    assert torch.equal(found.S * 2.0**80, plain.S)
    assert torch.equal((found.U.double() @ found.V.double()) * 2.0**80, plain.U.double() @ plain.V.double())
    assert found.stats["relative_error"] == plain.stats["relative_error"]


@both_kinds
@pytest.mark.parametrize("power", [0, 200])
def test_float64_has_its_own_range(algorithm, pattern, power):
    W, H = oracles.problem(OUT, IN, 0)
    found = run(algorithm, W.double() * 2.0**power, Gram.damped(H.double() * 2.0**power), pattern)
    assert found.stats["relative_error"] == solved(algorithm.name, pattern).stats["relative_error"]


@every_decomposer
@both_kinds
@pytest.mark.parametrize(
    ("factor", "of_H"),
    few_of(product([2.0**-20, 2.0**-6, 1.0, 2.0**20], [1e-6, 1.0, 1e6]), (2.0**-20, 1e-6), (1.0, 1.0), (2.0**20, 1e6)),
)
def test_half_precision_holds_the_factors(algorithm, pattern, factor, of_H):
    W, H = oracles.problem(OUT, IN, 0)
    found = run(algorithm, W * factor, Gram.damped(H * of_H), pattern)
    L = found.U.double() @ found.V.double()
    stored = found.U.half().double() @ found.V.half().double()  # with those of one scale alone it would be inf or 0
    assert oracles.objective(L - stored, H) <= 1e-5 * oracles.objective(L, H)


@every_decomposer
@pytest.mark.parametrize("factor", [2.0**-7, 1.0, 2.0**9])
def test_a_weight_in_half_precision_ends_where_it_does_in_float32(algorithm, factor):
    W, gram = layer()
    W = W.half().float()
    plain = run(algorithm, W, gram, NM(2, 4)).stats["relative_error"]
    assert run(algorithm, (W * factor).half(), gram, NM(2, 4)).stats["relative_error"] == pytest.approx(plain, rel=0.05)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_a_weight_that_is_not_finite(algorithm, bad):
    W, gram = layer()
    W[3, 7] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        run(algorithm, W, gram, NM(2, 4))


@pytest.mark.parametrize("rank", [-1, min(OUT, IN) + 1])
def test_refuses_an_impossible_rank(algorithm, rank):
    with pytest.raises(InputError, match="Rank"):
        run(algorithm, *layer(), NM(2, 4), rank)


@every_pruner
def test_refuses_a_rank_if_it_only_prunes(algorithm):
    with pytest.raises(InputError, match=f"{algorithm.name} only prunes"):
        run(algorithm, *layer(), NM(2, 4), 1)


def test_refuses_a_pattern_that_does_not_divide(algorithm):
    with pytest.raises(InputError, match="multiple of 16"):
        run(algorithm, *layer(), NM(2, 16))


def test_refuses_a_gram_of_another_width(algorithm):
    W, gram = layer()
    with pytest.raises(InputError, match="H must be"):
        run(algorithm, W[:, :-8], gram, NM(2, 4))


@pytest.mark.parametrize("W", [torch.ones(OUT, IN, dtype=torch.int8), torch.ones(IN), torch.ones(2, OUT, IN)])
def test_refuses_what_is_no_weight(algorithm, W):
    with pytest.raises(InputError, match="W must be a matrix"):
        run(algorithm, W, Gram.identity(IN), NM(2, 4))


# --- the shell, with algorithms that misbehave -----------------------------------------------------------------------


def through_the_shell(function, dtype=torch.float32):
    W, _ = layer()
    return solve(Algorithm("bad", "decomposer", function, {}), W.to(dtype), Gram.identity(IN), Unstructured(0.0), 0, {})


def only(S, **stats):
    return Decomposition(S, S.new_zeros(len(S), 0), S.new_zeros(0, S.shape[1]), stats)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_is_no_answer(bad):
    with pytest.raises(RunError, match="bad ended in values that are not finite"):
        through_the_shell(lambda W, *_: only(W * bad))


def test_an_answer_too_large_for_the_type_of_the_weight_is_no_answer():
    with pytest.raises(RunError, match="not finite"):
        through_the_shell(lambda W, *_: only(W * 1e6), torch.float16)


def test_an_answer_whose_error_overflows_is_no_answer():
    with pytest.raises(RunError):
        through_the_shell(lambda W, *_: only(W * 1e25))


def test_a_decomposition_that_fails_is_no_answer():
    with pytest.raises(RunError):
        through_the_shell(lambda W, *_: only(torch.linalg.svd(W * float("nan")).U))


def test_zeros_are_positive_after_rounding_too():
    S = through_the_shell(lambda W, *_: only(-1e-9 * torch.ones_like(W)), torch.float16).S
    assert not torch.signbit(S).any()


def test_an_algorithm_does_not_grade_itself():
    assert through_the_shell(lambda W, *_: only(0 * W, relative_error=0.0)).stats["relative_error"] == pytest.approx(1)


def test_what_an_algorithm_reports_is_kept_beside_what_is_measured():
    found = through_the_shell(lambda W, *_: only(W, iterations=9, converged=False, rho=0.5))
    assert (found.stats.iterations, found.stats.converged, found.stats["rho"]) == (9, False, 0.5)
    assert found.stats["relative_error"] == found.stats.relative_error == 0
    assert list(found.stats)[-1] == "rho"
    assert dict(found.stats) == {name: found.stats[name] for name in found.stats}
    assert len(found.stats) == len(dict(found.stats))
    assert "more" not in found.stats
    with pytest.raises(KeyError):
        found.stats["nothing"]


def test_a_pruner_may_say_how_it_went():
    W, gram = layer()
    S = W * NM(2, 4).mask(W.abs())
    told = Algorithm("told", "pruner", lambda *_: Pruned(S, SolveStats(5, converged=False)), {})
    silent = Algorithm("silent", "pruner", lambda *_: S, {})
    stats, usual = (solve(algorithm, W, gram, NM(2, 4), 0, {}).stats for algorithm in (told, silent))
    assert (stats.iterations, stats.converged) == (5, False)
    assert (usual.iterations, usual.converged) == (1, True)
    assert stats.relative_error == usual.relative_error > 0
