import json
import logging
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

import sparlow
from command_line import run, run_and_fail
from families import save_tiny, tiny, tiny_tokenizer
from sparlow.errors import InputError
from sparlow.evaluation.perplexity import evaluate
from sparlow.evaluation.task_catalogue import Catalogue
from sparlow.evaluation.tasks import PAPER, average, load_tasks, measure_tasks
from sparlow.recipe.recipe import Recipe

SUMS = [(2, 3), (4, 1), (9, 8), (7, 7), (12, 3), (5, 95), (3, 3), (61, 20), (8, 30), (1, 1), (6, 6)]
ACC, ACC_NORM, EXACT = ({"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm", "exact_match"))


def question(a, b):
    """Answers of one to four characters, so that likelihood a character often chooses another."""
    choices = [str(a + b), str(1000 + a), "-" + str(a + b), str(b)]
    turn = (a * b) % 4
    return {"ask": f"{a}+{b}=", "choices": choices[turn:] + choices[:turn], "right": -turn % 4}


DOCS = [question(a, b) for a, b in SUMS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory of task files and their data, for reading only."""
    folder = tmp_path_factory.mktemp("tasks")

    def add(name, docs, **keys):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, docs)))
        files = {"test": str(folder / f"{name}.jsonl")}
        stated = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{ask}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{right}}",
            "metric_list": [ACC, ACC_NORM],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(stated | keys))  # JSON is YAML

    add("both", DOCS)
    add("piqa", DOCS[:7], metric_list=[ACC])
    add("small", DOCS[3:9], metric_list=[ACC])
    first = {"samples": DOCS[:5], "sampler": "first_n"}
    add("shown", DOCS[5:], fewshot_config=first, metric_list=[ACC])
    add("fixed", DOCS[:4], num_fewshot=0, fewshot_config=first)
    add("drawn", DOCS[:8], num_fewshot=2, fewshot_config={"split": "test"}, tag="some")
    add("python", DOCS[:2], unsafe_code=True)
    written = {"doc_to_choice": None, "doc_to_target": "{{said}}", "metric_list": [EXACT]}
    until = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}
    said = ["no", *(greedy(tiny("llama"), doc["ask"]) for doc in DOCS[1:4])]
    docs = [{"ask": doc["ask"], "said": answer} for doc, answer in zip(DOCS[:4], said, strict=True)]
    add("written", docs, output_type="generate_until", generation_kwargs=until, **written)
    sized = [{"metric": "acc", "weight_by_size": True}]
    for name, members, keys in [
        ("inner", ["piqa", "small"], {"aggregate_metric_list": sized}),
        ("outer", ["inner", "both"], {"aggregate_metric_list": sized}),
        ("loose", ["small", "inner"], {}),
        ("mmlu", ["shown", "fixed"], {"aggregate_metric_list": sized}),
    ]:
        (folder / f"_{name}.yaml").write_text(json.dumps({"group": name, "task": members, **keys}))
    return folder


@pytest.fixture(scope="module", params=["dense", "compressed", "other family"])
def model(request):
    model = tiny("opt" if request.param == "other family" else "llama")
    if request.param == "compressed":
        windows = torch.randint(2, 97, (8, 16), generator=torch.Generator().manual_seed(0))
        recipe = Recipe(algorithm="wanda", rank=0)
        sparlow.compress(model, recipe, calibration=windows, evaluate=(), inplace=True)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model's directory, and its compressed one, for reading only."""
    place = tmp_path_factory.mktemp("place")
    save_tiny("llama", place / "model")
    (place / "text.txt").write_text("".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(160)))
    recipe = Recipe(algorithm="wanda", rank=0, samples=4, seqlen=16)
    sparlow.compress(place / "model", recipe, calibration=str(place / "text.txt"), out=place / "out", evaluate=())
    return place


def test_a_head_of_its_own_is_not_tied_by_lm_eval(place, folder):
    """Its config says that it is tied: lm-eval then ties it in place, for its passes and for good."""
    model = tiny("llama")
    model.config.tie_word_embeddings = True
    model.train()
    model.model.layers[0].eval()
    before, modes = dict(model.named_parameters()), {name: m.training for name, m in model.named_modules()}
    own, seen = model.lm_head.weight, []
    hook = model.register_forward_hook(lambda module, *_: seen.append(module.lm_head.weight))
    texts = {"evaluate": (str(place / "text.txt"),), "seqlen": 16}
    first = evaluate(model, tiny_tokenizer(), **texts)
    found = measured(model, ["both"], folder)
    hook.remove()
    assert found["tasks"]
    assert seen
    assert all(weight is own for weight in seen)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert before.keys() == dict(model.named_parameters()).keys()
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert evaluate(model, tiny_tokenizer(), **texts) == first


