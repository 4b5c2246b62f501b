"""``generate`` by the step alone: the tokens of transformers' own loop, and only where nothing else is asked for."""

import pytest
import torch
from transformers import GenerationConfig

import sparlow
from runnable import write
from sparlow.runtime.build import NoKernelError, library
from sparlow.runtime.greedy import greedy

try:
    library()
except NoKernelError as problem:
    pytest.skip(str(problem), allow_module_level=True)

IDS = torch.randint(2, 97, (3, 5), generator=torch.Generator().manual_seed(3))


class Heard:
    def __init__(self):
        self.said = []

    def put(self, tokens):
        self.said.append(tokens.tolist())

    def end(self):
        self.said.append("end")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("model"), "llama", ("int8", "int8"))
    return sparlow.load(folder, mode="packed", step="kernel"), sparlow.load(folder, mode="packed")


@pytest.mark.transformers
@pytest.mark.parametrize("least", [0, 8])
@pytest.mark.parametrize("texts", [1, 3])
def test_texts_end_where_they_end_in_transformers(pair, texts, least):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "min_new_tokens": least or None}
    stepping, other = pair
    free = other.generate(IDS[:texts], **options | {"eos_token_id": None})
    ends = [int(free[0, 8]), int(free[-1, 10])]  # the first text ends before the last one
    found, right = (model.generate(IDS[:texts], **options, eos_token_id=ends) for model in pair)
    assert torch.equal(found, right)
    assert greedy(stepping, (IDS[:texts],), options | {"eos_token_id": ends}) is not None


def test_a_streamer_hears_what_it_hears_from_transformers(pair):
    heard = [Heard(), Heard()]
    for model, streamer in zip(pair, heard, strict=True):
        model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, streamer=streamer)
    assert heard[0].said == heard[1].said
    assert len(heard[0].said) == 6


@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": True},
        {"num_beams": 2},
        {"repetition_penalty": 1.1},
        {"return_dict_in_generate": True},
        {"logits_processor": []},
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])},
        {"max_new_tokens": None},
        {"generation_config": GenerationConfig(no_repeat_ngram_size=2, max_new_tokens=3)},
        {"use_cache": False},
        {"output_hidden_states": True},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_whatever_else_is_asked_for_is_left_to_transformers(pair, asked):
    model = pair[0]
    assert greedy(model, (IDS[:1],), {"max_new_tokens": 3}) is not None
    assert greedy(model, (IDS[:1],), {"max_new_tokens": 3} | asked) is None


def test_fields_that_change_nothing_keep_it(pair):
    asked = {"max_new_tokens": 3, "num_beams": 1, "repetition_penalty": 1.0, "temperature": 0.3, "output_scores": False}
    assert greedy(pair[0], (IDS[:1],), asked) is not None
    assert greedy(pair[0], (), asked | {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}) is not None


def test_what_looks_like_padding_is_left_to_transformers(pair):
    assert greedy(pair[0], (IDS,), {"max_new_tokens": 3, "pad_token_id": int(IDS[0, 0])}) is None
