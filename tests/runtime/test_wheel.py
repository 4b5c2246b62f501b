"""The wheel holds the kernel, and whoever installs it needs no compiler."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import torch

import sparlow
from coded import save_coded
from sparlow.runtime.build import NoKernelError, library, prebuilt

try:
    library()
except NoKernelError as problem:
    pytest.skip(str(problem), allow_module_level=True)

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "hatch_build.py").exists(), reason="no sources to build a wheel from"),
]
PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, sparlow
from sparlow.runtime.which import kernel
model = sparlow.load(sys.argv[1], mode="packed")
kinds = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "in_features")})
with torch.no_grad():
    print(json.dumps([sparlow.__file__, str(kernel()), kinds, model(torch.tensor([[5, 6, 7]])).logits[0, -1].tolist()]))
"""


def build(out, *options, **variables):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(ROOT)]
    ended = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=600, env=os.environ | variables
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    (file,) = out.iterdir()
    return file, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheel"), "--wheel")[0]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel, which borrows all else from this one; its interpreter and its sparlow."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "-q", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, timeout=300)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, site / "sparlow"


def opened(python, folder, cache):
    """What a program without a compiler says of a model that it opens packed."""
    left = {name: value for name, value in os.environ.items() if not name.startswith(("SPARLOW", "PYTHON", "CC"))}
    environment = left | {"PATH": "", "SPARLOW_CACHE": str(cache)}
    command = [str(python), "-c", PROGRAM, str(folder)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600, env=environment)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_wheel_runs_packed_models_where_there_is_no_compiler(wheel, installed, tmp_path):
    assert re.fullmatch(r"sparlow-[^-]+-py3-none-(manylinux_2_\d+|linux|macosx)_\w+\.whl", wheel.name)
    python, package = installed
    folder = save_coded("llama", "int4", torch.float32, tmp_path)
    with torch.no_grad():
        right = sparlow.load(folder, mode="packed")(torch.tensor([[5, 6, 7]])).logits[0, -1]
    where, kernel, kinds, found = opened(python, folder, tmp_path / "cache")
    assert Path(where).parent == package
    assert kernel == f"{library().paths[-1]}, prebuilt"
    assert kinds == ["Linear", "PackedLinear"]  # the head is dense
    assert found == pytest.approx(right.tolist(), rel=1e-5, abs=1e-6)
    assert not (tmp_path / "cache").exists()


def test_a_prebuilt_kernel_of_other_sources_is_not_loaded(installed, tmp_path):
    python, package = installed
    folder = save_coded("llama", "int4", torch.float32, tmp_path)
    source = package / "runtime" / "kernel" / "pool.h"
    whole = source.read_text()
    source.write_text(whole + "/* another */\n")
    try:
        _, kernel, kinds, _ = opened(python, folder, tmp_path / "cache")
    finally:
        source.write_text(whole)
    assert kernel.startswith("none: There is no C compiler")
    assert kinds == ["Linear"]


def test_a_prebuilt_kernel_that_does_not_load_is_told(installed, tmp_path):
    python, package = installed
    folder = save_coded("llama", "int4", torch.float32, tmp_path)
    file = package / "runtime" / "kernel" / prebuilt().name
    shutil.move(file, tmp_path / "kept")
    file.write_bytes(b"no library")
    try:
        _, kernel, kinds, _ = opened(python, folder, tmp_path / "cache")
    finally:
        shutil.move(tmp_path / "kept", file)
    assert kernel.startswith("none: The prebuilt kernel cannot be loaded (")
    assert "There is no C compiler" in kernel
    assert kinds == ["Linear"]


def test_without_a_compiler_the_wheel_is_pure_and_says_so(tmp_path):
    file, said = build(tmp_path, "--wheel", CC=str(tmp_path / "nothing"))
    assert file.name.endswith("-py3-none-any.whl")
    assert "The wheel is pure" in said
    assert "There is no C compiler" in said


def test_the_source_distribution_can_build_wheels(tmp_path):
    file, _ = build(tmp_path, "--sdist")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"hatch_build.py", "src/sparlow/runtime/kernel/dispatch.c", "src/sparlow/runtime/kernel/sparlow.h"} <= names
    assert not [name for name in names if name.endswith(".so")]
