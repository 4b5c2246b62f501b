import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparlow.errors import InputError
from sparlow.model.artefact import bitmask
from sparlow.model.artefact.bitmask import pack, unpack

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def bits(t):
    return t.view(BITS[t.itemsize])


def sparse(rows, columns, density, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, columns, generator=generator) < density
    magnitude = 10.0 ** torch.randint(-6, 3, (rows, columns), generator=generator)  # down to subnormal half precision
    return torch.where(keep, torch.randn(rows, columns, generator=generator) * magnitude, 0.0).to(dtype) + 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 35),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from(DTYPES),
    st.integers(0),
)
def test_round_trip_is_exact(rows, columns, density, dtype, seed):
    S = sparse(rows, columns, density, dtype, seed % 2**32)
    values, mask = pack(S)
    assert mask.shape == (rows, -(-columns // 8))
    assert len(values) == S.count_nonzero()
    again = unpack(values, mask, S.shape)
    assert again.dtype == dtype
    assert torch.equal(bits(again), bits(S))
    if len(values) == S.numel():
        assert torch.equal(bits(unpack(values, None, S.shape)), bits(S))


def test_the_format_is_the_documented_one():
    S = torch.zeros(2, 10)
    S[0, 0], S[0, 7], S[0, 9], S[1, 1] = 1, 2, 3, 4
    values, mask = pack(S)
    assert values.tolist() == [1, 2, 3, 4]
    assert mask.tolist() == [[0b1000_0001, 0b10], [0b10, 0]]


def test_many_slices_give_the_same_as_one(monkeypatch):
    S = sparse(13, 21, 0.5, torch.bfloat16)
    values, mask = pack(S)
    monkeypatch.setattr(bitmask, "_ENTRIES_AT_A_TIME", 50)  # two rows and a rest of one
    sliced = pack(S)
    assert torch.equal(sliced[0], values)
    assert torch.equal(sliced[1], mask)
    assert torch.equal(unpack(values, mask, S.shape), S)


def test_takes_matrices_that_are_not_contiguous():
    S = sparse(12, 9, 0.5, torch.float32)
    assert torch.equal(unpack(*pack(S.T), S.T.shape), S.T)


def test_negative_zeros_are_dropped():
    values, mask = pack(torch.tensor([[1.0, -0.0, -2.0, 0.0]]))
    assert values.tolist() == [1.0, -2.0]
    assert mask.tolist() == [[0b0101]]
    cast = unpack(torch.tensor([1.0, -1e-12]).half(), mask, (1, 4))  # the second is -0.0 in half precision
    assert not cast.signbit().any()


def wrong(*, values=None, mask=None, shape=(2, 10)):
    good, bytes_ = pack(torch.eye(2, 10))
    return (good if values is None else values), (bytes_ if mask is None else mask), shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (wrong(values=torch.ones(1)), "keeps 2 entries, but there are 1"),
        (wrong(values=torch.ones(3)), "keeps 2 entries, but there are 3"),
        (wrong(values=torch.ones(2, 1)), "vector"),
        ((torch.ones(19), None, (2, 10)), "All entries .* are kept, but there are 19 values"),
        ((torch.ones(2, 10), None, (2, 10)), "All entries .* are kept"),
        (wrong(mask=torch.ones(2, 1, dtype=torch.uint8)), "mask"),
        (wrong(mask=torch.ones(2, 2)), "uint8"),
        (wrong(shape=(2, 17)), "mask"),
        (wrong(shape=(1, 10)), "mask"),
        (wrong(mask=torch.tensor([[1, 0], [0, 0b100]], dtype=torch.uint8)), "past the last of 10 columns"),
    ],
)
def test_refuses_parts_that_do_not_fit(arguments, message):
    with pytest.raises(InputError, match=message):
        unpack(*arguments)


def test_packs_matrices_only():
    with pytest.raises(InputError, match="matrix"):
        pack(torch.zeros(3))
