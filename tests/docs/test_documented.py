"""Every command and every snippet of README.md and docs/, executed in one process on a tiny model."""

import importlib
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sparlow
from command_line import run
from documented import ROOT, blocks, pages, runnable
from results import byte_tokenizer
from sparlow.algorithms import _registry
from sparlow.model.artefact.layers import compressed_layers
from sparlow.runtime import benchmark, benchmark_worker
from sparlow.text import corpora
from sparlow.text.sources import in_order

pytestmark = pytest.mark.slow

MODELS = ("MODEL", "SMOLLM2", "DENSE", "meta-llama/Llama-3.2-1B", "HuggingFaceTB/SmolLM2-135M")  # that pages name
RESULTS = ("DIR", "RESULT")  # results that pages take as they are
ADAPTERS = ("FOLDER",)  # and its export
TEXT = (ROOT / "docs" / "methods.md").read_text("utf-8").encode("ascii", "ignore").decode() * 2
CHAT = (
    "{% for turn in messages %}{{ 'So: ' if turn['role'] == 'assistant' }}{{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}So: {% endif %}"
)
SMALL = {  # added to a command, so that it takes a second; what it says itself is read all the same
    "compress": ("--samples", "4", "--seqlen", "64"),
    "compare": ("--samples", "4", "--seqlen", "64", "--no-time"),  # trying the methods takes longer than running them
    "plan": ("--samples", "4", "--seqlen", "64", "--no-time"),
    "evaluate": ("--seqlen", "64", "--limit", "2"),
    "finetune": ("--steps", "2", "--block-size", "32", "--batch", "1", "--accumulate", "1"),
    "generate": ("--max-tokens", "4"),
    "benchmark": ("--prompt-tokens", "8", "--tokens", "4", "--repeats", "1"),
}
SOON = {"3basil": "effort=0.1", **dict.fromkeys(("oats", "hassle-free-alps", "hassle-free-sparsegpt"), "rounds=2")}
EVALUATED = ("--evaluate-seqlen", "64", "--limit", "2")  # of commands that evaluate, too


@dataclass(frozen=True)
class Words:
    """A short text in the place of a corpus."""

    name: str

    def documents(self, seed=None):
        return in_order([TEXT], seed)

    @property
    def identity(self):
        return self.name


class Here:
    """A model of a benchmark in this process: one of its own takes seconds to begin, see tests/runtime."""

    def __init__(self):
        self._worker = benchmark_worker.Worker()

    def ask(self, what, **request):
        return json.loads(json.dumps(getattr(self._worker, what)(**request)))


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """A tiny dense model, and what became of it, to be copied."""
    place = tmp_path_factory.mktemp("documented")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    config = AutoConfig.for_model("llama", **sizes, **heads, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "dense")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(place / "dense")
    values = {"pattern": "dense", "values": "int4", "levels": "integer", "group": "32", "options": {"effort": 0.1}}
    windows = torch.randint(2, 100, (4, 64), generator=torch.Generator().manual_seed(0))
    recipe = sparlow.Recipe(rank=8, **values)
    sparlow.compress(place / "dense", recipe, calibration=windows, out=place / "result", evaluate=())
    sparlow.export(place / "result", place / "adapter", form="lora")
    return place


@pytest.fixture
def place(templates, tmp_path, monkeypatch):
    """A directory with all that pages name, in which they are read."""
    for name in MODELS:
        shutil.copytree(templates / "dense", tmp_path / name)
    for name in RESULTS:
        shutil.copytree(templates / "result", tmp_path / name)
    for name in ADAPTERS:
        shutil.copytree(templates / "adapter", tmp_path / name)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    records = [{"text": TEXT[i : i + 400]} for i in range(0, 400 * 10, 5)]
    (tmp_path / "c4.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:800]))
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 9)
    for name in ("wikitext2_test.raw", "my.txt"):
        (tmp_path / name).write_text(TEXT)
    named = [
        replace(corpus, calibration=corpus.calibration and Words(corpus.name), evaluation=Words(corpus.name))
        for corpus in corpora._NAMED
    ]
    monkeypatch.setattr(corpora, "_NAMED", tuple(named))
    monkeypatch.setattr(benchmark, "_process", lambda: nullcontext(Here()))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # by a benchmark, for all tests behind it
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def smaller(words):
    """A command of sparlow, made to take little."""
    name, *rest = words
    evaluates = not any(option == "--evaluate" and not value for option, value in pairwise(rest))
    if name in ("compress", "compare") and evaluates:
        rest = [*rest, *EVALUATED]
    if name == "compare":
        compared = [one for one in rest[rest.index("--algorithms") + 1].split(",") if one in SOON]
        rest = [*rest, *(word for one in compared for word in ("--option", f"{one}.{SOON[one]}"))]
    if name == "compress" and not {"--algorithm", "--recipe", "--option"}.intersection(rest):
        rest = [*rest, "--option", SOON["3basil"]]
    return [name, *rest, *(SMALL.get(name, ()) if evaluates or name != "evaluate" else ())]


