"""Finished directories of sparlow without a solver: random S, U and V of any form in tiny models of any family."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coded import coded_layer, free, two_of_four
from families import tiny, tiny_tokenizer
from sparlow.model.artefact.checkpoint import CheckpointWriter
from sparlow.model.artefact.embedding import quantise
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.forward.compressible import compressible
from sparlow.model.forward.decoder import Decoder

VALUES = ("int8", "int4", "int3", "int2")


def random_layer(weight, *, values="model", pattern="2:4", rank=3, seed=0, **grid):
    """A compressed layer of the shape and with the bias of a weight."""
    if values in VALUES:
        options = {"pattern": pattern, "rank": rank, "dtype": weight.dtype, "bias": weight.bias, "seed": seed}
        return coded_layer(weight.shape, values, **options, **grid)
    generator = torch.Generator().manual_seed(seed)
    S = torch.randn(weight.shape, generator=generator) / 4
    if pattern != "dense":
        S *= {"2:4": two_of_four, "free": free}[pattern](weight.shape, seed)
    U, V = (
        torch.randn(weight.shape[0], rank, generator=generator),
        torch.randn(rank, weight.shape[1], generator=generator),
    )
    return SparseLowRankLinear(S.to(weight.dtype), (U / 8).to(weight.dtype), (V / 8).to(weight.dtype), weight.bias)


def write_result(
    folder,
    family="llama",
    *,
    dtype=torch.float32,
    ranks=(3,),
    embedding="keep",
    tokenizer=None,
    others=None,
    blocks=None,
    **form,
):
    """Write a directory as compress leaves it; return the model.

    Args:
        folder: Where to.
        family: Of families.py.
        dtype: Of the model.
        ranks: That the layers have in turn.
        embedding: keep, int8 or int4, of the head as well.
        tokenizer: A tiny one of one token a character if left out.
        blocks: As many, where one shows the same as three.
        others: What is different of layers whose names end so; None leaves them dense.
        form: Values, pattern, levels and group of all layers.
    """
    model = tiny(family, dtype=dtype, blocks=blocks)
    decoder = Decoder.of(model)
    count = 0
    for block in decoder.blocks:
        for name, weight in [*compressible(block).items()]:
            own = next((more for end, more in (others or {}).items() if name.endswith(end)), {})
            if own is not None:
                weight.put(random_layer(weight, rank=ranks[count % len(ranks)], seed=count, **(form | own)))
            count += 1
    if embedding != "keep":
        quantise(model, embedding, embedding)
    writer = CheckpointWriter(folder, model, decoder)
    for i, block in enumerate(decoder.blocks):
        writer.write_block(i, block)
    writer.write_rest(model)
    patterns = dict.fromkeys(compressed_layers(model), form.get("pattern", "2:4"))
    writer.finish(model, tokenizer or tiny_tokenizer(), patterns=patterns)
    (folder / "LICENSE").write_text("Free for all.")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "preprocessor_config.json").write_text("{}")
    return model


def logits(model, seed=0, tokens=24, vocabulary=128):
    ids = torch.randint(2, vocabulary, (2, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids).logits.float()


def byte_tokenizer():
    """A byte-level BPE tokenizer of less than 128 tokens, as published models have it: printable ASCII, few merges."""
    characters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("a", "n"), ("an", "d")]
    tokens = ["<s>", "</s>", *characters, *("".join(pair) for pair in merges)]
    found = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>")  # noqa: S106 - no secret
