from dataclasses import dataclass, replace

import pytest
import torch

import sparlow
from families import save_tiny
from sparlow.model.loading.source import open_model, upcast_for_cpu
from sparlow.recipe.recipe import Recipe
from sparlow.report.records import Report
from sparlow.run import answers
from sparlow.run.answers import PROMPTS, Answers

TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(600))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    save_tiny("llama", place / "model")
    (place / "text.txt").write_text(TEXT)
    return place


def compressed(place, out, **options):
    recipe = Recipe(rank=2, calibration=str(place / "text.txt"), samples=2, seqlen=16, options={"effort": 0.1})
    texts = options.pop("evaluate", [str(place / "text.txt")])
    return sparlow.compress(place / "model", recipe, out=out, evaluate=texts, force=True, **options)


def by_hand(folder, prompt, tokens):
    """Token by token, each time from the beginning."""
    opened = open_model(str(folder))
    model, tokenizer = upcast_for_cpu(opened.model), opened.tokenizer
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    begun = ids.shape[1]
    for _ in range(tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, begun:], skip_special_tokens=True)


def test_both_models_answer_with_their_likeliest_tokens(place, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "TOKENS", 5)
    report = compressed(place, tmp_path / "out")
    assert report.answers["why"] == ""
    assert [row["prompt"] for row in report.answers["rows"]] == list(PROMPTS)
    for row in report.answers["rows"]:
        assert row["dense"] == by_hand(place / "model", row["prompt"], 5)
        assert row["compressed"] == by_hand(tmp_path / "out", row["prompt"], 5)
    assert Report.from_file(tmp_path / "out" / "report.json").answers == report.answers
    assert "Three prompts" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_without_an_evaluation_nobody_is_asked(place, tmp_path, monkeypatch):
    monkeypatch.setattr(Answers, "_ask", lambda *_: pytest.fail("asked"))
    assert compressed(place, tmp_path / "out", evaluate=()).answers == {}


def test_a_model_that_fails_does_not_end_the_run(place, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no cache for this one\nand more")

    monkeypatch.setattr(Answers, "_continued", fail)
    found = compressed(place, tmp_path / "out").answers
    assert found == {
        "rows": [],
        "why": "No prompts were answered, because the model failed: no cache for this one.",
    }
    assert "no cache for this one" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_a_model_that_does_not_fit_is_not_loaded(place, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "memory_available", lambda: 1000)
    monkeypatch.setattr(Answers, "_continued", lambda *_: pytest.fail("loaded"))
    why = compressed(place, tmp_path / "out").answers["why"]
    assert "GB of memory, and 0.0 GB were free" in why


def test_what_cannot_answer_is_told():
    found = Answers(_Opened(None), lambda _: None)
    assert "without a tokenizer" in found.why
    assert "Several processes" in Answers(_Opened("any"), lambda _: None, alone=False).why
    assert "writes no text" in Answers(replace(_Opened("any"), writes=False), lambda _: None).why


@dataclass
class _Opened:
    tokenizer: object
    writes: bool = True

    @property
    def model(self):
        return self

    def can_generate(self):
        return self.writes


def test_a_model_that_reads_few_tokens_writes_as_many_as_it_can(place, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "_context", lambda _: 40)
    monkeypatch.setattr(answers, "TOKENS", 100)
    rows = compressed(place, tmp_path / "out").answers["rows"]
    assert all(len(row["dense"]) <= 40 for row in rows)
    monkeypatch.setattr(answers, "_context", lambda _: 3)
    why = compressed(place, tmp_path / "other").answers["why"]
    assert why == "No prompts were answered, because the model failed: It reads fewer tokens than the prompts have."