def encode(text):
    return tiny_tokenizer()(text, return_tensors="pt").input_ids


@torch.no_grad()
def greedy(model, context, length=3):
    ids = encode(context)
    for _ in range(length):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tiny_tokenizer().decode(ids[0, -length:])


@torch.no_grad()
def log_likelihood(model, context, answer):
    """One sequence, one token after the other, in float64."""
    ids, start = encode(context + answer), encode(context).shape[1]
    logs = model(ids).logits[0].double().log_softmax(-1)
    return sum(logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))


def shares(model, docs, context=""):
    """What acc and acc_norm count, question by question."""
    right, right_by_length = [], []
    for doc in docs:
        ll = [log_likelihood(model, context + doc["ask"], " " + choice) for choice in doc["choices"]]
        by_length = [one / len(choice) for one, choice in zip(ll, doc["choices"], strict=True)]
        right.append(float(ll.index(max(ll)) == doc["right"]))
        right_by_length.append(float(by_length.index(max(by_length)) == doc["right"]))
    return right, right_by_length


def expected(metric, values, fewshot=0):
    stderr = pytest.approx(statistics.stdev(values) / len(values) ** 0.5)
    mean = pytest.approx(statistics.mean(values))
    return {"metric": metric, "value": mean, "stderr": stderr, "samples": len(values), "fewshot": fewshot}


def measured(model, names, folder, **options):
    return evaluate(model, tiny_tokenizer(), evaluate=(), tasks=names, task_path=folder, **options)


# values


def test_values_are_those_computed_by_hand(model, folder):
    found = measured(model, ["both", "piqa"], folder)
    right, by_length = shares(model, DOCS)
    assert right != by_length
    assert found == {
        "perplexity": {},
        "perplexity_stderr": {},
        "tasks": {"both": expected("acc_norm", by_length), "piqa": expected("acc", right[:7])},
        "average": pytest.approx((statistics.mean(by_length) + statistics.mean(right[:7])) / 2),
    }


def test_the_batch_does_not_matter(folder):
    model = tiny("llama")
    assert measured(model, ["both"], folder, batch_size=1) == measured(model, ["both"], folder, batch_size=7)


def test_rows_are_fewer_where_their_logits_would_be_many(folder, monkeypatch):
    from sparlow.evaluation import bounded_harness

    model, seen = tiny("llama"), []
    model.register_forward_hook(lambda _module, _given, output: seen.append(output.logits.shape[:2]))
    whole = measured(model, ["both", "written"], folder)
    assert max(rows for rows, _ in seen) == 8
    words = model.config.vocab_size
    monkeypatch.setattr(bounded_harness, "LOGITS_OF_BATCH", words * 16)
    seen.clear()
    assert measured(model, ["both"], folder)["tasks"] == {"both": whole["tasks"]["both"]}
    assert {rows for rows, _ in seen} == {1, 2}  # the longest alone, and shorter ones in more rows
    assert max(rows * tokens for rows, tokens in seen) <= 16


def test_a_limit_takes_the_first_questions(folder):
    model = tiny("llama")
    found = measured(model, ["both"], folder, limit=5)["tasks"]["both"]
    assert found == expected("acc_norm", shares(model, DOCS[:5])[1])
    one = measured(model, ["both"], folder, limit=1)["tasks"]["both"]
    assert (one["samples"], one["stderr"]) == (1, None)


def test_written_answers(folder):
    found = measured(tiny("llama"), ["written"], folder)
    assert found["tasks"] == {"written": expected("exact_match", [0.0, 1.0, 1.0, 1.0])}
    assert found["average"] == 0.75


