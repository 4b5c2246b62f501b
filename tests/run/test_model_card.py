"""The model card of a result: what it says, who may change it, and where it goes along."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparlow
from families import save_tiny
from sparlow.errors import InputError, RunError
from sparlow.model.artefact.card import MARK
from sparlow.run.model_card import card, write_model_card

TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(600))
QUICK = {"algorithm": "magnitude", "pattern": "2:4", "samples": 4, "seqlen": 16}
BASE = """---
license: apache-2.0
language: [en]
tags: [theirs]
---
# A base

```bibtex
@article{base2026,
  title = {A base},
}
```
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    save_tiny("gpt_neox", place / "model")
    (place / "model" / "README.md").write_text(BASE)
    (place / "model" / "LICENSE").write_text("Free.")
    (place / "text.txt").write_text(TEXT)
    return place


def compress(place, out, **options):
    text = str(place / "text.txt")
    return sparlow.compress(place / "model", QUICK, calibration=text, evaluate=text, out=out, **options)


@pytest.fixture(scope="module")
def report(place):
    return compress(place, place / "out")


def front(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_says_what_the_report_says(place, report):
    text = (place / "out" / "README.md").read_text()
    head = front(text)
    assert head["license"] == "apache-2.0"
    assert head["language"] == ["en"]
    assert {"sparlow", "magnitude"} <= set(head["tags"])
    assert "base_model" not in head  # a directory is no id of the hub
    (value,) = report.compressed["perplexity"].values()
    for words in (
        f"{value:.2f}",
        "2:4 and rank 0",
        f"{report.bits_per_weight:.2f}",
        'pattern = "2:4"',
        "@article{base2026",
    ):
        assert words in text
    assert "apache-2.0, holds for this model, too (`LICENSE`)" in text
    assert str(place) not in text  # paths are of another machine
    assert MARK in text


def test_a_base_on_the_hub_is_linked(report):
    report.model, before = "owner/name", report.model
    text = card(report, "---\nlicense: [broken\n---\n")
    report.model = before
    assert front(text)["base_model"] == "owner/name"
    assert "license" not in front(text)
    assert "https://huggingface.co/owner/name" in text
    assert "not on record here" in text


def test_what_somebody_wrote_stays(place, report, tmp_path):
    shutil.copytree(place / "out", tmp_path / "out")
    mine, value = tmp_path / "out" / "README.md", report.bits_per_weight
    report.bits_per_weight = 123.45
    try:
        assert write_model_card(report, tmp_path / "out")  # it follows the report
        assert "123.45" in mine.read_text()
        mine.write_text("my own")
        assert not write_model_card(report, tmp_path / "out")
        assert mine.read_text() == "my own"
        mine.write_bytes(b"\xff")  # of nobody's, but not of ours
        assert not write_model_card(report, tmp_path / "out")
    finally:
        report.bits_per_weight = value


@pytest.mark.usefixtures("report")
def test_a_card_goes_along_when_a_model_is_saved_again(place, tmp_path):
    card_before = (place / "out" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(place / "out")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card_before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my own")
    model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own"
    AutoModelForCausalLM.from_pretrained(place / "model").save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()


def test_a_model_compressed_in_memory_has_a_card_too(place, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    text = str(place / "text.txt")
    sparlow.compress(model, QUICK, calibration=text, evaluate=(), tokenizer=tokenizer, inplace=True)
    model.save_pretrained(tmp_path / "out")
    assert 'pattern = "2:4"' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_transformers_may_be_imported_first():
    program = (
        "import transformers.modeling_utils as m, sparlow; print(m.PreTrainedModel.save_pretrained.__module__, "
        "hasattr(m.PreTrainedModel.save_pretrained, '__wrapped__'))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True, timeout=120)
    assert shown.split()[-1] == "True"


@pytest.mark.usefixtures("report")
def test_a_finished_directory_goes_to_the_hub_as_it_is(place, monkeypatch):
    sent = {}

    class Hub:
        def __init__(self, token):
            sent["token"] = token

        def create_repo(self, repo_id, **options):
            sent["repo"] = (repo_id, options)

        def upload_folder(self, **options):
            if options["repo_id"] == "nobody/refused":
                raise ConnectionError("403 Forbidden")
            sent["upload"] = options
            return "https://huggingface.co/me/mine/commit/1"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert sparlow.push_to_hub(place / "out", "me/mine", private=True).endswith("/commit/1")
    assert sent["repo"] == ("me/mine", {"private": True, "exist_ok": True})
    assert sent["upload"]["folder_path"] == place / "out"
    assert (place / "out" / "README.md").exists()
    with pytest.raises(RunError, match=r"could not be uploaded to nobody/refused \(403 Forbidden\)"):
        sparlow.push_to_hub(place / "out", "nobody/refused")
    with pytest.raises(InputError, match="not a finished result"):
        sparlow.push_to_hub(place / "model", "me/mine")
