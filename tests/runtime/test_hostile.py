"""Damaged weights and damaged models, opened packed: refused in a sentence, or computed as the dense mode does."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import sparlow
from coded import coded_layer, write_in_codes
from mutations import SIZES, mutate, outcome
from sparlow.errors import InputError
from sparlow.model.artefact.stored_form import Weight, pack_weight
from sparlow.recipe.recipe import Recipe
from sparlow.runtime.build import NoKernelError, library
from sparlow.runtime.packed import Packed, PackedLinear
from sparlow.runtime.product import forced

try:
    HERE = library().paths
except NoKernelError as problem:
    pytest.skip(str(problem), allow_module_level=True)

NEAR = 1e-4  # of the largest number
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TRIES = [40, pytest.param(500, marks=pytest.mark.slow), pytest.param(5000, marks=pytest.mark.hostile)]


def a_weight(chance):
    """A layer of any form, packed."""
    shape = (chance.randint(1, 21), chance.choice((1, 4, 7, 8, 31, 60, 64, 65, 100, 128, 192, 321)))
    values, rank = chance.choice(("float", "int8", "int4", "int3", "int2")), chance.choice((0, 1, 5))
    pattern = chance.choice(("dense", "free", "2:4") if shape[1] % 4 == 0 else ("dense", "free"))
    dtype, bias = chance.choice(FLOATS), torch.ones(shape[0]) if chance.random() < 0.3 else None
    group = chance.choice((1, 16, 64, 128, "row"))
    grid = {"levels": chance.choice(("integer", "half", "book")), "group": group}
    options = {"pattern": pattern, "rank": rank, "bias": bias, "dtype": dtype, "seed": chance.randrange(2**31)}
    layer = coded_layer(shape, "int8" if values == "float" else values, **options, **grid)
    found = pack_weight(Weight(layer.S, layer.U, layer.V), None if values == "float" else layer.stored)
    return Packed(found.tensors, shape, found.grid, torch.float32, bias)


def numbers(chance, t):
    """What a tensor may hold after damage: a few bits turned, or everything else."""
    flat = t.clone().view(-1).view(torch.uint8)
    how = chance.randrange(4)
    if how == 0:
        flat.copy_(torch.randint(256, flat.shape, generator=torch.Generator().manual_seed(chance.randrange(2**31))))
    elif how == 1:
        flat.fill_(chance.choice((0, 0x7F, 0x80, 0xFF)))
    else:
        for _ in range(chance.choice((1, 1, 3, 9))):
            flat[chance.randrange(len(flat))] ^= 1 << chance.randrange(8)
    return flat.view(t.dtype).view(t.shape)


def damaged(chance, parts):
    """Damage the content of tensors, or the number of values; shapes and types are checked before a layer is made."""
    parts = dict(parts)
    for _ in range(chance.choice((1, 1, 2))):
        part = chance.choice([part for part, t in parts.items() if t.numel()] or ["weight"])
        if part == "weight" and chance.random() < 0.4:
            left = max(0, len(parts[part]) + chance.choice((-9, -1, 1, 7)))
            parts[part] = torch.cat([parts[part], parts[part], parts[part].new_zeros(9)])[:left]
        elif parts[part].numel():
            parts[part] = numbers(chance, parts[part])
    return {part: t.clone() for part, t in parts.items()}  # as long as it is and no byte longer


def same(found, right, scale):
    """Whether results agree where both are numbers, in the bound that sums of float32 have."""
    both = found.isfinite() & right.isfinite() & (scale < 1e30)  # far from overflow
    return bool(((found - right).abs() <= NEAR * scale + 1e-30)[both].all())


def try_weight(chance, packed):
    """Make a layer and use all of it by every path; where the dense layer can be had, the two agree."""
    layer = PackedLinear(packed, chance.choice(("float", "float", "int8")))
    tokens = chance.choice((1, 2, 5, 8, 11))
    x = torch.randn(tokens, packed.shape[1], generator=torch.Generator().manual_seed(chance.randrange(2**31)))
    found = []
    for path in HERE:
        with forced(path):
            found.append(layer(x).double())
            assert layer.back(torch.ones(tokens, packed.shape[0])).shape == x.shape
            assert found[-1].shape == (tokens, packed.shape[0])
    try:
        dense = layer.dequantize().double()
    except InputError:  # stricter than the kernel: codes that are not in use, numbers beyond the type
        return
    if layer.activations == "float":
        S, U, V = dense.S.detach(), dense.U.detach(), dense.V.detach()
        right = dense(x.double()).detach()
        scale = x.double().abs() @ S.abs().T + (x.double().abs() @ V.abs().T) @ U.abs().T + 1
        for y in found:
            assert same(y, right, scale)


@pytest.mark.parametrize("tries", TRIES)
def test_layers_of_damaged_tensors_are_refused_or_right(tries):
    refused, problems, before = 0, [], torch.get_num_threads()
    try:
        for i in range(tries):
            chance = random.Random(i)
            torch.set_num_threads(1 + i % 2)
            packed = a_weight(chance)
            if i % 4:
                packed = Packed(damaged(chance, packed.parts), packed.shape, packed.grid, packed.dtype, packed.bias)
            try:
                try_weight(chance, packed)
            except InputError as error:
                refused += 1
                problems += [f"{i}: {error}"] if i % 4 == 0 or "\n" in str(error) else []
            except BaseException as error:
                error.add_note(f"weight {i}: {packed.shape}, {packed.grid}, {sorted(packed.parts)}")
                raise
    finally:
        torch.set_num_threads(before)
    assert not problems
    assert tries / 10 < refused < tries * 3 / 4


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """A directory without a record of its checksums, whose shards hold every kind of tensor that there is."""
    folder = tmp_path_factory.mktemp("artefact") / "out"
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **SIZES)).eval()
    recipe = Recipe(algorithm="magnitude", rank=0)
    sparlow.compress(model, recipe, calibration=torch.arange(64).view(4, 16), out=folder, evaluate=())
    write_in_codes(folder, [("int3", "2:4"), ("int4", "dense"), ("int2", "free"), ("int8", "2:4")])
    (folder / "sparlow.json").unlink()
    yield folder
    transformers.utils.logging.enable_progress_bar()


def other_tensors(chance, file):
    """Damage a shard's tensors and write it anew with a right header: shapes, types, contents, names, what it says."""
    with safe_open(file, "pt") as shard:
        metadata = shard.metadata()
    tensors = load_file(file)
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(list(tensors))
        t = tensors[name]
        how = chance.randrange(6)
        if how == 0 and t.ndim:
            tensors[name] = t[: max(0, len(t) + chance.choice((-1, -3)))].clone()
        elif how == 1:
            tensors[name] = torch.cat([t, t])
        elif how == 2:
            tensors[name] = t.to(chance.choice((*FLOATS, torch.int8, torch.uint8, torch.int64)))
        elif how == 3:
            other = chance.choice(list(tensors))
            tensors[name], tensors[other] = tensors[other].clone(), t.clone()
        elif t.numel():
            tensors[name] = numbers(chance, t)
    save_file(tensors, file, metadata)