def test_a_group_is_one_figure_with_its_parts(folder):
    model = tiny("llama")
    right, by_length = shares(model, DOCS)
    parts = {"piqa": right[:7], "small": right[3:9]}
    found = measured(model, ["outer"], folder)["tasks"]
    outer, inner = found["outer"], found["outer"]["subtasks"]["inner"]
    assert list(found) == ["outer"]
    assert inner["subtasks"] == {name: expected("acc", values) for name, values in parts.items()}
    assert (inner["metric"], inner["samples"]) == ("acc", 13)
    assert inner["value"] == pytest.approx(statistics.mean(right[:7] + right[3:9]))
    assert outer["value"] == pytest.approx(statistics.mean(right[:7] + right[3:9] + right))
    assert outer["stderr"] > 0
    assert outer["subtasks"]["both"] == expected("acc_norm", by_length)


def test_a_group_without_a_figure_is_its_parts(folder):
    found = measured(tiny("llama"), ["loose"], folder)["tasks"]
    assert list(found) == ["small", "inner"]
    assert list(found["inner"]["subtasks"]) == ["piqa", "small"]


def test_average_only_of_shares_of_right_answers():
    def figure(metric, value):
        return {"metric": metric, "value": value, "stderr": None, "samples": 1, "fewshot": 0}

    shares = {"a": figure("acc", 0.5), "b": figure("acc_norm", 0.25), "c": figure("exact_match,strict", 0.0)}
    assert average(shares) == 0.25
    assert average(shares | {"d": figure("word_perplexity", 20.0)}) is None
    assert average({}) is None


# examples shown before a question


def shown(docs, count):
    return "".join(f"{doc['ask']} {doc['choices'][doc['right']]}\n\n" for doc in docs[:count])


@pytest.mark.parametrize(("fewshot", "expected_shots"), [(None, 5), (2, 2)])
def test_mmlu_is_shown_five_examples_unless_told_otherwise(fewshot, expected_shots, folder):
    model = tiny("llama", seed=3)
    model.config.max_position_embeddings = 256  # rotary: the model itself knows no bound
    parts = measured(model, ["mmlu"], folder, fewshot=fewshot)["tasks"]["mmlu"]["subtasks"]
    context = shown(DOCS, expected_shots)
    assert parts["shown"] == expected("acc", shares(model, DOCS[5:], context)[0], expected_shots)
    assert parts["fixed"]["fewshot"] == 0


def test_a_task_shows_what_its_file_says(folder):
    names = ["drawn", "shown"]
    found = measured(tiny("llama"), names, folder, limit=3)["tasks"]
    assert [found[name]["fewshot"] for name in names] == [2, 0]
    found = measured(tiny("llama"), names, folder, limit=3, fewshot=1)["tasks"]
    assert [found[name]["fewshot"] for name in names] == [1, 1]


def test_all_models_are_asked_the_same(folder):
    tasks, asked = load_tasks(["drawn"], path=folder), []
    for model in (tiny("llama"), tiny("opt")):
        measure_tasks(model, tiny_tokenizer(), tasks)
        asked.append([one.args for one in tasks.items[0].instances])
    assert asked[0] == asked[1]
    assert len({context for context, _ in asked[0]}) == 8


# names


def test_a_name_in_the_directory_goes_before_lm_evals(folder):
    (task,) = load_tasks(["piqa"], path=folder).items
    assert [doc["ask"] for doc in task.eval_docs] == [doc["ask"] for doc in DOCS[:7]]


def test_names_are_taken_once_and_tags_are_all_their_tasks(folder):
    tasks = load_tasks(["small", "some", "small"], path=folder)
    assert [task.task_name for task in tasks.items] == ["small", "drawn"]


def test_lm_eval_knows_the_tasks_of_the_paper():
    catalogue = Catalogue(None)
    catalogue.require([*PAPER, "mmlu", "glue"])
    assert set(PAPER) <= set(catalogue._stock[0])


@pytest.mark.slow
def test_names_are_found_as_lm_eval_finds_them():
    catalogue = Catalogue(None)
    files, known, text = catalogue._stock
    index = catalogue._whole.task_index
    assert all(name in known or name in text for name in index)
    assert all(name in known for name, entry in index.items() if entry.kind.name != "TAG")
    assert {name for name in files if index[name].yaml_path.resolve() != files[name].resolve()} == set()


def test_the_example_can_be_asked(monkeypatch, tmp_path):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (task,) = load_tasks(["capitals"], path="examples/zero_shot_tasks").items
    assert [task.doc_to_choice(doc)[task.doc_to_target(doc)] for doc in task.eval_docs][:2] == ["Paris", "Tokyo"]


