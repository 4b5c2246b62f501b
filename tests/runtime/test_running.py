"""``sparlow generate``: the model's own tokens as text, in every mode, and how long they took."""

import re
import shutil

import pytest
import torch
from transformers import AutoTokenizer

import sparlow
from families import save_tiny
from runnable import write
from sparlow.cli.commands import main
from sparlow.runtime.build import NoKernelError, library
from sparlow.runtime.options import RunningOptions, TextOptions
from sparlow.runtime.packed import PackedLinear
from sparlow.runtime.running import open_to_run, stream

try:
    library()
except NoKernelError as problem:
    pytest.skip(str(problem), allow_module_level=True)

PROMPT = "Hello there"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), "llama", ("int8", "int8"))


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(["generate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def own_text(folder, **options):
    model, tokenizer = sparlow.load(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=12, pad_token_id=1, **options)[0, ids.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.parametrize("options", [[], ["--mode", "merged"], ["--mode", "dense", "--step", "transformers"]])
def test_every_mode_writes_the_models_own_text(options, folder, capsys):
    code, out, err = said(capsys, folder, "--prompt", PROMPT, "--max-tokens", 12, *options)
    assert (code, out) == (0, own_text(folder, do_sample=False) + "\n")
    assert re.search(r"\d+ tokens: \d+\.\d\d s to the first, then \d+\.\d tokens a second\n$", err)


def test_a_dense_model_runs_too(tmp_path, capsys):
    save_tiny("gpt2", tmp_path)
    code, out, err = said(capsys, tmp_path, "--prompt", PROMPT, "--max-tokens", 3)
    assert code == 0
    assert out
    assert "tokens a second" in err
    code, _, err = said(capsys, tmp_path, "--prompt", PROMPT, "--mode", "packed")
    assert code == 2
    assert "is not compressed, so it cannot be opened packed. Leave out --mode." in " ".join(err.split())


def test_what_is_drawn_follows_the_seed_and_leaves_the_generator_alone(folder):
    found = []
    before = torch.get_rng_state()
    for seed in (1, 1, 2):
        text = TextOptions(max_tokens=12, temperature=1.5, seed=seed)
        running, letters = open_to_run(str(folder), RunningOptions()), []
        clock = stream(running, PROMPT, text, letters.append)
        assert any(isinstance(module, PackedLinear) for module in running.model.modules())
        assert running.stepping.steps == len(clock.stamps) - 1
        found.append("".join(letters))
    assert found[0] == found[1] != found[2]
    assert torch.equal(before, torch.get_rng_state())


def test_a_template_that_is_left_unused_is_named(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "chats")
    (tmp_path / "chats" / "chat_template.jinja").write_text("{{ 'Q: ' + messages[0]['content'] + ' A: ' }}")
    for words, named in (([], True), (["--chat"], False)):
        code, _, err = said(capsys, tmp_path / "chats", "--prompt", PROMPT, "--max-tokens", 3, *words)
        assert code == 0
        assert ("has a template for chats, which --chat uses." in " ".join(err.split())) == named


def test_chat_uses_the_template(folder, capsys):
    code, _, err = said(capsys, folder, "--prompt", PROMPT, "--chat")
    assert code == 2
    assert "The model's tokenizer has no chat template. Leave out --chat." in " ".join(err.split())
    running = open_to_run(str(folder), RunningOptions())
    running.tokenizer.chat_template = "{{ 'Q: ' + messages[0]['content'] + ' A: ' }}"
    letters, plain = [], []
    stream(running, PROMPT, TextOptions(chat=True, max_tokens=8), letters.append)
    stream(running, f"Q: {PROMPT} A: ", TextOptions(max_tokens=8), plain.append)
    assert letters == plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "The prompt holds no token. Give --prompt some text."),
        (["--prompt", "a" * 80], "The prompt has 80 tokens, and the model reads 64. Give a shorter one."),
        (["--prompt", "a", "--top-p", "0.5"], "--top-p has no effect without --temperature. Add it, or leave --top-p"),
        (["--prompt", "a", "--mode", "fast"], "There is no mode 'fast'. Choose one of: dense, packed, merged, auto."),
        (["--prompt", "a", "--temperature", "-1"], "must be a number that is not negative"),
    ],
)
def test_what_cannot_be_asked_for(arguments, message, folder, capsys):
    code, out, err = said(capsys, folder, *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())


def test_a_compressed_model_without_a_tokenizer_opens_and_its_text_is_refused(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    running = open_to_run(str(bare), RunningOptions())
    assert running.tokenizer is None
    with pytest.raises(sparlow.InputError, match="tokenizer"):
        stream(running, PROMPT, TextOptions(), print)
