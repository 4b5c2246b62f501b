import dataclasses
import re
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparlow.algorithms import algorithms
from sparlow.errors import InputError
from sparlow.linalg.patterns import NM, Unstructured
from sparlow.recipe.allocation import Budget, Rule
from sparlow.recipe.recipe import Recipe

LIBRARY = Path(__file__).parents[2] / "src" / "sparlow" / "recipe" / "library"
PUBLISHED = sorted(path for path in LIBRARY.glob("*.toml") if path.stem != "about")
FIELDS = [f.name for f in dataclasses.fields(Recipe)]
RATIO = ("bits", "size", "compression", "rank_share")  # instead of a rank
GRID = ("levels", "group")  # of values that matching cannot train
FULL = Recipe(
    algorithm="three-basil",
    options={"effort": 0.5, "schedule": "paper", "max_steps": 9},
    pattern="0.6",
    rank=3,
    embedding="int8",
    head="keep",
    values="model",
    factors="model",
    allocate="owl",
    owl_spread=0.05,
    owl_threshold=7.0,
    match=True,
    match_preset="paper",
    match_epochs=3,
    match_lr=0.001,
    match_batch=2,
    ignore=("k_proj", "model.layers.0.*"),
    layers=(Rule("mlp.down_proj", rank=128), Rule("q_proj", pattern="0.3", rank=1, values="model")),
    calibration="wikitext2",
    samples=7,
    seqlen=9,
    seed=5,
    bos="always",
    column="body",
    damping=0.1,
    relative_damping=0.2,
    behind="layers",
    dtype="bfloat16",
)
WRONG = {  # field: TOML values of another type
    "algorithm": ["3", "true", "['wanda']"],
    "options": ["'effort=1'", "1", "[1]", "true"],
    "pattern": ["7", "[2, 4]"],
    "rank": ["'64'", "64.0", "true"],
    "bits": ["'4'", "true"],
    "size": ["300", "[1]"],
    "embedding": ["8", "true"],
    "head": ["4", "['int8']"],
    "compression": ["'0.5'", "true"],
    "rank_share": ["'0.5'", "[0.2]"],
    "values": ["4", "true"],
    "levels": ["1", "['book']"],
    "group": ["64.0", "true"],
    "factors": ["8", "false"],
    "allocate": ["1", "true"],
    "owl_spread": ["'0.08'", "true"],
    "owl_threshold": ["'5'", "false"],
    "match": ["1", "'yes'", "0.0"],
    "match_preset": ["1", "true"],
    "match_epochs": ["2.0", "'2'", "true"],
    "match_lr": ["'2e-5'", "true"],
    "match_batch": ["8.0", "false"],
    "ignore": ["'k_proj'", "[1]", "3"],
    "layers": [
        "'k_proj'",
        "['k_proj']",
        "[{rank = 3}]",
        "[{match = 'q', rank = '3'}]",
        "[{match = 'q', values = 4}]",
        "[{match = 'q', order = 3}]",
    ],
    "calibration": ["7", "['c4']"],
    "samples": ["'128'", "1.5", "true"],
    "seqlen": ["'2048'", "2048.0", "false"],
    "seed": ["'0'", "0.5"],
    "bos": ["1", "true"],
    "column": ["1", "false"],
    "damping": ["'0.01'", "true", "[0.1]"],
    "relative_damping": ["'0.01'", "false"],
    "behind": ["1", "true"],
    "dtype": ["32", "true"],
}


# There and back


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        FULL,
        Recipe(rank=0),
        Recipe(options={"effort": "0.25"}),  # as typed on the command line
        Recipe(calibration="windows"),
    ],
    ids=["default", "full", "rank 0", "typed option", "token windows"],
)
def test_toml_comes_back_as_an_equal_recipe(recipe):
    again = Recipe.from_toml(recipe.to_toml())
    assert again == recipe
    assert again.to_toml() == recipe.to_toml()