# what is left behind


def test_nothing_is_left_changed(folder):
    model, tokenizer = tiny("llama").train(), tiny_tokenizer()
    state, level = torch.get_rng_state(), logging.getLogger("lm_eval").level
    evaluate(model, tokenizer, evaluate=(), tasks=["both"], task_path=folder, limit=2)
    assert model.training
    assert not model._forward_hooks
    assert tokenizer.pad_token is None
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger("lm_eval").level == level


def test_progress_counts_questions(folder):
    seen = []
    measured(tiny("llama"), ["both", "written"], folder, notify=seen.append)
    done = [step.done for step in seen]
    assert {(step.stage, step.total) for step in seen} == {("tasks", 15)}
    assert done == sorted(done)
    assert done.count(15) == 1
    assert len(set(done)) > 5


@pytest.mark.parametrize("level", [logging.NOTSET, logging.WARNING])
def test_lm_eval_is_silent_unless_its_logger_has_a_level(level, folder, capfd):
    logger = logging.getLogger("lm_eval")
    logger.setLevel(level)
    try:
        measured(tiny("llama"), ["both"], folder, limit=2)
    finally:
        logger.setLevel(logging.NOTSET)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert ("Running loglikelihood" in shown.err) is (level != logging.NOTSET)
    assert bool(shown.err) is (level != logging.NOTSET)


# what a task cannot be asked with


