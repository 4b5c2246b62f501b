import copy
import pickle

import numpy as np
import pytest
import torch

from coded import coded_layer, free, random_factors, random_grid, random_sparse, two_of_four
from sparlow.errors import InputError
from sparlow.linalg.grid import GridValues
from sparlow.model.artefact.layers import SparseLowRankLinear
from sparlow.model.artefact.packing import packed_state, tell_lost
from sparlow.model.artefact.stored_form import StoredForm, Weight, pack_weight, unpack_weight

SHAPE = (6, 44)  # columns that neither groups of 16 nor eights divide
MASKS = {"dense": lambda _: None, "2:4": two_of_four, "free": free}
GRIDS = [
    *(("int8", "integer"), ("int4", "half"), ("int4", "integer"), ("int3", "book"), ("int3", "half")),
    *(("int2", "book"), ("int2", "integer")),
]


def decoded(tensors, grid, shape):
    """S in float32 by docs/format.md, with numpy, row after row."""
    levels = tensors["book"].float().numpy() if "book" in tensors else np.arange(1 << grid.bits) - (1 << grid.bits - 1)
    levels = levels + (0.5 if grid.levels == "half" else 0)
    mask = np.ones(shape, bool)
    if "mask" in tensors:
        mask = np.unpackbits(tensors["mask"].numpy(), axis=1, bitorder="little")[:, : shape[1]].astype(bool)
    S, start, data = np.zeros(shape, np.float32), 0, tensors["weight"].numpy()
    for i in range(shape[0]):
        kept = np.flatnonzero(mask[i])
        stop = start + -(-len(kept) * grid.bits // 8)
        found = np.unpackbits(data[start:stop], bitorder="little")[: len(kept) * grid.bits].reshape(-1, grid.bits)
        codes = (found << np.arange(grid.bits)).sum(1)
        scale = tensors["scale"][i].float().numpy()[kept // (grid.group or shape[1])]
        S[i, kept], start = levels[codes].astype(np.float32) * scale, stop
    assert start == len(data)
    return torch.from_numpy(S)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize(("values", "levels"), GRIDS)
@pytest.mark.parametrize("group", [16, "row"])
def test_a_weight_on_a_grid_is_stored_as_documented_and_comes_back_to_the_bit(values, levels, group, pattern, dtype):
    mask = MASKS[pattern](SHAPE)
    found = random_grid(SHAPE, values, levels=levels, group=group, masked=mask is not None, dtype=dtype)
    S = random_sparse(SHAPE, found, mask=mask, dtype=dtype)
    U, V, factors = random_factors(SHAPE, 3, dtype=dtype)
    packed = pack_weight(Weight(S, U, V), StoredForm(found, factors))
    assert (packed.grid, packed.lost, packed.dtype, packed.int8_factors) == (found.grid, (), dtype, True)
    assert packed.kept == (S.numel() if mask is None else int(mask.sum()))
    assert torch.equal(decoded(packed.tensors, found.grid, SHAPE).to(dtype), S)
    assert ("mask" in packed.tensors) == (mask is not None)
    assert ("book" in packed.tensors) == (levels == "book")
    weight, form = unpack_weight(packed.tensors, SHAPE, packed.grid, packed.dtype)
    for mine, theirs in zip(weight, (S, U, V), strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, theirs)
    assert not weight.S[weight.S == 0].signbit().any()
    again = pack_weight(weight, form)
    assert again.tensors.keys() == packed.tensors.keys()
    assert all(torch.equal(t, again.tensors[part]) for part, t in packed.tensors.items())


@pytest.mark.parametrize("pattern", MASKS)
def test_a_large_weight_is_packed_in_slices(pattern, monkeypatch):
    monkeypatch.setattr("sparlow.model.artefact.bitmask._ENTRIES_AT_A_TIME", 100)
    layer = coded_layer(SHAPE, "int3", pattern=pattern)
    packed = pack_weight(Weight(layer.S, layer.U, layer.V), layer.stored)
    assert torch.equal(decoded(packed.tensors, packed.grid, SHAPE).to(torch.bfloat16), layer.S)
    assert torch.equal(unpack_weight(packed.tensors, SHAPE, packed.grid, packed.dtype)[0].S, layer.S)


def test_rows_that_hold_nothing_but_zeros():
    found = random_grid((2, 16), "int4", group=8)
    found = GridValues(found.grid, torch.zeros_like(found.scale), found.levels, masked=False)
    S, none = torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(0, 16, dtype=torch.bfloat16)
    packed = pack_weight(Weight(S, none.T[:2], none), StoredForm(found))
    assert packed.grid
    back = unpack_weight(packed.tensors, (2, 16), packed.grid, packed.dtype)[0].S
    assert torch.equal(back, S)
    assert not back.signbit().any()


@pytest.mark.parametrize("pattern", MASKS)
def test_a_model_that_computes_in_float32_packs_what_was_rounded_to_its_stored_type(pattern):
    layer = coded_layer(SHAPE, "int3", pattern=pattern)
    wide = pack_weight(Weight(layer.S.float(), layer.U.float(), layer.V.float()), layer.stored, torch.bfloat16)
    narrow = pack_weight(Weight(layer.S, layer.U, layer.V), layer.stored)
    assert (wide.lost, wide.dtype) == ((), torch.bfloat16)
    assert all(torch.equal(t, wide.tensors[part]) for part, t in narrow.tensors.items())


# What is not on its grid any more


@pytest.mark.parametrize(
    ("part", "lost"), [("S", ("values",)), ("U", ("factors",)), ("V", ("factors",)), ("SU", ("values", "factors"))]
)
def test_what_was_trained_is_stored_in_floats_and_never_rounded(part, lost):
    layer = coded_layer(SHAPE, "int4", pattern="2:4")
    with torch.no_grad():
        for name in part:
            getattr(layer, name)[1] *= 1.03
    packed = pack_weight(Weight(layer.S, layer.U, layer.V), layer.stored)
    assert packed.lost == lost
    assert (packed.grid is None) == ("values" in lost)
    assert packed.int8_factors == ("factors" not in lost)
    weight, _ = unpack_weight(packed.tensors, SHAPE, packed.grid, packed.dtype)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(weight, (layer.S, layer.U, layer.V), strict=True))
    root = torch.nn.Sequential(layer, copy.deepcopy(layer))
    with pytest.warns(UserWarning, match=r"^0 and 1 more: the numbers are not on the grid.*own type") as told:
        state, packs = packed_state(root)
    assert len(told) == 1
    assert packs["0"].lost == lost
    assert state["0.weight"].is_floating_point() == ("values" in lost)
    with pytest.raises(InputError, match=r"0 and 1 more.*Compress again"):
        packed_state(root, keep=True)


def test_nothing_is_told_of_what_is_as_it_was(recwarn):
    tell_lost([])
    packed_state(torch.nn.Sequential(coded_layer(SHAPE, "int4")), keep=True)
    assert not recwarn.list


@pytest.mark.parametrize(
    "change",
    [
        lambda found: GridValues(found.grid, found.scale[:-1], found.levels, found.masked),
        lambda found: GridValues(found.grid, found.scale[:, :-1], found.levels, found.masked),
        lambda found: GridValues(found.grid, found.scale * float("nan"), found.levels, found.masked),
        lambda found: GridValues(found.grid, found.scale * 2, found.levels, found.masked),
    ],
)
def test_a_form_that_does_not_fit_changes_no_value(change):
    layer = coded_layer(SHAPE, "int3")
    form = StoredForm(change(layer.stored.values))
    packed = pack_weight(Weight(layer.S, layer.U, layer.V), form)
    assert packed.lost == ("values",)
    assert torch.equal(packed.tensors["weight"].view(SHAPE) if packed.kept == layer.S.numel() else layer.S, layer.S)


def test_scales_take_16_bits():
    found = random_grid(SHAPE, "int4")
    with pytest.raises(InputError, match=r"bfloat16 or float16, not in torch\.float32"):
        StoredForm(GridValues(found.grid, found.scale.float(), found.levels, masked=False))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])  # noqa: S301 - our own
