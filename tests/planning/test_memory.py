"""The memory that a plan foresees is what a run takes, seen from outside in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a peak that can be reset is known to Linux only"),
]

PLANNED = """
import json, sys, sparlow
for fields in json.loads(sys.argv[2]):
    recipe = sparlow.Recipe(**fields)
    plan = sparlow.plan(sys.argv[1], recipe, evaluate=(), device="cpu", offload="cpu", timed=False)
    print(max(stage.cpu for stage in plan.stages))
"""
MEASURED = """
import json, sys, psutil, torch, sparlow.run.compress
recipe = sparlow.Recipe(**json.loads(sys.argv[2]))
ids = torch.randint(512, (recipe.samples, recipe.seqlen), generator=torch.Generator().manual_seed(0))
before = psutil.Process().memory_info().rss
report = sparlow.compress(
    sys.argv[1], recipe, calibration=ids, out=sys.argv[3], evaluate=(), device="cpu", offload="cpu", force=True
)
print(report.peak_memory["rss"] - before)
"""
TEXT = {"samples": 8, "seqlen": 256}  # all of it passes at a time
TRAINED = {"samples": 4, "seqlen": 256, "match": True, "match_epochs": 1}  # two steps, of which each takes as much
RECIPES = {
    "pruning": {"algorithm": "wanda", **TEXT},
    "solving": {"algorithm": "3basil", "rank": 16, "options": {"effort": 0.1, "max_steps": 5}, **TEXT},
    "matching": {"algorithm": "wanda", "match_preset": "blocks", **TRAINED},
    "distilling": {"algorithm": "wanda", **TRAINED},
    "on a grid": {"algorithm": "sparsegpt", "values": "int4", "pattern": "dense", **TRAINED},
}


# With its own rule glibc keeps freed matrices of up to 32 MiB for later, more or less of them. Plan and run are told
# that they go back at once, as those of larger models do: then what the code holds is what is compared.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


def said(script, *words):
    """The numbers that a process prints, one in a line."""
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | GIVE_BACK)
    return [int(line) for line in done.stdout.split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two wide blocks: their matrices are far larger than what libraries take on the way."""
    place = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def foreseen(folder):
    """What a plan says of each recipe."""
    return dict(zip(RECIPES, said(PLANNED, folder, json.dumps([*RECIPES.values()])), strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_the_peak_that_is_foreseen_is_the_peak_that_is_seen(name, folder, foreseen, tmp_path):
    (seen,) = said(MEASURED, folder, json.dumps(RECIPES[name]), tmp_path / "out")
    assert seen == pytest.approx(foreseen[name], rel=0.25)
