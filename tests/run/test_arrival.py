"""A shared file system may show what another machine wrote late, cut short, or as it was before."""

import errno
import json
from types import SimpleNamespace

import pytest
from made import report

from processes import SERVER, join, together
from sparlow.distributed import Processes, joined
from sparlow.errors import RunError
from sparlow.files import sha256
from sparlow.model.artefact.shards import ShardRecord
from sparlow.recipe.recipe import Recipe
from sparlow.run import arrival
from sparlow.run.arrival import arrived, wrong_with
from sparlow.run.job import Job
from sparlow.run.journal import Journal
from sparlow.run.record import KeptTraining

DECIDES = {"recipe": {}, "model": "abc", "calibration": "def", "format": 2, "solver": 1}
WHOLE = b"what was written" * 4


class Clock:
    """Time that passes only where somebody waits; then the next of some steps is taken."""

    def __init__(self, *steps):
        self.waited, self.steps = [], list(steps)

    def sleep(self, seconds):
        self.waited.append(seconds)
        if self.steps:
            self.steps.pop(0)()


@pytest.fixture
def waiting(monkeypatch):
    def begin(*steps):
        clock = Clock(*steps)
        monkeypatch.setattr(arrival.time, "sleep", clock.sleep)
        return clock

    return begin


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "written"
    path.write_bytes(WHOLE)
    record = ShardRecord("model-00001-of-00003.safetensors", len(WHOLE), sha256(path))
    path.unlink()
    return record


def test_what_is_there_is_taken_at_once(tmp_path, shard, waiting):
    clock = waiting()
    (tmp_path / shard.file).write_bytes(WHOLE)
    assert arrived(tmp_path, shard) == tmp_path / shard.file
    assert clock.waited == []


def test_a_file_that_appears_late_then_half_then_as_it_was_before_is_waited_for(tmp_path, shard, waiting):
    path = tmp_path / shard.file
    before = bytes(len(WHOLE))
    contents = (WHOLE[:10], before, WHOLE)
    clock = waiting(*(lambda content=content: path.write_bytes(content) for content in contents))
    assert wrong_with(path, shard) == "it is not there"
    assert arrived(tmp_path, shard).read_bytes() == WHOLE
    assert clock.waited == [*arrival.PAUSES[:3]]
    path.write_bytes(WHOLE[:10])
    assert wrong_with(path, shard) == f"it has 10 of {len(WHOLE)} bytes"
    path.write_bytes(before)
    assert wrong_with(path, shard) == "it holds other bytes"


def test_a_file_that_comes_with_the_last_look_is_taken(tmp_path, shard, waiting):
    nothing = [lambda: None] * (len(arrival.PAUSES) - 1)
    waiting(*nothing, lambda: (tmp_path / shard.file).write_bytes(WHOLE))
    assert arrived(tmp_path, shard).read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("content", "said"), [(None, "it is not there"), (WHOLE[:10], "it has 10 of 64"), (bytes(64), "it holds other")]
)
def test_one_that_never_becomes_right_is_one_sentence_after_a_bounded_time(content, said, tmp_path, shard, waiting):
    clock = waiting()
    if content is not None:
        (tmp_path / shard.file).write_bytes(content)
    with pytest.raises(RunError, match=f"is not what the first process wrote: {said}.*repeat the command"):
        arrived(tmp_path, shard)
    assert 60 < sum(clock.waited) < 180  # longer than NFS believes its caches


def test_a_handle_that_a_server_has_forgotten_is_no_traceback(tmp_path, shard, monkeypatch):
    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    (tmp_path / shard.file).write_bytes(WHOLE)
    monkeypatch.setattr(arrival, "sha256", stale)
    assert wrong_with(tmp_path / shard.file, shard) == "it cannot be read (Stale file handle)"


