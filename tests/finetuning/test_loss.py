"""The loss of fine-tuning in pieces beside the model's own: the same value and gradient, and never many logits."""

import copy

import pytest
import torch
from torch.nn import functional

from families import VOCABULARY, tiny

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from sparlow.evaluation.perplexity import perplexity  # noqa: E402
from sparlow.finetuning.loss import is_own_loss, loss_in_pieces, needs_pieces  # noqa: E402
from sparlow.finetuning.options import FinetuneOptions  # noqa: E402
from sparlow.finetuning.trainer import train  # noqa: E402 - after what they need is known to be there
from sparlow.model.forward import capture  # noqa: E402
from sparlow.model.forward.decoder import output_head  # noqa: E402
from sparlow.model.training.logit_pieces import PIECES  # noqa: E402
from sparlow.text.answers import IGNORED  # noqa: E402

IDS = torch.randint(2, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))


def labels_of(ids):
    """As of chats: questions, and what is filled up behind the end, are not learnt."""
    labels = ids.clone()
    labels[0, :9] = labels[1, 12:] = IGNORED
    return labels


@pytest.fixture(autouse=True)
def few_logits(monkeypatch):
    """Room for four tokens of three windows."""
    monkeypatch.setattr(capture, "LOGITS_AT_ONCE", VOCABULARY * 3 * 4 * PIECES)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "bloom", "mixtral"])
def test_value_and_gradient_are_those_of_the_models_own_loss(family):
    model, labels = tiny(family).eval(), labels_of(IDS)
    mask = torch.ones_like(IDS)
    mask[1, 12:] = 0
    head = {id(p) for p in output_head(model).parameters()}  # it may be that of the embedding, too
    assert needs_pieces(model, IDS)
    assert is_own_loss(model, IDS)
    widest = []
    output_head(model).register_forward_hook(lambda _module, _given, logits: widest.append(logits.numel()))
    blocks = [p for name, p in model.named_parameters() if ".0." in name and id(p) not in head]
    model.requires_grad_(requires_grad=False)
    for p in blocks:
        p.requires_grad_()
    count = (labels[:, 1:] != IGNORED).sum()
    found = loss_in_pieces(model, IDS, labels, {"attention_mask": mask}, count)
    own = gradients(model, found)
    assert max(widest) == VOCABULARY * 3 * 4
    whole = model(IDS, labels=labels, attention_mask=mask).loss
    assert found.item() == pytest.approx(whole.item(), rel=1e-6)
    expected = gradients(model, whole)
    assert own.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-7)


def test_without_gradients_there_is_the_value_alone():
    model = tiny("llama").eval()
    with torch.no_grad():
        found = loss_in_pieces(model, IDS, IDS, {}, 3 * 16)
        assert found.item() == pytest.approx(model(IDS, labels=IDS).loss.item(), rel=1e-6)
    assert not found.requires_grad


def test_a_loss_with_a_term_of_its_own_is_taken_as_a_whole():
    model = tiny("mixtral")
    assert is_own_loss(model, IDS)
    model.config.output_router_logits = True  # adds a term for the balance of experts
    assert not is_own_loss(model, IDS)


def test_a_config_that_asks_for_more_than_logits_is_no_hindrance_to_pieces():
    model = tiny("mixtral")
    expected = perplexity(model, IDS)
    model.config.output_router_logits = True
    assert perplexity(model, IDS).value == expected.value
    assert model.config.output_router_logits


def test_few_logits_are_taken_as_a_whole(monkeypatch):
    monkeypatch.undo()
    assert not needs_pieces(tiny("llama"), IDS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_ends_where_whole_logits_lead(checkpointing, tmp_path, monkeypatch):
    plan = FinetuneOptions(steps=3, lr=1e-2, batch=3, accumulate=2, gradient_checkpointing=checkpointing)
    examples = [{"input_ids": ids, "labels": labels} for ids, labels in zip(IDS, labels_of(IDS), strict=True)] * 4
    start = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    widest, losses, trained = [], {}, {}
    for way in ("pieces", "whole"):
        if way == "whole":
            monkeypatch.undo()
        model = copy.deepcopy(start)
        widest.clear()
        head = output_head(model.get_base_model())
        head.register_forward_hook(lambda _module, _given, logits: widest.append(logits.numel()))
        losses[way] = train(model, examples, plan, tmp_path / way)
        trained[way] = {name: p for name, p in model.named_parameters() if "lora" in name}
        assert (max(widest) == VOCABULARY * 3 * 17) == (way == "whole")
    assert losses["pieces"] == pytest.approx(losses["whole"], rel=1e-5)
    moved = [functional.mse_loss(p, start.get_parameter(name)).sqrt() for name, p in trained["whole"].items()]
    assert min(moved) > 1e-3
    for name, p in trained["whole"].items():
        torch.testing.assert_close(trained["pieces"][name], p, rtol=1e-3, atol=1e-5)
