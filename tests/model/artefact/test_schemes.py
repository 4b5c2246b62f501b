import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparlow.errors import InputError
from sparlow.model.artefact.schemes import (
    Scheme,
    StoredLayer,
    any_of,
    from_config,
    packed_shapes,
    stored_pattern,
    to_config,
)

NAMES = st.lists(
    st.lists(
        st.sampled_from(["layers", "0", "1", "10", "mlp", "q+", "a|b", "(x", "*", "w$", "é"]), min_size=1, max_size=4
    ),
    min_size=1,
    max_size=12,
)


@given(NAMES, NAMES)
def test_the_expression_of_some_names_matches_these_and_no_others(names, others):
    names, others = ({".".join(parts) for parts in group} for group in (names, others))
    expression = re.compile(any_of(sorted(names)))
    for name in names:
        assert expression.fullmatch(name)
    for other in others - names:
        assert not expression.fullmatch(other)
        assert not expression.fullmatch(other.replace(".", "x"))  # a dot is a dot
    assert expression.groups == 0


def test_many_layers_share_a_few_schemes_and_come_back():
    one, two = Scheme("2:4", "bf16", 3, "bf16"), Scheme("free", "fp32", 0, "fp32", transposed=True)
    records = {
        f"h.{i}.{name}": StoredLayer(scheme, i) for i in range(3) for name, scheme in {"a": one, "b": two}.items()
    }
    written = to_config(records)
    assert written["schemes"] == [
        {"pattern": "2:4", "values": "bf16", "rank": 3, "factors": "bf16"},
        {"pattern": "free", "values": "fp32", "rank": 0, "factors": "fp32", "transposed": True},
    ]
    assert written["layers"] == {
        "h.0.a": [0, 0],
        "h.0.b": [1, 0],
        "h.1.a": [0, 1],
        "h.1.b": [1, 1],
        "h.2.a": [0, 2],
        "h.2.b": [1, 2],
    }
    assert from_config(**written) == records


@pytest.mark.parametrize(
    ("kept", "asked", "pattern"),
    [
        (16, "2:4", "2:4"),
        (15, "2:4", "free"),  # a dead input: rows begin where only the mask says
        (16, "0.5", "free"),
        (16, None, "free"),
        (32, "4:4", "dense"),
        (32, "0.0", "dense"),
        (0, "0.99", "free"),
    ],
)
def test_a_pattern_is_stored_only_where_every_row_can_be_found_by_it(kept, asked, pattern):
    assert stored_pattern((4, 8), kept, asked) == pattern
    shapes = packed_shapes((4, 8), StoredLayer(Scheme(pattern, "bf16", 2, "bf16"), kept))
    assert shapes == {
        "weight": (kept,),
        **({} if pattern == "dense" else {"mask": (4, 1)}),
        "U": (4, 2),
        "V": (2, 8),
    }


@pytest.mark.parametrize(
    ("pattern", "kept", "shape"),
    [
        ("2:4", 15, (4, 8)),
        ("2:4", 17, (4, 8)),
        ("2:4", 16, (4, 9)),
        ("free", 32, (4, 8)),
        ("free", 33, (4, 8)),
        ("dense", 31, (4, 8)),
    ],
)
def test_counts_that_a_pattern_does_not_allow(pattern, kept, shape):
    with pytest.raises(InputError, match=f"keeps {kept} values, which"):
        packed_shapes(shape, StoredLayer(Scheme(pattern, "bf16", 2, "bf16"), kept))


@pytest.mark.parametrize("name", ["a\x1b[2K", "a\nb", "a\\1", "a" * 501, ".".join("a" * 60), "\u202ea"])
def test_names_of_layers_that_no_model_has(name):
    scheme = Scheme("2:4", "bf16", 3, "bf16").to_dict()
    with pytest.raises(InputError, match=r"is not the name of a layer|control characters") as caught:
        from_config([scheme], {name: [0, 1]})
    assert str(caught.value).isprintable()
