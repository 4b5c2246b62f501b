"""The memory that a plan foresees is what a run takes, seen from outside in a process of its own."""

import sys

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparlow
from processes import SERVER
from sparlow.recipe.recipe import GIVEN_WINDOWS, Recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a peak that can be reset is known to Linux only"),
]

HERE = {"device": "cpu", "offload": "cpu", "evaluate": ()}
TEXT = {"calibration": GIVEN_WINDOWS, "samples": 16, "seqlen": 256}


def compress(folder, recipe, out, note):
    """Compress in this process; write the bytes of its peak beyond what there was before."""
    torch.set_num_threads(1)
    ids = torch.randint(512, (recipe.samples, recipe.seqlen), generator=torch.Generator().manual_seed(0))
    before = psutil.Process().memory_info().rss
    report = sparlow.compress(folder, recipe, calibration=ids, out=out, force=True, **HERE)
    note.write_text(str(report.peak_memory["rss"] - before))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two wide blocks: their matrices are far larger than what libraries take on the way."""
    place = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    return place


@pytest.mark.parametrize(
    "recipe",
    [
        {"algorithm": "wanda"},
        {"algorithm": "3basil", "rank": 16, "options": {"effort": 0.1, "max_steps": 5}},
        {"algorithm": "wanda", "match": True, "match_preset": "blocks", "match_epochs": 1},
        {"algorithm": "wanda", "match": True, "match_epochs": 1},
        {"algorithm": "sparsegpt", "values": "int4", "pattern": "dense", "match": True, "match_epochs": 1},
    ],
    ids=["pruning", "solving", "matching", "distilling", "distilling on a grid"],
)
def test_the_peak_that_is_foreseen_is_the_peak_that_is_seen(recipe, folder, tmp_path):
    recipe, note = Recipe(**recipe, **TEXT), tmp_path / "peak"
    foreseen = max(stage.cpu for stage in sparlow.plan(folder, recipe, timed=False, **HERE).stages)
    run = SERVER.Process(target=compress, args=(folder, recipe, tmp_path / "out", note))
    run.start()
    run.join(300)
    assert run.exitcode == 0
    assert int(note.read_text()) == pytest.approx(foreseen, rel=0.25)
