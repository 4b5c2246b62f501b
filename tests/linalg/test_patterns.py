import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from sparlow.errors import InputError
from sparlow.linalg import patterns
from sparlow.linalg.coordinates import interleave
from sparlow.linalg.patterns import NM, Unstructured, parse_pattern, within_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATTERNS = [
    NM(2, 4),
    NM(4, 8),
    NM(2, 8),
    NM(1, 4),
    Unstructured(0.5),
    Unstructured(0.7),
    Unstructured(0.5, per_row=True),
]
WITH_TIES = st.sampled_from([0.0, 2.0**-140, 0.5, 1.0, 1.0 + 2.0**-23, 2.0**100])
SCORE = st.one_of(WITH_TIES, st.floats(0, 2.0**100, width=32))


@st.composite
def scores_for(draw, m=1):
    """Scores (out, in) with in a multiple of m; ties and zeros are frequent."""
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    entry = draw(st.sampled_from([WITH_TIES, SCORE]))
    values = draw(st.lists(entry, min_size=rows * groups * m, max_size=rows * groups * m))
    return torch.tensor(values, dtype=torch.float32).reshape(rows, groups * m)


@st.composite
def nm_and_scores(draw):
    m = draw(st.integers(1, 8))
    return NM(draw(st.integers(1, m)), m), draw(scores_for(m))


def randoms(rows, columns, dtype=torch.float32, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# --- masks -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(nm_and_scores())
def test_nm_keeps_the_best_subset_of_every_group(case):
    pattern, scores = case
    assert torch.equal(pattern.mask(scores), oracles.nm_mask(scores, pattern.n, pattern.m))


@settings(max_examples=150, deadline=None)
@given(scores_for(), st.floats(0, 1, exclude_max=True))
def test_unstructured_keeps_the_head_of_the_sorted_scores(scores, sparsity):
    pattern = Unstructured(sparsity)
    mask = pattern.mask(scores)
    assert torch.equal(mask, oracles.largest_mask(scores, pattern.kept(tuple(scores.shape))))
    assert abs(mask.sum().item() - (1 - sparsity) * scores.numel()) <= 0.5


@settings(max_examples=100, deadline=None)
@given(scores_for(), st.floats(0, 1, exclude_max=True))
def test_per_row_keeps_the_head_of_every_row(scores, sparsity):
    pattern = Unstructured(sparsity, per_row=True)
    for row, chosen in zip(scores, pattern.mask(scores), strict=True):
        assert chosen.sum() == pattern.kept((1, len(row)))
        assert torch.equal(chosen, oracles.largest_mask(row, int(chosen.sum())))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_count_is_exact_in_every_float_type(pattern, dtype):
    scores = randoms(12, 40, dtype)  # in bfloat16 most scores have an equal
    mask = pattern.mask(scores)
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    assert mask.sum() == pattern.kept((12, 40))
    assert torch.equal(mask, pattern.mask(scores.float()))


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("per_row", [False, True])
def test_the_count_is_exact_in_float64(sparsity, per_row):
    scores = 1 + 1e-9 * randoms(12, 40).double()  # one and the same number in float32
    pattern = Unstructured(sparsity, per_row=per_row)
    assert pattern.mask(scores).sum() == pattern.kept((12, 40))


def test_a_group_may_be_wide():
    scores = randoms(1, 300)
    assert torch.equal(NM(1, 300).mask(scores), oracles.largest_mask(scores, 1))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_scores_may_be_a_view_and_are_left_alone(pattern):
    scores = randoms(40, 12).T
    before = scores.clone()
    assert torch.equal(pattern.mask(scores), pattern.mask(scores.contiguous()))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equal_scores_go_to_the_entries_that_come_first(pattern):
    mask = pattern.mask(torch.ones(3, 16))
    group = {
        NM: lambda: mask.reshape(-1, pattern.m),
        Unstructured: lambda: mask if pattern.per_row else mask.reshape(1, -1),
    }
    groups = group[type(pattern)]()
    assert mask.sum() == pattern.kept((3, 16))
    assert (groups.int().diff(dim=1) <= 0).all()  # kept entries first, then the pruned ones


def test_nothing_is_pruned_at_sparsity_zero_nor_by_n_equal_to_m():
    assert Unstructured(0.0).mask(torch.zeros(3, 8)).all()
    assert NM(4, 4).mask(torch.zeros(3, 8)).all()


def test_a_sparsity_near_one_may_leave_nothing():
    assert not Unstructured(0.99).mask(randoms(3, 4)).any()


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (5, 24), (7, 40)])
def test_kept_and_density_agree_with_the_mask(pattern, shape):
    count = pattern.mask(randoms(*shape)).sum().item()
    assert count == pattern.kept(shape)
    rounding = 0.5 * (shape[0] if getattr(pattern, "per_row", False) else 1)
    assert abs(count - pattern.density * shape[0] * shape[1]) <= rounding


