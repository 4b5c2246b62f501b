import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparlow.errors import InputError
from sparlow.model.artefact import codes
from sparlow.model.artefact.codes import pack_codes, row_bytes, unpack_codes

ROWS = st.lists(st.lists(st.integers(0, 255), max_size=20), max_size=6)


def as_bits(rows, bits):
    """The bytes by docs/format.md: least significant bits first, each row begins on a byte."""
    found = []
    for row in rows:
        text = "".join(format(code, f"0{bits}b")[::-1] for code in row)
        text += "0" * (-len(text) % 8)
        found += [int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8)]
    return found


@given(ROWS, st.sampled_from([8, 4, 3, 2]), st.sampled_from([1, 7, 1 << 22]))
def test_codes_are_packed_as_documented_and_come_back(rows, bits, at_a_time):
    rows = [[code % (1 << bits) for code in row] for row in rows]
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    flat = torch.tensor([code for row in rows for code in row], dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "_CODES_AT_A_TIME", at_a_time)
        packed = pack_codes(flat, counts, bits)
        assert packed.tolist() == as_bits(rows, bits)
        assert row_bytes(counts, bits).sum() == len(packed)
        assert torch.equal(unpack_codes(packed, counts, bits), flat)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("change", [lambda data: data[1:], lambda data: torch.cat([data, data[:1]])])
def test_bytes_that_are_missing_or_left_over(bits, change):
    counts = torch.tensor([5, 9])
    data = pack_codes(torch.ones(14, dtype=torch.uint8), counts, bits)
    with pytest.raises(InputError, match="Its codes should take"):
        unpack_codes(change(data), counts, bits)


@pytest.mark.parametrize("counts", [[5, 5], [5, 9]])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_what_a_row_has_left_over_is_zero(bits, counts):
    counts = torch.tensor(counts)
    data = pack_codes(torch.ones(int(counts.sum()), dtype=torch.uint8), counts, bits)
    data[row_bytes(counts, bits)[0] - 1] |= 128
    with pytest.raises(InputError, match="past the end of a row"):
        unpack_codes(data, counts, bits)
