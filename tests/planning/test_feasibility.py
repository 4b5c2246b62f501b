import pytest
import torch

import sparlow
from families import save_tiny
from sparlow import machine
from sparlow.distributed import Processes
from sparlow.errors import InputError
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.loading.meta import meta_model
from sparlow.planning import feasibility
from sparlow.planning.memory import disk, stages
from sparlow.planning.microbenchmarks import BOUND
from sparlow.planning.workload import Structure, workload
from sparlow.recipe.recipe import GIVEN_WINDOWS, Recipe
from sparlow.recipe.run_options import RunOptions
from sparlow.run.compare import compare
from sparlow.run.recovery import Recovery

RECIPE = Recipe(algorithm="magnitude", samples=256, seqlen=64, calibration=GIVEN_WINDOWS)
IDS = torch.arange(256 * 64).view(256, 64) % 128
HIDDEN = 256 * 64 * 32 * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's directory, for reading only."""
    place = tmp_path_factory.mktemp("feasibility")
    save_tiny("gpt_neox", place)
    return place


@pytest.fixture(autouse=True)
def _on_a_disk(monkeypatch):
    """Whatever the folder for temporary files is on."""
    monkeypatch.setattr(machine, "MOUNTS", machine.Path("/no such file"))


def worked(folder, recipe=RECIPE, *, offload="cpu", **facts):
    return workload(Structure(meta_model(str(folder))), recipe, RunOptions("cpu", offload, evaluate=()), **facts)


def needed(folder, recipe=RECIPE, **changes):
    return max(stage.cpu for stage in stages(worked(folder, recipe, **changes), BOUND))


def compressed(folder, out, recipe=RECIPE, **options):
    ids = IDS[: recipe.samples, : recipe.seqlen]
    return sparlow.compress(folder, recipe, calibration=ids, out=out, evaluate=(), **{"offload": "cpu", **options})


def refused(folder, out, recipe=RECIPE, **options):
    with pytest.raises(InputError) as refusal:
        compressed(folder, out, recipe, **options)
    assert not out.exists()
    message = str(refusal.value)
    assert message.endswith("Use --force to run anyway.")
    return message


def test_too_little_memory_is_told_with_what_would_fit(folder, tmp_path, monkeypatch):
    available = needed(folder, offload="disk") + HIDDEN // 2
    monkeypatch.setattr(feasibility, "memory_available", lambda: available)
    message = refused(folder, tmp_path / "out")
    assert f"{feasibility.human_bytes(available)} is available" in message
    assert "--offload disk" in message
    found = compressed(folder, tmp_path / "out", offload="disk")
    assert found.bytes == compressed(folder, tmp_path / "forced", force=True).bytes


