"""Runs of two processes beside runs of one: the same model within rounding, and nothing written twice."""

import json
import math
import os
import shutil
import signal
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from families import save_tiny, tiny
from processes import SERVER, Run, join, together
from sparlow.cli import pages, results
from sparlow.distributed import LostError, Processes, joined, local_device, require_one, require_own_device
from sparlow.errors import InputError, RunError
from sparlow.evaluation.agreement import Measured
from sparlow.joining import differences
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.loading.source import OpenedModel
from sparlow.model.training.loop import _Training
from sparlow.model.training.resume_state import TrainingCheckpoint, TrainingState
from sparlow.progress import Clock
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import Perplexity, Report
from sparlow.run.compress import _seen, _windows_for_all
from sparlow.run.passes import BlockwiseRunner
from sparlow.run.pipeline import _naming
from sparlow.run.recovery import Recovery
from sparlow.run.verify import verify_artefact

TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(900))
OPTIONS = ["--samples", "7", "--seqlen", "16", "--rank", "4", "--option", "effort=0.1", "--option", "max_steps=4"]


def started(model, out, more=(), size=2, second=((), {})):
    """Start ``size`` processes of one compression; the second may have options and variables of its own."""
    text = model.parent / "text.txt"
    text.write_text(TEXT)
    command = ["compress", model, "--out", out, "--calibration", text, "--evaluate", text, *OPTIONS, *more]
    found = []
    for rank, variables in enumerate(together(size)):
        log = out.parent / f"{out.name}-{len(list(out.parent.glob('*.log')))}.log"
        log.touch()
        options, others = second if rank == 1 else ((), {})
        found.append(Run([*command, *options], log, join, variables | others))
    return found


def ended(runs):
    """Exit code and words of each."""
    return [run.end() for run in runs], ["".join(_without_steps(run.said)) for run in runs]


def _without_steps(words):
    return (line for line in words.splitlines(keepends=True) if not line.startswith("solved "))


