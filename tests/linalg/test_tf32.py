import pytest
import torch

import oracles
import sparlow
from sparlow.algorithms import _registry
from sparlow.linalg.tf32 import exact_products, rounded_products, unit

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
newer = pytest.mark.skipif(not hasattr(CPU, "fp32_precision"), reason="torch has no such settings before 2.9")


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends, "fp32_precision"):
        for setting in (torch.backends, CUDA, CPU):
            setting.fp32_precision = "none"


def ask_for_tf32(how):
    """What a script does before it calls sparlow; torch's older functions then refuse to say what is set."""
    if how == "for all":
        torch.backends.fp32_precision = "tf32"
    elif how == "for CUDA":
        CUDA.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision(how)


@newer
@pytest.mark.parametrize("how", ["for all", "for CUDA", "high", "medium"])
def test_the_newer_precision_settings_neither_stop_a_solve_nor_round_its_products(how):
    ask_for_tf32(how)
    before = CUDA.fp32_precision, CPU.fp32_precision
    with exact_products():
        assert (CUDA.fp32_precision, CPU.fp32_precision) == ("ieee", "ieee")
        with rounded_products(torch.device("cuda")):  # needs no device
            assert CUDA.fp32_precision == "tf32"
        assert CUDA.fp32_precision == "ieee"
        with rounded_products(torch.device("cpu")):
            assert CPU.fp32_precision == "ieee"
    assert (CUDA.fp32_precision, CPU.fp32_precision) == before
    if how == "for all":  # still follows what is set for all
        torch.backends.fp32_precision = "ieee"
        assert CUDA.fp32_precision == "ieee"


@newer
def test_a_precision_set_by_the_caller_does_not_reach_a_method(monkeypatch):
    seen = []
    monkeypatch.setattr(_registry, "_ALGORITHMS", dict(_registry._ALGORITHMS))

    @sparlow.pruner("looks-at-the-precision")
    def looks(W, gram, pattern):  # noqa: ARG001 - a pruner's signature
        """Look at the settings."""
        seen.append((CUDA.fp32_precision, CPU.fp32_precision))
        return W * pattern.mask(W.abs())

    ask_for_tf32("for all")
    W, H = oracles.problem(8, 16, 0)
    sparlow.decompose(W, H, pattern="2:4", rank=0, algorithm="looks-at-the-precision")
    assert seen == [("ieee", "ieee")]
    assert (CUDA.fp32_precision, CPU.fp32_precision) == ("tf32", "tf32")


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