def test_the_full_recipe_leaves_no_field_at_its_default():
    by_ratio = [Recipe(bits=4.0), Recipe(size="35%")]
    by_ratio += [Recipe(compression=0.5, rank_share=0.2)] * 2
    on_grid = [Recipe(values="int4", levels="integer", group="64")] * 2
    assert all(getattr(FULL, name) != getattr(Recipe(), name) for name in FIELDS if name not in RATIO + GRID)
    for recipe, name in zip(by_ratio + on_grid, RATIO + GRID, strict=True):
        assert getattr(recipe, name) != getattr(Recipe(), name)
        assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert list(FULL.to_dict()) == [name for name in FIELDS if getattr(FULL, name) is not None]


def test_the_file_is_what_a_person_would_write():
    assert tomllib.loads(FULL.to_toml()) == FULL.to_dict()
    assert "rank" not in tomllib.loads(Recipe().to_toml())


def test_fields_left_out_take_their_defaults():
    assert Recipe.from_toml("") == Recipe()
    assert Recipe.from_toml('pattern = "0.5"') == Recipe(pattern="0.5")


def test_whole_numbers_do_for_a_damping():
    recipe = Recipe.from_toml("damping = 1\nrelative_damping = 0")
    assert (recipe.damping, recipe.relative_damping) == (1.0, 0.0)
    assert type(recipe.damping) is float


def test_from_file(tmp_path):
    (tmp_path / "recipe.toml").write_text(FULL.to_toml())
    assert Recipe.from_file(tmp_path / "recipe.toml") == FULL
    assert Recipe.from_file(str(tmp_path / "recipe.toml")) == FULL


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_every_published_recipe_loads(path):
    recipe = Recipe.from_file(path)
    assert Recipe.from_toml(recipe.to_toml()) == recipe


# What it stands for


def test_the_rank_left_out_depends_on_the_kind_of_algorithm():
    kinds = {a.name: a.kind for a in algorithms()}
    assert set(kinds.values()) == {"pruner", "decomposer"}
    for name, kind in kinds.items():
        assert Recipe(algorithm=name).budget("any", (200, 100)) == Budget(NM(2, 4), 0 if kind == "pruner" else 64)
    assert Recipe(rank=0).budget("any", (8, 8)) == Budget(NM(4, 8), 0)
    assert Recipe(rank=5).budget("any", (8, 8)) == Budget(NM(4, 8), 5)


@pytest.mark.parametrize(("columns", "pattern"), [(64, "16:32"), (48, "8:16"), (40, "4:8"), (12, "2:4"), (30, "16:32")])
def test_the_pattern_left_out_takes_the_largest_groups_that_fit(columns, pattern):
    assert str(Recipe().budget("any", (100, columns)).pattern) == pattern
    assert str(Recipe().pattern_of_all) == "16:32"
    assert str(Recipe(pattern="2:4").budget("any", (100, columns)).pattern) == "2:4"


def test_options_and_pattern_are_parsed():
    recipe = Recipe(options={"effort": "0.25", "max_steps": "7"}, pattern="1:4", rank=1)
    assert recipe.parsed_options == {"effort": 0.25, "max_steps": 7}
    assert recipe.budget("any", (8, 8)) == Budget(NM(1, 4), 1)
    assert Recipe(pattern="0.7", rank=1).budget("any", (8, 8)) == Budget(Unstructured(0.7), 1)


@pytest.mark.parametrize(("compression", "share"), [(0.5, 0.2), (0.4, 0.0), (0.6, 0.5), (0.0, 0.3)])
@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (192, 576)])
def test_a_compression_and_a_share_decide_pattern_and_rank(compression, share, shape):
    budget = Recipe(compression=compression, rank_share=share).budget("any", shape)
    weights, line = shape[0] * shape[1], sum(shape)
    kept = (1 - compression) * weights
    assert kept - line - 1 < budget.values(shape) <= kept + 1  # the rank is rounded down
    assert budget.rank * line == pytest.approx(share * kept, abs=line)