def shards(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One of linear layers only, and one with experts, some of which see no token in one process."""
    folders = {name: tmp_path_factory.mktemp(name) / "model" for name in ("llama", "mixtral")}
    for name, folder in folders.items():
        save_tiny(name, folder)
    return folders


@pytest.fixture(scope="module")
def model(models):
    return models["llama"]


MODES = {
    "solves": [],
    "layers": ["--behind", "layers"],
    "error": ["--allocate", "error", "--pattern", "0.5"],
    "matching": ["--match", "--match-preset", "blocks", "--match-batch", "4"],
    "distillation": ["--match"],
}


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """Give the directory that so many processes have written, and what each said: one run for all who only read it."""

    @cache
    def made(family, mode, size):
        out = tmp_path_factory.mktemp("finished") / "out"
        codes, words = ended(started(models[family], out, MODES[mode], size=size))
        assert codes == [0] * size, words
        return out, words

    return made


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode"), [("mixtral", "matching"), *(("llama", mode) for mode in MODES)])
def test_two_processes_find_what_one_finds(family, mode, finished):
    (by_one, _), (by_two, words) = (finished(family, mode, size) for size in (1, 2))
    assert "perplexity" in words[0]
    assert words[1] == ""  # the first one speaks for all
    assert verify_artefact(by_two) == []
    alone, two = (Report.from_file(folder / "report.json") for folder in (by_one, by_two))
    for one, other in zip(alone.layers, two.layers, strict=True):
        assert (one.name, one.pattern, one.rank, one.tokens) == (other.name, other.pattern, other.rank, other.tokens)
        assert other.relative_error == pytest.approx(one.relative_error, rel=1e-3)
    for part in ("dense", "compressed"):
        (one,), (other,) = (getattr(report, part)["perplexity"].values() for report in (alone, two))
        assert other == pytest.approx(one, rel=1e-5 if part == "dense" else 5e-3)
    (one,), (other,) = (report.agreement.values() for report in (alone, two))
    assert other.divergence == pytest.approx(one.divergence, rel=0.02)
    assert other.divergence_stderr == pytest.approx(one.divergence_stderr, rel=0.05)
    assert other.same_first_choice == pytest.approx(one.same_first_choice, abs=0.02)
    assert other.loss_difference == pytest.approx(one.loss_difference, abs=5e-3)
    assert [row["epochs"] for row in alone.matching] == [row["epochs"] for row in two.matching]
    assert two.processes["count"] == 2
    assert two.processes["bytes_per_block"] > 0
    assert alone.processes == {}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_two_processes_find_the_same_bits_where_each_passes_as_many_windows_at_a_time(family, models, tmp_path):
    reading = tmp_path / "model"
    shutil.copytree(models[family], reading)
    config = json.loads((reading / "config.json").read_text())
    (reading / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    text = tmp_path / "long.txt"
    text.write_text("".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(9000)))
    more = ["--calibration", text, "--samples", "8", "--seqlen", "1024", "--evaluate-seqlen", "64"]  # 2 at a time
    for name, size in (("alone", 1), ("two", 2)):
        codes, words = ended(started(reading, tmp_path / name, more, size=size))
        assert codes == [0] * size, words
    alone, two = shards(tmp_path / "alone"), shards(tmp_path / "two")
    assert alone.keys() == two.keys()
    for name, tensors in alone.items():
        assert all(torch.equal(tensor, two[name][key]) for key, tensor in tensors.items())


@pytest.mark.slow
def test_of_experts_a_process_that_dies_ends_all_and_the_run_goes_on(models, finished, tmp_path):
    """As of linear layers: ``test_one_of_three.py``."""
    (whole, _), model, out = finished("mixtral", "solves", 2), models["mixtral"], tmp_path / "out"
    processes = started(model, out)
    while not any(out.glob("model-*.safetensors")):
        assert all(run.process.exitcode is None for run in processes), ended(processes)
        time.sleep(0.01)
    os.kill(processes[1].process.pid, signal.SIGKILL)
    codes, words = ended(processes)
    assert codes == [1, -signal.SIGKILL]
    assert "repeat the command" in words[0]
    assert "Traceback" not in words[0]
    assert not json.loads((out / "sparlow.json").read_text())["finished"]
    codes, words = ended(started(model, out))
    assert codes == [0, 0], words
    expected, found = shards(whole), shards(out)
    assert expected.keys() == found.keys()
    for name in expected:
        assert all(torch.equal(tensor, found[name][key]) for key, tensor in expected[name].items())


@pytest.mark.slow
def test_a_finished_directory_is_refused_by_all(model, finished, tmp_path):
    out = shutil.copytree(finished("llama", "solves", 2)[0], tmp_path / "out")
    record = json.loads((out / "sparlow.json").read_text())
    for more, said in (([], "finished result"), (["--seed", "5"], "another run")):
        codes, words = ended(started(model, out, more))
        assert codes == [2, 2]
        assert all(said in one for one in words)  # what to do about it, not that another one ended
        (out / "sparlow.json").write_text(json.dumps(record | {"finished": False}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "said"),
    [
        ((["--samples", "6"], {}), "they differ in samples (7 in the first, 6 in process 1)"),
        (
            (["--json", "nowhere/x.json"], {}),
            "Process 1 of 2 failed before it had met the others: There is no directory",
        ),
        (([], {"WORLD_SIZE": "3"}), "processes were started together, process"),
    ],
    ids=["another recipe", "a place that is not there", "another number of processes"],
)
def test_processes_that_were_told_different_things_say_so_before_any_work(second, said, model, tmp_path):
    out = tmp_path / "out"
    codes, words = ended(started(model, out, second=second))
    assert 2 in codes
    assert set(codes) <= {1, 2}  # the store of keys ends with the first process
    assert said in " ".join(" ".join(words).split())
    assert not any("cannot find each other" in one for one in words)  # they have, and one says what is wrong
    assert not any("Traceback" in one for one in words)
    assert not out.exists()


def test_other_commands_say_that_they_are_for_one_process(monkeypatch):
    require_one("sparlow evaluate")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="sparlow evaluate works in one process"):
        require_one("sparlow evaluate")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is no number of processes"),
        ({"WORLD_SIZE": "2"}, "2 processes were started together, but they cannot find each other"),
    ],
)
def test_an_environment_that_joins_nobody_is_refused(variables, sentence, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=sentence), joined():
        pass


def test_a_process_that_ends_before_all_have_met_is_told_in_a_sentence(monkeypatch):
    def gone(**_):
        raise RuntimeError("[/x/pair.cc:1] Connection closed by peer [127.0.0.1]:4711\nmore")

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "new_group", gone)
    with pytest.raises(RunError, match=r"could not meet the others at the start.*Connection closed by peer"), joined():
        pass


def test_a_process_without_text_finds_the_block_that_overflows_as_the_others_do():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    opened, second = OpenedModel(model, None, "tiny", ""), Processes(1, 2)
    runner = BlockwiseRunner(opened, "cpu", Clock(), lambda _: None, second)
    runner.measure = lambda *_, **__: Measured(Perplexity(math.nan, 0.0, 0), None)
    with pytest.raises(InputError, match=r"model\.layers\.1: the output is not finite"):
        runner.dense({"one window": torch.arange(16)[None]}, {}, [])


def test_a_training_that_other_processes_go_on_with_is_at_the_same_part_of_its_epoch(tmp_path):
    """More processes take wider steps: 40 of 64 are 20 of 32, where to skip 40 would end the epoch at once."""
    values = torch.nn.Parameter(torch.ones(2))
    file, optimiser = tmp_path / "state.safetensors", torch.optim.Adam([values])
    checkpoint = TrainingCheckpoint(file, lambda tensors: save_file(dict(tensors), file))
    kept = TrainingState(1.0, 0.5, epochs=1, steps=40, updates=104, per_epoch=64, losses=[0.5])
    checkpoint.keep(kept, {"v": values.detach()}, optimiser, {"v": torch.zeros(2)})
    state, _ = checkpoint.resume({"v": values}, optimiser)
    assert (state.per_epoch, state.losses) == (64, [0.5])
    for steps, expected in ((64, (40, 104)), (32, (20, 52)), (64, (40, 104))):
        state.divide(steps)
        assert (state.steps, state.updates) == expected


PASSED = (
    "[Rank 0]: Rank {} failed to pass monitoredBarrier in 172800000 ms\n Original exception: \n[/x/tcp/pair.cc:553] "
)
CLOSED = "Connection closed by peer [127.0.0.1]:6557"
LATE = "Timed out waiting 172800000ms for recv operation to complete"


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            f"{PASSED.format(2)}{CLOSED}. This is typically caused by a remote worker crashing. GLHF!",
            f"waited for process 2, which ended or cannot be reached ({CLOSED}).",
        ),
        (f"{PASSED.format(1)}{LATE}", f"waited for process 1, which does not come ({LATE})."),
        (f"[/x/tcp/pair.cc:5] {CLOSED}\nframe #0", f"another one, which ended or cannot be reached ({CLOSED})."),
    ],
    ids=["one that ended after a second", "one that hangs", "within an exchange"],
)
def test_the_sentence_of_one_that_is_lost_names_no_time_that_was_not_waited_and_no_source(said, sentence, monkeypatch):
    def lost(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(distributed, "monitored_barrier", lost)
    with pytest.raises(LostError) as error, _naming("model.layers.0.mlp.down_proj"):
        Processes(0, 3).barrier()
    assert sentence in str(error.value)
    assert str(error.value).startswith("Process 0 of 3 waited for")  # no fault of the layer's
    assert "repeat the command" in str(error.value)


def test_one_process_tells_the_user_and_writes_what_he_asks_for(monkeypatch, tmp_path, capsys):
    figure = SimpleNamespace(name="one", svg="<svg></svg>")

    def told(folder):
        results.put(Path("-"), {"a": 1})
        results.put(folder.with_suffix(".json"), {"a": 1})
        pages.write_figures([figure], folder)
        return capsys.readouterr().out.startswith("{"), folder.with_suffix(".json").exists(), folder.exists()

    for variables, speaks in (({"WORLD_SIZE": "2", "RANK": "1"}, False), ({"RANK": "0"}, True)):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert told(tmp_path / f"{speaks}") == (speaks,) * 3
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("RANK", "1")  # left by something else
    assert told(tmp_path / "alone") == (True,) * 3


def test_what_the_model_writes_itself_comes_from_the_first_process():
    windows = torch.tensor([[1, 2], [3, 4]])
    second = Processes(1, 2)
    second.first_finds = lambda _: windows.tolist()
    recipe = Recipe(calibration="self", samples=2, seqlen=2)
    assert torch.equal(_windows_for_all(second, None, None, recipe), windows)  # without a model


def test_a_process_that_found_no_accelerator_is_told_before_any_exchange_on_one():
    def seen(device):
        model = tiny("llama")
        return _seen(SimpleNamespace(model=model, weights=SimpleNamespace(device=torch.device(device))), {})

    assert differences([seen("cuda:1"), seen("cuda:0"), seen("cpu")]) == [
        "--device (cuda in the first, cpu in process 2)"
    ]


def test_while_the_first_keeps_a_state_of_training_all_are_patient():
    """It may write for long; they would take it for one that hangs."""
    done = []

    class Second(Processes):
        def totals(self, numbers):
            return [1.0 + number for number in numbers]  # it is time in the first

        def part(self):
            done.append("part")

    keeping = SimpleNamespace(
        _data=SimpleNamespace(processes=Second(1, 2)),
        _checkpoint=TrainingCheckpoint(None, lambda _: done.append("kept")),
        _optimiser=torch.optim.Adam([torch.zeros(1, requires_grad=True)]),
        _trained={},
        _best={},
        state=TrainingState(1.0, 1.0),
        seconds=lambda: 0.0,
    )
    _Training._keep(keeping)
    assert done == ["part", "kept"]
    keeping._checkpoint = TrainingCheckpoint()  # of a block by itself: nobody writes
    _Training._keep(keeping)
    assert len(done) == 2


def test_steps_that_more_processes_make_wider_are_told():
    recipe, ids = Recipe(match=True, match_batch=3), torch.zeros(32, 16, dtype=torch.int64)
    storage = StoredDtypes.of(tiny("llama"))
    three, four = (Recovery(recipe, storage, "model.layers", ids, 0, Processes(0, size)) for size in (3, 4))
    assert (three.training.plan.batch, three.warnings) == (3, [])
    assert (four.training.plan.batch, four.warnings) == (4, ["4 processes train on 4 windows in each step, not on 3."])


def test_costly_layers_are_divided_first():
    costs = {"a": 1.0, "b": 5.0, "c": 3.0, "d": 3.0}
    assert Processes(0, 2).assign(costs) == {"b": 0, "c": 1, "d": 1, "a": 0}
    assert set(Processes().assign(costs).values()) == {0}


def test_shares_of_rows_are_all_rows():
    rows = torch.arange(7)
    shares = [Processes(rank, 3).local_rows(rows) for rank in range(3)]
    assert torch.equal(torch.cat(shares), rows)
    assert {len(share) for share in shares} == {2, 3}


def test_each_process_has_an_accelerator_of_its_own(monkeypatch):
    assert local_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [local_device(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # as where a scheduler gives each task its own
    assert local_device("cuda") == "cuda:0"
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    assert local_device("cuda") == "cuda:1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match="would compute on cuda:0"):
        local_device("cuda:0")


def test_two_processes_on_one_accelerator_are_refused_before_any_work(monkeypatch):
    first, everyone = Processes(0, 3), []
    first.all_gather = lambda own: everyone or [own, own, "another"]
    monkeypatch.setattr(distributed, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr("sparlow.distributed._identity", lambda device: f"here {device}")
    with pytest.raises(InputError, match="Processes 0, 1 would compute on accelerators that others"):
        require_own_device(first, torch.device("cuda:0"))
    everyone[:] = ["here cuda:0", "here cuda:1", "there cuda:0"]
    require_own_device(first, torch.device("cuda:0"))
    everyone[:] = ["", "", ""]  # none, or one that several may share
    require_own_device(first, torch.device("cpu"))


def twice(variables, note):
    """Be one of two that share two runs, one after the other; the first is slow to end the one."""
    join(variables)
    if variables["RANK"] == "0":
        end = distributed.destroy_process_group
        distributed.destroy_process_group = lambda *given: (time.sleep(1), end(*given))
    found = []
    for _ in range(2):
        with joined() as processes:
            found.append(processes.totals([processes.rank + 1.0]))
    note.write_text(json.dumps(found))


@pytest.mark.slow
def test_the_same_processes_may_share_another_run_afterwards(tmp_path):
    notes = [tmp_path / "0", tmp_path / "1"]
    runs = [SERVER.Process(target=twice, args=given) for given in zip(together(2), notes, strict=True)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0, 0]
    assert [json.loads(note.read_text()) for note in notes] == [[[3.0], [3.0]]] * 2


def with_a_group_of_their_own(variables, note):
    """Be one of two that have opened a group which knows nothing of tensors on the CPU, as NCCL alone does."""
    join(variables)
    distributed.init_process_group("cuda:gloo")
    with joined() as processes:
        found = [processes.totals([processes.rank + 1.0]), processes.all_gather(processes.rank)]
    note.write_text(json.dumps([*found, distributed.is_initialized()]))


@pytest.mark.slow
def test_a_group_of_the_caller_may_know_accelerators_alone_and_stays_open(tmp_path):
    notes = [tmp_path / "0", tmp_path / "1"]
    runs = [
        SERVER.Process(target=with_a_group_of_their_own, args=given) for given in zip(together(2), notes, strict=True)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0, 0]
    assert [json.loads(note.read_text()) for note in notes] == [[[3.0], [0, 1], True]] * 2


def test_only_the_first_process_looks_and_all_know():
    def find():
        return {"seen": 1}

    assert Processes().first_finds(find) == {"seen": 1}
    words = b'{"seen": 1}'
    second = Processes(1, 2)
    second.totals = lambda numbers: [len(words) + number for number in numbers]
    second.broadcast = lambda tensor: tensor.copy_(torch.frombuffer(bytearray(words), dtype=torch.uint8))
    assert second.first_finds(lambda: 1 // 0) == {"seen": 1}
