"""Every path of the kernel that this processor has, against float64 of the numbers as they are stored."""

import ctypes
import mmap
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coded import random_factors, random_grid, random_sparse
from sparlow.errors import InputError
from sparlow.linalg.grid import GridValues, make_grid
from sparlow.linalg.grid_target import GridTarget
from sparlow.linalg.scales import learned
from sparlow.model.artefact.stored_form import StoredForm, Weight, pack_weight
from sparlow.runtime import product
from sparlow.runtime.build import PATHS, NoKernelError, library
from sparlow.runtime.openmp import use_torchs_threads
from sparlow.runtime.product import TOKENS, forced, joined, operand, products

try:
    HERE = library().paths
except NoKernelError as problem:
    pytest.skip(str(problem), allow_module_level=True)

ROUNDING = 1e-5  # of what the absolute values give: sums of some hundred float32 products
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CODES = ("int8", "int4", "int3", "int2")
FACTORS = (*FLOATS, "int8")
path = pytest.mark.parametrize(
    "path",
    [pytest.param(name, marks=[] if name in HERE else pytest.mark.skip(reason=f"no {name} here")) for name in PATHS],
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def masks(shape, kind, generator):
    """None for dense; else some entries, an empty row first and a full one last."""
    if kind == "dense":
        return None
    if kind == "free":
        mask = torch.rand(shape, generator=generator) < 0.4
        mask[0] = False
        mask[-1] = shape[0] == 1 or mask.numel() > shape[1]
        return mask
    n, m = map(int, kind.split(":"))
    columns = -(-shape[1] // m) * m
    scores = torch.rand(shape[0], columns // m, m, generator=generator)
    return (scores.argsort(-1).argsort(-1) < n).reshape(shape[0], columns)[:, : shape[1]].contiguous()


@st.composite
def weights(draw, values=(*FLOATS, *CODES)):
    """The tensors of a weight as the format's own packer writes them, and S, U, V, bias in float64."""
    shape = (
        draw(st.integers(1, 21)),
        draw(st.one_of(st.integers(1, 140), st.sampled_from((64, 128, 192, 256, 321, 384, 640)))),
    )
    kind, rank = draw(st.sampled_from(values)), draw(st.sampled_from((0, 1, 3, 17)))
    seed, pattern = draw(st.integers(0, 2**31)), draw(st.sampled_from(("dense", "free", "2:4", "4:8", "16:32")))
    generator = torch.Generator().manual_seed(seed)
    mask = masks(shape, pattern, generator)
    form, factors = None, draw(st.sampled_from(FACTORS))
    if kind in FLOATS:
        S = torch.randn(shape, generator=generator).to(FLOATS[kind])
        S = S if mask is None else S.masked_fill(~mask, 0)
    else:
        levels = draw(st.sampled_from(("integer", "half", "book")))
        group = draw(st.sampled_from((1, 16, 50, 64, 128, "row")))
        scales = draw(st.sampled_from((torch.bfloat16, torch.float16)))
        form = random_grid(shape, kind, levels=levels, group=group, masked=mask is not None, dtype=scales, seed=seed)
        S = random_sparse(shape, form, mask=mask, dtype=torch.float32, seed=seed)
    if factors == "int8":
        U, V, steps = random_factors(shape, rank, dtype=torch.float32, seed=seed)
    else:
        U, V = (
            torch.randn(size, generator=generator).to(FLOATS[factors]) for size in ((shape[0], rank), (rank, shape[1]))
        )
        steps = None
    stored = StoredForm(form, steps if rank else None, torch.float32) if form or (steps and rank) else None
    packed = pack_weight(Weight(S, U, V), stored)
    assert not packed.lost
    bias = torch.randn(shape[0], generator=generator) if draw(st.booleans()) else None
    return packed, shape, (S.double(), U.double(), V.double(), bias)


def inputs(tokens, columns, seed):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    return x * torch.where(torch.rand(columns, generator=torch.Generator().manual_seed(seed + 1)) < 0.05, 30.0, 1.0)


def expected(exact, x, low_rank_x=None):
    """The product in float64, and the same of absolute values."""
    S, U, V, bias = exact
    other = x if low_rank_x is None else low_rank_x
    b = torch.zeros(len(S)) if bias is None else bias
    y = x @ S.T + (other @ V.T) @ U.T + b
    return y, x.abs() @ S.abs().T + (other.abs() @ V.abs().T) @ U.abs().T + b.abs() + 1e-30


def rounded(x):
    """X in int8, in float64; of each 128 columns, every fourth run of eight shares a scale."""
    tokens, cols = x.shape
    runs = torch.nn.functional.pad(x, (0, -cols % 128)).view(tokens, -1, 4, 4, 8)
    big = runs.abs().amax((2, 4), keepdim=True)
    found = (runs * torch.where(big > 0, 127 / big, 0)).round().double() * (big / 127).double()
    return found.view(tokens, -1)[:, :cols]


def takes_rounded(weight):
    """Whether inputs are rounded for this weight: its levels are integers, its groups whole blocks."""
    struct = weight.S.struct
    return weight.S.coded and (struct.group >= struct.cols or struct.group % 64 == 0)


@path
@quick
@given(weights(), st.integers(1, TOKENS + 3), st.integers(0, 2**31))
def test_a_product_is_that_of_the_stored_numbers(path, weight, tokens, seed):
    packed, shape, exact = weight
    x = inputs(tokens, shape[1], seed)
    with forced(path):
        y = operand(packed.tensors, shape, packed.grid, exact[3]).product(x)
    right, size = expected(exact, x.double())
    assert ((y - right).abs() <= ROUNDING * size).all()


@quick
@given(weights(), st.integers(1, TOKENS + 3), st.integers(0, 2**31))
def test_inputs_in_bfloat16_round_the_weight_only_where_tokens_are_many(weight, tokens, seed):
    packed, shape, exact = weight
    x = inputs(tokens, shape[1], seed).bfloat16()
    y = operand(packed.tensors, shape, packed.grid, exact[3]).product(x)
    right, size = expected(exact, x.double())
    assert y.dtype == torch.float32
    # bfloat16 holds 8 bits, and rounds the weight and then the product
    assert ((y - right).abs() <= (ROUNDING if tokens <= TOKENS else 1.01 * 2**-7) * size).all()


@quick
@given(weights(), st.sampled_from([TOKENS + 1, 300]), st.integers(1, 2**9), st.integers(0, 2**31))
def test_a_weight_may_take_several_tiles(weight, tokens, entries, seed):
    packed, shape, exact = weight
    x, found = inputs(tokens, shape[1], seed), operand(packed.tensors, shape, packed.grid, exact[3])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_TILE", "_LARGE_TILE"):
            patch.setattr(product, name, entries)
        y, back = found.product(x), found.back(torch.ones(tokens, shape[0]))
    right, size = expected(exact, x.double())
    assert ((y - right).abs() <= ROUNDING * size).all()
    torch.testing.assert_close(back, found.back(torch.ones(tokens, shape[0])))


@path
@quick
@given(weights(CODES), st.integers(1, TOKENS), st.integers(0, 2**31))
def test_a_product_of_rounded_inputs_is_that_of_the_rounded_ones(path, weight, tokens, seed):
    packed, shape, exact = weight
    x = inputs(tokens, shape[1], seed)
    x[0, : shape[1] // 2] = 0  # whole groups of zeros
    with forced(path):
        found = operand(packed.tensors, shape, packed.grid, exact[3])
        y = found.product(x, rounded=True)
    right, size = expected(exact, rounded(x) if takes_rounded(found) else x.double(), x.double())
    assert ((y - right).abs() <= ROUNDING * size).all()


@path
@quick
@given(st.lists(weights(), min_size=2, max_size=4), st.integers(1, TOKENS + 3), st.booleans(), st.integers(0, 2**31))
def test_weights_that_read_one_input_give_what_each_gives_alone(path, some, tokens, rounded, seed):
    columns = some[0][1][1]
    x = inputs(tokens, columns, seed)
    with forced(path):
        found = [operand(p.tensors, shape, p.grid, exact[3]) for p, shape, exact in some if shape[1] == columns] * 2
        together = products(found, x, rounded=rounded)
        for one, y in zip(found, together, strict=True):
            alone = one.product(x, rounded=rounded)
            if tokens <= TOKENS:
                assert torch.equal(y, alone)
            else:  # torch's products may sum in another order where the result is part of a wider one
                torch.testing.assert_close(y, alone)


def test_weights_of_other_widths_are_not_joined():
    with pytest.raises(InputError, match=r"must have one number of columns"):
        joined([large(), large(shape=(64, 512))])


@path
@quick
@given(weights())
def test_rows_are_decoded_to_the_stored_numbers(path, weight):
    packed, shape, exact = weight
    with forced(path):
        found = operand(packed.tensors, shape, packed.grid, None)
        rows = [found.decoded(found.S, r, r + 1) for r in range(shape[0])]
        assert torch.equal(found.decoded(found.S).double(), exact[0])
        assert torch.equal(torch.cat(rows).double(), exact[0])
        halves = found.decoded(found.S, out=torch.empty(shape, dtype=torch.bfloat16))
        assert torch.equal(halves, exact[0].float().bfloat16())


@path
@quick
@given(weights(), st.integers(0, 2**31))
def test_gradients_reach_the_input(path, weight, seed):
    packed, shape, exact = weight
    dy = inputs(3, shape[0], seed)
    with forced(path):
        dx = operand(packed.tensors, shape, packed.grid, None).back(dy)
    S, U, V, _ = exact
    right = dy.double() @ S + (dy.double() @ U) @ V
    size = dy.abs().double() @ S.abs() + (dy.abs().double() @ U.abs()) @ V.abs()
    assert ((dx - right).abs() <= ROUNDING * size).all()


def fenced(t):
    """A copy of a tensor, behind whose last byte memory may not be read."""
    page, size = mmap.PAGESIZE, max(t.nbytes, 1)
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + whole), page, 0) == 0
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=t.nbytes, offset=whole - t.nbytes) if t.nbytes else t
    return flat.copy_(t.reshape(-1).view(torch.uint8)).view(t.dtype).view(t.shape) if t.nbytes else t


@path
@pytest.mark.skipif(sys.platform != "linux", reason="memory is fenced by Linux's mprotect")
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(weights(), st.integers(1, TOKENS), st.booleans())
def test_nothing_behind_a_tensor_is_read(path, weight, tokens, rounded):
    packed, shape, exact = weight
    parts = {part: fenced(t) for part, t in packed.tensors.items()}
    with forced(path):
        found = operand(parts, shape, packed.grid, exact[3])
        found.product(inputs(tokens, shape[1], 0), rounded=rounded)
        assert torch.equal(found.decoded(found.S).double(), exact[0])


@pytest.mark.parametrize("values", ["int3", "int2"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_learned_book_is_one_of_bytes(values, masked):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(24, 256, generator=generator)
    W = W * (W.abs() > 0.7) if masked else W
    target = GridTarget(make_grid(values, "book"), masked)
    rounding = learned(W, torch.ones(256), target)
    scale = target.storage.scale(W.abs().view(24, 2, 128).amax(2) / rounding.top)
    grid = GridValues(target.grid, scale.bfloat16(), rounding.levels().bfloat16(), masked)
    S = rounding.to_grid(W, grid.steps(256), torch.empty_like(W))
    packed = pack_weight(Weight(S, W[:, :0], W[:0]), StoredForm(grid, None, torch.float32))
    assert operand(packed.tensors, (24, 256), packed.grid, None).S.coded


def large(values="int4", shape=(512, 1024), rank=16):
    found = random_grid(shape, values, group=128, masked=True)
    mask = masks(shape, "16:32", torch.Generator().manual_seed(0))
    U, V, steps = random_factors(shape, rank, dtype=torch.float32)
    packed = pack_weight(
        Weight(random_sparse(shape, found, mask=mask, dtype=torch.float32), U, V),
        StoredForm(found, steps, torch.float32),
    )
    return operand(packed.tensors, shape, packed.grid, None)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["those of torch", "our own"])
def whose_threads(request):
    again = use_torchs_threads.__wrapped__
    if request.param == "our own":
        library().functions.sparlow_openmp(None, None, None)
    elif not again(library()):
        pytest.skip("torch has no OpenMP here")
    yield
    again(library())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere OpenMP may be another, or not be found")
def test_products_between_operations_of_torch_run_in_its_threads():
    assert use_torchs_threads(library()) == torch.backends.openmp.is_available()


@path
@pytest.mark.usefixtures("whose_threads")
@pytest.mark.parametrize("rounded", [False, True])
def test_threads_change_no_bit(path, rounded, two_threads):
    weight, x = large(), inputs(5, 1024, 0)
    with forced(path):
        two_threads(1)
        one = weight.product(x, rounded=rounded)
        for threads in (2, 3, 7):
            two_threads(threads)
            assert torch.equal(weight.product(x, rounded=rounded), one)
            assert all(torch.equal(y, one) for y in products([weight] * 3, x, rounded=rounded))


@pytest.mark.usefixtures("whose_threads")
def test_threads_of_python_may_call_at_once(two_threads):
    two_threads(2)
    weight = large()
    inputs_of = [inputs(1, 1024, seed) for seed in range(4)]
    alone = [weight.product(x) for x in inputs_of]
    wrong = []

    def many(k):
        wrong.extend(k for _ in range(40) if not torch.equal(weight.product(inputs_of[k]), alone[k]))

    threads = [threading.Thread(target=many, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FORK = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from test_kernel import large, inputs
torch.set_num_threads(2)
weight, x = large(), inputs(1, 1024, 0)
y = weight.product(x)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(weight.product(x), y) else 3)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_process_has_threads_of_its_own(request):
    program = FORK.format(tests=str(request.path.parent))
    path = f"import sys; sys.path[:0] = {sys.path!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", path + program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_nan_and_infinity_are_not_hidden():
    weight = large()
    for bad in (torch.nan, torch.inf):
        x = inputs(1, 1024, 0)
        x[0, 5] = bad
        for rounded_too in (False, True):
            assert not weight.product(x, rounded=rounded_too).isfinite().all()


def test_a_mask_that_keeps_another_number_is_refused():
    shape = (4, 32)
    S = masks(shape, "2:4", torch.Generator().manual_seed(0)).float()
    packed = pack_weight(Weight(S, S[:, :0], S[:0]), None)
    packed.tensors["mask"][1, 1] = 0xFF
    with pytest.raises(InputError, match=r"Its values should take 272 bytes, but there are 256"):
        operand(packed.tensors, shape, None, None)


def test_a_path_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"no kernel for sse9 on this processor. Choose one of plain"), forced("sse9"):
        pass
