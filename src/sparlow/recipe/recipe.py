"""A recipe: everything that decides the result of a compression, as one frozen record and one TOML file."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from sparlow.errors import InputError
from sparlow.recipe.allocation import (
    LEVELS,
    VALUES,
    Budget,
    Rule,
    Shape,
    matches,
    ratio_rank,
    ratio_share,
    ratio_sparsity,
)
from sparlow.recipe.contradictions import require_budget, require_values
from sparlow.recipe.named import is_name, text_of
from sparlow.report.value_types import MODEL
from sparlow.schema import (
    ABOVE_0,
    FRACTION,
    NOT_NEGATIVE,
    Choices,
    Doc,
    FileOnly,
    Needs,
    Panel,
    Unset,
    at_least,
    check_fields,
    documented,
    idle,
    options_of,
    require_effect,
    require_known,
    values_of,
)

if TYPE_CHECKING:  # the command line reads the fields without torch, see the imports inside functions
    from torch import Tensor

    from sparlow.algorithms import Algorithm
    from sparlow.linalg.grid import Grid
    from sparlow.linalg.patterns import NM, Pattern
    from sparlow.recipe.bits import Asked

    Calibration = str | Path | Sequence[str] | Tensor  # what stands for calibration text wherever Python takes it

# Columns of a group where no pattern is asked for. 16:32 costs the bytes of 2:4, and keeps better weights.
DEFAULT_GROUPS = (32, 16, 8, 4)
DEFAULT_RANK = 64  # of methods with a low-rank part: 2.4 % of the linear weights of an 8B Llama
AUTO, KEEP_ENDS = "auto", "keep"
ENDS = (AUTO, KEEP_ENDS, "int8", "int4")  # ways to store the embedding and the output head
FACTORS = ("auto", MODEL, "int8")
ALLOCATIONS = ("uniform", "owl", "error")
MATCH_PRESETS = ("logits", "blocks", "paper")  # training_plan.PRESETS says what each of them is
GIVEN_WINDOWS = "windows"  # what a recipe calls a calibration by token windows given directly
GIVEN_TEXTS = "texts"  # and one by texts
OWN_TEXT = "self"  # the calibration that the model writes itself
BEHIND = ("blocks", "layers")  # what is compressed already where a layer's statistics are taken
BOS = ("auto", "always", "never")  # text.beginning says what each of them is
LARGEST = 1_000_000  # bytes of a recipe file; the longest that were ever seen have some thousands
TOO_LARGE = f"The recipe is larger than {LARGEST:,} bytes. Give a TOML file with the fields of a recipe."
KEEP, CALIBRATION, SOLVER, MATCHING = map(Panel, ("What to keep", "Calibration", "Solver", "Matching"))
PRESETS_OWN = Unset("the preset's")
MATCH_ONLY, OWL_ONLY = Needs("match", value=True, said="--match"), Needs("allocate", "owl", "--allocate owl")

_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rf"(?<![\w-]){_PART}(?:[ \t]*\.[ \t]*{_PART}){{100}}")  # tomllib takes quadratic time for such


@documented
@dataclass(frozen=True)
class Recipe:
    """What is done to every linear layer, and on which text."""

    algorithm: Annotated[str, Doc("Compression algorithm; `sparlow algorithms` lists all of them."), SOLVER] = "3basil"
    options: Annotated[
        Mapping[str, Any],
        Doc("Options of the algorithm itself, by name; they are checked against its signature."),
        FileOnly(),
        SOLVER,
    ] = field(default_factory=dict)
    pattern: Annotated[
        str | None,
        Doc(
            "Pattern of the sparse part: N:M such as 16:32 or 2:4 keeps N of every M entries; a fraction is what is "
            "removed, so 0.25 keeps 75 %. dense keeps every entry: for values on a grid."
        ),
        Unset("16:32, or 8:16, 4:8, 2:4 where 32 does not divide the inputs of a layer"),
        KEEP,
    ] = None
    rank: Annotated[
        int | None,
        Doc("Rank of the low-rank part."),
        Unset(f"{DEFAULT_RANK}, or less where a layer would take more than dense; 0 if the algorithm only prunes"),
        KEEP,
    ] = None
    bits: Annotated[
        float | None,
        Doc(
            "Bits that a compressed weight may take, over all layers and with everything that is stored of them. "
            "Pattern, values and ranks are chosen for it, as far as they are not given."
        ),
        ABOVE_0,
        KEEP,
    ] = None
    size: Annotated[
        str | None,
        Doc(
            "Bytes that the whole file may take, such as 300MB, or 35% of the dense model's. What else is stored is "
            "subtracted, and the bits that are left are spent as by --bits."
        ),
        KEEP,
    ] = None
    embedding: Annotated[
        str,
        Doc(
            "How the embedding is stored: keep (as it is), int8 or int4. auto takes int8 where the compressed weights "
            "take below 9 bits each."
        ),
        Choices("way to store an embedding", ENDS),
        KEEP,
    ] = AUTO
    head: Annotated[
        str,
        Doc("How the output head is stored, likewise; of a model that ties the two, as its embedding."),
        Choices("way to store an output head", ENDS),
        KEEP,
    ] = AUTO
    compression: Annotated[
        float | None,
        Doc(
            "Fraction of each layer's values that is removed. Give it with a pattern or a rank share: the rank follows."
        ),
        FRACTION,
        KEEP,
    ] = None
    rank_share: Annotated[
        float | None, Doc("Share of the kept values that goes to the low-rank part."), FRACTION, KEEP
    ] = None
    values: Annotated[
        str | None,
        Doc(
            "Type of the values of S: model (that of the model's weights), or whole numbers of so many bits times a "
            "scale, which the algorithm takes into account while it solves."
        ),
        Choices("type of values", VALUES),
        Unset("model, or what --bits chooses"),
        KEEP,
    ] = None
    levels: Annotated[
        str,
        Doc(
            "Levels of int values: integer (the only ones that other programs read), half (integers and a half, so no "
            "zero), book (learned for each layer), auto (integer for int8, book below)."
        ),
        Choices("kind of levels", LEVELS),
        KEEP,
    ] = "auto"
    group: Annotated[
        str | None,
        Doc("Columns of a row that share a scale of int values: a number such as 64, or row for all."),
        Unset("128, or fewer where --bits chooses so"),
        KEEP,
    ] = None
    factors: Annotated[
        str,
        Doc("Type of U and V: model, int8, or auto (int8 where the values of S are int)."),
        Choices("type of factors", FACTORS),
        KEEP,
    ] = "auto"
    allocate: Annotated[
        str,
        Doc(
            "How the budget is divided among layers. owl gives more to blocks with more outliers and needs an "
            "unstructured pattern; error keeps the total and gives more where the layers' errors fall most."
        ),
        Choices("allocation", ALLOCATIONS),
        KEEP,
    ] = "uniform"
    owl_spread: Annotated[
        float, Doc("OWL λ: block densities vary over a range of 2λ."), NOT_NEGATIVE, OWL_ONLY, KEEP
    ] = 0.08
    owl_threshold: Annotated[
        float,
        Doc("OWL M: an outlier exceeds this many times the mean score of its block."),
        NOT_NEGATIVE,
        OWL_ONLY,
        KEEP,
    ] = 5.0
    match: Annotated[
        bool,
        Doc(
            "Train what is kept towards the dense model after compression. Zeros stay zero; of values on a grid the "
            "scales are trained."
        ),
        MATCHING,
    ] = False
    match_preset: Annotated[
        str,
        Doc(
            "How to match. logits trains all blocks together towards the dense model's logits, and needs the whole "
            "model, its gradients and Adam's state in memory; blocks trains each block by itself towards the dense "
            "model's output at its place; paper does so in the published setting."
        ),
        Choices("matching preset", MATCH_PRESETS),
        MATCH_ONLY,
        MATCHING,
    ] = "logits"
    match_epochs: Annotated[
        int | None, Doc("Maximum number of epochs."), ABOVE_0, PRESETS_OWN, MATCH_ONLY, MATCHING
    ] = None
    match_lr: Annotated[
        float | None,
        Doc("Learning rate of Adam. logits gives U and V a quarter of it, scales of a grid have more."),
        ABOVE_0,
        PRESETS_OWN,
        MATCH_ONLY,
        MATCHING,
    ] = None
    match_batch: Annotated[
        int | None, Doc("Calibration windows in each training step."), ABOVE_0, PRESETS_OWN, MATCH_ONLY, MATCHING
    ] = None
    ignore: Annotated[
        Sequence[str], Doc("Layers to leave dense, by the end of their names. * and ? are wildcards."), KEEP
    ] = ()
    layers: Annotated[
        Sequence[Rule],
        Doc("Rules for single layers, as [[layers]] tables with match, pattern, rank and values. A later rule wins."),
        FileOnly(),
        KEEP,
    ] = ()
    calibration: Annotated[
        str,
        Doc("Calibration text: c4, wikitext2, ptb, builtin, self (the model writes it), a file or a hub data set."),
        CALIBRATION,
    ] = "c4"
    samples: Annotated[int, Doc("Number of calibration windows."), at_least(1), CALIBRATION] = 128
    seqlen: Annotated[int, Doc("Tokens in each calibration window."), at_least(1), CALIBRATION] = 2048
    seed: Annotated[int, Doc("Random seed for selecting the calibration windows."), CALIBRATION] = 0
    bos: Annotated[
        str,
        Doc(
            "Whether calibration windows begin with the beginning-of-text token, within their seqlen. auto does so "
            "where the tokenizer adds one by itself."
        ),
        Choices("way to begin a window", BOS),
        CALIBRATION,
    ] = "auto"
    column: Annotated[
        str, Doc("Column that holds the text, where a file or a hub data set is a table."), CALIBRATION
    ] = "text"
    damping: Annotated[
        float, Doc("Absolute damping: adds this × mean(diag H) to the diagonal of H."), NOT_NEGATIVE, SOLVER
    ] = 0.005
    relative_damping: Annotated[
        float, Doc("Relative damping: adds this × diag(H) to the diagonal of H."), NOT_NEGATIVE, SOLVER
    ] = 0.005
    behind: Annotated[
        str,
        Doc(
            "What is compressed already when the inputs of a layer are observed: blocks, all blocks before its own, as "
            "published; layers, the layers of its own block that it is computed from, too."
        ),
        Choices("order", BEHIND),
        SOLVER,
    ] = "blocks"
    dtype: Annotated[
        str, Doc("Data type of the model's weights: auto (as stored), float32, bfloat16 or float16."), Panel("Machine")
    ] = "auto"

    def __post_init__(self) -> None:
        for name, kinds in (("group", (int,)), ("pattern", (float,))):
            value: object = getattr(self, name)
            if type(value) in kinds:  # as a number in TOML or Python
                object.__setattr__(self, name, str(value))
        check_fields(self, "a recipe")
        algorithm = self.found_algorithm
        _ = self.parsed_options  # raises for one that is wrong
        object.__setattr__(self, "options", algorithm.plain_options(self.options))
        rules = (rule if isinstance(rule, Rule) else Rule.from_dict(rule) for rule in self.layers)
        object.__setattr__(self, "layers", tuple(rules))
        values = values_of(self)
        require_effect(
            [name for name, option in options_of(Recipe).items() if values[name] != option.default], values, Recipe
        )
        require_budget(self)
        require_values(self)

    def grid_of(self, values: str | None) -> "Grid | None":
        """The grid that values of this type lie on."""
        from sparlow.linalg.grid import GROUP, make_grid

        return make_grid(values or MODEL, self.levels, GROUP if self.group is None else self.group)

    @property
    def chooses(self) -> bool:
        """Whether pattern, values and ranks are chosen for a number of bits."""
        return self.bits is not None or self.size is not None

    def asked(self, bits: float) -> "Asked":
        """What a choice for so many bits must keep to."""
        from sparlow.linalg.patterns import parse_pattern
        from sparlow.recipe.bits import Asked

        return Asked(
            bits,
            low_rank=self.found_algorithm.kind != "pruner",
            pattern=None if self.pattern is None else parse_pattern(self.pattern),
            values=self.values,
            levels=self.levels,
            group=self.group,
            factors=self.factors,
            rank=self.rank,
        )

    def budget(self, name: str, shape: Shape, uniform: Budget | None = None) -> Budget | None:
        """Return the budget of a layer before any allocation by data; None if it stays dense.

        Args:
            name: Its full name in the model.
            shape: (out, in).
            uniform: What it gets unless a rule says otherwise; the recipe's own if left out.
        """
        from sparlow.linalg.patterns import parse_pattern

        if any(matches(pattern, name) for pattern in self.ignore):
            return None
        found = uniform or self._on(self.grid_of(self.values), self.uniform(shape))
        for rule in self.layers:
            if matches(rule.match, name):
                pattern = found.pattern if rule.pattern is None else parse_pattern(rule.pattern)
                found = dataclasses.replace(found, pattern=pattern, rank=found.rank if rule.rank is None else rule.rank)
                found = found if rule.values is None else self._on(self.grid_of(rule.values), found)
        return found

    def _on(self, grid: "Grid | None", budget: Budget) -> Budget:
        return dataclasses.replace(budget, grid=grid, int8_factors=self.int8_factors(grid))

    def int8_factors(self, grid: "Grid | None") -> bool:
        """Whether U and V of a layer whose values lie on this grid are stored in int8."""
        wanted = self.factors == "int8" or (self.factors == "auto" and grid is not None)
        return wanted and self.found_algorithm.kind != "pruner"

    def has_rule(self, name: str) -> bool:
        """Whether a rule says anything about the layer of this full name."""
        return any(matches(rule.match, name) for rule in self.layers)

    def rules_pattern(self, name: str) -> bool:
        """Whether a rule gives the layer of this full name a pattern, which an allocation then leaves alone."""
        return any(rule.pattern is not None and matches(rule.match, name) for rule in self.layers)

    def takes_default_pattern(self, name: str) -> bool:
        """Whether nothing that was asked for decides the pattern of the layer of this full name."""
        chosen = self.chooses or self.compression is not None
        return self.pattern is None and not chosen and not self.rules_pattern(name)

    def gives_rank(self, name: str) -> bool:
        """Whether the rank of the layer of this full name was asked for; else it is a default or a consequence."""
        ruled = any(rule.rank is not None and matches(rule.match, name) for rule in self.layers)
        return self.rank is not None or ruled

    @property
    def pattern_of_all(self) -> "Pattern":
        """The pattern of S where no rule says otherwise."""
        return self.uniform((1, 1)).pattern

    def uniform(self, shape: Shape) -> Budget:
        """Return the pattern and the rank of a layer (out, in) for which nothing else was chosen."""
        from sparlow.linalg.patterns import Unstructured, parse_pattern

        if self.compression is None:
            default = 0 if self.found_algorithm.kind == "pruner" else DEFAULT_RANK
            return Budget(
                default_pattern(shape[1]) if self.pattern is None else parse_pattern(self.pattern),
                default if self.rank is None else self.rank,
            )
        if self.found_algorithm.kind == "pruner":
            return Budget(Unstructured(self.compression), 0)
        if self.pattern is None:
            share = self.rank_share or 0.0
            pattern: Pattern = Unstructured(ratio_sparsity(self.compression, share))
        else:
            pattern = parse_pattern(self.pattern)
            share = ratio_share(self.compression, pattern)
        return Budget(pattern, ratio_rank(self.compression, share, shape))

    @property
    def found_algorithm(self) -> "Algorithm":
        """The registered algorithm behind the name or alias."""
        from sparlow.algorithms import find

        return find(self.algorithm)[0]

    @property
    def parsed_options(self) -> dict[str, Any]:
        """The options as the algorithm's function takes them, those of an alias included."""
        from sparlow.algorithms import find

        algorithm, implied = find(self.algorithm)
        return algorithm.parse_options({**implied, **self.options})

    def to_dict(self) -> dict[str, Any]:
        """All fields, in order; what is None is left out, for TOML has no null."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"ignore": list(self.ignore), "layers": [rule.to_dict() for rule in self.layers]}
        return {name: _plain(value) for name, value in values.items() if value is not None and value != []}

    def to_toml(self) -> str:
        """The recipe as a file that ``from_toml`` reads back to an equal recipe."""
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """Check names and types, and build the recipe; InputError says what is wrong."""
        require_known(data, cls, "A recipe")
        return cls(**data)

    @classmethod
    def from_toml(cls, text: str) -> "Recipe":
        """Read what ``to_toml`` writes; fields left out take their defaults."""
        if len(text) > LARGEST:
            raise InputError(TOO_LARGE)
        if _LONG_KEY.search(text):
            raise InputError("The recipe holds a dotted name of more than 100 parts. No field of a recipe has so many.")
        try:
            return cls.from_dict(tomllib.loads(text))
        except RecursionError:
            raise InputError("The recipe is not usable: its lists or tables are nested too deeply.") from None
        except InputError:
            raise
        except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
            raise InputError(f"The recipe is not valid TOML: {error}.") from None

    @classmethod
    def from_file(cls, path: str | Path) -> "Recipe":
        """Read a TOML file, or the packaged recipe of this name.

        Raises:
            InputError: There is neither, or it is no recipe.
        """
        if is_name(path) and not Path(path).exists():
            return cls.from_toml(text_of(str(path)))
        if Path(path).suffix.lower() in (".yaml", ".yml", ".json"):
            raise InputError(
                f'{path} is not TOML, as recipes are. Write it as a .toml file, with lines such as pattern = "2:4".'
            )
        try:
            with Path(path).open("rb") as file:
                data = file.read(LARGEST + 1)
            if len(data) > LARGEST:
                raise InputError(TOO_LARGE)
            return cls.from_toml(data.decode("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The recipe {path} cannot be read: {error}.") from None

    def with_fields(self, fields: Mapping[str, Any]) -> "Recipe":
        """Return a copy with fields that a user gives; another algorithm does not take over the options of this one.

        Raises:
            InputError: One of them is wrong, or has no effect.
        """
        changes = dict(fields)
        if changes.get("algorithm", self.algorithm) != self.algorithm:
            changes.setdefault("options", {})
        found = self.changed(**changes)
        require_effect(changes, values_of(found), Recipe)  # also for what was given and is the default
        return found

    def changed(self, **changes: Any) -> "Recipe":  # noqa: ANN401 - fields have many types
        """Return a copy with some fields replaced; those that thereby have no effect go back to their defaults."""
        without = idle(values_of(self) | changes, Recipe).keys() - changes.keys()
        defaults = {name: options_of(Recipe)[name].default for name in without}
        return dataclasses.replace(self, **{**defaults, **changes})


def default_pattern(columns: int) -> "NM":
    """Return the pattern of a layer with so many inputs where none is given: half of the largest group that fits.

    Where none fits, the layer stays dense, see ``budgets``.
    """
    from sparlow.linalg.patterns import NM

    size = next((size for size in DEFAULT_GROUPS if columns % size == 0), DEFAULT_GROUPS[0])
    return NM(size // 2, size)


RecipeLike = Recipe | Mapping[str, Any] | str | Path  # what stands for a recipe wherever Python takes one


def as_recipe(given: RecipeLike | None, fields: Mapping[str, Any] = MappingProxyType({})) -> Recipe:
    """Return a recipe from what a caller may give for one.

    Args:
        given: Itself, its fields as a dict, the path of its file, the name of a packaged one, or None for the defaults.
        fields: Of it, in the place of what ``given`` says.

    Raises:
        InputError: It is none of these, or holds what no recipe can.
    """
    require_known(fields, Recipe, "A recipe")
    if isinstance(given, str | Path):
        found = Recipe.from_file(given)
    elif isinstance(given, Mapping):
        found = Recipe.from_dict(given)
    elif given is None or isinstance(given, Recipe):
        found = given or Recipe()
    else:
        raise InputError(f"A recipe cannot be given as a {type(given).__name__}. Give a Recipe, a dict or a TOML file.")
    return found.with_fields(fields) if fields else found


def with_calibration(recipe: Recipe, calibration: "Calibration | None") -> Recipe:
    """Put a calibration given beside the recipe into it."""
    if calibration is None:
        return recipe
    if isinstance(calibration, str | Path):
        return recipe.changed(calibration=str(calibration))
    if isinstance(calibration, list | tuple) and calibration and all(isinstance(text, str) for text in calibration):
        return recipe.changed(calibration=GIVEN_TEXTS)
    import torch

    if not isinstance(calibration, torch.Tensor):
        raise InputError(
            f"Calibration text cannot be given as a {type(calibration).__name__}. Give the name of a corpus, the path "
            "of a file (.txt, or .jsonl with one text a line), a list of texts, or a tensor (windows, seqlen) of int64 "
            "token ids."
        )
    if calibration.ndim != 2 or calibration.dtype != torch.int64 or calibration.numel() == 0:  # noqa: PLR2004 - a matrix
        raise InputError("Calibration windows must be a tensor (windows, seqlen) of int64 token ids.")
    for name, count in zip(("samples", "seqlen"), calibration.shape, strict=True):
        asked = getattr(recipe, name)
        if asked not in (count, options_of(Recipe)[name].default):
            raise InputError(
                f"The recipe says {name} = {asked}, and the windows given have {count}. Leave it out of the recipe."
            )
    return recipe.changed(calibration=GIVEN_WINDOWS, samples=calibration.shape[0], seqlen=calibration.shape[1])


def _plain(value: Any) -> Any:  # noqa: ANN401 - fields have many types
    return dict(value) if isinstance(value, Mapping) else value
