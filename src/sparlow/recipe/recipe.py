"""A recipe: everything that decides the result of a compression, as one frozen record and one TOML file."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor

from sparlow.algorithms import Algorithm, find
from sparlow.errors import InputError
from sparlow.linalg.patterns import NM, Pattern, Unstructured, parse_pattern
from sparlow.recipe.allocation import Budget, Rule, Shape, matches, ratio_rank, ratio_share, ratio_sparsity

OPTIONAL = ("pattern", "rank", "compression", "rank_share", "match_epochs", "match_lr", "match_batch")  # may be None
DEFAULT_GROUPS = (
    32,
    16,
    8,
    4,
)  # columns of a group; 16:32 ends at a third of the extra perplexity of 2:4 at the same bytes
ALLOCATIONS = ("uniform", "owl", "error")
MATCH_PRESETS = ("logits", "blocks", "paper")
GIVEN_WINDOWS = "windows"  # what a recipe calls a calibration by token windows given directly
OWN_TEXT = "self"  # the calibration that the model writes itself
DEFAULT_RANK = 64  # of methods with a low-rank part: 2.4 % of the linear weights of an 8B Llama


@dataclass(frozen=True)
class Recipe:
    """What is done to every linear layer, and on which text.

    Attributes:
        algorithm: A name printed by ``sparlow algorithms``.
        options: The algorithm's own options; names and values are checked against its signature.
        pattern: ``"2:4"`` (N:M) or ``"0.5"`` (the fraction removed); None stands for 16:32 (a layer whose inputs 32
            does not divide takes 8:16, 4:8 or 2:4), or for what follows from ``compression``.
        rank: Rank of the low-rank part; None stands for 64, or 0 if the algorithm only prunes, or for what follows
            from ``compression``.
        compression: Fraction of the values of every layer that is removed; instead of a rank. With a pattern the
            low-rank part gets what is left; without one, ``rank_share`` of it. A pruner removes just this fraction.
        rank_share: Share of the values kept that goes to the low-rank part.
        allocate: "uniform"; "owl": more for blocks with more outliers (needs an unstructured pattern); or "error":
            as many values in all, given where the layers' relative errors fall most (ranks, and densities where the
            pattern is unstructured).
        owl_spread: Of OWL, λ: the densities of the blocks span 2λ.
        owl_threshold: Of OWL, M: an outlier exceeds so many times the mean score of its block.
        match: Train what is kept towards the dense model after layers are compressed; zeros stay zero.
        match_preset: "logits": all blocks together towards the dense model's logits, which needs the whole model in
            memory, with gradients; "blocks": each block by itself, towards what the dense model has at its place;
            "paper": likewise, in the published setting.
        match_epochs: At most so many; None for the preset's, as below.
        match_lr: Learning rate of Adam; "logits" gives U and V a quarter of it.
        match_batch: Windows a step.
        ignore: Layers that stay dense, by ``match`` as in a rule.
        layers: Rules for single layers; a later one wins.
        calibration: Name of a corpus, a file or a hub data set; "self" for text that the model writes itself; "windows"
            stands for token windows given directly.
        samples: Calibration windows.
        seqlen: Tokens in a window.
        seed: Of the choice of windows.
        damping: Times mean(diag H), added to the diagonal of H.
        relative_damping: Times diag(H), added likewise.
        dtype: Of the model's weights: auto (as stored), float32, bfloat16 or float16.
    """

    algorithm: str = "3basil"
    options: Mapping[str, Any] = field(default_factory=dict)
    pattern: str | None = None
    rank: int | None = None
    compression: float | None = None
    rank_share: float | None = None
    allocate: str = "uniform"
    owl_spread: float = 0.08
    owl_threshold: float = 5.0
    match: bool = False
    match_preset: str = "logits"
    match_epochs: int | None = None
    match_lr: float | None = None
    match_batch: int | None = None
    ignore: Sequence[str] = ()
    layers: Sequence[Rule] = ()
    calibration: str = "c4"
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    damping: float = 0.005
    relative_damping: float = 0.005
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_type(f.name, getattr(self, f.name))
        algorithm, implied = find(self.algorithm)
        algorithm.parse_options({**implied, **self.options})
        object.__setattr__(self, "options", algorithm.plain_options(self.options))
        object.__setattr__(self, "ignore", tuple(self.ignore))
        rules = (rule if isinstance(rule, Rule) else Rule.from_dict(rule) for rule in self.layers)
        object.__setattr__(self, "layers", tuple(rules))
        self._check_numbers()
        self._check_matching()
        self._check_budget()

    def _check_numbers(self) -> None:
        for name in ("samples", "seqlen"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("damping", "relative_damping", "owl_spread", "owl_threshold"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number that is not negative, not {getattr(self, name)}.")
        for name in ("compression", "rank_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"{name} must be a fraction from 0 up to below 1, not {value}.")
        if self.match_preset not in MATCH_PRESETS:
            raise InputError(
                f"There is no preset {self.match_preset!r} of matching; there is: {', '.join(MATCH_PRESETS)}."
            )
        if self.allocate not in ALLOCATIONS:
            raise InputError(f"There is no allocation {self.allocate!r}; there is: {', '.join(ALLOCATIONS)}.")

    def _check_matching(self) -> None:
        for name in ("match_epochs", "match_lr", "match_batch"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be above 0, not {value}.")

    def _check_budget(self) -> None:
        """Pattern and rank, or the compression they follow from: neither too little is given nor too much."""
        prunes = self.found_algorithm.kind == "pruner"
        if self.rank_share is not None and (prunes or self.compression is None):
            why = f"{self.algorithm} has no low-rank part" if prunes else "it is a share of what --compression leaves"
            raise InputError(f"--rank-share cannot be used here: {why}.")
        if self.compression is not None and self.rank is not None:
            raise InputError("Give --pattern and --rank, or --compression; a rank follows from the compression.")
        if self.compression is not None and (self.pattern is None) == (self.rank_share is None) and not prunes:
            raise InputError("Beside --compression give either --rank-share or --pattern: the rest follows.")
        if self.compression is not None and self.pattern is not None and prunes:
            raise InputError(f"{self.algorithm} only prunes: give --pattern or --compression, not both.")
        uniform = self._uniform((1, 1))
        if isinstance(uniform.pattern, NM) and self.allocate == "owl":
            raise InputError("OWL gives every block a density of its own: give an unstructured --pattern such as 0.5.")
        if isinstance(uniform.pattern, NM) and self.allocate == "error" and not (uniform.rank or self.compression):
            raise InputError(
                f"With {uniform.pattern} an allocation by error moves ranks, and there is no low-rank part here: "
                "give a --rank, or an unstructured --pattern such as 0.5."
            )

    def budget(self, name: str, shape: Shape) -> Budget | None:
        """What a layer may keep before the data have a say; None if it stays dense.

        Args:
            name: Its full name in the model.
            shape: (out, in).
        """
        if any(matches(pattern, name) for pattern in self.ignore):
            return None
        uniform = self._uniform(shape)
        pattern, rank = uniform.pattern, uniform.rank
        for rule in self.layers:
            if matches(rule.match, name):
                pattern = pattern if rule.pattern is None else parse_pattern(rule.pattern)
                rank = rank if rule.rank is None else rule.rank
        return Budget(pattern, rank)

    def has_rule(self, name: str) -> bool:
        """Whether a rule says anything about the layer of this full name."""
        return any(matches(rule.match, name) for rule in self.layers)

    def rules_pattern(self, name: str) -> bool:
        """Whether a rule gives the layer of this full name a pattern, which an allocation then leaves alone."""
        return any(rule.pattern is not None and matches(rule.match, name) for rule in self.layers)

    @property
    def pattern_of_all(self) -> Pattern:
        """The pattern of S where no rule says otherwise."""
        return self._uniform((1, 1)).pattern

    def _uniform(self, shape: Shape) -> Budget:
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
    def found_algorithm(self) -> Algorithm:
        """The registered algorithm behind the name or alias."""
        return find(self.algorithm)[0]

    @property
    def parsed_options(self) -> dict[str, Any]:
        """The options as the algorithm's function takes them, those of an alias included."""
        algorithm, implied = find(self.algorithm)
        return algorithm.parse_options({**implied, **self.options})

    def to_dict(self) -> dict[str, Any]:
        """All fields, in order; what is None is left out, for TOML has no null."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"ignore": list(self.ignore), "layers": [rule.to_dict() for rule in self.layers]}
        return {name: _plain(value) for name, value in values.items() if value is not None and value != []}

    def to_toml(self) -> str:
        """The recipe as a file that ``from_toml`` reads back to an equal recipe."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """Check names and types, and build the recipe; InputError says what is wrong."""
        known = [f.name for f in fields(cls)]
        for name, value in data.items():
            if name not in known:
                raise InputError(f"A recipe has no field {name!r}; there is: {', '.join(known)}.")
            _check_type(name, value)
        values: dict[str, Any] = {n: float(v) if float in _TYPES[n] and v is not None else v for n, v in data.items()}
        return cls(**values)

    @classmethod
    def from_toml(cls, text: str) -> "Recipe":
        """Read what ``to_toml`` writes; fields left out take their defaults."""
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"The recipe is not valid TOML: {error}.") from None

    @classmethod
    def from_file(cls, path: str | Path) -> "Recipe":
        """Read a TOML file."""
        try:
            return cls.from_toml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The recipe {path} cannot be read: {error}.") from None

    def changed(self, **changes: Any) -> "Recipe":  # noqa: ANN401 - fields have many types
        """Return a copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