def clear_for(words, place):
    """Remove what an alternative, written one line above, has left at the same place."""
    for option in ("--out", "--peft"):
        if option in words:
            old = place / words[words.index(option) + 1]
            if old.exists() and old.name not in RESULTS and "--overwrite" not in words:
                shutil.rmtree(old)


def execute(words, place):
    """Run a command in this process; 0 if it went well."""
    if words[0] == "python":
        return importlib.import_module("run").main(words[2:])
    clear_for(words, place)
    return run(*smaller(words[1:]))


@pytest.mark.parametrize("page", [page for page in pages() if runnable(page)])
def test_what_a_page_says_runs(page, place, capsys, monkeypatch):
    monkeypatch.setattr(_registry, "_ALGORITHMS", dict(_registry._ALGORITHMS))  # a page adds some
    names = {}
    for block in runnable(page):
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(ROOT / page), "exec"), names)  # noqa: S102 - our own
            continue
        for words in block.commands:
            assert execute(words, place) == 0, f"{page}, line {block.line}: {words}\n{capsys.readouterr().err}"


def test_recipes_in_the_pages_are_recipes():
    shown = [block.text for page in pages() for block in blocks(page) if block.language == "toml"]
    assert [sparlow.Recipe.from_toml(text).to_dict() for text in shown]


FORMS = {
    "codes and a book": {"bits": 3.5},
    "codes under a mask": {"pattern": "2:4", "values": "int3", "rank": 4},
    "halves under a free mask": {"pattern": "0.5", "values": "int4", "levels": "half", "rank": 4},
    "whole rows": {
        "pattern": "dense",
        "values": "int8",
        "group": "row",
        "rank": 4,
        "embedding": "int4",
        "head": "int8",
    },
    "floats": {"pattern": "16:32", "rank": 4, "embedding": "keep", "head": "keep"},
}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("form", FORMS)
def test_the_reader_in_the_page_of_the_format_reads_every_form(form):
    windows = torch.randint(2, 100, (4, 64), generator=torch.Generator().manual_seed(0))
    shutil.rmtree("DIR")
    sparlow.compress(
        "MODEL", sparlow.Recipe(**FORMS[form], dtype="bfloat16"), calibration=windows, out="DIR", evaluate=()
    )
    names = {}
    (reader,) = [block for block in runnable("docs/format.md") if "def unpacked" in block.text]
    exec(reader.text, names)  # noqa: S102 - our own
    found, layers = names["read"]("DIR"), compressed_layers(sparlow.load("DIR"))
    assert layers.keys() <= found.keys()
    for name, layer in layers.items():
        for mine, theirs in zip(found[name], (layer.S, layer.U, layer.V), strict=True):
            assert torch.equal(mine, theirs), name
    embedding = {name: S for name, (S, _, _) in found.items() if name not in layers}
    state = sparlow.load("DIR").state_dict()
    assert all(torch.equal(S, state[f"{name}.weight"]) for name, S in embedding.items())
    assert bool(embedding) == (form != "floats")


def test_the_notebook_runs(place, capsys):
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text("utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)  # none is kept that nobody has looked at
    names = {}
    for number, source in enumerate(sources, 1):
        exec(compile(source, f"quickstart.ipynb, cell {number}", "exec"), names)  # noqa: S102 - our own
    shown = capsys.readouterr().out
    assert "bits a compressed weight" in shown
    assert len(re.findall(r"^block \d", shown, re.MULTILINE)) == 5
    assert (place / "quickstart-lora" / "adapter_config.json").is_file()
