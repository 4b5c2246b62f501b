"""Arithmetic of allocation: which pattern and rank a layer gets, and what that costs in values, bytes and bits.

    rank     = ⌊κ (1 − c) · out · in / (out + in)⌋      c: fraction of the values removed, κ: the low-rank part's share
    sparsity = c + κ − c κ                              of what is left, as in OATS (arXiv 2409.13652)

Nothing here looks at a tensor. What the data say comes in as numbers: outlier shares (OWL), error curves.
"""

import fnmatch
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from sparlow.errors import InputError, RunError
from sparlow.report.value_types import MODEL, shown_values
from sparlow.schema import LARGEST, shown, unknown

if TYPE_CHECKING:  # torch would come with it, and the command line reads a recipe's fields without
    from sparlow.linalg.grid import Grid
    from sparlow.linalg.patterns import Pattern

Shape = tuple[int, int]  # (out, in)
VALUES = (MODEL, "int8", "int4", "int3", "int2")  # those of ``linalg.grid``, which comes with torch
LEVELS = ("auto", "integer", "half", "book")


@dataclass(frozen=True, slots=True)
class Budget:
    """What one layer may keep.

    Attributes:
        pattern: Which entries of S.
        rank: Of U V.
        grid: That the entries of S lie on; None for the type that the weight has.
        int8_factors: Whether U and V are stored in int8.
    """

    pattern: "Pattern"
    rank: int
    grid: "Grid | None" = None
    int8_factors: bool = False

    def values(self, shape: Shape) -> int:
        """Numbers kept of a weight (out, in): entries of S, U and V."""
        return self.pattern.kept(shape) + self.rank * sum(shape)

    def bytes(self, shape: Shape, size: int) -> int:
        """Bytes that is stored in: S, U, V and where S has values.

        Where a free pattern leaves each row a number of codes of its own, a row's last byte is counted as if all had
        the mean.

        Args:
            shape: (out, in).
            size: Bytes of a number that lies on no grid.
        """
        return self.sparse_bytes(shape, size) + self.low_rank_bytes(shape, size)

    def sparse_bytes(self, shape: Shape, size: int) -> int:
        """Bytes of S: values, or codes, scales and book; and a bit a weight in whole bytes a row, unless all are kept.

        Args:
            shape: (out, in).
            size: Bytes of a number that lies on no grid.
        """
        rows, columns = shape
        kept = self.pattern.kept(shape)
        mask = rows * -(-columns // 8) if kept < rows * columns else 0
        return mask + (math.ceil(self.grid.bytes(shape, kept / rows)) if self.grid else kept * size)

    def low_rank_bytes(self, shape: Shape, size: int) -> int:
        """Bytes of U and V, the scales of int8 included.

        Args:
            shape: (out, in).
            size: Bytes of a number that is not in int8.
        """
        if not self.int8_factors:
            return self.rank * sum(shape) * size
        from sparlow.linalg.grid import factor_bytes

        return factor_bytes(shape, self.rank)

    @property
    def on_grid(self) -> dict[str, Any]:
        """What ``solve`` is told beside pattern and rank."""
        if self.grid is None and not self.int8_factors:
            return {}
        return {"grid": self.grid, "int8_factors": self.int8_factors and self.rank > 0}

    @property
    def value_type(self) -> str:
        """Of the values of S: ``model``, or ``int4`` and the like."""
        return self.grid.name if self.grid else MODEL

    @property
    def shown_values(self) -> str:
        """The same with the levels and the columns that share a scale, for tables."""
        return shown_values(self.value_type, *((self.grid.levels, self.grid.group) if self.grid else (None, None)))

    def to_dict(self) -> dict[str, object]:
        """For a file; ``from_dict`` reads it back."""
        found: dict[str, object] = {"pattern": str(self.pattern), "rank": self.rank}
        if self.grid:
            found["grid"] = {"values": self.grid.name, "levels": self.grid.levels, "group": self.grid.group}
        return found | ({"int8_factors": True} if self.int8_factors else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "Budget":
        """Read what ``to_dict`` gave."""
        from sparlow.linalg.grid import WHOLE_ROW, make_grid
        from sparlow.linalg.patterns import parse_pattern

        grid = data.get("grid")
        if isinstance(grid, Mapping):
            grid = make_grid(str(grid["values"]), str(grid["levels"]), grid["group"] or WHOLE_ROW)
        elif grid is not None:
            raise TypeError("grid")
        pattern, rank = parse_pattern(str(data["pattern"])), int(str(data["rank"]))
        return cls(pattern, rank, grid, data.get("int8_factors") is True)


def matches(pattern: str, name: str) -> bool:
    """Whether a layer's full name ends, at a dot, in what ``pattern`` says; it may hold * and ? .

    The layers of experts, which have a number at the end, all go by the name without it too.
    """
    role, _, number = name.rpartition(".")
    names = (name, role) if number.isdecimal() else (name,)
    return any(fnmatch.fnmatchcase(one, asked) for one in names for asked in (pattern, f"*.{pattern}"))


@dataclass(frozen=True)
class Rule:
    """An exception: layers whose full name ends, at a dot, in ``match`` get a pattern, a rank or values of their own.

    Attributes:
        match: ``"mlp.down_proj"``, ``"model.layers.0.*"``; * and ? stand for any characters, any one.
        pattern: In place of the recipe's; None leaves it.
        rank: In place of the recipe's; None leaves it.
        values: Type of the values, in place of the recipe's; None leaves it. Levels and groups are the recipe's.
    """

    match: str
    pattern: str | None = None
    rank: int | None = None
    values: str | None = None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            from sparlow.linalg.patterns import parse_pattern

            parse_pattern(self.pattern)
        if self.rank is not None and not 0 <= self.rank < LARGEST:
            raise InputError(f"The rule for {self.match} gives the rank {shown(self.rank)}. Give 0 or more.")
        if self.values not in (None, *VALUES):
            what = f"The rule for {self.match} gives values of the unknown type {shown(self.values)}"
            raise InputError(unknown(what, str(self.values), VALUES))

    @classmethod
    def from_dict(cls, data: object) -> "Rule":
        """Read one ``[[layers]]`` table; InputError says what is wrong."""
        types: dict[str, type] = {"match": str, "pattern": str, "rank": int, "values": str}
        table: Mapping[str, Any] = data if isinstance(data, Mapping) else {}
        if "match" not in table or any(type(value) is not types.get(name) for name, value in table.items()):
            raise InputError(
                f"A [[layers]] table cannot be read: {shown(data)}. Give match (text), and pattern (text), rank "
                "(a number) or values (text)."
            )
        return cls(**table)

    def to_dict(self) -> dict[str, Any]:
        """The table, without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def require_total(costs: Sequence[int], asked: float, what: str = "values", *, exactly: bool = True) -> None:
    """Look over an allocation: all layers together keep what was asked for.

    Args:
        costs: What each layer keeps, in whole numbers.
        asked: That all were to keep.
        what: Is counted.
        exactly: No less will do either.

    Raises:
        RunError: They do not.
    """
    kept = sum(costs)
    if kept > asked + len(costs) or (exactly and kept < asked - len(costs)):
        raise RunError(
            f"The allocation keeps {kept:,} {what} in {len(costs)} layers where {asked:,.0f} were asked for. "
            "This is a fault of sparlow, please report it; --allocate uniform goes without."
        )


# Ratio-driven ranks


def ratio_rank(compression: float, share: float, shape: Shape) -> int:
    """Return the rank at which U V holds ``share`` of the values that ``compression`` leaves of a weight (out, in)."""
    rows, columns = shape
    return math.floor(share * (1 - compression) * rows * columns / (rows + columns) + 1e-9)


def ratio_sparsity(compression: float, share: float) -> float:
    """Return the sparsity of S that leaves the low-rank part its ``share`` of the kept values."""
    return round(compression + share - compression * share, 12)


def ratio_share(compression: float, pattern: "Pattern") -> float:
    """The low-rank part's share of the values kept, once ``pattern`` has taken its own.

    Raises:
        InputError: The pattern alone keeps as many values as ``compression`` leaves, or more.
    """
    share = (1 - compression - pattern.density) / (1 - compression)
    if share <= 0:
        below = f"compression below {1 - pattern.density:g}" if pattern.density < 1 else "sparser pattern"
        raise InputError(
            f"Pattern {pattern} alone keeps {pattern.density:g} of the values, so nothing is left for a low-rank part "
            f"at a compression of {compression:g}. Give a {below}."
        )
    return share


# OWL: outlier-weighed densities (Yin et al., 2023, arXiv 2310.05175)


def owl_densities(outliers: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Densities of the blocks: the more outliers, the more is kept.

    The paper's mean is that of the blocks, which are alike in a Llama. Here each counts by its weights, so that all
    together keep what was asked for in a model whose blocks differ.

    Args:
        outliers: Share of each block's scores |W_ij|·√H_jj that exceed a multiple of their mean.
        sizes: Weights that the density of each block is for.
        sparsity: Mean over the weights.
        spread: λ; densities span 2λ.

    Raises:
        InputError: A density would leave (0, 1].
    """
    low, high = min(outliers), max(outliers)
    width = (high - low) or 1.0  # all alike: uniform
    raw = [2 * spread * (share - low) / width for share in outliers]
    mean = sum(size * share for size, share in zip(sizes, raw, strict=True)) / sum(sizes)
    densities = [round(1 - sparsity + delta - mean, 12) for delta in raw]
    if min(densities) <= 0 or max(densities) > 1:
        raise InputError(
            f"OWL with a spread of {spread:g} around a sparsity of {sparsity:g} asks for densities from "
            f"{min(densities):.3f} to {max(densities):.3f}. Lower --owl-spread."
        )
    return densities


# By error: a global budget goes where the errors fall most

RANK_STEPS, RANK_GROWTH = 4, 8  # ranks offered: multiples of a quarter of the uniform one, up to eight times it
DENSITY_STEP, DENSITY_STEPS = 0.05, 4  # densities offered: so many steps below the uniform one and above it
FEWEST = 0.05  # no density falls below
MASKED = 16  # weights whose bits of the mask take as much as one number, in the types that take least


@dataclass(frozen=True, slots=True)
class Offer:
    """One of the budgets a layer might get: what it costs and the relative error that would remain."""

    budget: Budget
    cost: int
    error: float


def cost(budget: Budget, shape: Shape, size: int) -> int:
    """What an allocation counts a layer (out, in) as: its values or, where some are stored in fewer bits, its bytes."""
    return budget.bytes(shape, size) if budget.grid or budget.int8_factors else budget.values(shape)


def offered(uniform: Budget, shape: Shape, size: int, *, low_rank: bool) -> "dict[Pattern, list[int]]":
    """The patterns and ranks worth looking at for a layer (out, in): around its ``uniform`` budget.

    Args:
        uniform: What it would get otherwise.
        shape: (out, in).
        size: Bytes of a number that lies on no grid.
        low_rank: Whether the method has a low-rank part.
    """
    from sparlow.linalg.patterns import Unstructured

    rank = uniform.rank
    grid = range(0, min(RANK_GROWTH * rank, *shape) + 1, max(rank // RANK_STEPS, 1)) if low_rank and rank else [0]
    patterns: set[Pattern] = {uniform.pattern}
    whole = uniform.pattern.kept(shape) == math.prod(shape)  # a mask would take a bit a weight
    if isinstance(uniform.pattern, Unstructured) and not (whole and uniform.grid):
        steps = (uniform.pattern.sparsity + DENSITY_STEP * i for i in range(-DENSITY_STEPS, DENSITY_STEPS + 1))
        patterns |= {Unstructured(round(s, 12)) for s in steps if 0 <= s <= 1 - FEWEST}
    ranks = sorted({*grid, rank})
    dense = math.prod(shape) * (size if uniform.grid or uniform.int8_factors else MASKED / (MASKED + 1))
    most = max(math.floor(dense), cost(uniform, shape, size))  # never more than dense
    return {
        p: [r for r in ranks if cost(replace(uniform, pattern=p, rank=r), shape, size) <= most]
        for p in sorted(patterns, key=str)
    }


def error_driven(offers: Mapping[str, Sequence[Offer]], total: int) -> dict[str, Budget]:
    """Choose an offer for every layer, so that together they cost at most ``total`` and the sum of errors is small.

    Of each layer only the offers on the lower convex hull of (cost, error) count. All begin with their cheapest; the
    step that lowers an error most for its price is taken next, as long as it can be paid. But for the last steps,
    this is the optimum over all choices (Lagrange).
    """
    hulls = {name: _lower_hull(those) for name, those in offers.items()}
    taken = dict.fromkeys(hulls, 0)
    left = total - sum(hull[0].cost for hull in hulls.values())

    def steepness(name: str) -> float:
        now, then = hulls[name][taken[name] : taken[name] + 2]
        return (then.error - now.error) / (then.cost - now.cost)  # negative; the heap gives the lowest first

    steps = [(steepness(name), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        hull = hulls[name]
        price = hull[taken[name] + 1].cost - hull[taken[name]].cost
        if price > left:
            continue  # a cheaper step of another layer may still fit
        left -= price
        taken[name] += 1
        if taken[name] + 1 < len(hull):
            heapq.heappush(steps, (steepness(name), name))
    return {name: hull[taken[name]].budget for name, hull in hulls.items()}


def _lower_hull(offers: Sequence[Offer]) -> list[Offer]:
    """Return the lower convex hull of the offers, cheapest first: each further step lowers the error less."""
    hull: list[Offer] = []
    for offer in sorted(offers, key=lambda o: (o.cost, o.error)):
        if hull and offer.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _bends_up(hull[-2], hull[-1], offer):
            hull.pop()
        hull.append(offer)
    return hull


def _bends_up(a: Offer, b: Offer, c: Offer) -> bool:
    """Return whether b lies above the line from a to c."""
    return (b.error - a.error) * (c.cost - a.cost) > (c.error - a.error) * (b.cost - a.cost)
