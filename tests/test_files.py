import json
import os
import stat

import pytest
import torch

import sparlow
from command_line import run_and_fail
from families import save_tiny
from sparlow.errors import InputError, RunError, printable
from sparlow.files import follow_umask, human_bytes, parse_json, partial_of, read_json, replacing, shard_filename
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import Report

pytestmark = pytest.mark.skipif(os.name == "nt", reason="modes and links of POSIX")
HOSTILE = {
    "nested": "[" * 200_000 + "]" * 200_000,
    "nested object": '{"a": ' * 150 + "1" + "}" * 150,
    "huge": '{"a": "' + "x" * 100_000_000 + '"}',
    "long number": '{"a": ' + "9" * 5_000 + "}",
    "array": "[1]",
    "no text": b"\xff\xfe{}",
    "cut": '{"a": 1',
}


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o027])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


# Modes


def test_nobody_else_could_serve_a_result_whose_shards_were_for_their_owner_only(umask, tmp_path, monkeypatch):
    """safetensors writes with mode 0600 whatever the umask."""
    monkeypatch.setenv("SPARLOW_CACHE", str(tmp_path / "cache"))
    save_tiny("llama", tmp_path / "dense")
    recipe = Recipe(algorithm="magnitude", pattern="2:4", calibration="self", samples=2, seqlen=8)
    sparlow.compress(tmp_path / "dense", recipe, out=tmp_path / "out", evaluate=())
    files = [path for folder in ("out", "cache") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert {"config.json", "sparlow.json", "report.html", "tokenizer.json", "recipe.toml"} <= {f.name for f in files}
    assert sum(file.suffix == ".safetensors" for file in files) == 5  # four shards, and the windows of its own text
    assert {oct(mode(file)) for file in files} == {oct(0o666 & ~umask)}


def test_files_of_other_libraries_get_the_mode_of_new_ones(umask, tmp_path):
    save_tiny("llama", tmp_path)
    assert mode(tmp_path / "model.safetensors") == 0o600
    follow_umask(tmp_path)
    assert {mode(path) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    partial_of(tmp_path / "a.json").symlink_to(tmp_path / "victim")
    with replacing(tmp_path / "a.json") as partial:
        assert not partial.is_symlink()
        partial.write_text("new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "a.json").read_text() == "new"


def test_a_temporary_file_that_comes_back_at_once_is_not_written_to(tmp_path, monkeypatch):
    """Between the removal of what is in the way and the opening, somebody makes a link."""
    target = tmp_path / "a.json"
    (tmp_path / "victim").write_text("precious")
    partial_of(target).symlink_to(tmp_path / "victim")
    monkeypatch.setattr(type(target), "unlink", lambda *_, **__: None)
    with pytest.raises(RunError, match="Cannot write"), replacing(target) as partial:
        partial.write_text("new")
    assert (tmp_path / "victim").read_text() == "precious"


# JSON


@pytest.mark.parametrize("name", HOSTILE)
def test_nested_or_huge_json_is_one_sentence(name, tmp_path):
    text = HOSTILE[name]
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (read_json, parse_json, Report.from_file, sparlow.load, sparlow.plan):
        whole = read in (read_json, parse_json, Report.from_file)
        with pytest.raises(InputError) as caught:
            read(tmp_path / "config.json" if whole else tmp_path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1_000


def test_a_pipe_in_the_place_of_a_config_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError):
        parse_json(tmp_path / "config.json")


def test_a_result_of_links_says_how_to_copy_it(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").symlink_to(tmp_path / "there" / "config.json")
    with pytest.raises(InputError, match="Copy the directory with cp -L"):
        sparlow.load(tmp_path / "out")


# Names, and what is shown

FORGED = "a\x1b[2K\x1b[1Gverified\u202e"


def test_an_escape_sequence_in_a_name_cannot_forge_verified(tmp_path, capsys):
    for error in (InputError(FORGED), RunError(FORGED)):
        assert str(error) == "a\ufffd[2K\ufffd[1Gverified\ufffd"
    assert printable("eins\n\tzwei é × 🙂") == "eins\n\tzwei é × 🙂"
    said = run_and_fail(capsys, "inspect", tmp_path / FORGED)
    assert "\x1b" not in said
    with pytest.raises(InputError, match="control characters"):
        shard_filename(f"{FORGED}.safetensors")


def test_names_of_tensors_with_escape_sequences_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    windows = torch.randint(2, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    save_tiny("llama", tmp_path / "dense")
    recipe = Recipe(algorithm="magnitude", pattern="2:4")
    sparlow.compress(tmp_path / "dense", recipe, calibration=windows, out=tmp_path / "out", evaluate=())
    (tmp_path / "out" / "sparlow.json").unlink()
    shard = tmp_path / "out" / "model-00004-of-00004.safetensors"
    save_file(load_file(shard) | {FORGED: torch.ones(1)}, shard, {"format": "pt"})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    with pytest.raises(InputError, match="control characters") as caught:
        sparlow.load(tmp_path / "out")
    assert str(caught.value).isprintable()
    index["weight_map"][FORGED] = shard.name
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="control characters"):
        sparlow.load(tmp_path / "out")


def test_what_a_table_shows_has_no_escape_sequences(capsys):
    from sparlow.cli import display, tables

    display.out.print(tables.table(("name",), [(FORGED,)]), FORGED)
    display.err.print(FORGED)
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert shown.out.count("verified") == 2


def test_no_size_but_nothing_is_shown_as_nothing():
    """A message compared 0.0 MB with 0.0 MB."""
    sizes = {0: "0.0 MB", 60: "0.1 KB", 1000: "1.0 KB", 99_900: "99.9 KB", 100_000: "0.1 MB", 10**9: "1.00 GB"}
    assert {size: human_bytes(size) for size in sizes} == sizes