def test_check_accepts_what_divides_and_names_what_does_not():
    NM(2, 4).check((3, 12))
    Unstructured(0.5).check((3, 13))
    with pytest.raises(InputError, match=r"2:4.*multiple of 4.*13"):
        NM(2, 4).check((4, 13))


def test_within_rows_changes_unstructured_patterns_only():
    assert within_rows(Unstructured(0.3)) == Unstructured(0.3, per_row=True)
    assert within_rows(NM(2, 4)) == NM(2, 4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_violation_is_silent_for_what_the_mask_leaves_and_for_less(pattern):
    S = gaussian(6, 16)
    S = S * pattern.mask(S.abs())
    assert pattern.violation("layer", S) is None
    assert pattern.violation("layer", torch.zeros_like(S)) is None


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_violation_names_the_layer_that_keeps_one_too_many(pattern):
    S = gaussian(6, 16)
    mask = pattern.mask(S.abs())
    mask.view(-1)[(~mask).view(-1).nonzero()[0]] = True
    assert "layer 7 keeps" in pattern.violation("layer 7", S * mask)


@pytest.mark.parametrize("pattern", [Unstructured(0.7), Unstructured(0.9)], ids=str)
def test_a_choice_within_rows_does_not_violate_the_pattern_it_is_made_for(pattern):
    S = gaussian(24, 33 if pattern.sparsity == 0.7 else 17)
    S = S * within_rows(pattern).mask(S.abs())
    assert pattern.violation("layer", S) is None


# --- parsing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        ("4:4", NM(4, 4)),
        ("0.5", Unstructured(0.5)),
        ("0", Unstructured(0.0)),
        ("0.0", Unstructured(0.0)),
        ("dense", Unstructured(0.0)),
        ("7e-1", Unstructured(0.7)),
    ],
)
def test_parse_pattern(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "pattern", [*(p for p in PATTERNS if p != Unstructured(0.5, per_row=True)), Unstructured(0.0)], ids=str
)
def test_parse_pattern_reads_what_str_prints(pattern):
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize("pattern", [Unstructured(0.0), Unstructured(0.0, per_row=True)])
def test_dense_keeps_everything_and_nothing_violates_it(pattern):
    X = gaussian(6, 13)  # no width is refused
    X[2, 5] = 0
    pattern.check((6, 13))
    assert str(pattern) == "dense"
    assert pattern.kept((6, 13)) == 78
    assert pattern.density == 1
    assert pattern.mask(X.abs()).all()
    assert torch.equal(projected(pattern.projector(), X), X)
    assert pattern.violation("layer", X) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "half",
        "Dense",
        "2:4:8",
        ":4",
        "2:",
        "2.0:4",
        "0:4",
        "5:4",
        "-1:4",
        "0:0",
        "1",
        "1.0",
        "-0.1",
        "nan",
        "inf",
        "50%",
        "0,5",
        ":",
    ],
)
def test_parse_pattern_refuses_anything_else(text):
    with pytest.raises(InputError, match=r"Give"):
        parse_pattern(text)


# --- projectors ------------------------------------------------------------------------------------------------------


