"""Thousands of compressed layers: what opening, writing and describing do grows as the layers do, not as their square.

Calls are counted, not seconds: those of Python's functions and of functions in C.
"""

import gc
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from results import random_layer
from sparlow.model.artefact.checkpoint import CheckpointWriter, load
from sparlow.model.artefact.describe import describe, verify
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.artefact.schemes import any_of
from sparlow.model.forward.compressible import compressible
from sparlow.model.forward.decoder import Decoder


def calls(function):
    """How many functions a function calls, and its result."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # others have functions called whenever it runs
    sys.setprofile(note)
    try:
        found = function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count, found


def deep(blocks, **options):
    """A tiny model of many compressed layers."""
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=blocks,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=32,
        **options,
    )
    model = LlamaForCausalLM(config)
    for block in Decoder.of(model).blocks:
        for weight in [*compressible(block).values()]:
            weight.put(random_layer(weight, rank=1))
    return model


def written(model, folder):
    decoder = Decoder.of(model)
    writer = CheckpointWriter(folder, model, decoder)
    for i, block in enumerate(decoder.blocks):
        writer.write_block(i, block)
    writer.write_rest(model)
    writer.finish(model)


def test_work_grows_as_the_number_of_layers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # how often one thread looks for another is left to chance
    shown = is_progress_bar_enabled()
    disable_progress_bar()  # it is drawn as often as time passes
    counts = {function: [] for function in (written, load, describe, verify)}
    for blocks in (1, 6, 12, 18):  # the first one warms caches
        model, folder = deep(blocks), tmp_path / str(blocks)
        counts[written].append(calls(lambda: written(model, folder))[0])  # noqa: B023 - called here
        for function in (load, describe, verify):
            counts[function].append(calls(lambda: function(folder))[0])  # noqa: B023 - the same
    if shown:
        enable_progress_bar()
    for function, (_, *found) in counts.items():
        assert found[2] - found[1] < 1.1 * (found[1] - found[0]), function  # 1.67 if work grew as the square


def widest(expression):
    """The largest number of alternatives in a group of an expression without escaped characters but for dots."""
    found, counts = 1, [1]
    for character in expression:
        if character == "(":
            counts.append(1)
        elif character == ")":
            found = max(found, counts.pop())
        elif character == "|":
            counts[-1] += 1
    return max(found, *counts)


def test_a_name_is_found_among_thousands_by_its_characters():
    assert widest(any_of(f"layers.{i}.mlp.{j}" for i in range(90) for j in range(100))) <= 11  # digits, and the dot


def test_layers_that_a_class_keeps_in_float32_come_back_in_it(tmp_path, monkeypatch):
    written(deep(2), tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["o_proj"])
    layers = compressed_layers(load(tmp_path, dtype=torch.bfloat16))
    for name, layer in layers.items():
        expected = torch.float32 if "o_proj" in name else torch.bfloat16
        assert {layer.S.dtype, layer.U.dtype, layer.V.dtype} == {expected}