def default_pattern(columns: int) -> NM:
    """Return the pattern of a layer with so many inputs where none is given: half of the largest group that fits."""
    size = next((size for size in DEFAULT_GROUPS if columns % size == 0), DEFAULT_GROUPS[0])
    return NM(size // 2, size)


def with_calibration(recipe: Recipe, calibration: str | Path | Tensor | None) -> Recipe:
    """Put a calibration given beside the recipe into it."""
    if calibration is None:
        return recipe
    if not isinstance(calibration, Tensor):
        return recipe.changed(calibration=str(calibration))
    if calibration.ndim != 2 or calibration.dtype != torch.int64 or calibration.numel() == 0:  # noqa: PLR2004 - a matrix
        raise InputError("Calibration windows must be a tensor (windows, seqlen) of int64 token ids.")
    return recipe.changed(calibration=GIVEN_WINDOWS, samples=calibration.shape[0], seqlen=calibration.shape[1])


_TYPES: dict[str, tuple[type, ...]] = {
    "algorithm": (str,),
    "options": (Mapping,),
    "pattern": (str,),
    "rank": (int,),
    "compression": (float, int),
    "rank_share": (float, int),
    "allocate": (str,),
    "owl_spread": (float, int),
    "owl_threshold": (float, int),
    "match": (bool,),
    "match_preset": (str,),
    "match_epochs": (int,),
    "match_lr": (float, int),
    "match_batch": (int,),
    "ignore": (Sequence,),
    "layers": (Sequence,),
    "calibration": (str,),
    "samples": (int,),
    "seqlen": (int,),
    "seed": (int,),
    "damping": (float, int),
    "relative_damping": (float, int),
    "dtype": (str,),
}


def _check_type(name: str, value: object) -> None:
    expected = _TYPES[name]
    absent = name in OPTIONAL and value is None
    items = value if Sequence in expected and isinstance(value, Sequence) else ()
    wrong = Sequence in expected and isinstance(value, str)  # a text is a sequence, and not what is meant
    wrong |= name == "ignore" and not all(isinstance(item, str) for item in items)
    if not absent and (wrong or not isinstance(value, expected) or isinstance(value, bool) != (bool in expected)):
        raise InputError(f"Field {name} of a recipe must be {_spoken(expected)}, not {value!r}.")


def _plain(value: Any) -> Any:  # noqa: ANN401 - fields have many types
    return dict(value) if isinstance(value, Mapping) else value


def _spoken(types: tuple[type, ...]) -> str:
    names = {
        bool: "true or false",
        str: "text",
        int: "a whole number",
        float: "a number",
        Mapping: "a table",
        Sequence: "a list",
    }
    return names[types[0]]
