import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, WhisperConfig, WhisperForConditionalGeneration

import sparlow
from families import BY_TEXT, EXTRAS, FAMILIES, STRUCTURES, save_tiny, tiny, tiny_tokenizer
from sparlow.errors import InputError
from sparlow.evaluation.perplexity import evaluate
from sparlow.model.forward.causality import require_causal
from sparlow.recipe.recipe import Recipe

WINDOWS = torch.randint(2, 97, (4, 16), generator=torch.Generator().manual_seed(1))
RECIPE = Recipe(algorithm="magnitude", pattern="2:4", samples=4, seqlen=16)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def encoder(kind, *, is_decoder=False):
    config = AutoConfig.for_model(kind, vocab_size=128, is_decoder=is_decoder, pad_token_id=1, **SIZES)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_an_encoder_is_refused_before_any_work(kind, tmp_path):
    encoder(kind).save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="is no causal language model: the last token of a text changes"):
        sparlow.compress(tmp_path / "dense", RECIPE, calibration=WINDOWS, out=tmp_path / "out", evaluate=())
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_encoder_is_refused_as_an_object_and_by_evaluate():
    for work in (
        lambda model: sparlow.compress(model, RECIPE, calibration=WINDOWS, evaluate=(), inplace=True),
        lambda model: evaluate(model, tiny_tokenizer(), seqlen=16),
    ):
        with pytest.raises(InputError, match="is no causal language model"):
            work(encoder("bert"))


def test_an_encoder_with_a_mask_of_a_decoder_is_none():
    report = sparlow.compress(encoder("bert", is_decoder=True), RECIPE, calibration=WINDOWS, evaluate=(), inplace=True)
    assert report.layers


def test_an_encoder_with_a_decoder_is_refused_by_its_config(tmp_path):
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8, "max_source_positions": 16}
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = WhisperConfig(vocab_size=128, max_target_positions=64, **sizes, **heads, **tokens)
    WhisperForConditionalGeneration(config).save_pretrained(tmp_path)
    for work in (
        lambda: sparlow.compress(tmp_path, RECIPE, calibration=WINDOWS, evaluate=(), out=tmp_path / "out"),
        lambda: sparlow.plan(tmp_path, RECIPE, timed=False, evaluate=()),
    ):
        with pytest.raises(InputError, match=r"an encoder with a decoder \(whisper\)"):
            work()


@pytest.mark.parametrize("family", FAMILIES + EXTRAS + BY_TEXT + STRUCTURES)
def test_no_causal_model_is_refused(family, monkeypatch):
    ran = []
    monkeypatch.setattr("sparlow.model.forward.causality.ROUNDING", 1e-5)  # well within
    model = tiny(family)
    model.register_forward_hook(lambda *_: ran.append(1))
    require_causal(model, family)
    assert ran  # and did not fail on the way
    require_causal(model, family, first_block=True)


def test_a_causal_model_in_half_precision_is_not_refused(tmp_path):
    save_tiny("mixtral", tmp_path, dtype=torch.bfloat16)
    require_causal(tiny("mixtral", dtype=torch.bfloat16), "it")
