import json

import pytest

from sparlow.errors import InputError
from sparlow.files import as_json, sha256
from sparlow.machine import machine
from sparlow.model.artefact.shards import ShardRecord
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import LayerRecord, Perplexity
from sparlow.run.journal import Journal
from sparlow.run.output_dir import LOCK, NAME, check_folder
from sparlow.run.record import RunRecord, read_record

DECIDES = {"recipe": Recipe(rank=4).to_dict(), "model": "abc", "calibration": "def", "format": 2, "solver": 1}

BUILTIN, C4 = {"builtin": Perplexity(12.5, 0.25)}, {"c4": Perplexity(9.0)}


def record(block, name="mlp.up_proj"):
    return LayerRecord(block, name, (48, 32), "2:4", 0.5, 4, 0.01, 50, 1.25, 0.0, ("look twice",))


def journal(folder, *, overwrite=False, **changes):
    return Journal(folder, DECIDES | changes, "model.layers", overwrite=overwrite)


def shard(folder, i):
    path = folder / f"model-{i + 1:05d}-of-00003.safetensors"
    header = json.dumps({"__metadata__": {"block": str(i)}}).ljust(92)
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    return ShardRecord(path.name, 100, sha256(path))


def begun(folder, blocks=2):
    """A run that was stopped after some blocks."""
    run = journal(folder)
    run.begin(BUILTIN, {})
    for i in range(blocks):
        run.note_block(shard(folder, i), [record(i), record(i, "mlp.down_proj")], [], {"solve": i + 1.5})
    return run


def finished(folder):
    run = begun(folder)
    run.note_rest(shard(folder, 2), Recipe(rank=4).to_toml())
    run.finish(run.record.dense, {})
    return run


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is remembered


def test_nothing_is_on_disk_before_the_first_record(tmp_path):
    run = journal(tmp_path / "a" / "out")
    assert (run.blocks_done, run.record.dense) == (0, {})
    assert not (tmp_path / "a").exists()
    run.begin(BUILTIN, {})
    assert content(tmp_path / "a" / "out").keys() == {NAME}


def test_a_later_run_goes_on_from_what_is_there(tmp_path):
    begun(tmp_path)
    again = journal(tmp_path)
    assert again.blocks_done == 2
    assert again.record.dense == BUILTIN
    assert again.record.blocks[1].layers == [record(1), record(1, "mlp.down_proj")]


def test_perplexities_are_added_to_those_known(tmp_path):
    begun(tmp_path)
    journal(tmp_path).begin(C4, {})
    assert journal(tmp_path).record.dense == BUILTIN | C4


def test_finished_comes_last(tmp_path):
    run = begun(tmp_path)
    assert json.loads((tmp_path / NAME).read_text())["finished"] is False
    assert not (tmp_path / "recipe.toml").exists()
    run.note_rest(shard(tmp_path, 2), Recipe(rank=4).to_toml())
    assert json.loads((tmp_path / NAME).read_text())["finished"] is False
    run.finish(run.record.dense, {})
    state = json.loads((tmp_path / NAME).read_text())
    assert state["finished"] is True
    assert state["shards"].keys() == {path.name for path in tmp_path.glob("*.safetensors")}
    assert Recipe.from_file(tmp_path / "recipe.toml") == Recipe(rank=4)


def test_records_by_full_name(tmp_path):
    begun(tmp_path)
    names = [f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("up", "down")]
    assert read_record(tmp_path).layers == dict(
        zip(names, [r for i in range(2) for r in journal(tmp_path).record.blocks[i].layers], strict=True)
    )


def forged(folder, **changes):
    """As if the run had begun elsewhere."""
    state = json.loads((folder / NAME).read_text())
    state["machines"][0] |= changes
    (folder / NAME).write_text(json.dumps(state))


def test_the_machine_of_the_first_part_stays_on_record(tmp_path):
    begun(tmp_path)
    forged(tmp_path, cpu="Another", threads=99)
    again = journal(tmp_path)
    again.begin({}, {})
    assert [record["cpu"] for record in again.record.machines] == ["Another", machine()["cpu"]]
    assert again.record.machines == json.loads((tmp_path / NAME).read_text())["machines"]


def test_a_run_that_went_on_elsewhere_says_so_even_when_it_is_back(tmp_path):
    begun(tmp_path)
    assert journal(tmp_path).warnings == []
    here = machine()
    forged(tmp_path, threads=99)
    journal(tmp_path).begin({}, {})
    for _ in range(2):
        again = journal(tmp_path)
        again.begin({}, {})
        (warning,) = again.warnings
        assert f"threads (99, then {here['threads']})" in warning
        assert len(again.record.machines) == 2