@pytest.mark.parametrize("pattern", ["2:4", "2:8", "0.75"])
def test_with_a_pattern_the_low_rank_part_gets_what_is_left(pattern):
    shape = (600, 1200)
    budget = Recipe(compression=0.4, pattern=pattern).budget("any", shape)
    assert str(budget.pattern) == pattern
    assert budget.rank > 0
    assert 0.6 * 600 * 1200 - 1800 < budget.values(shape) <= 0.6 * 600 * 1200


def test_a_pruner_removes_what_the_compression_says():
    assert Recipe(algorithm="wanda", compression=0.6).budget("any", (8, 8)) == Budget(Unstructured(0.6), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression": 0.5}, "either --rank-share or --pattern"),
        ({"compression": 0.5, "rank_share": 0.2, "pattern": "2:4"}, "either --rank-share or --pattern"),
        ({"compression": 0.5, "rank": 3, "rank_share": 0.1}, "A rank follows from the compression"),
        ({"compression": 0.5, "pattern": "2:4"}, "Give a compression below 0.5"),
        ({"compression": 0.8, "pattern": "0.7"}, "Give a compression below 0.7"),
        ({"compression": 0.8, "pattern": "dense"}, "Pattern dense alone keeps 1 of .* Give a sparser pattern"),
        ({"compression": 1.0, "rank_share": 0.2}, "compression must be a fraction from 0 up to below 1, not 1.0"),
        ({"compression": 0.5, "rank_share": -0.2}, "rank_share must be a fraction"),
        ({"rank_share": 0.2}, "a share of what --compression leaves"),
        ({"algorithm": "wanda", "compression": 0.5, "rank_share": 0.2}, "wanda has no low-rank part"),
        ({"algorithm": "wanda", "compression": 0.5, "pattern": "2:4"}, "--pattern or --compression, not both"),
        ({"allocate": "owl"}, "Give an unstructured --pattern"),
        ({"allocate": "owl", "pattern": "dense"}, "Give an unstructured --pattern"),
        ({"behind": "layer"}, "no order 'layer'; did you mean 'layers'\\? Choose one of: blocks, layers"),
        ({"allocate": "owls"}, "no allocation 'owls'; did you mean 'owl'\\? Choose one of: uniform, owl"),
        ({"layers": [{"match": "q", "pattern": "4:2"}]}, "Pattern 4:2"),
        ({"layers": [{"match": "q", "rank": -1}]}, "Give 0 or more"),
    ],
)
def test_budgets_that_contradict_themselves(changes, message):
    with pytest.raises(InputError, match=message):
        Recipe(**changes)


def test_rules_make_exceptions_and_the_later_one_wins():
    recipe = Recipe(
        pattern="0.5",
        rank=4,
        ignore=("k_proj", "layers.1.*"),
        layers=[{"match": "*.?_proj", "rank": 2}, Rule("layers.0.attn.q_proj", pattern="2:4"), Rule("down", rank=0)],
    )
    got = {
        name: recipe.budget(f"model.layers.{name}", (8, 8))
        for name in ("0.attn.q_proj", "0.attn.k_proj", "0.mlp.down", "0.mlp.letdown", "1.attn.q_proj", "2.attn.q_proj")
    }
    assert got == {
        "0.attn.q_proj": Budget(NM(2, 4), 2),
        "0.attn.k_proj": None,
        "0.mlp.down": Budget(Unstructured(0.5), 0),
        "0.mlp.letdown": Budget(Unstructured(0.5), 4),
        "1.attn.q_proj": None,
        "2.attn.q_proj": Budget(Unstructured(0.5), 2),
    }


def test_an_option_typed_on_the_command_line_is_the_one_in_a_file():
    typed = Recipe(options={"effort": "0.25", "max_steps": "7"})
    assert typed == Recipe(options={"effort": 0.25, "max_steps": 7})
    assert tomllib.loads(typed.to_toml())["options"] == {"effort": 0.25, "max_steps": 7}


