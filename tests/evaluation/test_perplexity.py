import math
import statistics

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn import functional

import sparlow
from families import VOCABULARY, tiny, tiny_tokenizer
from sparlow.errors import InputError
from sparlow.evaluation.perplexity import Baseline, evaluate, measure, perplexity
from sparlow.evaluation.texts import require_tokenizer
from sparlow.model.forward import capture
from sparlow.model.forward.attention import TOKENS_AT_ONCE
from sparlow.recipe.recipe import Recipe
from sparlow.report.perplexities import shown
from waits import Counting

TEXT = "".join(chr(32 + (5 * i * i + i // 7) % 95) for i in range(700))


def by_hand(model, windows):
    """One window and one prediction after the other, in float64."""
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        log_p = [logits[i].log_softmax(-1)[window[i + 1]].item() for i in range(len(window) - 1)]
        losses.append(-sum(log_p) / len(log_p))
    return math.exp(sum(losses) / len(losses))


def tokens(windows, seqlen, seed=0):
    return torch.randint(2, 97, (windows, seqlen), generator=torch.Generator().manual_seed(seed))


def compressed():
    model = tiny("llama")
    recipe = Recipe(rank=4, options={"effort": 0.1, "max_steps": 10})
    sparlow.compress(model, recipe, calibration=tokens(8, 16), evaluate=(), inplace=True)
    return model


@pytest.fixture(scope="module", params=["dense", "compressed", "other family"])
def model(request):
    return {"dense": lambda: tiny("llama"), "compressed": compressed, "other family": lambda: tiny("opt")}[
        request.param
    ]()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.mark.parametrize(("windows", "seqlen"), [(5, 16), (1, 2), (3, 33)])
def test_perplexity_is_the_one_computed_by_hand(model, windows, seqlen):
    ids = tokens(windows, seqlen)
    assert perplexity(model, ids).value == pytest.approx(by_hand(model, ids), rel=1e-5)


@pytest.mark.parametrize("windows", [2, 9])
def test_the_standard_error_is_that_of_the_mean_over_windows_times_the_perplexity(windows):
    model, ids = tiny("llama"), tokens(windows, 16)
    found = perplexity(model, ids)
    losses = [math.log(by_hand(model, one[None])) for one in ids]
    error = statistics.stdev(losses) / math.sqrt(windows)
    assert found.stderr == pytest.approx(error * by_hand(model, ids), rel=1e-3)


def test_the_standard_error_of_a_single_window_is_unknown():
    assert perplexity(tiny("llama"), tokens(1, 16)).stderr is None


def test_windows_count_alike_in_batches_of_any_size():
    model, ids = tiny("llama"), tokens(7, 2)
    seen = []
    whole = perplexity(model, ids, seen.append).value
    assert seen == [7]
    longer = tokens(3, TOKENS_AT_ONCE // 2 + 1)  # one window at a time
    seen.clear()
    assert perplexity(model, longer, seen.append).value == pytest.approx(
        math.exp(sum(math.log(perplexity(model, one[None]).value) for one in longer) / 3), rel=1e-5
    )
    assert seen == [1, 1, 1]
    assert whole == pytest.approx(by_hand(model, ids), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_for_perplexity():
    model = tiny("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tokens(3, 16)).value == pytest.approx(VOCABULARY, rel=1e-6)


def test_a_model_that_is_sure_and_wrong_has_no_finite_perplexity():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    found = perplexity(model, tokens(3, 16))
    assert (found.value, found.stderr) == (math.inf, None)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = tiny("llama").train(training)
    model.model.layers[1].self_attn.attention_dropout = 0.5
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert perplexity(model, tokens(3, 16)) == perplexity(model, tokens(3, 16))  # no dropout
    assert model.training is training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_evaluate_cuts_the_text_as_documented(model, text):
    ids = torch.tensor(tiny_tokenizer()(TEXT).input_ids)
    windows = ids[: len(ids) // 24 * 24].view(-1, 24)
    assert len(windows) == 29
    found = evaluate(model, tiny_tokenizer(), evaluate=[text], seqlen=24)
    assert found == {
        "perplexity": {text: pytest.approx(by_hand(model, windows), rel=1e-5)},
        "perplexity_stderr": {text: measure(model, windows)[0].perplexity.stderr},
    }
    assert found["perplexity_stderr"][text] > 0
    few = evaluate(model, tiny_tokenizer(), evaluate=[text], seqlen=24, limit=2)
    assert few["perplexity"][text] == pytest.approx(by_hand(model, windows[:2]), rel=1e-5)
    assert few != found


def test_evaluate_takes_several_texts(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    both = evaluate(tiny("llama"), tiny_tokenizer(), evaluate=[text, str(other)], seqlen=24)["perplexity"]
    assert list(both) == [text, str(other)]
    assert both[text] != both[str(other)]
    assert evaluate(tiny("llama"), tiny_tokenizer(), evaluate=[], seqlen=24) == {
        "perplexity": {},
        "perplexity_stderr": {},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seqlen": 1}, "seqlen"),
        ({"seqlen": 65}, "at most 64 tokens"),
        ({"seqlen": 24, "limit": 0}, "limit"),
    ],
)
def test_text_that_gives_no_window(options, message, text):
    with pytest.raises(InputError, match=message):
        evaluate(tiny("llama"), tiny_tokenizer(), evaluate=[text], **options)


def test_a_text_shorter_than_a_window(tmp_path):
    (tmp_path / "short.txt").write_text(TEXT[:23])
    with pytest.raises(InputError, match="holds 23 tokens, one window needs 24"):
        evaluate(tiny("llama"), tiny_tokenizer(), evaluate=[str(tmp_path / "short.txt")], seqlen=24)


def test_a_missing_tokenizer_is_said_with_what_to_do():
    tokenizer = tiny_tokenizer()
    assert require_tokenizer(tokenizer, "model") is tokenizer
    with pytest.raises(InputError, match=r"my-model has no tokenizer\. Give token windows"):
        require_tokenizer(None, "my-model")


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "gpt2", "gemma3n_text", "opt"])
def test_logits_of_whole_windows_are_never_there_together(family, monkeypatch):
    model = tiny(family)
    windows = torch.randint(VOCABULARY, (6, 40), generator=torch.Generator().manual_seed(1))
    whole = perplexity(model, windows)
    monkeypatch.setattr(capture, "LOGITS_AT_ONCE", 6 * 7 * VOCABULARY)  # of seven tokens
    widths, real = [], functional.cross_entropy

    def seen(logits, *more, **options):
        widths.append(len(logits))
        return real(logits, *more, **options)

    head = model.get_output_embeddings()
    tokens = []
    hook = head.register_forward_hook(lambda _module, _given, logits: tokens.append(logits.shape[:-1].numel()))
    monkeypatch.setattr("sparlow.evaluation.perplexity.functional.cross_entropy", seen)
    found = perplexity(model, windows)
    hook.remove()
    assert max(tokens) <= 6 * 7
    assert max(widths) <= 6 * 7
    assert found.value == pytest.approx(whole.value, rel=1e-5)


def test_a_head_that_looks_at_other_tokens_is_given_all_of_them(monkeypatch):
    """What is behind the blocks of a model that is only measured may be anything."""
    model = tiny("llama")
    windows = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    norm = model.model.norm
    forward = norm.forward
    norm.forward = lambda x: forward(x - x.mean(1, keepdim=True))
    passed = []
    model.register_forward_hook(lambda _module, _given, output: passed.append(tuple(output.logits.shape[:2])))
    whole = perplexity(model, windows)
    assert passed == [(2, 40)]
    monkeypatch.setattr(capture, "LOGITS_AT_ONCE", 2 * 7 * VOCABULARY)
    passed.clear()
    assert perplexity(model, windows).value == pytest.approx(whole.value, rel=1e-6)
    assert passed[-2:] == [(1, 40)] * 2  # a window at a time, since less cannot be


# what windows begin with, and what a caller may give


def beginning_tokenizer():
    """The tiny tokenizer, which puts <s> before a text by itself."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def test_the_figure_with_bos_stands_beside_the_published_one(text):
    model = tiny("llama")
    found = evaluate(model, beginning_tokenizer(), evaluate=[text], seqlen=24)["perplexity"]
    assert list(found) == [text, f"{text}, with BOS"]
    ids = torch.tensor(tiny_tokenizer()(TEXT).input_ids)
    whole = torch.cat([torch.zeros(1, dtype=torch.int64), ids])
    assert found[text] == pytest.approx(by_hand(model, whole[: len(whole) // 24 * 24].view(-1, 24)), rel=1e-5)
    windows = ids[: len(ids) // 23 * 23].view(-1, 23)
    begun = torch.cat([torch.zeros(len(windows), 1, dtype=torch.int64), windows], 1)
    assert found[f"{text}, with BOS"] == pytest.approx(by_hand(model, begun), rel=1e-5)
    assert list(evaluate(model, tiny_tokenizer(), evaluate=[text], seqlen=24)["perplexity"]) == [text]


def test_the_figure_with_bos_is_shown_where_it_differs_by_more_than_two_per_cent():
    near, far = ({"a": 10.0, "a, with BOS": 10.0 * factor} for factor in (1.019, 0.97))
    assert shown([near]) == ["a"]
    assert shown([far]) == shown([near, far]) == ["a", "a, with BOS"]
    assert shown([{"a": math.inf, "a, with BOS": 3.0}]) == ["a", "a, with BOS"]


def test_tokens_beyond_the_embedding_are_named_with_both_numbers(text):
    model = tiny("llama")
    model.resize_token_embeddings(90)
    with pytest.raises(InputError, match=r"text.txt: token id 9\d is outside .* embedding has 90 rows"):
        evaluate(model, tiny_tokenizer(), evaluate=[text], seqlen=24)


def test_one_name_is_one_text_and_a_tokenizer_may_be_given_by_its_directory(text, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    expected = evaluate(tiny("llama"), tiny_tokenizer(), evaluate=[text], seqlen=24)
    assert evaluate(tiny("llama"), tmp_path, evaluate=text, seqlen=24) == expected
    assert evaluate(tiny("llama"), str(tmp_path), evaluate="", seqlen=24) == {
        "perplexity": {},
        "perplexity_stderr": {},
    }
    (tmp_path / "empty").mkdir()
    for wrong, message in [
        (tmp_path / "empty", "no tokenizer in"),
        (3, "cannot be given as a int. Give a tokenizer"),
        (None, "has no tokenizer"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate(tiny("llama"), wrong, evaluate=text, seqlen=24)
    with pytest.raises(InputError, match="cannot be given as 3"):
        evaluate(tiny("llama"), tmp_path, evaluate=[3], seqlen=24)


def test_logits_in_more_pieces_make_a_device_wait_no_longer(monkeypatch):
    model, windows = tiny("llama"), tokens(3, 33)
    dense = Baseline(tiny("llama", seed=1)).on(windows)
    waits = []
    for pieces in (2, 16):
        monkeypatch.setattr(capture, "LOGITS_AT_ONCE", VOCABULARY * 32 // pieces * len(windows))
        with Counting() as counting:
            measure(model, windows, dense=dense)
        waits.append(counting.waits)
    assert waits[0] == waits[1]