def test_the_samples_that_are_named_fit_and_twice_as_many_do_not(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(feasibility, "memory_available", lambda: needed(folder, RECIPE.changed(samples=64)) + 1000)
    assert "or --samples 64 or" in refused(folder, tmp_path / "out")
    refused(folder, tmp_path / "out", RECIPE.changed(samples=128))
    compressed(folder, tmp_path / "out", RECIPE.changed(samples=64))


def test_only_what_fits_is_named(folder, tmp_path, monkeypatch):
    recipe = RECIPE.changed(samples=4096)
    monkeypatch.setattr(feasibility, "memory_available", lambda: needed(folder, recipe) + HIDDEN)
    ids = torch.zeros(4096, 64, dtype=torch.int64)
    with pytest.raises(InputError, match="--no-match") as refusal:
        sparlow.compress(folder, recipe.changed(match=True), calibration=ids, out=tmp_path, evaluate=(), offload="cpu")
    assert "--evaluate" not in str(refusal.value)
    assert "--match-preset" not in str(refusal.value)  # that needs as many copies of the hidden states


def test_where_no_option_is_enough_the_fewest_together_are_named(folder):
    recipe = RECIPE.changed(match=True)
    work = worked(folder, recipe)

    def fits(changed):
        return changed.place == "disk" and not changed.together

    assert feasibility.options_that_fit(work, fits) == [
        "--offload disk and --match-preset blocks",
        "--offload disk and --no-match",
    ]
    everything = "--offload disk and --no-match and --samples 64"
    assert feasibility.options_that_fit(work, lambda w: fits(w) and not w.recipe.match and w.recipe.samples <= 64) == [
        everything
    ]
    assert feasibility.options_that_fit(work, lambda w: w.recipe.samples <= 100) == ["--samples 64"]
    assert feasibility.options_that_fit(work, lambda _: False) == []


def test_hidden_states_that_a_training_puts_on_a_full_disk_may_wait_in_memory(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sparlow.model.forward.activation_store.lies_in_memory", lambda _: False)
    recipe = RECIPE.changed(match=True, match_preset="blocks")
    there = disk(worked(folder, recipe, offload="auto", out=tmp_path / "out"))
    assert there.hidden > 0
    monkeypatch.setattr(feasibility, "disk_available", lambda _: there.out + there.hidden - 1)
    message = refused(folder, tmp_path / "out", recipe, offload="auto")
    assert "It would fit with --offload cpu or --no-match" in message


def test_where_nothing_would_fit_it_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(feasibility, "memory_available", lambda: 1)
    assert "No option makes it fit." in refused(folder, tmp_path / "out")


def test_force_begins_all_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(feasibility, "memory_available", lambda: 1)
    monkeypatch.setattr(feasibility, "disk_available", lambda _: 1)
    compressed(folder, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "report.json").exists()


def test_a_bound_that_does_not_fit_is_replaced_by_a_measurement(folder, monkeypatch):
    work = worked(folder)
    measured = []
    monkeypatch.setattr(feasibility, "workspace", lambda *_: measured.append(1) or BOUND)
    feasibility.require_memory(work)
    assert not measured
    monkeypatch.setattr(feasibility, "memory_available", lambda: 1)
    with pytest.raises(InputError):
        feasibility.require_memory(work)
    assert measured


def test_too_little_disk_is_told_and_what_is_there_counts(folder, tmp_path, monkeypatch):
    work = worked(folder)
    size = disk(work).out
    monkeypatch.setattr(feasibility, "disk_available", lambda _: size - 1)
    message = refused(folder, tmp_path / "out")
    assert f"the run needs {feasibility.human_bytes(size)}, " in message
    assert f"mostly for the result in {tmp_path / 'out'}." in message
    assert "choose another --out" in message
    compressed(folder, tmp_path / "out", force=True)
    compressed(folder, tmp_path / "out", overwrite=True)  # its own files will be gone


def test_disk_for_the_last_pass_is_counted(folder, tmp_path, monkeypatch):
    recipe = RECIPE.changed(match=True)
    size = disk(worked(folder, recipe)).out
    monkeypatch.setattr(feasibility, "disk_available", lambda _: size - 1)
    assert "It would fit with --match-preset blocks or --no-match" in refused(folder, tmp_path / "out", recipe)
    compressed(folder, tmp_path / "out")


def test_hidden_states_on_disk_are_counted(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(feasibility, "disk_available", lambda _: 3 * HIDDEN - 1)
    message = refused(folder, tmp_path / "out", offload="disk")
    assert "hidden states" in message
    assert "--samples 128" in message
    compressed(folder, tmp_path / "out", RECIPE.changed(samples=128), offload="disk")


def test_a_comparison_is_refused_as_a_whole(folder, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("words and more words " * 60)
    base = Recipe(algorithm="magnitude", samples=4, seqlen=16, calibration=str(text))
    recipes = {"magnitude": base, "wanda": base.changed(algorithm="wanda")}
    how = RunOptions(evaluate=())
    one = disk(worked(folder, base)).out
    monkeypatch.setattr(feasibility, "disk_available", lambda _: 2 * one - 1)
    with pytest.raises(InputError, match="Not enough disk"):
        compare(folder, recipes, out=tmp_path / "out", options=how)
    assert not (tmp_path / "out").exists()
    assert len(compare(folder, recipes, out=tmp_path / "out", options=how, force=True).rows) == 2


def group(folder, **values):
    folder.mkdir(parents=True)
    for name, text in values.items():
        (folder / name.replace("_dot_", ".")).write_text(f"{text}\n")


def test_the_limit_of_a_control_group_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    stat = "inactive_file 30\nactive_file 5"
    group(tmp_path / "a", memory_dot_max=100, memory_dot_current=90, memory_dot_stat=stat)
    group(tmp_path / "a" / "b", memory_dot_max="max", memory_dot_current=50, memory_dot_stat=stat)
    assert list(machine._left(tmp_path / "a" / "b", "memory.max", "memory.current")) == [40]
    monkeypatch.setattr(machine, "_limits", lambda: iter([40]))
    assert machine.memory_available() == 40
    monkeypatch.setattr(machine, "_limits", lambda: iter([-3]))
    assert machine.memory_available() == 0


def test_a_limit_on_addresses_counts(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10**15, 10**15))
    assert 0 < next(machine._limits()) < 10**15


def test_processes_of_one_machine_divide_its_memory_and_the_windows(folder, monkeypatch):
    monkeypatch.setattr(machine, "_limits", lambda: iter([40]))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.memory_available() == 10
    alone, shared = (worked(folder, offload="disk", processes=n) for n in (1, 4))
    assert alone.hidden == 4 * shared.hidden
    assert disk(alone).hidden == disk(shared).hidden  # all of them lie on that machine's disk


@pytest.mark.parametrize(
    ("changes", "windows"), [({}, 32), ({"match": True, "match_batch": 8}, 2), ({"samples": 6}, 2)]
)
def test_the_plan_passes_as_many_windows_at_a_time_as_the_run(changes, windows, folder):
    """Of four processes, each has its share of every micro-batch; a step of training has windows for all of them."""
    recipe = RECIPE.changed(**changes)
    work = worked(folder, recipe, processes=4)
    assert work.batch == windows * 64
    ids = torch.zeros(recipe.samples, recipe.seqlen, dtype=torch.int64)
    run = Recovery(recipe, StoredDtypes.of(meta_model(str(folder))), "layers", ids, 0, Processes(0, 4))
    assert work.batch == len(Processes(0, 4).local_rows(ids[: run.micro_batch])) * 64
    if work.together:
        assert work.together.plan == run.training.plan


def test_the_hidden_states_of_an_evaluation_are_divided_too(folder):
    options = RunOptions("cpu", "cpu", evaluate=("builtin",), evaluate_seqlen=64)
    alone, shared = (workload(Structure(meta_model(str(folder))), RECIPE, options, processes=n) for n in (1, 4))
    evaluations = [next(s.cpu for s in stages(work, BOUND) if s.name == "evaluation") for work in (alone, shared)]
    copies = alone.evaluated * 32 * 4
    walked, kept = 3, 2  # copies: on their way through blocks, and the dense model's, which may be two
    assert evaluations[0] - evaluations[1] == (walked + kept) * (copies - copies // 4)