def test_changed_is_a_checked_copy():
    before = Recipe()
    assert before.changed(seed=3, rank=2) == Recipe(seed=3, rank=2)
    assert before == Recipe()
    with pytest.raises(InputError, match="samples"):
        before.changed(samples=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.seed = 3


# What is refused


def test_wrong_types_are_tried_for_every_field():
    assert list(WRONG) == FIELDS


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_field_of_the_wrong_type(name, value):
    with pytest.raises(InputError, match=rf"Field {name} of a recipe must be |A \[\[{name}\]\]"):
        Recipe.from_toml(f"{name} = {value}")


@pytest.mark.parametrize("name", ["sample", "Seed", "quantise"])
def test_an_unknown_field_is_answered_with_the_list(name):
    with pytest.raises(InputError, match=f"no field '{name}'") as caught:
        Recipe.from_toml(f"{name} = 1")
    assert all(known in str(caught.value) for known in FIELDS)


def test_an_unknown_algorithm_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"no algorithm '3basl'; did you mean '3basil'\?"):
        Recipe(algorithm="3basl")
    with pytest.raises(InputError, match=r"did you mean 'magnitude'\?"):
        Recipe.from_toml('algorithm = "magnitud"')


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("3basil", {"efort": 1}, r"3basil has no option 'efort'; did you mean 'effort'\?"),
        ("3basil", {"effort": "much"}, "effort='much' is not usable: expected float above 0"),
        ("3basil", {"effort": 0}, "effort=0 is not usable: expected float above 0"),
        ("3basil", {"max_steps": 0}, "max_steps=0 is not usable: expected int at least 1"),
        ("3basil", {"schedule": "slow"}, r"schedule='slow' is not usable: expected joint \| paper \| literal"),
        ("three-basil", {"efort": 1}, "no option 'efort'"),
        ("magnitude", {"effort": 1}, r"magnitude has no option 'effort' \(it takes none\)"),
    ],
)
def test_options_that_the_algorithm_does_not_take(algorithm, options, message):
    with pytest.raises(InputError, match=message):
        Recipe(algorithm=algorithm, options=options)


@pytest.mark.parametrize("pattern", ["", "half", "2:", "2:4:8", "0:4", "5:4", "2:x", "1", "1.5", "-0.1", "nan", "inf"])
def test_patterns_that_are_none(pattern):
    with pytest.raises(InputError, match=r"Pattern|sparsity"):
        Recipe(pattern=pattern)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"seqlen": -3}, "seqlen must be at least 1, not -3"),
        ({"match": True, "match_epochs": 0}, "match_epochs must be above 0, not 0"),
        ({"match_lr": -1e-5}, "match_lr must be above 0"),
        ({"match_batch": -1}, "match_batch must be above 0"),
        (
            {"match_preset": "papers"},
            "no matching preset 'papers'; did you mean 'paper'\\? Choose one of: logits, blocks, paper",
        ),
        ({"damping": -0.1}, "damping must be a number that is not negative, not -0.1"),
        ({"relative_damping": -1.0}, "relative_damping must be a number that is not negative, not -1.0"),
    ],
)
def test_numbers_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        Recipe(**changes)


