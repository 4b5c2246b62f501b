"""How far a model agrees with the dense one: against a direct computation in float64, whole, by blocks, resumed."""

import copy
import json
import math
import statistics
from contextlib import contextmanager

import pytest
import torch

import sparlow
from families import VOCABULARY, save_tiny, tiny, tiny_tokenizer
from sparlow.cli.commands import main
from sparlow.evaluation.perplexity import Baseline, evaluate, measure, perplexity
from sparlow.model.forward import capture
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading.source import OpenedModel
from sparlow.model.loading.weights import InMemory
from sparlow.progress import Clock
from sparlow.recipe.recipe import Recipe
from sparlow.report.html_page import html
from sparlow.report.records import Agreement, Report
from sparlow.run.journal import read_record
from sparlow.run.passes import BlockwiseRunner

WINDOWS = torch.randint(2, 97, (7, 12), generator=torch.Generator().manual_seed(3))
TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(400))
PRUNE = Recipe(algorithm="magnitude", pattern="2:4", seqlen=16, calibration="builtin", samples=2)
ITSELF = Agreement(0.0, 0.0, 1.0, 0.0, 0.0)


def other(model, share=0.3):
    """A model whose blocks are somewhat other than those of ``model``."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in Decoder.of(changed).blocks.parameters():
            weight.add_(share * weight.std() * torch.randn(weight.shape, generator=generator))
    return changed


def by_hand(model, dense, windows):
    """One window and one prediction after the other, in float64."""
    divergences, same, differences = [], [], []
    for window in windows:
        with torch.no_grad():
            ours, theirs = (one.double()(window[None]).logits[0, :-1].log_softmax(-1) for one in (model, dense))
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1).mean().item())
        same.append((theirs.argmax(-1) == ours.argmax(-1)).double().mean().item())
        after = window[1:, None]
        differences.append((theirs.gather(1, after) - ours.gather(1, after)).mean().item())

    def error(values):
        return statistics.stdev(values) / math.sqrt(len(values))

    mean = statistics.mean
    return Agreement(mean(divergences), error(divergences), mean(same), mean(differences), error(differences))


def require_about(found, expected):
    for name, value in vars(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4, abs=2e-7), name


def compared(model, dense, windows=WINDOWS):
    return measure(model, windows, dense=Baseline(dense).on(windows))[0].agreement


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_the_figures_are_those_computed_by_hand(family):
    dense = tiny(family)
    found = compared(other(dense), dense)
    expected = by_hand(other(dense), copy.deepcopy(dense), WINDOWS)
    assert expected.divergence > 1e-4
    assert expected.same_first_choice < 1
    require_about(found, expected)


def test_a_model_agrees_with_itself():
    model = tiny("llama")
    assert compared(model, copy.deepcopy(model)) == ITSELF
    assert compared(model, copy.deepcopy(model), WINDOWS[:1]) == Agreement(0.0, None, 1.0, 0.0, None)


def test_the_difference_of_losses_is_that_of_the_perplexities():
    dense = tiny("llama")
    found = compared(other(dense), dense)
    ratio = perplexity(other(dense), WINDOWS).value / perplexity(dense, WINDOWS).value
    assert found.loss_difference == pytest.approx(math.log(ratio), abs=1e-6)


def test_logits_are_looked_at_in_pieces_of_any_size(monkeypatch):
    dense = tiny("llama")
    whole = compared(other(dense), dense)
    monkeypatch.setattr(capture, "LOGITS_AT_ONCE", 7 * 3 * VOCABULARY)  # of three tokens of each window
    monkeypatch.setattr("sparlow.evaluation.agreement.LOGITS_AT_ONCE", 16 * VOCABULARY)  # two rows at a time
    require_about(compared(other(dense), dense), whole)


def test_what_is_impossible_for_the_dense_model_adds_nothing():
    dense = tiny("opt")
    bias = torch.zeros(VOCABULARY)
    bias[5] = -math.inf
    masked = copy.deepcopy(dense)
    hook = lambda _module, _given, logits: logits + bias  # noqa: E731
    for model in (dense, masked):
        model.get_output_embeddings().register_forward_hook(hook)
    windows = WINDOWS.masked_fill(WINDOWS == 5, 6)
    assert compared(masked, dense, windows) == ITSELF


def test_models_that_cannot_be_compared():
    dense = tiny("llama")
    larger = tiny("llama")
    larger.resize_token_embeddings(VOCABULARY + 8)
    assert compared(larger, dense) is None
    alone = tiny("llama")
    norm, forward = alone.model.norm, alone.model.norm.forward
    norm.forward = lambda x: forward(x - x.mean(1, keepdim=True))  # looks at other tokens
    windows = torch.randint(2, 97, (3, 40), generator=torch.Generator().manual_seed(3))
    assert compared(alone, dense, windows) is None
    assert Baseline(alone).on(windows) is None
    assert measure(alone, windows, dense=Baseline(dense).on(windows))[0].perplexity == perplexity(alone, windows)


# A baseline of which the blocks are gone


def test_a_baseline_needs_its_blocks_only_once(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    dense = tiny("llama")
    model, text, words = other(dense), str(tmp_path / "text.txt"), tiny_tokenizer()
    expected = evaluate(model, words, evaluate=text, seqlen=16, baseline=tiny("llama"))
    assert expected["agreement"][text].divergence > 0
    baseline = Baseline(dense)
    assert evaluate(dense, words, evaluate=text, seqlen=16, baseline=baseline).keys() == {
        "perplexity",
        "perplexity_stderr",
    }
    assert baseline.release_blocks()
    assert all(p.is_meta for p in Decoder.of(dense).blocks.parameters())
    assert evaluate(model, words, evaluate=text, seqlen=16, baseline=baseline) == expected
    unseen = evaluate(model, words, evaluate=text, seqlen=8, baseline=baseline)
    assert unseen["agreement"] == {text: None}


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("dense")
    save_tiny("llama", place / "model")
    (place / "text.txt").write_text(TEXT)
    return place


def compressed(folder, out, **options):
    text = str(folder / "text.txt")
    return sparlow.compress(folder / "model", PRUNE, out=out, evaluate=[text], **options), text


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "out"
    return out, *compressed(folder, out)


def test_block_by_block_is_as_whole(done):
    out, report, text = done
    whole = evaluate(sparlow.load(out), tiny_tokenizer(), evaluate=text, seqlen=16, baseline=tiny("llama"))[
        "agreement"
    ][text]
    assert whole.divergence > 1e-4
    require_about(report.agreement[text], whole)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_the_states_may_wait_anywhere(offload, done, folder, tmp_path):
    assert compressed(folder, tmp_path / "out", offload=offload)[0].agreement == done[1].agreement


def test_in_place_is_as_in_a_directory(done, folder):
    model = tiny("llama")
    text = str(folder / "text.txt")
    report = sparlow.compress(model, PRUNE, tokenizer=tiny_tokenizer(), evaluate=[text], inplace=True)
    assert report.agreement == done[1].agreement


class Stop:
    def __init__(self, stage, at):
        self.stage, self.at = stage, at

    def __call__(self, step):
        if (step.stage, step.done) == (self.stage, self.at):
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [Stop("blocks", 1), Stop("compressed perplexity", 4)], ids=["blocks", "measuring"])
def test_a_resumed_run_finds_the_same(stop, done, folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compressed(folder, tmp_path / "out", notify=stop)
    report, _ = compressed(folder, tmp_path / "out")
    assert report.agreement == done[1].agreement
    assert Report.from_file(tmp_path / "out" / "report.json") == report


def test_what_is_on_record_is_in_the_report_and_on_the_page(done):
    out, report, text = done
    data = json.loads((out / "report.json").read_text())
    assert data["agreement"] == {text: vars(report.agreement[text])}
    assert list(read_record(out).agreement.values()) == [report.agreement[text]]
    page, found = html(report), report.agreement[text]
    assert f"divergence from the dense model, {text}" in page
    assert f"{found.divergence:.4f} ± {found.divergence_stderr:.4f}" in page
    assert f"{found.same_first_choice:.1%}" in page
    assert f"{found.loss_difference:+.4f} ± {found.loss_difference_stderr:.4f}" in page


def test_a_report_of_an_older_version_has_no_agreement(done, tmp_path):
    data = json.loads((done[0] / "report.json").read_text())
    del data["agreement"]
    (tmp_path / "report.json").write_text(json.dumps(data))
    report = Report.from_file(tmp_path / "report.json")
    assert report.agreement == {}
    assert "divergence" not in html(report)


# A compressed model whose head is another


class Changed(InMemory):
    """The same blocks behind another head, while that is asked for."""

    def __init__(self, model):
        super().__init__(Decoder.of(model).blocks, torch.float32)
        self.head = model.lm_head

    @contextmanager
    def outside_blocks(self, *, stored=False):  # noqa: ARG002 - as they are
        before = self.head.weight.detach().clone()
        self.head.weight.data = 0.5 * before
        yield
        self.head.weight.data = before


def test_the_dense_states_go_through_the_dense_head():
    model = tiny("llama").eval()
    opened = OpenedModel(model, None, "model", "", untouched=True)
    runner = BlockwiseRunner(opened, "cpu", Clock(), lambda _: None)
    runner.measure("dense", WINDOWS, opened.weights, keep=True)
    assert runner.measure("same", WINDOWS, opened.weights).agreement == ITSELF
    found = runner.measure("changed", WINDOWS, Changed(model)).agreement
    quieter = copy.deepcopy(model)
    quieter.lm_head.weight.data *= 0.5
    require_about(found, by_hand(quieter, copy.deepcopy(model), WINDOWS))
    assert found.divergence > 1e-4
    model.lm_head.weight.data *= 0.5  # for good: the dense head is gone
    assert runner.measure("lost", WINDOWS, opened.weights).agreement is None


# The command line


def test_evaluate_shows_and_writes_the_agreement(done, folder, tmp_path, capsys):
    out, report, text = done
    file, options = tmp_path / "found.json", ["--evaluate", text, "--seqlen", "16"]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(out), "--baseline", str(folder / "model"), *options, "--json", str(file)])
    assert not stop.value.code
    found = json.loads(file.read_text())
    require_about(Agreement(**found["agreement"][text]), report.agreement[text])
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("divergence"))
    assert line.split()[-4:] == ["–", f"{found['agreement'][text]['divergence']:.4f}", "±", line.split()[-1]]


def test_evaluate_says_where_two_models_cannot_be_compared(done, tmp_path, capsys):
    out, _, text = done
    model = tiny("llama")
    model.resize_token_embeddings(VOCABULARY + 8)
    model.save_pretrained(tmp_path / "larger")
    tiny_tokenizer().save_pretrained(tmp_path / "larger")
    with pytest.raises(SystemExit):
        main(["evaluate", str(out), "--baseline", str(tmp_path / "larger"), "--evaluate", text, "--seqlen", "16"])
    assert f"note: The agreement with {tmp_path / 'larger'} on {text} is not known" in capsys.readouterr().out
