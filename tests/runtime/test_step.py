"""A token through all blocks in one call: the model's own logits and tokens, or the model's own pass."""

import copy
import logging
import pickle

import pytest
import torch
from transformers import GenerationConfig

import sparlow
from families import tiny
from runnable import write
from sparlow.errors import InputError
from sparlow.runtime.anatomy import UnlikeError
from sparlow.runtime.build import PATHS, NoKernelError, library
from sparlow.runtime.cache import StepCache
from sparlow.runtime.product import forced
from sparlow.runtime.step import Step
from sparlow.runtime.stepping import leave_step, use_step

try:
    HERE = library().paths
except NoKernelError as problem:
    pytest.skip(str(problem), allow_module_level=True)

KNOWN = ("llama", "mistral", "qwen2", "qwen3")
BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the largest logit
path = pytest.mark.parametrize(
    "path",
    [pytest.param(name, marks=[] if name in HERE else pytest.mark.skip(reason=f"no {name} here")) for name in PATHS],
)


def ids(texts=1, tokens=24, seed=3):
    return torch.randint(2, 97, (texts, tokens), generator=torch.Generator().manual_seed(seed))


def teacher_forced(model, tokens, begin=4):
    """The logits behind each token from ``begin`` on, by steps."""
    step = Step(model)
    cache = step.cache()
    with torch.no_grad():
        model(tokens[:, :begin], past_key_values=cache, use_cache=True)
    return torch.stack([step(tokens[:, i : i + 1], cache) for i in range(begin, tokens.shape[1])], dim=1)


def own(model, tokens, begin=4):
    with torch.no_grad():
        return model(tokens).logits[:, begin:].float()


def close(found, right, dtype=torch.float32):
    return (found - right).abs().max() <= BOUND[dtype] * right.abs().max()


def made(model, tokens, **options):
    return model.generate(tokens, **{"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0} | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", KNOWN)
def test_dense_models_have_their_own_logits(family, dtype):
    model = tiny(family, dtype=dtype)
    tokens = ids(tokens=8 if family == "mistral" else 24)  # which sees eight
    assert close(teacher_forced(model, tokens), own(model, tokens), dtype)


@path
@pytest.mark.parametrize("texts", [1, 3, 8])
def test_every_path_has_the_models_own_logits(path, texts):
    model = tiny("qwen3")
    with forced(path):
        assert close(teacher_forced(model, ids(texts)), own(model, ids(texts)))


@pytest.mark.parametrize(("mode", "activations"), [("packed", "float"), ("packed", "int8"), ("dense", "float")])
def test_compressed_models_have_their_own_logits(mode, activations, tmp_path):
    folder = write(tmp_path, "llama", ("int8", "int8"))
    model = sparlow.load(folder, mode=mode, activations=activations)
    tokens = ids(tokens=12)
    right = torch.cat([own(model, tokens[:, :n], n - 1) for n in range(5, 13)], dim=1)
    assert close(teacher_forced(model, tokens), right, torch.bfloat16 if activations == "int8" else torch.float32)


def test_large_inputs_that_rounding_spoils_hide_no_structure(folder):
    found = {}
    for activations in ("float", "int8"):
        model = sparlow.load(folder, mode="packed", activations=activations)
        with torch.no_grad():
            for block in model.model.layers:
                block.input_layernorm.weight[3] = 1e3  # its neighbours become zeros
        found[activations] = teacher_forced(model, ids(tokens=8))  # or there is no step
    assert not close(found["int8"], found["float"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), "llama", ("int8", "int8"))


@pytest.fixture
def pair(folder):
    """A packed model that steps, what it did, and the same model by transformers."""
    model = sparlow.load(folder, mode="packed", step="kernel")
    return model, model.forward.stepping, sparlow.load(folder, mode="packed")


@pytest.mark.transformers
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.7, "top_k": 5}, {"repetition_penalty": 1.3}],
    ids=["greedy", "beams", "sampled", "penalised"],
)
def test_generate_gives_the_same_tokens(pair, options):
    model, stepping, other = pair
    found = []
    for one in (model, other):
        torch.manual_seed(0)
        found.append(made(one, ids(2, 5), **options))
    assert torch.equal(*found)
    assert stepping.steps == 9