def test_a_tokenizer_without_an_end_is_said_in_one_sentence(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token = None
    for name in ("both", "written"):
        with pytest.raises(InputError, match="no end-of-text token, which lm-eval needs"):
            evaluate(tiny("llama"), tokenizer, evaluate=(), tasks=[name], task_path=folder)


def test_a_task_that_writes_more_than_the_model_reads_is_said_in_one_sentence(folder, tmp_path):
    for file in folder.glob("written.*"):
        text = file.read_text().replace('"max_gen_toks": 3', '"max_gen_toks": 80').replace('"written"', '"long"')
        (tmp_path / file.name.replace("written", "long")).write_text(text)
    with pytest.raises(InputError, match="'long' lets the model write 80 tokens, and the model reads at most 64"):
        evaluate(tiny("llama"), tiny_tokenizer(), evaluate=(), tasks=["long"], task_path=tmp_path)


def test_a_question_with_tokens_that_the_model_lacks_is_said_in_one_sentence(folder):
    model = tiny("llama")
    model.resize_token_embeddings(20)
    with pytest.raises(InputError, match=r"token id \d+, and the model's embedding has 20 rows"):
        evaluate(model, tiny_tokenizer(), evaluate=(), tasks=["both"], task_path=folder)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


# the command


def test_two_models_side_by_side(place, folder, capfd, tmp_path):
    text, file = str(place / "text.txt"), tmp_path / "found.json"
    options = ["--evaluate", text, "--seqlen", 16, "--tasks", "both, inner", "--task-path", folder, "--json", file]
    assert run("evaluate", place / "out", "--baseline", place / "model", *options) == 0
    shown = capfd.readouterr()
    dense, compressed = (
        evaluate(
            model,
            tiny_tokenizer(),
            evaluate=[text],
            seqlen=16,
            tasks=["both", "inner"],
            task_path=folder,
            baseline=baseline,
        )
        for model, baseline in ((tiny("llama"), None), (sparlow.load(place / "out"), tiny("llama")))
    )
    assert dense != compressed
    compressed["agreement"] = {text: vars(compressed["agreement"][text])}
    baseline = {"model": str(place / "model"), **dense}
    assert json.loads(file.read_text()) == {
        "model": str(place / "out"),
        "seqlen": 16,
        **compressed,
        "in_domain": [text],
        "baseline": baseline,
    }
    lines, remark = shown.out.splitlines(), "(in-domain: same source as the calibration text)"
    assert lines[0].split() == ["model", "out"]
    for label, value in [
        (
            f"perplexity (seqlen 16), {text} {remark}",
            lambda found: f"{found['perplexity'][text]:.4f} ± {found['perplexity_stderr'][text]:.4f}",
        ),
        ("both, acc_norm", lambda found: "{value:.4f} ± {stderr:.4f}".format(**found["tasks"]["both"])),
        ("inner, acc", lambda found: "{value:.4f} ± {stderr:.4f}".format(**found["tasks"]["inner"])),
        ("average", lambda found: f"{found['average']:.4f}"),
    ]:
        row = f"{re.escape(label)} +{re.escape(value(dense))} +{re.escape(value(compressed))}"
        assert any(re.fullmatch(row, line) for line in lines), label
    assert len(lines) == 8  # three of the agreement
    told = [line.partition(" (")[0] for line in shown.err.splitlines()]  # without times
    names = [str(place / which) for which in ("model", "out")]
    assert told == [
        f"{stage}, {name}: {n} of {n}" for name in names for stage, n in (("perplexity, text.txt", 10), ("tasks", 24))
    ]


def test_names_are_shown_whole_where_they_end_alike_and_as_they_are(place, folder, capsys, tmp_path):
    for name in ("a[b]c", "[bold]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(place / "model")
    given = ["--evaluate", "", "--tasks", "small", "--task-path", folder, "--limit", 1]
    assert run("evaluate", tmp_path / "a[b]c" / "model", "--baseline", tmp_path / "[bold]" / "model", *given) == 0
    shown = capsys.readouterr()
    both = [str(tmp_path / name / "model") for name in ("[bold]", "a[b]c")]
    assert shown.out.splitlines()[0].split() == both
    assert [line.partition(" (")[0] for line in shown.err.splitlines()] == [f"tasks, {name}: 1 of 1" for name in both]


def test_debug_lets_lm_eval_speak(place, folder, capfd):
    given = ["--evaluate", "", "--tasks", "small", "--task-path", folder, "--limit", 1]
    try:
        assert run("evaluate", place / "model", *given, "--debug") == 0
    finally:
        logging.getLogger("lm_eval").setLevel(logging.NOTSET)
    assert "Running loglikelihood" in capfd.readouterr().err


def test_tasks_alone_need_no_window(place, folder, capsys, tmp_path):
    given = ["--evaluate", "", "--tasks", "both", "--task-path", folder, "--limit", 3, "--json", tmp_path / "a.json"]
    assert run("evaluate", place / "model", *given) == 0
    assert "perplexity" not in capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["perplexity"] == {}
    assert found["tasks"]["both"]["samples"] == 3


@pytest.fixture
def closed(monkeypatch, tmp_path_factory):
    """A wrong name must be told before any model is opened."""

    def refuse(*_, **__):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("sparlow.cli.evaluating.open_model", refuse)
    place = tmp_path_factory.mktemp("closed")
    (place / "config.json").write_text("{}")
    return place


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--tasks", "small,piqqa"], "There is no task 'piqqa'. Did you mean piqa"),
        (["--tasks", "python"], "runs code"),
        (["--tasks", ""], "No task is named"),
        (["--tasks", "small", "--fewshot", -1], "at least 0, not -1"),
        (["--tasks", "small", "--task-path", "nowhere"], "nowhere is not a directory"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_bad_names_are_told_before_the_model_is_opened(given, said, closed, folder, capsys):
    assert said in run_and_fail(capsys, "evaluate", closed, "--task-path", folder, *given)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "holds no task file"),
        ("task: [", "one.yaml cannot be read"),
        ("include: missing.yaml", "missing.yaml"),
        ("task: one\ndataset_path: nobody/nothing\ntest_split: test", "The task 'one' cannot be loaded"),
        ("task: one\ndataset_path: json\ndataset_kwargs: {data_files: {test: no.jsonl}}", "no.jsonl"),
    ],
    ids=["empty", "no YAML", "include", "no data set", "no file"],
)
def test_task_files_that_cannot_be_used(text, said, closed, capsys, tmp_path):
    if text is not None:
        (tmp_path / "one.yaml").write_text(text)
    assert said in run_and_fail(capsys, "evaluate", closed, "--tasks", "one", "--task-path", tmp_path)


@pytest.mark.parametrize("missing", ["lm_eval.tasks", "accelerate"])
def test_without_lm_eval_it_says_what_to_install(missing, closed, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    line = run_and_fail(capsys, "evaluate", closed, "--tasks", "both", "--task-path", folder)
    assert "pip install 'sparlow[eval]'" in line


@pytest.mark.parametrize("name", ["limit", "batch_size"])
def test_numbers_are_checked(name, folder):
    with pytest.raises(InputError, match=f"{name} must be at least 1, not 0"):
        measured(tiny("llama"), ["both"], folder, **{name: 0})
