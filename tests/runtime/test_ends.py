"""The embedding and the output head in codes, packed: tied or not, the same answers, and what models are used for."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparlow
from runnable import write
from sparlow.errors import InputError
from sparlow.runtime.build import NoKernelError, library
from sparlow.runtime.ends import PackedEmbedding
from sparlow.runtime.packed import PackedLinear

try:
    library()
except NoKernelError as problem:
    pytest.skip(str(problem), allow_module_level=True)

IDS = torch.randint(2, 97, (2, 7), generator=torch.Generator().manual_seed(1))
BOUND = {torch.float32: 1e-5, torch.bfloat16: 0.06}  # of the largest logit; dense mode in bfloat16 is itself 0.03 off


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits.float()


def close(found, right, dtype=torch.float32):
    return (found - right).abs().max() <= BOUND[dtype] * right.abs().max()


def ends_of(model):
    return model.get_input_embeddings(), model.get_output_embeddings()


CASES = {
    "untied": ("llama", ("int8", "int4"), torch.float32),
    "tied": ("gpt2", ("int8", "int8"), torch.float32),
    "tied, padded": ("opt", ("int4", "int4"), torch.float32),
    "bfloat16": ("qwen2", ("int4", "int8"), torch.bfloat16),
}
TIED = ("tied", "tied, padded")


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    family, ends, dtype = CASES[request.param]
    folder = write(tmp_path_factory.mktemp("model"), family, ends, dtype=dtype, group=8)
    return request.param, folder, dtype


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tied"), "gpt2", ("int8", "int8"))


def test_the_ends_stay_packed_and_answer_as_dense(case):
    name, folder, dtype = case
    dense, packed = sparlow.load(folder), sparlow.load(folder, mode="packed")
    embedding, head = ends_of(packed)
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert (embedding.packed is head.packed) == (name in TIED)
    assert torch.equal(embedding(IDS), dense.get_input_embeddings()(IDS))
    assert embedding(IDS).dtype == dtype
    assert torch.equal(embedding.weight, dense.get_input_embeddings().weight)
    assert close(logits(packed), logits(dense), dtype)
    assert not any("embed" in name or "head" in name for name, _ in packed.named_parameters() if "pos" not in name)


def test_generate_gives_the_same_tokens(tied):
    dense, packed = sparlow.load(tied), sparlow.load(tied, mode="packed")
    made = [m.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (dense, packed)]
    assert made[0].shape == (2, 15)
    assert torch.equal(*made)


@pytest.mark.parametrize("mode", ["packed", "dense", "merged"])
def test_what_is_saved_packed_opens_in_every_mode(case, mode, tmp_path):
    _, folder, dtype = case
    packed = sparlow.load(folder, mode="packed")
    packed.save_pretrained(tmp_path)
    with sparlow.mode(mode):
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(ends_of(again)[0], PackedEmbedding) == (mode == "packed")
    assert close(logits(again), logits(packed), dtype)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * sum(
        file.stat().st_size for file in folder.glob("*.safetensors")
    )


def test_copies_share_what_is_stored_and_pickles_keep_it_tied(tied):
    packed = sparlow.load(tied, mode="packed")
    other = copy.deepcopy(packed)
    assert ends_of(other)[0].packed is ends_of(packed)[1].packed
    again = pickle.loads(pickle.dumps(packed))  # noqa: S301 - our own
    assert ends_of(again)[0].packed is ends_of(again)[1].packed
    for model in (other, again):
        assert torch.equal(logits(model), logits(packed))


def test_a_state_dict_has_both_names_and_is_taken_back(tied):
    packed = sparlow.load(tied, mode="packed")
    state = {name: t.clone() for name, t in packed.state_dict().items()}
    assert torch.equal(state["transformer.wte.weight"], state["lm_head.weight"])
    assert state["lm_head.weight"].dtype == torch.uint8
    other = sparlow.load(tied, mode="packed")
    embedding = ends_of(other)[0]
    embedding._take(
        {part: torch.zeros_like(t) if part == "scale" else t for part, t in embedding.packed.tensors.items()}
    )
    assert not torch.equal(logits(other), logits(packed))
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(packed))


def test_casts_change_the_type_of_the_result_only(tied):
    packed = sparlow.load(tied, mode="packed")
    embedding = ends_of(packed)[0]
    right = embedding(IDS)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16):
        torch.nn.Module.to(packed, dtype)  # transformers refuses it for what is quantised
        assert torch.equal(embedding(IDS), right.to(dtype))
    assert packed(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["packed", "merged"])
def test_what_rounds_the_embedding_in_its_class_stays_in_floats(mode, tmp_path):
    folder = write(tmp_path, "gemma2", ("int8", "int8"), group=8)  # its embedding is multiplied by a number
    dense, opened = sparlow.load(folder), sparlow.load(folder, mode=mode)
    plain = type(dense.get_input_embeddings()) is torch.nn.Embedding
    assert isinstance(ends_of(opened)[0], PackedEmbedding) == (plain and mode == "packed")
    assert close(logits(opened), logits(dense))


def test_an_embedding_alone_and_a_head_alone(tmp_path):
    for ends in (("int8", "keep"), ("keep", "int4")):
        folder = write(tmp_path / "-".join(ends), "llama", ends, group=8)
        dense, packed = sparlow.load(folder), sparlow.load(folder, mode="packed")
        assert [isinstance(end, PackedEmbedding | PackedLinear) for end in ends_of(packed)] == [
            end != "keep" for end in ends
        ]
        assert close(logits(packed), logits(dense))


def test_a_model_without_its_head_is_opened_packed(tied):
    from transformers import AutoModel

    with sparlow.mode("packed"):
        body = AutoModel.from_pretrained(tied)
    assert isinstance(body.get_input_embeddings(), PackedEmbedding)
    right = sparlow.load(tied)(IDS, output_hidden_states=True).hidden_states[-1]
    assert (body(IDS).last_hidden_state - right).abs().max() <= 1e-5 * right.abs().max()


def test_a_packed_embedding_is_one_operator_to_torch_compile(tied):
    embedding = ends_of(sparlow.load(tied, mode="packed"))[0]
    assert torch.equal(torch.compile(embedding, backend="eager", fullgraph=True)(IDS), embedding(IDS))


def test_what_cannot_be_done_says_so(tied):
    packed = sparlow.load(tied, mode="packed")
    with pytest.raises(InputError, match=r"^A packed embedding cannot be resized. Open the model with mode='dense'"):
        packed.resize_token_embeddings(200)
    for bad in (128, -1):
        with pytest.raises(InputError, match=r"A token id is not in the vocabulary.*ids go up to 127"):
            packed(torch.tensor([[3, bad]]))
    packed.tie_weights()  # nothing is left to tie
    assert ends_of(packed)[0].packed is ends_of(packed)[1].packed


def test_dequantize_gives_plain_ends_tied_as_they_were(case):
    what, folder, dtype = case
    model = sparlow.load(folder, mode="packed")
    right = logits(model)
    plain = model.dequantize()
    embedding, head = ends_of(plain)
    assert (type(embedding), type(head)) == (torch.nn.Embedding, torch.nn.Linear)
    assert (embedding.weight is head.weight) == (what in TIED)
    assert close(logits(plain), right, dtype)
