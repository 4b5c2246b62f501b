from typing import Literal

import pytest
import torch

import oracles
from sparlow.algorithms import Decomposition, Option, Pruner, _registry, algorithms, decomposer, find, pruner, solve
from sparlow.errors import InputError, RunError
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import NM, Unstructured

MAGNITUDE = find("magnitude")[0].function


@pytest.fixture(autouse=True)
def _registry_put_back(monkeypatch):
    """Register into a copy, so that nothing made here is left behind."""
    monkeypatch.setattr(_registry, "_ALGORITHMS", dict(_registry._ALGORITHMS))


@pytest.fixture
def mine():
    """A researcher's algorithm: some pruner, then the rest truncated, with an option of every kind."""

    @decomposer("mine-own", aliases={"mine-fast": {"rounds": 1, "metric": "plain"}})
    def mine_own(
        W,
        gram,
        pattern,
        rank,
        *,
        rounds: int = 3,
        shrink: float = 1.0,
        metric: Literal["plain", "gram"] = "gram",
        polish: bool = False,
        prune: Pruner = MAGNITUDE,
    ):
        """Prune, then truncate. Not seen elsewhere.

        More about it.
        """
        del rounds, metric, polish
        S = prune(W, gram, pattern)
        P, sigma, Qt = torch.linalg.svd(W - S)
        return Decomposition(S, P[:, :rank] * sigma[:rank] * shrink, Qt[:rank], {"iterations": 7})

    return find("mine-own")[0]


# --- looking up ------------------------------------------------------------------------------------------------------


def test_every_name_and_alias_is_found():
    for algorithm in algorithms():
        assert find(algorithm.name) == (algorithm, {})
        for alias, options in algorithm.aliases.items():
            assert find(alias) == (algorithm, options)


def test_algorithms_come_sorted_pruners_first():
    keys = [(a.kind != "pruner", a.name) for a in algorithms()]
    assert keys == sorted(keys)
    assert {a.kind for a in algorithms()} == {"pruner", "decomposer"}


def test_every_algorithm_says_in_one_sentence_what_it_does():
    for algorithm in algorithms():
        assert algorithm.summary.endswith("."), algorithm.name


def test_a_slip_of_the_finger_is_answered_with_the_nearest_name_and_the_list():
    with pytest.raises(InputError, match=r"'magnitud'; did you mean 'magnitude'\? Choose one of: .*wanda"):
        find("magnitud")


def test_a_wild_guess_is_answered_with_the_list():
    with pytest.raises(InputError, match=r"'zzz'\. Choose one of: .*magnitude") as caught:
        find("zzz")
    assert "did you mean" not in str(caught.value)


def test_an_alias_stands_for_options_and_cannot_be_spoilt(mine):
    algorithm, options = find("mine-fast")
    assert algorithm is mine
    assert options == {"rounds": 1, "metric": "plain"}
    options["rounds"] = 99
    assert find("mine-fast")[1]["rounds"] == 1


# --- registering -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mine-own", "mine-fast"])
def test_a_name_is_given_once(mine, name):
    for register in (pruner(name), decomposer("new", aliases={name: {}})):
        with pytest.raises(ValueError, match=name):
            register(lambda W, _gram, _pattern: W)
    assert "new" not in [a.name for a in algorithms()]
    assert find("mine-own")[0] is mine


def test_registering_gives_the_function_back():
    def function(W, _gram, pattern):
        return W * pattern.mask(W.abs())

    assert pruner("mine")(function) is function


def test_a_new_algorithm_is_listed_and_solves(mine):
    assert mine in algorithms()
    assert mine.summary == "Prune, then truncate. Not seen elsewhere."
    W, H = oracles.problem(24, 40, seed=0)
    gram = Gram.damped(H)
    found = solve(mine, W, gram, NM(2, 4), 3, mine.parse_options({"shrink": "0.5"}))
    assert torch.equal(found.S, MAGNITUDE(W, gram, NM(2, 4)))
    assert (found.U.shape, found.V.shape) == ((24, 3), (3, 40))
    assert torch.equal(found.dense(), found.S + found.U @ found.V)
    assert found.stats["iterations"] == 7  # its own word counts
    assert found.stats["relative_error"] == pytest.approx(gram.relative_error(W, W - found.dense()), rel=1e-4)


