"""Where hidden states lie while a run goes on, how much room they take, and what is left of them afterwards."""

import os
import tempfile

import pytest
import torch

import sparlow
from families import save_tiny, tiny
from sparlow import machine
from sparlow.model.forward.activation_store import place
from sparlow.model.forward.capture import capture_block_inputs
from sparlow.model.loading.meta import meta_model
from sparlow.planning.memory import disk, stages
from sparlow.planning.microbenchmarks import BOUND
from sparlow.planning.workload import Structure, workload
from sparlow.recipe.recipe import GIVEN_WINDOWS, Recipe
from sparlow.recipe.run_options import RunOptions
from sparlow.run import passes

RECIPE = Recipe(algorithm="magnitude", samples=16, seqlen=16, calibration=GIVEN_WINDOWS)
IDS = torch.randint(128, (16, 16), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's directory, for reading only."""
    found = tmp_path_factory.mktemp("model")
    save_tiny("llama", found)
    return found


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The system's folder for temporary files, for this test alone."""
    found = tmp_path / "temporary"
    found.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(found))
    return found


def compressed(model, out, notify=lambda _: None, recipe=RECIPE):
    where = {"out": out, "device": "cpu"} if out else {"inplace": True}
    return sparlow.compress(model, recipe, calibration=IDS, evaluate=(), offload="disk", notify=notify, **where)


def test_a_shard_that_a_killed_run_was_writing_is_removed(folder, tmp_path):
    out = tmp_path / "out"

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressed(folder, out, stop)
    (out / ".tmpXdNInr").write_bytes(b"half of a shard")  # the name that safetensors renames
    compressed(folder, out)
    assert not (out / ".tmpXdNInr").exists()


def test_they_lie_in_out_and_a_killed_run_leaves_nothing_of_them(folder, tmp_path, temporary):
    out, seen = tmp_path / "out", []

    def look(_):
        seen.append((sorted((out / ".hidden").iterdir()), sorted(temporary.iterdir())))

    compressed(folder, out, look)
    assert seen
    assert all(found == ([], []) for found in seen)  # files without a name: there is nothing to leave
    assert not (out / ".hidden").exists()


def test_what_a_killed_run_has_left_is_cleared_when_the_next_begins(folder, tmp_path):
    """Where a file system knows no files without names."""
    out = tmp_path / "out"
    (out / ".hidden").mkdir(parents=True)  # by a run that was killed before its first record
    (out / ".hidden" / "sparlow-left").write_bytes(b"private")
    seen = []
    compressed(folder, out, lambda _: seen.append(list((out / ".hidden").iterdir())))
    assert seen
    assert not any(seen)
    sparlow.load(out)


def test_without_out_nothing_has_a_name_either(temporary):
    seen = []
    compressed(tiny("llama"), None, lambda _: seen.append(list(temporary.iterdir())))
    assert seen
    assert not any(seen)


def mounted(folder, monkeypatch, tmp_path, kind):
    """Let the file system of a folder be of some kind."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    file = tmp_path / "mountinfo"
    file.write_text(f"1 0 0:0 / / rw - ext4 /dev/a rw\n2 1 {number} / /there rw shared:1 - {kind} none rw\n")
    monkeypatch.setattr(machine, "MOUNTS", file)


@pytest.mark.parametrize(("kind", "expected"), [("tmpfs", True), ("ramfs", True), ("ext4", False)])
def test_a_file_system_in_main_memory_is_known(kind, expected, tmp_path, monkeypatch):
    mounted(tmp_path, monkeypatch, tmp_path, kind)
    assert machine.lies_in_memory(tmp_path / "not" / "there" / "yet") is expected


def test_a_tmpfs_counts_as_memory(folder, tmp_path, monkeypatch):
    def counted(offload):
        work = workload(
            Structure(meta_model(str(folder))), RECIPE, RunOptions("cpu", offload, evaluate=()), out=tmp_path / "out"
        )
        return work, {stage.name: stage.cpu for stage in stages(work, BOUND)}

    mounted(tmp_path, monkeypatch, tmp_path, "ext4")
    work, on_disk = counted("disk")
    _, in_memory = counted("cpu")
    mounted(tmp_path, monkeypatch, tmp_path, "tmpfs")
    _, found = counted("disk")
    assert on_disk["solving"] < in_memory["solving"]
    written = disk(work).out
    assert all(found[name] == in_memory[name] + written for name in found)
    monkeypatch.setattr(machine, "_limits", lambda: iter([1]))
    assert place("auto", 10**6, CPU, tmp_path) == "cpu"  # files would take the same memory
    mounted(tmp_path, monkeypatch, tmp_path, "ext4")
    assert place("auto", 10**6, CPU, tmp_path) == "disk"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3n_text", "gemma4_text"])
def test_a_run_decides_by_the_bytes_that_the_plan_counts(name, tmp_path, monkeypatch):
    """Gemma-3n carries four hidden states a token, Gemma-4 embeddings for each block beside them."""
    sizes = []
    real = passes.place
    monkeypatch.setattr(
        passes, "place", lambda offload, size, *a, **k: sizes.append(size) or real(offload, size, *a, **k)
    )
    save_tiny(name, tmp_path / "model")
    meta, options = meta_model(str(tmp_path / "model")), RunOptions("cpu", evaluate=())
    work = workload(Structure(meta), RECIPE, options)
    compressed(tmp_path / "model", tmp_path / "out")
    compressed(tiny(name), None)
    assert sizes == [work.hidden] * 2
    assert workload(Structure(tiny(name)), RECIPE, options).hidden == work.hidden
    assert (work.hidden > 16 * 16 * 32 * 4) == (name != "llama")


def test_held_out_windows_pass_a_few_at_a_time():
    model, windows = tiny("llama"), IDS
    found = capture_block_inputs(model, windows, micro_batch=2, apart=5)
    assert [len(x) for x in found.hidden] == [2] * 5 + [1] + [2, 2, 1]
    assert torch.equal(torch.cat(found.ids), windows)


def test_windows_that_judge_are_no_larger_batch_than_those_that_train(tmp_path, folder, monkeypatch):
    many = torch.randint(128, (80, 16), generator=torch.Generator().manual_seed(0))
    recipe = RECIPE.changed(samples=80, match=True, match_preset="blocks", match_epochs=1)
    recorded = []
    real = passes.capture_block_inputs
    monkeypatch.setattr(passes, "capture_block_inputs", lambda *a, **k: recorded.append(real(*a, **k)) or recorded[-1])
    report = sparlow.compress(folder, recipe, calibration=many, out=tmp_path / "out", evaluate=(), device="cpu")
    sizes = [len(x) for x in recorded[0].hidden]
    assert max(sizes) == 2
    assert sizes[-3:] == [2, 2, 1]  # five of eighty judge
    assert all(row["loss_after"] <= row["loss_before"] for row in report.matching)
