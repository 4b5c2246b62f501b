"""``sparlow benchmark``: what is measured is checked, and what is wrong is said."""

import json
from io import StringIO

import pytest
import torch
from safetensors.torch import load_file

import sparlow
from command_line import run
from families import save_tiny
from runnable import write
from sparlow.errors import InputError
from sparlow.runtime.benchmark import BOUNDS, Benchmark, Row, spread
from sparlow.runtime.benchmark_worker import CHECKED, bytes_read, serve
from sparlow.runtime.build import NoKernelError, library
from sparlow.runtime.options import BenchmarkOptions

try:
    library()
except NoKernelError as problem:
    pytest.skip(str(problem), allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), "llama", ("int8", "int8"))


def answers(*requests):
    said = []
    serve(StringIO("\n".join(map(json.dumps, requests))), said.append)
    return [json.loads(line) for line in said]


def opened(folder, **options):
    return {"do": "open", "name": str(folder), "threads": 1, **options}


def off(file, reference):
    found, right = load_file(file)["logits"], load_file(reference)["logits"]
    assert found.shape == right.shape == (CHECKED - 7, 128)
    return float((found - right).square().mean().sqrt() / right.square().mean().sqrt())


@pytest.mark.parametrize("step", ["kernel", "transformers"])
def test_a_worker_measures_and_writes_what_is_checked(step, folder, tmp_path):
    right, own = tmp_path / "right", tmp_path / "own"
    answers(opened(folder, mode="packed", dtype="float32"), {"do": "reference", "file": str(right)})
    said = answers(
        opened(folder, mode="packed", dtype="float32"),
        {"do": "logits", "step": step, "file": str(own)},
        {"do": "run", "step": step, "batch": 2, "prompt": 8, "tokens": 4},
    )
    assert off(own, right) <= BOUNDS["float32"] / 100  # the reference rounds nothing that packed layers do not
    assert said[0]["no_step"] == ""
    assert all(said[2][name] > 0 for name in ("first", "prefill", "decode", "peak"))


def test_a_worker_says_what_it_cannot_do(folder, tmp_path):
    save_tiny("gpt2", tmp_path)
    missing, unknown, plain = answers(
        opened(tmp_path / "nothing"), opened(folder, mode="fast"), opened(tmp_path, mode="packed")
    )
    assert all(said["input"] for said in (missing, unknown, plain))
    assert "is not compressed" in plain["error"]
    assert "7" in answers(opened(tmp_path))[0]["no_step"]


def test_bytes_read_are_those_of_the_weights_a_token_needs(folder, tmp_path):
    packed = sparlow.load(folder, mode="packed")
    embedding = packed.get_input_embeddings()
    rest = sum(p.nbytes for p in packed.parameters())
    assert bytes_read(packed) == rest + sum(
        module.bytes for module in packed.modules() if hasattr(module, "packed") and module is not embedding
    )
    tied = sparlow.load(write(tmp_path, "gpt2", ("int8", "int8")), mode="packed")
    assert bytes_read(tied) > tied.get_input_embeddings().bytes + sum(p.nbytes for p in tied.parameters())


def row(name, dtype, difference, rates):
    compressed = name == "ours"
    mode, bound = "packed" if compressed else "dense", BOUNDS[dtype]
    inputs = "float" if compressed else ""
    return Row(name, mode, dtype, inputs, "kernel", compressed, difference=difference, bound=bound, decode={1: rates})


def rows():
    dense = row("dense", "float32", 0.0, [9, 10, 11]), row("dense", "bfloat16", 1.0, [99])  # the second is wrong
    return Benchmark([*dense, row("ours", "float32", 1e-6, [30, 20, 25])], {}, {}, {}, [])


def test_a_speed_of_wrong_results_is_no_baseline():
    found = rows()
    assert found.times(found.rows[2], 1) == 2.5
    assert [row.same_output for row in found.rows] == [True, False, True]
    assert not Row("", "", "", "", "", compressed=False, difference=float("nan"), bound=1).same_output
    assert spread([9, 10, 11]) == 0.1
    assert found.to_dict()["rows"][2]["times_dense"] == {"1": 2.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": ("1", "two")}, r"--batch must be whole numbers of at least 1, not 1, two"),
        ({"batch": ("0",)}, r"--batch must be whole numbers"),
        ({"mode": ("auto",)}, r"There is no mode 'auto' to measure"),
        ({"mode": ()}, r"There is nothing to measure without --mode"),
        ({"dtype": ("int8",)}, r"There is no dtype 'int8' to measure"),
        ({"activations": ("int4",)}, r"There is no activations 'int4' to measure"),
    ],
)
def test_what_cannot_be_measured(options, message):
    with pytest.raises(InputError, match=message):
        BenchmarkOptions(**options)


@pytest.mark.slow
def test_the_command_shows_a_table_and_writes_json(folder, tmp_path, capsys):
    save_tiny("llama", tmp_path / "dense")
    json_file = tmp_path / "found.json"
    few = ["--prompt-tokens", "16", "--tokens", "4", "--repeats", "2", "--batch", "1,2", "--threads", "1"]
    code = run("benchmark", str(tmp_path / "dense"), str(folder), *few, "--json", str(json_file))
    shown = capsys.readouterr().out
    assert code == 0, shown
    found = json.loads(json_file.read_text())
    assert len(found["rows"]) == 12  # both models in two types, by two steps, the packed one with both kinds of inputs
    assert [row["inputs"] for row in found["rows"]] == [""] * 4 + ["float", "float", "int8", "int8"] * 2
    for row in found["rows"]:
        assert row["same_output"]
        assert {batch: len(times) for batch, times in row["decode"].items()} == {"1": 2, "2": 2}
        assert row["peak"]["1"] > row["interpreter"] > 0
    assert shown.count("yes (") == 24
    assert torch.get_num_threads() >= 1