def test_a_generation_config_is_followed(pair):
    model, stepping, other = pair
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(*(m.generate(ids(), generation_config=config) for m in (model, other)))
    assert stepping.steps == 5
    model.generate(ids(), generation_config=config, use_cache=False)
    assert stepping.steps == 5


def test_what_a_step_cannot_do_the_model_does(pair):
    model, stepping, other = pair
    tokens, mask = ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    assert torch.equal(*(made(m, tokens, attention_mask=mask) for m in (model, other)))
    assert stepping.steps == 0
    assert torch.equal(*(made(m, ids(9, 4)) for m in (model, other)))  # more texts than the kernel takes
    assert stepping.steps == 0
    whole = made(model, tokens, output_hidden_states=True, return_dict_in_generate=True)
    assert len(whole.hidden_states) == 10
    assert stepping.steps == 0


def test_beyond_the_context_the_model_goes_on_from_the_same_cache(pair):
    model, stepping, other = pair
    assert torch.equal(*(made(m, ids(1, 60), max_new_tokens=12) for m in (model, other)))
    assert stepping.steps == 4  # positions 60 to 63 of 64


def test_a_window_is_not_stepped_over():
    model, other = tiny("mistral"), tiny("mistral")
    stepping = use_step(model)
    assert torch.equal(*(made(m, ids(1, 4)) for m in (model, other)))
    assert stepping.steps == 4  # positions 4 to 7; from 8 on a token does not see the first


def test_changed_weights_are_seen(pair):
    model, _, other = pair
    before = made(model, ids())
    for one in (model, other):
        with torch.no_grad():
            one.model.norm.weight.neg_()
    assert torch.equal(made(model, ids()), made(other, ids()))
    assert not torch.equal(made(model, ids()), before)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granite", "phi3", "mixtral", "stablelm", "olmo2", "opt"])
def test_other_structures_are_left_to_transformers_and_that_is_said_once(family, caplog):
    model, other = tiny(family), tiny(family)
    stepping = use_step(model)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(*(made(m, ids()) for m in (model, other)))
        made(model, ids())
    assert caplog.text.count("Each token is computed by transformers, not in one call of the kernel: ") == 1
    assert stepping.why_not
    assert stepping.steps == 0


def test_a_model_that_does_something_else_with_the_same_parts_is_refused():
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.forward, before = (
        lambda *a, **k: tuple(2 * t if t is not None else t for t in before(*a, **k)),
        attention.forward,
    )
    with pytest.raises(UnlikeError, match=r"computes something else than what its structure shows"):
        Step(model)


def test_it_can_be_left_copied_and_pickled(pair):
    model, _, other = pair
    right = made(other, ids())
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own
        assert one.forward.stepping.model is one
        assert torch.equal(made(one, ids()), right)
        assert one.forward.stepping.steps == 9
    leave_step(model)
    assert torch.equal(made(model, ids()), right)


def test_a_cache_grows_is_cropped_and_reordered_as_transformers_do():
    from transformers import DynamicCache

    caches = StepCache(1), DynamicCache()
    generator = torch.Generator().manual_seed(0)
    for tokens in (5, 1, 300, 1):
        new = torch.randn(2, 3, tokens, 4, generator=generator)
        assert all(map(torch.equal, *(cache.update(new, -new, 0) for cache in caches)))
    for cache in caches:
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([1, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
    assert [cache.get_seq_length() for cache in caches] == [304, 304]
    assert torch.equal(*(cache.layers[0].values for cache in caches))
    new = torch.randn(2, 3, 1, 4, generator=generator)
    assert all(map(torch.equal, *(cache.update(new, -new, 0) for cache in caches)))


def test_a_step_that_is_none_is_refused(folder):
    with pytest.raises(InputError, match=r"There is no step 'fast'. Choose one of: transformers, kernel"):
        sparlow.load(folder, step="fast")