WITHOUT_EFFECT = {
    "match_preset": ("'paper'", "--match"),
    "match_epochs": ("3", "--match"),
    "match_lr": ("0.001", "--match"),
    "match_batch": ("4", "--match"),
    "owl_spread": ("0.1", "--allocate owl"),
    "owl_threshold": ("3.0", "--allocate owl"),
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused_in_a_file_too(name):
    value, needed = WITHOUT_EFFECT[name]
    option = f"--{name.replace('_', '-')}"
    said = f"{option} has no effect without {needed}. Add {needed}, or leave {option} out"
    with pytest.raises(InputError, match=re.escape(said)):
        Recipe.from_toml(f"{name} = {value}")
    turned_on = "match = true" if needed == "--match" else "allocate = 'owl'\npattern = '0.5'"
    assert Recipe.from_toml(f"{turned_on}\n{name} = {value}").to_dict()[name]


def test_what_is_turned_off_takes_along_what_only_it_needs():
    recipe = FULL.changed(match=False, allocate="uniform")
    assert {name: getattr(recipe, name) for name in WITHOUT_EFFECT} == {
        name: getattr(Recipe(), name) for name in WITHOUT_EFFECT
    }
    with pytest.raises(InputError, match="--match-lr has no effect"):
        FULL.changed(match=False, match_lr=1e-3)


@pytest.mark.parametrize("name", ["damping", "relative_damping"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_damping_that_is_not_finite(name, value):
    with pytest.raises(InputError, match=name):
        Recipe.from_toml(f"{name} = {value}")


@pytest.mark.parametrize("text", ["seed = ", "algorithm: wanda", "[recipe", "seed = 1\nseed = 2"])
def test_a_file_that_is_no_toml(text, tmp_path):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(InputError, match="not valid TOML"):
        Recipe.from_file(tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("ignore = " + "[" * 100_000 + "]" * 100_000, "nested too deeply", id="lists in lists"),
        pytest.param("options = " + "{a=" * 5000 + "1" + "}" * 5000, "nested too deeply", id="tables in tables"),
        pytest.param("seed = " + "9" * 5000, "4300 digits", id="a long number"),
        pytest.param("seed = 0x" + "f" * 5000, "at most 18 digits", id="a long hexadecimal number"),
        pytest.param("damping = 0x" + "f" * 5000, "damping must be", id="a long number for a fraction"),
        pytest.param("layers = [{match = 'q', rank = 0x" + "f" * 5000 + "}]", "rank", id="a long rank of a rule"),
        pytest.param("options = {max_steps = 0x" + "f" * 5000 + "}", "max_steps", id="a long number for an option"),
        pytest.param("pattern = '" + "9" * 5000 + ":4'", "Pattern", id="a long number in a pattern"),
        pytest.param(".".join(["a"] * 20_000) + " = 1", "dotted name", id="a dotted name"),
        pytest.param("[" + " . ".join(["'a'"] * 20_000) + "]", "dotted name", id="a dotted title"),
        pytest.param("options = {" + ".".join(['"a"'] * 20_000) + " = 1}", "dotted name", id="a dotted name inside"),
        pytest.param("# " + "x" * 2_000_000, "larger than 1,000,000 bytes", id="a large file"),
    ],
)
def test_what_would_take_long_or_break_the_parser_is_one_sentence(text, said, tmp_path):
    (tmp_path / "recipe.toml").write_text(text)
    start = time.process_time()
    with pytest.raises(InputError, match=said) as caught:
        Recipe.from_file(tmp_path / "recipe.toml")
    assert time.process_time() - start < 5  # 20,000 parts of a name take tomllib twice as long
    assert len(str(caught.value)) < 500
    assert str(caught.value).count("\n") == 0
    with pytest.raises(InputError, match=said):
        Recipe.from_toml(text)


def test_a_name_with_many_dots_in_a_text_is_read():
    names = [".".join(["layers", *"0123456789"])] * 50
    assert Recipe.from_toml(f"ignore = {names!r}").ignore == tuple(names)


def test_a_slip_in_the_name_of_a_field_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"A recipe has no field 'patern'; did you mean 'pattern'\? Choose one of: "):
        Recipe.from_toml("patern = '2:4'")


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.toml").write_bytes('calibration = "caf\xe9.txt"'.encode("latin-1"))
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "latin.toml"):
        with pytest.raises(InputError, match=f"The recipe {path} cannot be read"):
            Recipe.from_file(path)


PATIENT = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["wanda", "2:4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@PATIENT
@given(st.dictionaries(st.sampled_from([*FIELDS, "colour"]), ANYTHING, max_size=4))
def test_whatever_a_recipe_is_made_from_it_is_refused_in_a_sentence_or_comes_back(data):
    try:
        recipe = Recipe.from_dict(data)
    except InputError as error:
        assert str(error)  # noqa: PT017 - both are right
    else:
        assert Recipe.from_toml(recipe.to_toml()) == recipe


@PATIENT
@given(st.text(max_size=60))
def test_whatever_a_file_says_is_refused_in_a_sentence_or_read(text):
    try:
        assert isinstance(Recipe.from_toml(text), Recipe)
    except InputError as error:
        assert str(error)  # noqa: PT017 - both are right
