import pytest
import torch

from sparlow.linalg.tf32 import unit


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.0], 1.0),
        ([], 1.0),
        ([0.75, -3.0], 2.0),
        ([4.0], 4.0),
        ([-1e-30], 2.0**-100),
        ([3e38], 2.0**126),
        ([1e-44], 2.0**-126),
        ([float("nan")], 1.0),
        ([float("inf"), 1.0], 1.0),
    ],
)
def test_the_unit_is_the_power_of_two_below_the_largest(values, expected):
    assert unit(torch.tensor(values)) == expected