def test_only_those_that_do_not_write_look_and_each_file_once(tmp_path, shard, waiting, monkeypatch):
    writer = Journal(tmp_path, DECIDES, "model.layers")
    (tmp_path / shard.file).write_bytes(WHOLE)
    writer.note_block(shard, [], [], {})
    monkeypatch.setattr("sparlow.run.journal.arrived", lambda *_: pytest.fail("the one that wrote it need not look"))
    assert writer.shard(shard.file) == tmp_path / shard.file
    assert writer.shard("model-00002-of-00003.safetensors") is None
    looks = []
    monkeypatch.setattr("sparlow.run.journal.arrived", lambda *given: looks.append(given) or arrived(*given))
    reader = Journal(tmp_path, DECIDES, "model.layers", writes=False, late=True)
    assert reader.shard(shard.file) is None  # nobody has told it yet, and it does not look by itself
    reader.record = writer.record
    waiting()
    assert [reader.shard(shard.file) for _ in range(2)] == [tmp_path / shard.file] * 2
    assert looks == [(tmp_path, shard)]
    beside = Journal(tmp_path, DECIDES, "model.layers", writes=False)  # on the machine of the first
    beside.record = writer.record
    assert beside.shard(shard.file) == tmp_path / shard.file
    assert len(looks) == 1


def one_of_two(variables, folder, note):
    """Write in the first process; in the second see the shard late."""
    join(variables)
    steps = [lambda: (folder / "late").rename(folder / "model-00001-of-00003.safetensors")]
    clock = Clock(*steps)
    with joined() as processes:
        arrival.time.sleep = clock.sleep  # of all modules: while they join, they wait for each other in earnest
        journal = Journal(folder, DECIDES, "model.layers", writes=processes.first, late=not processes.first)
        journal.share(processes)
        if processes.first:
            folder.mkdir()
            (folder / "late").write_bytes(WHOLE)
            journal.note_block(ShardRecord("model-00001-of-00003.safetensors", 64, sha256(folder / "late")), [], [], {})
        processes.part()
        journal.share(processes)
        found = journal.shard("model-00001-of-00003.safetensors") if not processes.first else None
        processes.barrier()
    note.write_text(json.dumps([found and found.read_bytes().decode(), len(clock.waited)]))


@pytest.mark.slow
def test_another_process_learns_names_and_sums_and_waits(tmp_path):
    notes, folder = [tmp_path / "0", tmp_path / "1"], tmp_path / "out"
    runs = [
        SERVER.Process(target=one_of_two, args=(variables, folder, note))
        for variables, note in zip(together(2), notes, strict=True)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0, 0]
    assert [json.loads(note.read_text()) for note in notes] == [[None, 0], [WHOLE.decode(), 1]]


class Second(Processes):
    """The second of two, which is told something."""

    def __init__(self, told):
        super().__init__(1, 2)
        self.told = told

    def first_finds(self, _):
        return self.told


def test_the_report_of_a_finished_run_is_told_to_those_who_do_not_see_it(tmp_path):
    written = report()
    told = Second(json.loads(written.to_json()))
    runner = SimpleNamespace(dense=lambda *_: {})
    job = SimpleNamespace(processes=told, recipe=Recipe(), runner=runner, known_dense={})
    found = Job.remeasure(job, SimpleNamespace(folder=tmp_path / "not here yet", measured={}), {})
    assert found.layers == written.layers
    assert found.machine == written.machine


def test_a_state_of_training_is_read_by_all_or_by_none(tmp_path, shard, waiting):
    path = tmp_path / shard.file
    path.write_bytes(WHOLE)
    first, second = (Journal(tmp_path, DECIDES, "model.layers", writes=not late, late=late) for late in (False, True))
    assert first.training_for(Processes()) is None
    for journal in (first, second):
        journal.record.training = KeptTraining(shard, 1)
    assert first.training_for(Processes()) == path
    path.unlink()
    assert first.training_for(Processes()) is None
    assert second.training_for(Second(told=False)) is None
    waiting(lambda: path.write_bytes(WHOLE))
    assert second.training_for(Second(told=True)) == path  # it is late here