def walk(start, drift, steps, seed=1):
    """A random walk that begins at ``start``: the iterates of an imaginary solver."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield start
        start = start + drift * torch.randn(start.shape, generator=generator)


def projected(project, X):
    """What is left of X, from a buffer that held something else."""
    return project(X, torch.full_like(X, 7.0))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9])
def test_the_projector_of_a_small_matrix_is_exact(sparsity):
    pattern = Unstructured(sparsity)
    project = pattern.projector()
    for X in walk(gaussian(96, 128), 0.1, 5):
        assert torch.equal(projected(project, X), X * pattern.mask(X.abs()))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("shape", [(512, 1024), (1000, 700), (960, 960), (320, 960), (768, 768)])
def test_the_projector_of_a_large_matrix_keeps_nearly_as_many(sparsity, shape):
    pattern = Unstructured(sparsity)
    uneven = gaussian(1, shape[1], seed=1).exp()  # columns differ, neighbours too
    X = gaussian(*shape) * torch.logspace(-1, 1, shape[0])[:, None] * uneven
    found = projected(pattern.projector(), X)
    assert torch.equal(found, X * (X.abs() >= found.abs()[found != 0].min()))
    kept = pattern.kept(shape)
    deviation = math.sqrt(sparsity / (1 - sparsity) / 50_000)  # of the share that so many samples keep
    assert abs((found != 0).sum().item() - kept) < 4 * deviation * kept


@pytest.mark.parametrize("exponent", [-30, 8, 20])
def test_the_projector_does_not_care_for_units(exponent):
    project, X = Unstructured(0.5).projector(), gaussian(512, 512)
    assert torch.equal(projected(project, X) * 2.0**exponent, projected(project, X * 2.0**exponent))


def test_the_projector_keeps_what_there_is_of_a_matrix_with_many_zeros():
    start = gaussian(60, 80) * (randoms(60, 80) < 0.3)  # 30 % are not zero, and half may stay
    assert torch.equal(projected(Unstructured(0.5).projector(), start), start)


def interleaved(X, pattern):
    """X with its columns as a projector takes them."""
    return interleave(X, pattern.group or 1)


def deinterleaved(X, pattern):
    return interleave(X, X.shape[1] // (pattern.group or 1))


GROUPS = [NM(2, 4), NM(1, 4), NM(4, 4), NM(2, 8), NM(4, 8), NM(7, 8), NM(8, 16), NM(2, 5), NM(16, 32), NM(13, 32)]


@pytest.mark.parametrize("at_once", [2**19, 1500, 1])
@pytest.mark.parametrize("pattern", [*GROUPS, Unstructured(0.5, per_row=True), Unstructured(0.0)], ids=str)
def test_projectors_of_groups_are_exact(pattern, at_once, monkeypatch):
    monkeypatch.setattr(patterns._GroupProjector, "AT_ONCE", at_once)  # all rows, some of them twice, or each by itself
    project = pattern.projector()
    for rows in (12, 12, 5):  # the memory follows the matrix
        for X in walk(gaussian(rows, 320), 0.3, 4):
            found = deinterleaved(projected(project, interleaved(X, pattern)), pattern)
            assert torch.equal(found, X * pattern.mask(X.abs()))


def test_entries_that_tie_are_all_kept_by_the_projector():
    X = torch.tensor([[1.0, -1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0]])
    found = deinterleaved(projected(NM(2, 4).projector(), interleaved(X, NM(2, 4))), NM(2, 4))
    assert found.tolist() == [[1.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [*PATTERNS, NM(8, 16), NM(16, 32)], ids=str)
def test_an_accelerator_keeps_the_same_entries(pattern):
    scores = gaussian(64, 96).abs().mul(8).round()  # with many ties
    assert torch.equal(pattern.mask(scores.cuda()).cpu(), pattern.mask(scores))
    X = gaussian(64, 96, seed=1)
    found = pattern.projector()(X.cuda(), torch.empty(64, 96, device="cuda")).cpu()
    assert torch.equal(found, pattern.projector()(X, torch.empty(64, 96)))
