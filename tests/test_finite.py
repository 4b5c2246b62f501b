import pytest
import torch

from sparlow import finite
from sparlow.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_finds_the_one_that_is_none(dtype, value):
    x = torch.ones(3, 5, dtype=dtype)
    assert all_finite(x)
    x[1, 2] = value
    assert not all_finite(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_not_misled_by_a_sum(dtype):
    most = torch.finfo(dtype).max
    assert all_finite(torch.full((4, 4), most, dtype=dtype))  # overflows
    assert not all_finite(torch.tensor([torch.inf, -torch.inf, 1.0], dtype=dtype))
    assert all_finite(torch.empty(0, 3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_look_at_each_entry_copies_a_part_at_a_time(dtype, monkeypatch):
    monkeypatch.setattr(finite, "AT_A_TIME", 100)
    looked_at = []
    monkeypatch.setattr(torch.Tensor, "isfinite", of(looked_at, torch.Tensor.isfinite))
    monkeypatch.setattr(torch.Tensor, "float", of(looked_at, torch.Tensor.float))
    x = torch.full((50, 20), torch.finfo(dtype).max).to(dtype)
    assert all_finite(x)
    assert max(looked_at) <= 100
    x[49, 19] = torch.nan
    assert not all_finite(x)


def of(sizes, function):
    def counted(x, *args):
        sizes.append(x.numel())
        return function(x, *args)

    return counted
