"""What is wrong with names and places is told before torch and transformers are imported, which takes seconds."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import contextlib, io, json, sys

class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'transformers', 'datasets'):
            raise RuntimeError(f'{name} is imported')

sys.meta_path.insert(0, Heavy())
from sparlow.cli.commands import main
for line in json.load(sys.stdin):
    shown = io.StringIO()
    from sparlow.cli import display
    display.err.file = shown
    try:
        main(line)
    except SystemExit as end:
        code = end.code
    except Exception as error:
        code = repr(error)
    print(json.dumps([code, shown.getvalue()]))
"""
OUT = ["--out", "out"]
TOLD = {  # what is typed, and what must be said of it
    "no such model": (["compress", "./zzz", *OUT], "There is no directory ./zzz."),
    "a model that was meant": (["compress", "./modle", *OUT], "did you mean model?"),
    "no name": (["plan", " "], "No model is named."),
    "no such file": (["plan", "./zzz.gguf"], "There is no file zzz.gguf."),
    "a file that was meant": (["plan", "tny.gguf"], "did you mean tiny.gguf?"),
    "a directory with a file in it": (["generate", "files", "--prompt", "a"], "such as files/tiny.gguf"),
    "not on the hub": (["compress", "MISSING", *OUT], "There is no such directory. As an id of the hub"),
    "a second model": (["benchmark", "model", "./zzz"], "There is no directory ./zzz."),
    "a baseline": (["evaluate", "model", "--baseline", "./zzz"], "There is no directory ./zzz."),
    "a finished result": (["compress", "model", "--out", "done"], "holds a finished result"),
    "another's directory": (["compress", "model", "--out", "files"], "holds no run of sparlow"),
    "an unfinished run": (["inspect", "begun"], "is an unfinished run"),
    "an unfinished run to export": (["export", "begun", "--as", "merged", *OUT], "is an unfinished run"),
    "an unfinished run to tune": (["finetune", "begun", *OUT], "is an unfinished run"),
    "a file for a result": (["inspect", "files/tiny.gguf"], "is a file"),
    "no place for JSON": (["compress", "model", *OUT, "--json", "none/x.json"], "There is no directory none"),
    "no place for figures": (["compress", "model", *OUT, "--figures", "files/tiny.gguf"], "is a file"),
    "a recipe": (["compress", "model", *OUT, "--recipe", "3basil-2to4-r6"], "did you mean '3basil-2to4-r64'?"),
    "an option": (["compress", "model", *OUT, "--offload", "dsk"], "did you mean 'disk'?"),
    "a number": (["compress", "model", *OUT, "--rank", "many"], "a whole number"),
    "an unknown option": (["compress", "model", *OUT, "--patern", "2:4"], "There is no option --patern; did you mean"),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    for name in ("model", "files", "done", "begun"):
        (place / name).mkdir()
    (place / "model" / "config.json").write_text("{}")
    for folder in (place, place / "files"):
        (folder / "tiny.gguf").write_bytes(b"")
    record = dict.fromkeys(["format", "fingerprint", "blocks_name", "dense", "shards", "blocks"])
    (place / "done" / "sparlow.json").write_text(json.dumps(record | {"finished": True}))
    (place / "begun" / "sparlow.json").write_text('{"finished": false}')
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    typed = json.dumps([words for words, _ in TOLD.values()] + [["recipes", "--quiet"]])
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=typed, env=environment, cwd=place, capture_output=True, text=True,
        check=True, timeout=120,
    )  # fmt: skip
    assert {path.name for path in place.iterdir()} == {"model", "files", "done", "begun", "tiny.gguf"}
    return dict(zip([*TOLD, "recipes"], map(json.loads, ended.stdout.splitlines()), strict=True))


def test_the_list_of_recipes_needs_no_torch(said):
    assert said["recipes"] == [0, ""]


@pytest.mark.parametrize("slip", TOLD)
def test_a_slip_is_told_before_torch_is_imported(slip, said):
    code, shown = said[slip]
    assert code == 2, shown
    assert TOLD[slip][1] in " ".join(shown.split())