def test_the_form_survives_copies_and_is_no_parameter(how):
    layer = coded_layer(SHAPE, "int3", pattern="2:4")
    twin = how(layer)
    assert twin.stored.values is not layer.stored.values
    assert twin.state_dict().keys() == {"S", "U", "V"}
    one, other = (pack_weight(Weight(x.S, x.U, x.V), x.stored).tensors for x in (layer, twin))
    assert all(torch.equal(t, other[part]) for part, t in one.items())


def test_a_layer_takes_its_packed_form_from_a_state_dict():
    layer, other = coded_layer(SHAPE, "int3", pattern="free"), coded_layer(SHAPE, "int3", pattern="free", seed=5)
    state, _ = packed_state(torch.nn.Sequential(layer))
    taken = torch.nn.Sequential(other)
    taken.load_state_dict(state)
    assert torch.equal(other.S, layer.S)
    assert torch.equal(other.U, layer.U)
    assert all(torch.equal(t, packed_state(taken)[0][name]) for name, t in state.items())
    plain = SparseLowRankLinear(layer.S, layer.U, layer.V)
    with pytest.raises(InputError, match="The state of 0 holds codes, and nothing says of which grid"):
        torch.nn.Sequential(plain).load_state_dict(state)
    for part in ("scale", "book", "U_scale"):
        with pytest.raises(InputError, match=f"lacks {part}"):
            taken.load_state_dict({name: t for name, t in state.items() if name != f"0.{part}"})
    with pytest.raises(InputError, match="Its scale has the shape"):
        taken.load_state_dict(state | {"0.scale": state["0.scale"][1:]})


