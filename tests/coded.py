"""Weights on a grid without a solver: random codes, decoded and rounded as a solver leaves them."""

import itertools
import json

import torch
from transformers import AutoModelForCausalLM

import sparlow
from families import save_tiny, tiny_tokenizer
from sparlow.linalg.grid import FactorScales, GridValues, make_grid
from sparlow.model.artefact.checkpoint import CheckpointWriter
from sparlow.model.artefact.checksums import small_sums
from sparlow.model.artefact.embedding import quantise
from sparlow.model.artefact.layers import SparseLowRankLinear, compressed_layers
from sparlow.model.artefact.stored_form import StoredForm
from sparlow.model.forward.compressible import compressible
from sparlow.model.forward.decoder import Decoder


def scale_type(dtype):
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def random_grid(shape, values, *, levels="auto", group=16, masked=False, dtype=torch.bfloat16, seed=0):
    """GridValues of random scales, and a random book where levels are learned."""
    generator, grid = torch.Generator().manual_seed(seed), make_grid(values, levels, group)
    scale = (torch.rand(shape[0], grid.groups(shape[1]), generator=generator) + 0.5) / (1 << grid.bits)
    book = (torch.rand(1 << grid.bits, generator=generator) + 0.1).cumsum(0)
    book = (book - book.mean()) if grid.levels == "book" else grid.uniform()
    own = scale_type(dtype)
    return GridValues(grid, scale.to(own), book.to(own), masked)


def random_sparse(shape, found, *, mask=None, dtype=torch.bfloat16, seed=0):
    """S (out, in) of random codes on a grid."""
    generator, usable = torch.Generator().manual_seed(seed), found.usable()
    codes = usable[torch.randint(len(usable), shape, generator=generator)]
    S = found.decode(codes)
    return (S if mask is None else S.masked_fill(~mask, 0)).to(dtype)


def random_factors(shape, rank, *, dtype=torch.bfloat16, seed=0):
    """U and V on the grid of int8, and their scales."""
    generator = torch.Generator().manual_seed(seed)
    scales = [((torch.rand(rank, generator=generator) + 0.5) / 900).to(scale_type(dtype)) for _ in "UV"]
    u, v = (torch.randint(-127, 128, size, generator=generator) for size in ((shape[0], rank), (rank, shape[1])))
    U, V = u * scales[0].float(), v * scales[1].float()[:, None]
    return U.to(dtype), V.to(dtype), FactorScales(*scales)


def two_of_four(shape, seed=0):
    """A mask that keeps exactly two of every four."""
    scores = torch.rand(shape[0] * shape[1] // 4, 4, generator=torch.Generator().manual_seed(seed))
    return (scores.argsort(-1).argsort(-1) < 2).reshape(shape)


def free(shape, seed=0):
    """A mask that keeps about a third, and no entry of the first row."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 1 / 3
    mask[0] = False
    return mask


def coded_layer(shape, values, *, pattern="dense", rank=3, dtype=torch.bfloat16, bias=None, seed=0, **grid):
    """A compressed layer on a grid, its factors in int8."""
    mask = {"dense": lambda *_: None, "2:4": two_of_four, "free": free}[pattern](shape, seed)
    found = random_grid(shape, values, masked=mask is not None, dtype=dtype, seed=seed, **grid)
    U, V, factors = random_factors(shape, rank, dtype=dtype, seed=seed)
    layer = SparseLowRankLinear(random_sparse(shape, found, mask=mask, dtype=dtype, seed=seed), U, V, bias)
    layer.stored = StoredForm(found, factors if rank else None)
    return layer


def coded_model(model, values="int4", **options):
    """Replace every linear of the blocks of a model by one on a grid."""
    for i, block in enumerate(Decoder.of(model).blocks):
        for k, (name, weight) in enumerate(compressible(block).items()):
            layer = coded_layer(weight.shape, values, dtype=weight.dtype, bias=weight.bias, seed=17 * i + k, **options)
            weight.put(layer)
            del name
    return model


def save_coded(family, values, dtype, folder, pattern="2:4"):
    """Write a tiny model in codes, its tokenizer beside it, as a finished directory; its path."""
    save_tiny(family, folder / "dense", dtype=dtype)
    model = coded_model(AutoModelForCausalLM.from_pretrained(folder / "dense"), values, pattern=pattern)
    return finish(model, folder / "out", pattern)


def finish(model, folder, pattern):
    """Write a model whose layers are in codes, and its tokenizer, as a finished directory; its path."""
    decoder = Decoder.of(model)
    writer = CheckpointWriter(folder, model, decoder)
    for i, block in enumerate(decoder.blocks):
        writer.write_block(i, block)
    writer.write_rest(model)
    writer.finish(model, tiny_tokenizer(), patterns=dict.fromkeys(compressed_layers(model), pattern))
    return folder


def write_in_codes(folder, kinds, group=8):
    """Write a finished directory again: its layers on grids, its embedding in int8 and, if that is another, its head.

    Args:
        folder: What compress wrote.
        kinds: Pairs of values and pattern that the layers have in turn.
        group: Columns that share a scale.
    """
    model = sparlow.load(folder)
    decoder, layers = Decoder.of(model), compressed_layers(model)
    for (name, layer), (values, pattern) in zip(layers.items(), itertools.cycle(kinds), strict=False):
        options = {"rank": layer.rank, "bias": layer.bias, "dtype": layer.S.dtype, "group": group}
        model.set_submodule(name, coded_layer(tuple(layer.S.shape), values, pattern=pattern, **options))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    quantise(model, "int8", "int8" if tied else "int4")
    writer = CheckpointWriter(folder, model, decoder)
    shards = [writer.write_block(i, block) for i, block in enumerate(decoder.blocks)]
    shards.append(writer.write_rest(model))
    writer.finish(model, patterns=dict.fromkeys(layers, "2:4"))
    state = json.loads((folder / "sparlow.json").read_text())
    state["shards"] = {shard.file: {"bytes": shard.bytes, "sha256": shard.sha256} for shard in shards}
    (folder / "sparlow.json").write_text(json.dumps(state | {"opens_as": small_sums(folder)}))
