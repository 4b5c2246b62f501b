import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparlow.linalg.selection import Selection


@st.composite
def selections(draw):
    """Which of how many, and the shape of the groups."""
    m = draw(st.one_of(st.integers(1, 40), st.sampled_from([16, 32, 64, 75, 300])))
    return draw(st.integers(1, m)), m, (draw(st.integers(1, 3)), draw(st.integers(1, 4)))


@settings(max_examples=150, deadline=None)
@given(selections(), st.integers(0, 2**31), st.sampled_from([3, 1000]))
def test_the_nth_largest_of_every_group(case, seed, values):
    n, m, shape = case
    select = Selection(n, m, shape, torch.empty(0))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):  # the same memory again
        members = torch.randint(values, (m, *shape), generator=generator).float()
        before = members.clone()
        assert torch.equal(select(members), members.sort(0, descending=True).values[n - 1])
        assert torch.equal(members, before)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 2), (3, 7), (8, 16)])
def test_every_single_answer_is_right(n, m):
    """A network that selects from all vectors of zeros and ones selects from all vectors."""
    members = torch.arange(2**m).unsqueeze(0).bitwise_right_shift(torch.arange(m).unsqueeze(1)).bitwise_and(1).float()
    found = Selection(n, m, (2**m,), members)(members)
    assert torch.equal(found, (members.sum(0) >= n).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_members_may_be_a_view_of_any_float_type(dtype):
    X = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    members = X.view(5, 8, 3).transpose(0, 1)
    found = Selection(3, 8, (5, 3), X)(members)
    assert found.dtype == dtype
    assert torch.equal(found, members.sort(0, descending=True).values[2])


@pytest.mark.parametrize(("n", "m", "most"), [(2, 4, 7), (4, 8, 27), (8, 16, 91), (16, 32, 283)])
def test_it_takes_no_more_comparisons_than_it_says(n, m, most):
    """Numbers compared for one group, by the lengths of what is compared."""
    select = Selection(n, m, (1,), torch.empty(0))
    assert m + sum(len(x) for _, x, _, _ in select._steps) == most