# --- options ---------------------------------------------------------------------------------------------------------


def test_the_signature_is_the_configuration(mine):
    assert list(mine.options) == ["rounds", "shrink", "metric", "polish", "prune"]
    assert {name: option.shown_default for name, option in mine.options.items()} == {
        "rounds": "3",
        "shrink": "1.0",
        "metric": "gram",
        "polish": "False",
        "prune": "magnitude",
    }
    choices = [option.choices for option in mine.options.values()]
    assert choices == ["int", "float", "plain | gram", "bool", "the name of a pruner"]


@pytest.mark.parametrize(
    ("annotation", "given", "expected"),
    [
        (int, "7", 7),
        (int, 7, 7),
        (int, 7.0, 7),
        (float, "0.5", 0.5),
        (float, "1e-3", 1e-3),
        (float, 2, 2.0),
        (bool, "true", True),
        (bool, "False", False),
        (bool, True, True),
        (Literal["a", "b"], "b", "b"),
        (Literal[4, 8], "8", 8),
        (Literal[4, 8], 8, 8),
        (str, "word", "word"),
    ],
)
def test_parse_takes_what_a_user_types_and_what_toml_holds(annotation, given, expected):
    parsed = Option("name", None, annotation).parse(given)
    assert parsed == expected
    assert type(parsed) is type(expected)


@pytest.mark.parametrize(
    ("annotation", "given"),
    [
        (int, "7.5"),
        (int, 7.5),
        (int, "many"),
        (int, None),
        (int, float("nan")),
        (float, "half"),
        (float, [1.0]),
        (bool, "yes"),
        (bool, 1),
        (Literal["a", "b"], "c"),
        (Literal["a", "b"], "A"),
        (Literal[4, 8], 16),
    ],
)
def test_parse_refuses_the_rest_and_says_what_it_expected(annotation, given):
    option = Option("name", None, annotation)
    with pytest.raises(InputError, match=r"name=.*expected") as caught:
        option.parse(given)
    assert str(caught.value).endswith(f"expected {option.choices}.")


@pytest.mark.parametrize(
    ("annotation", "given"),
    [(float, word) for word in ("nan", "inf", "-inf")] + [(int, float("inf"))],
)
def test_parse_refuses_what_is_not_finite(annotation, given):
    with pytest.raises(InputError, match="expected"):
        Option("name", None, annotation).parse(given)


@pytest.mark.parametrize("annotation", [int, float])
@pytest.mark.parametrize("given", [True, False])
def test_parse_does_not_take_true_for_a_number(annotation, given):
    with pytest.raises(InputError, match="expected"):
        Option("name", None, annotation).parse(given)


def test_a_pruner_is_chosen_by_name(mine):
    option = mine.options["prune"]
    assert option.parse("wanda") is find("wanda")[0].function
    with pytest.raises(InputError, match="did you mean 'wanda'"):
        option.parse("wand")
    with pytest.raises(InputError, match="the name of a pruner"):
        option.parse("mine-own")


def test_a_solve_uses_the_pruner_that_was_chosen(mine):
    W, H = oracles.problem(24, 40, seed=0)
    gram = Gram.damped(H)
    found = solve(mine, W, gram, NM(2, 4), 3, mine.parse_options({"prune": "wanda"}))
    assert torch.equal(found.S, find("wanda")[0].function(W, gram, NM(2, 4)))


def test_a_pruner_chosen_by_an_alias_brings_the_options_of_the_alias(mine):
    @pruner("scaled", aliases={"scaled-double": {"factor": 2.0}})
    def scaled(W, _gram, pattern, *, factor: float = 1.0):
        return factor * W * pattern.mask(W.abs())

    W = torch.ones(4, 8)
    assert mine.options["prune"].parse("scaled-double")(W, Gram.identity(8), NM(2, 4)).max() == 2


