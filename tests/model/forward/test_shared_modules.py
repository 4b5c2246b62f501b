"""Modules that stand in several places: what would be written or counted once for two layers is refused by name."""

import pytest
import torch

import sparlow
from families import tiny
from sparlow.errors import InputError
from sparlow.model.forward.decoder import Decoder, shared_weights
from sparlow.recipe.recipe import Recipe


def with_one_mlp_in_two_blocks():
    model = tiny("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    return model


def test_an_mlp_that_two_blocks_share_does_not_vanish_from_the_record(tmp_path):
    windows = torch.randint(2, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(algorithm="wanda", pattern="2:4")
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj\.weight is shared with another layer"):
        sparlow.compress(with_one_mlp_in_two_blocks(), recipe, calibration=windows, out=tmp_path / "o", evaluate=())
    assert not (tmp_path / "o").exists()
    with pytest.raises(InputError, match="is shared with another layer"):
        sparlow.compress(
            with_one_mlp_in_two_blocks(), recipe, calibration=windows, evaluate=(), force=True, inplace=True
        )


def test_every_name_of_a_shared_weight_is_given():
    model = with_one_mlp_in_two_blocks()
    names = {f"model.layers.{i}.mlp.{name}_proj.weight" for i in (0, 2) for name in ("gate", "up", "down")}
    assert set(shared_weights(model, Decoder.of(model))) == names
    assert shared_weights(tiny("llama"), Decoder.of(tiny("llama"))) == []