def test_a_finished_run_keeps_the_machines_it_was_made_on(tmp_path):
    finished(tmp_path)
    forged(tmp_path, threads=99)
    assert len(journal(tmp_path).record.machines) == 1
    assert journal(tmp_path).warnings == []


def test_a_run_begun_before_machines_were_on_record_goes_on(tmp_path):
    begun(tmp_path)
    state = json.loads((tmp_path / NAME).read_text())
    del state["machines"]
    (tmp_path / NAME).write_text(json.dumps(state))
    assert journal(tmp_path).warnings == []


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("blocks"),
        lambda state: state.update(machines=5),
        lambda state: state.update(machines=["a large one"]),
        lambda state: state.pop("blocks_name"),
        lambda state: state["blocks"][0].pop("layers"),
        lambda state: state["blocks"][0]["layers"][0].pop("shape"),
        lambda state: state["blocks"][0]["layers"][0].update(colour="red"),
        lambda state: state.update(blocks=7),
    ],
)
def test_records_that_cannot_be_understood(change, tmp_path):
    begun(tmp_path)
    state = json.loads((tmp_path / NAME).read_text())
    change(state)
    (tmp_path / NAME).write_text(json.dumps(state))
    with pytest.raises(InputError, match="not a record of sparlow"):
        read_record(tmp_path)


def test_a_record_of_an_older_version_has_no_standard_errors(tmp_path):
    begun(tmp_path)
    state = json.loads((tmp_path / NAME).read_text())
    assert state["dense"] == {"builtin": 12.5}
    assert state.pop("dense_stderr") == {"builtin": 0.25}
    (tmp_path / NAME).write_text(json.dumps(state))
    assert read_record(tmp_path).dense == {"builtin": Perplexity(12.5, None)}


def test_a_record_comes_back_as_it_was_written(tmp_path):
    for make in (begun, finished):
        run = make(tmp_path)
        assert read_record(tmp_path) == run.record == RunRecord.from_dict(run.record.to_dict())


@pytest.mark.parametrize("make", [lambda _: RunRecord({"blocks": []}, "blocks"), begun, finished])
def test_the_text_of_a_record_is_that_of_its_object(make, tmp_path):
    run = make(tmp_path)
    found = getattr(run, "record", run)
    assert found.to_text() == as_json(found.to_dict())
    assert not hasattr(run, "record") or (tmp_path / NAME).read_text(encoding="utf-8") == found.to_text()


def test_what_is_on_record_of_a_block_is_made_text_once(tmp_path, monkeypatch):
    """So that a run of many layers does not take longer for each block, the more of them are done."""
    made = []

    def counted(content):
        made.extend(len(content["layers"]) for _ in range("layers" in content))
        return as_json(content)

    monkeypatch.setattr("sparlow.run.record.as_json", counted)
    begun(tmp_path, blocks=8)
    assert made == [2] * 8


# Another run


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "xyz"}, "differs in model[.] Repeat"),
        ({"calibration": "xyz"}, "differs in calibration[.] Repeat"),
        ({"solver": 2}, "holds a run with the solvers of revision 1, and this sparlow has 2[.] "),
        ({"model": "xyz", "format": 3}, "holds a run in the format 2, and this sparlow has 3[.] "),
        ({"model": "xyz", "calibration": "uvw"}, "differs in model, calibration[.] Repeat"),
        ({"recipe": Recipe(rank=4, seed=3).to_dict()}, r"differs in seed \(0 there, 3 now\)[.] Repeat"),
        ({"recipe": Recipe(rank=5).to_dict()}, r"differs in rank \(4 there, 5 now\)[.] Repeat"),
        ({"recipe": Recipe().to_dict()}, r"differs in rank \(4 there, None now\)[.] Repeat"),
        (
            {"recipe": Recipe(rank=4, pattern="4:8", options={"effort": 2.0}).to_dict()},
            r"options \({} there, {'effort': 2.0} now\), pattern \(None there, 4:8 now\)[.] Repeat",
        ),
    ],
)
def test_another_run_is_refused_with_what_differs(changes, named, tmp_path):
    begun(tmp_path)
    before = content(tmp_path)
    with pytest.raises(InputError, match=named) as caught:
        journal(tmp_path, **changes)
    assert "--overwrite" in str(caught.value)
    assert content(tmp_path) == before


