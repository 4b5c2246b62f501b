"""Memory that runs out in the middle of a run ends it in one sentence, with options that need much less."""

import subprocess
import sys

import pytest
import torch

from families import save_tiny
from sparlow import compress
from sparlow.errors import RunError
from sparlow.model.loading.meta import meta_model
from sparlow.planning import memory
from sparlow.planning.feasibility import MUCH_LESS, options_that_help
from sparlow.planning.microbenchmarks import BOUND
from sparlow.planning.workload import Structure, workload
from sparlow.recipe.recipe import GIVEN_WINDOWS, Recipe
from sparlow.recipe.run_options import RunOptions
from sparlow.run import pipeline

KINDS = {
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 8 bytes."),
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuSOLVER": RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    "NCCL": RuntimeError("NCCL Error 1: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"),
}
RECIPE = Recipe(calibration=GIVEN_WINDOWS, samples=4096, seqlen=16, rank=2)


@pytest.fixture(autouse=True)
def _nothing_but_the_model(monkeypatch):
    """What libraries hold, whatever the run, would be more than all that a tiny model needs."""
    monkeypatch.setattr(memory, "LOADED_LATE", 0)
    monkeypatch.setattr(memory, "LARGEST_HELD", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory") / "model"
    save_tiny("llama", folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_sentence_names_options_that_need_much_less(kind, model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise KINDS[kind]

    monkeypatch.setattr(pipeline, "solve", full)
    windows = torch.randint(0, 64, (4096, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(RunError) as stop:
        compress(model, RECIPE, calibration=windows, out=tmp_path / "out", evaluate=(), offload="cpu", force=True)
    said = str(stop.value)
    assert said.startswith("There is too little main memory" if kind == "CPU" else "The accelerator has too little")
    assert "Much less is needed with --offload disk or --samples " in said
    assert said.endswith("The same command resumes an unfinished run.")


PHASES = {  # what is done: where, and what the recipe needs for it
    "opening": ("sparlow.run.compress.open_model", {}),
    "recording": ("sparlow.run.passes.capture_block_inputs", {}),
    "Grams": ("sparlow.run.pipeline.collect_statistics", {}),
    "exchanging": ("sparlow.run.pipeline.with_grams", {}),
    "matching": ("sparlow.run.recovery.match", {"match": True, "match_preset": "blocks", "match_epochs": 1}),
    "distilling": ("sparlow.run.recovery.distill", {"match": True, "match_epochs": 1}),
    "passing on": ("sparlow.run.job.pass_through", {}),
    "saving": ("sparlow.model.artefact.checkpoint.CheckpointWriter.write_block", {}),
    "finishing": ("sparlow.model.artefact.checkpoint.CheckpointWriter.write_rest", {}),
}


@pytest.mark.parametrize("phase", PHASES)
def test_wherever_memory_runs_out_it_is_one_sentence_and_the_run_goes_on(phase, model, tmp_path, monkeypatch):
    place, more = PHASES[phase]
    recipe = Recipe(calibration=GIVEN_WINDOWS, samples=4, seqlen=16, algorithm="wanda", **more)
    windows = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))

    def full(*_, **__):
        raise KINDS["CPU"]

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(RunError, match=r"There is too little main memory .*The same command resumes"):
            compress(model, recipe, calibration=windows, out=tmp_path / "out", evaluate=(), force=True)
    assert compress(model, recipe, calibration=windows, out=tmp_path / "out", evaluate=(), force=True).layers


def test_what_is_named_needs_less_by_the_plan(model):
    options = RunOptions("cpu", "cpu", ())
    found = options_that_help(model, RECIPE, options, out=model.parent / "out")
    (samples,) = (int(words.removeprefix("--samples ")) for words in found if words.startswith("--samples "))

    def fullest(recipe):
        shape = meta_model(str(model), dtype=recipe.dtype, trust_remote_code=False)
        work = workload(Structure(shape), recipe, options, streamed=True, out=model.parent / "out")
        return max(stage.cpu for stage in memory.stages(work, BOUND))

    assert fullest(RECIPE.changed(samples=samples)) <= MUCH_LESS * fullest(RECIPE)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only there a process can be given less memory")
@pytest.mark.parametrize("command", ["compress", "evaluate", "inspect"])
def test_a_process_that_is_given_less_and_less_memory_says_so(command, model, tmp_path):
    """For real, and each time somewhere else."""
    (tmp_path / "text.txt").write_text("the sparse part stays and the low rank part learns what was lost. " * 20)
    recipe = Recipe(calibration=GIVEN_WINDOWS, samples=4, seqlen=16, rank=2, options={"max_steps": 5})
    compress(model, recipe, calibration=torch.ones(4, 16, dtype=torch.int64), out=tmp_path / "out", evaluate=())
    text = str(tmp_path / "text.txt")
    small = ["--seqlen", "16"]
    words = {
        "compress": [model, "--out", tmp_path / "new", "--calibration", text, "--samples", "4", "--evaluate=", *small],
        "evaluate": [tmp_path / "out", "--evaluate", text, *small],
        "inspect": [tmp_path / "out"],
    }[command]
    own = "import resource, sys; from sparlow.__main__ import main; size = int(sys.argv.pop(1)); "
    own += "resource.setrlimit(resource.RLIMIT_AS, (size, size)); main()"
    codes = []
    for size in (150, 900):
        line = [sys.executable, "-c", own, str(size * 2**20), command, *map(str, words)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
        codes.append(done.returncode)
        assert "Traceback" not in done.stderr
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1]
            assert said.startswith("error: There is too little main memory"), said
    assert codes[0] == 1