def test_a_layer_that_takes_floats_is_not_on_a_grid_any_more():
    layer = coded_layer(SHAPE, "int4", pattern="2:4")
    with torch.no_grad():
        layer.S *= 1.01
    with pytest.warns(UserWarning, match="not on the grid"):
        state, _ = packed_state(torch.nn.Sequential(layer))
    taken = torch.nn.Sequential(coded_layer(SHAPE, "int4", pattern="2:4", seed=5))
    taken.load_state_dict(state)
    assert torch.equal(taken[0].S, layer.S)
    assert taken[0].stored.values is None
    assert taken[0].stored.factors is not None


# Files that are not to be trusted


def spoiled(part, change):
    def spoil(tensors):
        tensors[part] = tensors[part].clone()
        change(tensors[part])

    return spoil


@pytest.mark.parametrize(
    ("values", "levels", "pattern", "spoil", "message"),
    [
        ("int4", "integer", "dense", spoiled("weight", lambda t: t.fill_(0)), "a level that is not in use"),
        ("int4", "integer", "2:4", spoiled("weight", lambda t: t.fill_(0x88)), "a level that is not in use"),
        ("int8", "integer", "2:4", spoiled("weight", lambda t: t.fill_(128)), "a level that is not in use"),
        ("int8", "integer", "dense", spoiled("weight", lambda t: t.fill_(0)), "a level that is not in use"),
        ("int4", "half", "2:4", spoiled("scale", lambda t: t.fill_(0)), "keeps values that are zero"),
        ("int4", "half", "2:4", spoiled("scale", lambda t: t[0].fill_(torch.nan)), "scale holds numbers"),
        (
            "int4",
            "half",
            "dense",
            spoiled("scale", lambda t: t[0].fill_(torch.inf)),
            "scale holds numbers",
        ),
        ("int3", "book", "dense", spoiled("book", lambda t: t[0].fill_(torch.nan)), "book holds numbers"),
        ("int3", "book", "dense", spoiled("book", lambda t: t[0].fill_(9)), "levels of its book do not rise"),
        ("int4", "half", "dense", spoiled("U_scale", lambda t: t[0].fill_(torch.nan)), "U_scale holds numbers"),
        ("int4", "half", "dense", spoiled("V_scale", lambda t: t[0].fill_(-torch.inf)), "V_scale holds numbers"),
        ("int4", "half", "dense", spoiled("U", lambda t: t[0].fill_(-128)), "the code -128"),
        ("int4", "half", "dense", spoiled("scale", lambda t: t.fill_(3.3e38)), "leave the range"),
        ("int4", "half", "dense", spoiled("V_scale", lambda t: t.fill_(3.3e38)), "leave the range"),
        ("int3", "half", "dense", spoiled("weight", lambda t: t.fill_(255)), "past the end of a row"),
        ("int4", "half", "free", spoiled("mask", lambda t: t[1].fill_(0)), "Its codes (should take|go on past)"),
    ],
)
def test_what_cannot_be_is_refused(values, levels, pattern, spoil, message):
    shape = (6, 44) if values != "int3" or levels == "book" else (6, 41)
    layer = coded_layer(shape, values, levels=levels, pattern=pattern)
    packed = pack_weight(Weight(layer.S, layer.U, layer.V), layer.stored)
    tensors = dict(packed.tensors)
    spoil(tensors)
    with pytest.raises(InputError, match=message):
        unpack_weight(tensors, shape, packed.grid, packed.dtype)