def test_parse_options_parses_each_by_its_type(mine):
    given = {"rounds": "4", "polish": "true", "metric": "plain"}
    assert mine.parse_options(given) == {"rounds": 4, "polish": True, "metric": "plain"}
    assert mine.parse_options({}) == {}


def test_parse_options_names_the_option_that_was_meant(mine):
    with pytest.raises(
        InputError, match=r"mine-own has no option 'round'; did you mean 'rounds'\? Choose one of: .*shrink"
    ):
        mine.parse_options({"round": 3})


def test_an_algorithm_without_options_says_so():
    with pytest.raises(InputError, match=r"has no option 'effort' \(it takes none\)"):
        find("magnitude")[0].parse_options({"effort": 1})


def test_defaults_pass_their_own_parser():
    for algorithm in algorithms():
        for name, option in algorithm.options.items():
            assert option.parse(option.shown_default) == option.default, (algorithm.name, name)


# --- a result is not believed ----------------------------------------------------------------------------------------


def _right(W, gram, rank):
    S = MAGNITUDE(W, gram, NM(2, 4))
    P, sigma, Qt = torch.linalg.svd(W - S)
    return S, P[:, :rank] * sigma[:rank], Qt[:rank]


WRONG = {
    "breaks the pattern": (lambda W, _S, U, V: (W, U, V), "broke the pattern: S"),
    "breaks the rank": (lambda _W, S, U, V: (S, U[:, :2], V[:2]), r"U of shape \(8, 2\), not \(8, 3\)"),
    "factors that do not meet": (lambda _W, S, U, V: (S, U, V[:1]), r"V of shape \(1, 16\), not \(3, 16\)"),
    "a row that adds itself to all": (lambda _W, S, U, V: (S[:1], U, V), r"S of shape \(1, 16\), not \(8, 16\)"),
    "whole numbers": (lambda _W, S, U, V: (S.round().to(torch.int32), U, V), "S as torch.int32"),
    "complex numbers": (lambda _W, S, U, V: (S, U + 0j, V), "U as torch.complex64"),
    "another device": (lambda _W, S, U, V: (S, U, V.to("meta")), "V as torch.float32 on meta"),
    "no tensor": (lambda _W, S, U, V: (S.tolist(), U, V), "list and no tensor for S"),
    "not finite": (lambda _W, S, U, V: (S, U * float("nan"), V), "not finite"),
    "W changed in place": (lambda W, S, U, V: (W.mul_(0) + S, U, V), "changed W or H in place"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_decomposition_that_is_not_what_was_asked_for_is_refused_with_the_name_of_its_method(wrong):
    changed, said = WRONG[wrong]

    @decomposer("liar")
    def liar(W, gram, _pattern, rank):
        """Answer something else."""
        return Decomposition(*changed(W, *_right(W, gram, rank)))

    W, H = oracles.problem(8, 16, 0)
    with pytest.raises(RunError, match=f"liar.*{said}"):
        solve(find("liar")[0], W, Gram.damped(H), NM(2, 4), 3, {})


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda W: W, "broke the pattern"),
        (lambda W: W.new_zeros(1), "of shape"),
        (lambda W: (W,), "tuple and no tensor"),
        (lambda _: None, "NoneType and no tensor"),
    ],
)
def test_a_pruner_that_does_not_prune_is_refused_with_its_name(answer, said):
    @pruner("idle")
    def idle(W, _gram, _pattern):
        """Answer something else."""
        return answer(W)

    W, H = oracles.problem(8, 16, 0)
    for pattern in (NM(2, 4), Unstructured(0.5)):
        with pytest.raises(RunError, match=f"idle.*{said}"):
            solve(find("idle")[0], W, Gram.damped(H), pattern, 0, {})


def test_a_tuple_in_place_of_a_decomposition_is_refused():
    @decomposer("bare")
    def bare(W, gram, _pattern, rank):
        """Answer a tuple."""
        return _right(W, gram, rank)

    W, H = oracles.problem(8, 16, 0)
    with pytest.raises(RunError, match="bare returned a tuple and no Decomposition"):
        solve(find("bare")[0], W, Gram.damped(H), NM(2, 4), 3, {})
