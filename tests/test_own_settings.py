"""Whatever the process that calls sparlow has set for itself, results have the bits of a fresh one."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparlow
from families import tiny
from samples import few_of
from sparlow.errors import InputError
from sparlow.own_settings import own_settings
from sparlow.recipe.recipe import GIVEN_WINDOWS, Recipe

ALGORITHMS = {"3basil": {"max_steps": 6}, "oats": {}, "alps": {}, "sparsegpt": {}, "eora": {}}
MATCHED = Recipe(rank=2, samples=32, seqlen=16, options={"max_steps": 4}, match=True, calibration=GIVEN_WINDOWS)
IDS = torch.randint(128, (32, 16), generator=torch.Generator().manual_seed(0))


@contextmanager
def changed(set_to, value, before):
    set_to(value)
    try:
        yield
    finally:
        set_to(before)


def dtype(kind):
    return changed(torch.set_default_dtype, kind, torch.float32)


@contextmanager
def bf16_products():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@contextmanager
def tf32_everywhere():
    torch.backends.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.fp32_precision = "none"


SETTINGS = {
    "float64 by default": lambda: dtype(torch.float64),
    "bfloat16 by default": lambda: dtype(torch.bfloat16),
    "another device by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "deterministic": lambda: changed(torch.use_deterministic_algorithms, *(True, False)),
    "medium precision": lambda: changed(torch.set_float32_matmul_precision, "medium", "highest"),
    "products in bfloat16": bf16_products,
    "tf32 by the newer name": tf32_everywhere,
    "one kernel of attention": lambda: sdpa_kernel([SDPBackend.MATH]),
    "numpy raises": lambda: np.errstate(all="raise"),
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def setting(request):
    return request.param


def state():
    """All that a caller can see of settings and generators."""
    flags = [torch.backends.mkldnn.matmul.fp32_precision, torch.backends.fp32_precision]
    modes = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")]
    modes += [torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.flash_sdp_enabled()]
    kinds = [torch.get_default_dtype(), torch.get_default_device(), np.geterr()]
    draws = [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]  # noqa: NPY002
    return flags, modes, kinds, draws


def problem():
    """A weight and a second moment, in float64 for what the default type makes of plain numbers."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(32, 48, generator=generator, device="cpu", dtype=torch.float32)
    X = torch.randn(200, 48, generator=generator, device="cpu", dtype=torch.float32)
    return W, X.T @ X


def decomposed():
    W, H = PROBLEM
    found = [
        sparlow.decompose(
            W, H, pattern="2:4", rank=0 if name in ("alps", "sparsegpt") else 4, algorithm=name, **options
        )
        for name, options in ALGORITHMS.items()
    ]
    return [part for one in found for part in (one.S, one.U, one.V)]


PROBLEM = problem()
CLEAN = decomposed()


def test_decompositions_have_the_same_bits_under_any_setting(setting):
    with setting():
        before = state()
        found = decomposed()
        assert state() == before
    assert all(torch.equal(one, other) for one, other in zip(found, CLEAN, strict=True))
    assert not any(part.is_inference() for part in found)


@pytest.fixture(scope="module")
def whole():
    """A model as it is compressed and trained in a clean process."""
    model = tiny("llama")
    sparlow.compress(model, MATCHED, calibration=IDS, evaluate=(), inplace=True)
    return model.state_dict()


FEW = [SETTINGS[name] for name in ("another device by default", "autocast", "inference mode", "products in bfloat16")]


@pytest.mark.parametrize("setting", few_of(SETTINGS.values(), *FEW), ids=SETTINGS)
def test_compressed_and_trained_models_have_the_same_bits_under_any_setting(setting, whole):
    model = tiny("llama")
    with setting():
        before = state()
        sparlow.compress(model, MATCHED, calibration=IDS, evaluate=(), inplace=True)
        assert state() == before
    found = model.state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_an_algorithm_that_draws_without_a_seed_draws_the_same_and_leaves_the_callers_draws_alone():
    def draws():
        with own_settings():
            return torch.rand(3).tolist(), random.random(), np.random.random()  # noqa: NPY002

    torch.manual_seed(5)
    before = state()
    first = draws()
    assert state() == before
    torch.manual_seed(6)
    assert draws() == first


def test_settings_come_back_after_an_error():
    W, H = PROBLEM
    with dtype(torch.float64):
        before = state()
        with pytest.raises(InputError):
            sparlow.decompose(W, H, pattern="2:4", rank=4000)
        assert state() == before


def test_a_setting_that_cannot_be_undone_is_refused(monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with pytest.raises(InputError, match=r"ONEDNN_DEFAULT_FPMATH_MODE=BF16 .* Unset it"):
        sparlow.decompose(*PROBLEM, pattern="2:4", rank=4)
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "strict")
    sparlow.decompose(*PROBLEM, pattern="2:4", rank=4)


@pytest.mark.parametrize(("of_h", "of_w"), [(1e15, 1.0), (1.0, 1e-25), (1e-25, 1e20), (1e25, 1e-30), (1e60, 1.0)])
def test_no_factor_of_a_weight_or_its_inputs_changes_what_is_found(of_h, of_w):
    W, H = PROBLEM
    plain = sparlow.decompose(W, H, pattern="2:4", rank=4)
    found = sparlow.decompose(W * of_w, H.double() * of_h, pattern="2:4", rank=4)
    assert found.stats.relative_error == pytest.approx(plain.stats.relative_error, rel=1e-3)
    low_rank = found.U.double() @ found.V.double() / of_w
    assert (low_rank - plain.U.double() @ plain.V.double()).norm() < 1e-2 * low_rank.norm()
    assert torch.equal(found.S != 0, plain.S != 0)


def test_a_model_of_tiny_weights_reports_the_errors_of_the_same_model():
    found = []
    for factor in (1.0, 1e-20):
        model = tiny("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                for module in layer.modules():
                    if isinstance(module, torch.nn.Linear):
                        module.weight.mul_(factor)
        report = sparlow.compress(model, MATCHED.changed(match=False), calibration=IDS, evaluate=(), inplace=True)
        found.append({layer.name: layer.relative_error for layer in report.layers if layer.block == 0})
    plain, small = found
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):  # these read the same in both
        assert small[name] == pytest.approx(plain[name], rel=1e-3)
    assert small.pop("mlp.down_proj") == 0  # what enters it underflows, as the record says: all inputs count as dead
    assert all(error > 1e-4 for error in small.values())


@pytest.mark.parametrize(("where", "value"), [((3, 3), float("inf")), ((3, 4), float("inf")), ((3, 3), float("nan"))])
def test_a_second_moment_that_overflowed_is_refused_in_one_sentence(where, value):
    W, H = PROBLEM
    large = H.clone()
    large[where] = value
    with pytest.raises(InputError, match=r"^H holds NaN, infinity or a negative diagonal"):
        sparlow.decompose(W, large, pattern="2:4", rank=4)
