"""Tiny models in codes, written as compress writes them, to be opened and run in every mode."""

from transformers import AutoModelForCausalLM

from coded import coded_model, finish
from families import save_tiny
from sparlow.model.artefact.embedding import quantise


def write(folder, family, ends=("keep", "keep"), *, dtype=None, group=None, values="int8", pattern="2:4"):
    """Write a random model of a family to folder/dense, and in codes to folder/out, which is returned.

    Args:
        folder: It.
        family: One of ``families``.
        ends: How its embedding and its head are stored.
        dtype: Of the model; float32 if left out.
        group: Columns of the embedding and the head that share a scale.
        values: Of its linear layers.
        pattern: The same.
    """
    save_tiny(family, folder / "dense", **({} if dtype is None else {"dtype": dtype}))
    model = coded_model(AutoModelForCausalLM.from_pretrained(folder / "dense"), values, pattern=pattern)
    quantise(model, *ends, group=group)
    return finish(model, folder / "out", pattern)
