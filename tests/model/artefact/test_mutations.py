"""Thousands of mutated headers, configs and records: each is refused in a sentence, or loads as it was."""

import random

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import sparlow
from coded import write_in_codes
from mutations import SIZES, mutate, outcome
from sparlow.errors import InputError
from sparlow.model.artefact.describe import describe
from sparlow.recipe.recipe import Recipe
from sparlow.run.verify import verify_artefact

SHARDS = tuple(f"model-{i:05d}-of-00002.safetensors" for i in (1, 2))  # a block, and the rest
FILES = ("config.json", "model.safetensors.index.json", "generation_config.json", "sparlow.json", *SHARDS, *SHARDS)


@pytest.fixture(scope="module", params=["floats", "codes"])
def artefact(request, tmp_path_factory):
    """A finished directory, and the model in it; with codes, its shards hold every kind of tensor that there is."""
    folder = tmp_path_factory.mktemp("artefact") / "out"
    transformers.utils.logging.disable_progress_bar()
    windows = torch.arange(64).view(4, 16)
    recipe = Recipe(rank=2, options={"effort": 0.1, "max_steps": 3})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **SIZES)).eval()
    sparlow.compress(model, recipe, calibration=windows, out=folder, evaluate=())
    if request.param == "codes":
        write_in_codes(folder, [("int3", "2:4"), ("int4", "dense"), ("int2", "free"), ("int8", "2:4")])
    yield folder, sparlow.load(folder).state_dict()
    transformers.utils.logging.enable_progress_bar()


def same(state, other):
    return state.keys() == other.keys() and all(
        torch.equal(t.view(torch.uint8), other[name].view(torch.uint8)) for name, t in state.items() if t.numel()
    )


def attempt(folder, expected, name, *, everything):
    """Load, and perhaps describe and verify; whatever is not refused must be as it was, as far as it is on record."""
    recorded = (folder / "sparlow.json").exists() and name != "sparlow.json"
    for read in (sparlow.load, describe, verify_artefact) if everything else (sparlow.load,):
        found = outcome(read, folder)
        if isinstance(found, InputError):
            assert str(found)
            assert "\n" not in str(found)
        elif read is sparlow.load and recorded:
            assert same(found.state_dict(), expected)


@pytest.mark.parametrize("tries", [100, pytest.param(5000, marks=pytest.mark.faults)])
def test_what_is_mutated_is_refused_or_loads_as_it_was(tries, artefact):
    folder, expected = artefact
    original = {path.name: path.read_bytes() for path in folder.iterdir()}
    for i in range(tries):
        chance = random.Random(i)
        name = chance.choice(FILES)
        (folder / name).write_bytes(mutate(chance, name, original[name]))
        if chance.random() < 0.4 and name != "sparlow.json":
            (folder / "sparlow.json").unlink()  # nothing to compare with: only what is built may be trusted
        try:
            attempt(folder, expected, name, everything=i % 5 == 0)
        except BaseException as error:
            error.add_note(f"mutation {i} of {name}: {(folder / name).read_bytes()[:3000]!r}")
            raise
        finally:
            for path in {name, "sparlow.json"}:
                (folder / path).write_bytes(original[path])