def raw(chance, file):
    """Turn some bytes anywhere behind the header."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for _ in range(chance.choice((1, 4, 64))):
        data[chance.randrange(start, len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def damage(chance, folder):
    """Damage a file of a directory."""
    shard = chance.choice(sorted(folder.glob("*.safetensors")))
    how = chance.randrange(4)
    if how == 0:
        other_tensors(chance, shard)
    elif how == 1:
        raw(chance, shard)
    else:
        file = chance.choice((shard, folder / "config.json"))
        file.write_bytes(mutate(chance, file.name, file.read_bytes()))


IDS = torch.arange(12).view(2, 6)


def compute(folder, mode):
    """Logits of few and of many tokens, or what was said, on opening or by torch."""

    def read(folder):
        model = sparlow.load(folder, mode=mode)
        try:
            with torch.no_grad():
                return [model(ids).logits.double() for ids in (IDS[:1, :3], IDS)]
        except RuntimeError as problem:
            return problem

    return outcome(read, folder)


def attempt(folder):
    """Open a damaged directory packed; whether it was refused."""
    found = compute(folder, "packed")
    if isinstance(found, InputError):
        assert str(found)
        assert "\n" not in str(found)
        return True
    right = compute(folder, "dense")
    if isinstance(found, RuntimeError):  # a config that transformers opens and cannot compute with
        assert isinstance(right, RuntimeError)
        assert str(right) == str(found)
        return True
    if not isinstance(right, InputError):
        for y, other in zip(found, right, strict=True):
            assert y.shape == other.shape
            finite = bool(other.isfinite().all()) and bool(y.isfinite().all())
            assert not finite or same(y, other, 100 * other.abs().max() + 1)  # damaged numbers may cancel
    return False


@pytest.mark.parametrize("mode", ["packed", "dense"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_a_norm_of_whole_numbers_is_refused(mode, dtype, artefact, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(artefact, folder)
    (file,) = (f for f in folder.glob("*.safetensors") if "gpt_neox.final_layer_norm.weight" in load_file(f))
    tensors = load_file(file)
    tensors["gpt_neox.final_layer_norm.weight"] = tensors["gpt_neox.final_layer_norm.weight"].to(dtype)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"final_layer_norm\.weight should hold floating-point numbers"):
        sparlow.load(folder, mode=mode)


@pytest.mark.parametrize("tries", TRIES)
def test_damaged_models_are_refused_or_answer_as_dense_ones_do(tries, artefact, tmp_path):
    refused = 0
    for i in range(tries):
        chance = random.Random(i)
        folder = tmp_path / "damaged"
        shutil.copytree(artefact, folder)
        try:
            damage(chance, folder)
            refused += attempt(folder)
        except BaseException as error:
            error.add_note(f"damage {i}")
            raise
        finally:
            shutil.rmtree(folder)
    assert tries / 4 < refused < tries


def runtime_library(name):
    """The path of a library of the compiler, or an empty text."""
    compiler = shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return ""
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip() if Path(found.stdout.strip()).is_absolute() else ""


@pytest.mark.hostile
def test_the_sanitizers_of_the_compiler_find_nothing(tmp_path):
    asan = runtime_library("libasan.so")
    if not asan:
        pytest.skip("no gcc with AddressSanitizer here")
    environment = os.environ | {
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=98",
        "CC": "gcc",
        "SPARLOW_KERNEL_FLAGS": "-O1 -fsanitize=address,undefined -fno-omit-frame-pointer",
        "SPARLOW_CACHE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTEST_ADDOPTS": "",
    }
    asked = f"{__file__}::test_layers_of_damaged_tensors_are_refused_or_right[500]"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", asked]
    ended = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=3000)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "1 passed" in ended.stdout
    assert len(list(tmp_path.glob("kernel-*.so"))) == 1
