"""Results of algorithms: the parts of the weight, and statistics of the solve."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

from torch import Tensor

from sparlow.linalg.grid import FactorScales, GridValues

Number = float | int | str | bool


@dataclass(frozen=True, slots=True, eq=False)
class SolveStats(Mapping[str, Number]):
    """How a solve went; ``stats["rho"]`` reads a field or one of the algorithm's own numbers alike.

    An algorithm reports the first two and its own numbers; the rest is measured by ``solve``, whatever it says.

    Attributes:
        iterations: Steps taken; 1 where there is only one.
        converged: Whether the solver had settled when it ended; True where it takes a fixed number of steps.
        relative_error: The ratio tr(R H Rᵀ) / tr(W H Wᵀ) with R = W − S − U V, H damped.
        seconds: Taken.
        damping: Added to H because a factorisation failed without it; 0 if none did.
        dead_columns: Inputs that were always zero.
        relative_error_per_token: The ratio over sampled tokens, each scaled to length one; None without a sample.
        more: The algorithm's own numbers, by name.
        trace: Iterations, and the share of the kept entries that changed since the last look, at some of the looks.
    """

    iterations: int = 1
    converged: bool = True
    relative_error: float = math.nan
    seconds: float = 0.0
    damping: float = 0.0
    dead_columns: int = 0
    relative_error_per_token: float | None = None
    more: Mapping[str, Number] = field(default_factory=dict)
    trace: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, given: Mapping[str, Number]) -> "SolveStats":
        """Return the record for a plain mapping, whose unknown names are the algorithm's own numbers."""
        if isinstance(given, SolveStats):
            return given
        known = {name: value for name, value in given.items() if name in _FIELDS}
        return cls(**known, more={name: value for name, value in given.items() if name not in _FIELDS})  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> Number:
        value: Number | None = getattr(self, name) if name in _FIELDS else self.more[name]
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in _FIELDS if getattr(self, name) is not None)
        yield from self.more

    def __len__(self) -> int:
        return sum(1 for _ in self)


_FIELDS = tuple(f.name for f in fields(SolveStats) if f.name not in ("more", "trace"))
LOOKS = 32  # of a trace that are kept, so that the record of a model of many layers stays small


def thinned(trace: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Return at most ``LOOKS`` of the looks, the first and the last among them, with changes in four digits."""
    count = min(len(trace), LOOKS)
    chosen = [trace[round(i * (len(trace) - 1) / max(count - 1, 1))] for i in range(count)]
    return tuple((step, float(f"{change:.4g}")) for step, change in chosen)


@dataclass(frozen=True, slots=True)
class Pruned:
    """The answer of a pruner that can say how it went.

    Attributes:
        S: What is left of the weight (out, in), on its pattern.
        stats: How the solve went.
        values: The grid that S lies on; None if any number will do.
    """

    S: Tensor
    stats: SolveStats = field(default_factory=SolveStats)
    values: GridValues | None = None

    @classmethod
    def of(cls, answer: "Tensor | Pruned") -> "Pruned":
        """Return a pruner's answer, which may be S alone, as a record."""
        return answer if isinstance(answer, Pruned) else cls(answer)


@dataclass(frozen=True, slots=True)
class Decomposition:
    """W ≈ S + U V.

    Attributes:
        S: The sparse part (out, in), on its pattern.
        U: Left factor of the low-rank part (out, rank).
        V: Right factor of the low-rank part (rank, in).
        stats: How the solve went; an algorithm may give a plain mapping.
        values: The grid that the kept entries of S lie on; None if any number will do.
        factors: The scales of U and V where these are in int8; None if any number will do.
    """

    S: Tensor
    U: Tensor
    V: Tensor
    stats: SolveStats = field(default_factory=SolveStats)
    values: GridValues | None = None
    factors: FactorScales | None = None

    def __post_init__(self) -> None:
        """Make a record of a plain mapping."""
        object.__setattr__(self, "stats", SolveStats.of(self.stats))

    def dense(self) -> Tensor:
        """S + U V (out, in)."""
        return self.S + self.U @ self.V
