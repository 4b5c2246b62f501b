"""The kernel's paths for 64-bit ARM, cross-compiled and run by qemu, against float64 of the stored numbers."""

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_kernel import CODES, FLOATS, ROUNDING, expected, inputs, rounded, takes_rounded, weights

from sparlow.runtime.build import FLAGS, FOLDER, PATHS, NoKernelError, arm_flags, library
from sparlow.runtime.product import TOKENS, operand

CASES = int(os.environ.get("SPARLOW_ARM_CASES", "100"))  # of each path
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
POINTERS = ("data", "start", "mask", "scale", "narrow", "wide")
pytestmark = pytest.mark.slow
for program in (COMPILER, EMULATOR):
    if shutil.which(program) is None:
        pytest.skip(f"the paths for ARM are not tested: there is no {program}", allow_module_level=True)
try:
    library()  # it describes the weights
except NoKernelError as problem:
    pytest.skip(str(problem), allow_module_level=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arm")
    sources = [*FOLDER.glob("*.c"), Path(__file__).with_name("run_cases.c")]
    for source in sources:
        command = [COMPILER, *FLAGS, *arm_flags(source), f"-I{FOLDER}", "-c", source, "-o", folder / f"{source.stem}.o"]
        subprocess.run(command, check=True)
    objects = [folder / f"{source.stem}.o" for source in sources]
    subprocess.run([COMPILER, "-static", *objects, "-o", folder / "run", "-lpthread", "-lm"], check=True)
    return folder / "run"


def number(n):
    return struct.pack("<q", n)


def pointed_to(address, size):
    return number(-1) if not address else number(size) + ctypes.string_at(address, size)


def of_tensor(t):
    return number(-1) if t is None else pointed_to(t.data_ptr(), t.nbytes)


def of_matrix(matrix):
    left = list(matrix.tensors)
    parts = [left.pop(0) if getattr(matrix.struct, name) else None for name in POINTERS]
    return bytes(matrix.struct) + b"".join(map(of_tensor, parts))


def of_case(path, weight, x, *, a8):
    factors = number(bool(weight.V)) + (of_matrix(weight.V) + of_matrix(weight.U) if weight.V else b"")
    head = b"".join(map(number, (PATHS.index(path), a8, len(x))))
    return head + of_matrix(weight.S) + factors + of_tensor(weight.fold) + of_tensor(weight.bias) + of_tensor(x)


def drawn(count):
    """So many weights, tokens and seeds, the same at every run."""
    found = []

    @settings(
        max_examples=count, database=None, derandomize=True, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(weights((*FLOATS, *CODES)), st.integers(1, TOKENS), st.booleans(), st.integers(0, 2**31))
    def draw(weight, tokens, one, seed):
        found.append((weight, 1 if one else tokens, seed))

    draw()
    return found


@pytest.mark.parametrize("path", ["plain", "neon", "dotprod"])
def test_products_and_rows_are_those_of_the_stored_numbers(path, program):
    cases, given_cases = [], drawn(CASES)
    for (packed, shape, exact), tokens, seed in given_cases:
        weight, x = operand(packed.tensors, shape, packed.grid, exact[3]), inputs(tokens, shape[1], seed)
        cases += [(weight, exact, x, a8) for a8 in (False, True)]
    text = number(len(cases)) + b"".join(of_case(path, weight, x, a8=a8) for weight, _, x, a8 in cases)
    done = subprocess.run([EMULATOR, program], input=text, capture_output=True, check=True)
    numbers = np.frombuffer(done.stdout, dtype="<f4")
    assert len(numbers) == sum(
        len(x) * weight.S.shape[0] + weight.S.shape[0] * weight.S.shape[1] for weight, _, x, _ in cases
    )
    for weight, exact, x, a8 in cases:
        out, columns = weight.S.shape
        y, rows, numbers = np.split(numbers, [len(x) * out, len(x) * out + out * columns])
        right, size = expected(exact, rounded(x) if a8 and takes_rounded(weight) else x.double(), x.double())
        wrong = np.abs(y.reshape(len(x), out) - right.numpy()) > ROUNDING * size.numpy()
        assert not wrong.any(), (weight.S, len(x), a8)
        assert (rows.reshape(out, columns) == exact[0].numpy()).all()