def test_a_damaged_record_is_refused(tmp_path):
    begun(tmp_path)
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        journal(tmp_path)


def test_overwriting_forgets_at_once_and_removes_with_the_first_record(tmp_path):
    finished(tmp_path)
    before = content(tmp_path)
    run = journal(tmp_path, overwrite=True, model="xyz")
    assert (run.blocks_done, run.record.dense) == (0, {})
    assert content(tmp_path) == before
    run.begin({}, {})
    assert content(tmp_path).keys() == {NAME}
    run.note_block(shard(tmp_path, 0), [record(0)], [], {})
    assert content(tmp_path).keys() == {NAME, "model-00001-of-00003.safetensors"}  # removed once only


# Shards


def test_a_shard_as_it_was_recorded_passes(tmp_path):
    run = begun(tmp_path)
    assert run.has(0)
    assert journal(tmp_path).has(1)
    assert not journal(tmp_path).has(2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes() + b"!"),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"),
    ],
    ids=["missing", "longer", "one byte"],
)
def test_a_shard_that_is_another_is_not_had(spoil, tmp_path):
    run = begun(tmp_path)
    spoil(tmp_path / "model-00002-of-00003.safetensors")
    assert (run.has(0), run.has(1)) == (True, False)


@pytest.mark.parametrize("file", ["../model-00001-of-00003.safetensors", "/etc/passwd"])
def test_a_record_does_not_lead_out_of_the_directory(file, tmp_path):
    begun(tmp_path)
    state = json.loads((tmp_path / NAME).read_text())
    state["blocks"][0]["file"] = file
    state["shards"][file] = {"bytes": 100, "sha256": ""}
    (tmp_path / NAME).write_text(json.dumps(state))
    with pytest.raises(InputError, match="not the name of a safetensors file"):
        journal(tmp_path)


# Whether a directory may be written to


@pytest.mark.parametrize("overwrite", [False, True])
def test_new_empty_and_unfinished_directories_may_be_written_to(overwrite, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    begun(tmp_path / "unfinished")
    (tmp_path / "hardly begun").mkdir()
    for name in (LOCK, f".{NAME}.partial"):  # of a run that was killed before its first record
        (tmp_path / "hardly begun" / name).write_bytes(b"")
    for name in ("new", "empty", "unfinished", "hardly begun"):
        check_folder(tmp_path / name, overwrite=overwrite)
    assert not (tmp_path / "new").exists()


def test_a_finished_directory_only_if_asked_to(tmp_path):
    finished(tmp_path)
    with pytest.raises(InputError, match=r"holds a finished result.*--overwrite"):
        check_folder(tmp_path, overwrite=False)
    check_folder(tmp_path, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_never_a_file_nor_what_is_not_ours(overwrite, tmp_path):
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(InputError, match=r"thesis.txt is a file"):
        check_folder(tmp_path / "thesis.txt", overwrite=overwrite)
    with pytest.raises(InputError, match="not empty and holds no run of sparlow"):
        check_folder(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "the only copy"


@pytest.mark.parametrize("theirs", ["{}", '{"colour": "brown", "species": "sparrow"}'])
def test_a_file_of_our_name_does_not_make_a_directory_ours(theirs, tmp_path):
    (tmp_path / "thesis.txt").write_text("the only copy")
    (tmp_path / NAME).write_text(theirs)
    with pytest.raises(InputError):
        check_folder(tmp_path, overwrite=True)


def test_an_unfinished_directory_of_the_first_format_is_not_mixed_with_the_second(tmp_path):
    begun(tmp_path)
    state = json.loads((tmp_path / NAME).read_text())
    state["fingerprint"] = {k: v for k, v in state["fingerprint"].items() if k not in ("format", "solver")}
    state["fingerprint"]["version"] = "0.1.0"
    (tmp_path / NAME).write_text(json.dumps(state))
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"holds a run in the format of an older sparlow, .* has 2[.] .*compress"):
        journal(tmp_path)
    assert content(tmp_path) == before
    assert journal(tmp_path, overwrite=True).blocks_done == 0


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_shard_of_a_finished_result_is_not_measured_again(damage, tmp_path):
    run = finished(tmp_path)
    run.require_whole()
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"The shard {file.name} of the finished result .* --overwrite"):
        journal(tmp_path).require_whole()
