"""The report of a run: one record for each layer, and ``report.json`` (version 1)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sparlow.errors import InputError
from sparlow.files import as_json, human_bytes, parse_json
from sparlow.machine import machine, versions
from sparlow.report.tabular import Tabular
from sparlow.report.value_types import MODEL, shown_values

VERSION = 1  # of the keys of report.json


@dataclass(frozen=True)
class LayerRecord:
    """One compressed linear layer.

    Attributes:
        block: Number of its decoder block.
        name: Within the block.
        shape: (out, in).
        pattern: As typed, such as 2:4.
        density: Fraction of S that is not zero.
        rank: Of U V.
        relative_error: The ratio tr(R H Rᵀ) / tr(W H Wᵀ) with R = W − S − U V, H damped.
        iterations: Steps of the solver.
        seconds: Of the solver.
        damping: What a factorisation needed beyond the recipe's damping; 0 if nothing.
        warnings: What a careful reader should know.
        tokens: Of the calibration text that reached the layer.
        dead_inputs: Input features that were always zero.
        settled: Whether the solver had, when it ended.
        relative_error_per_token: Σ |R x|² / Σ |W x|² over some hundred tokens x, each scaled to length one, so that a
            few huge ones do not hide the others; None of a layer that no token reached.
        value_type: Of the values of S: ``model`` for the type of the model's weights, or ``int4`` and the like.
        levels: The kind of levels of int values; None for ``model``.
        group: Columns of a row that share a scale; None for the whole row, and for ``model``.
        factor_type: Of U and V: ``model`` or ``int8``.
        trace: Iterations, and the share of the kept entries that changed since the last look, at some of the looks of
            the solver; empty where it does not look.
    """

    block: int
    name: str
    shape: tuple[int, int]
    pattern: str
    density: float
    rank: int
    relative_error: float
    iterations: int
    seconds: float
    damping: float
    warnings: tuple[str, ...] = ()
    tokens: int = 0
    dead_inputs: int = 0
    settled: bool = True
    relative_error_per_token: float | None = None
    value_type: str = MODEL
    levels: str | None = None
    group: int | None = None
    factor_type: str = MODEL
    trace: tuple[tuple[int, float], ...] = ()

    @property
    def shown_values(self) -> str:
        """The type of the values for tables: ``model``, or ``int4 half, 128 columns a scale``."""
        return shown_values(self.value_type, self.levels, self.group)

    @property
    def values(self) -> int:
        """Numbers kept: entries of S that are not zero, and those of U and V."""
        rows, columns = self.shape
        return round(self.density * rows * columns) + self.rank * (rows + columns)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerRecord":
        """Read one row of ``layers`` in report.json; ValueError, KeyError or TypeError if it is none."""
        rows, columns = data["shape"]
        for name, kinds in _KINDS.items():
            if name in data and type(data[name]) not in kinds:
                raise TypeError(name)
        if not all(type(size) is int and size > 0 for size in (rows, columns)):
            raise TypeError("shape")
        trace = tuple((int(step), float(change)) for step, change in data.get("trace", ()))
        return cls(**{**data, "shape": (rows, columns), "warnings": tuple(map(str, data["warnings"])), "trace": trace})


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("block", "rank", "iterations", "tokens", "dead_inputs"), (int,)),
    **dict.fromkeys(("density", "relative_error", "seconds", "damping"), (float, int)),
    **dict.fromkeys(("name", "pattern", "value_type", "factor_type"), (str,)),
    "levels": (str, type(None)),
    "group": (int, type(None)),
    "settled": (bool,),
    "relative_error_per_token": (float, int, type(None)),
}


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and its standard error.

    Attributes:
        value: The exponential of the mean over windows of the mean negative log-likelihood.
        stderr: Its standard error: that of the mean over windows, times the value (delta method). None where it is not
            known: of a single window, of a value that is not finite, of what an older version measured.
        losses: Mean negative log-likelihood of each window, in order; empty where several processes divided them, or an
            older version measured.
    """

    value: float
    stderr: float | None = None
    losses: tuple[float, ...] = ()


def perplexities(found: Mapping[str, Perplexity]) -> dict[str, dict[str, Any]]:
    """Return what ``dense`` and ``compressed`` in report.json hold, from perplexities by corpus."""
    losses = {name: list(one.losses) for name, one in found.items() if one.losses}
    said: dict[str, dict[str, Any]] = {
        "perplexity": {name: one.value for name, one in found.items()},
        "perplexity_stderr": {name: one.stderr for name, one in found.items()},
    }
    return said | ({"losses": losses} if losses else {})


@dataclass(frozen=True)
class Agreement:
    """How far a model agrees with the dense one on the windows of a text. None is what is not finite, or not known.

    Attributes:
        divergence: Kullback–Leibler divergence of its predictions from the dense model's, in nats a token.
        divergence_stderr: Standard error of that mean, over windows. None for a single window.
        same_first_choice: Share of the tokens for which both hold the same next token for the likeliest.
        loss_difference: Mean negative log-likelihood minus the dense model's, in nats a token.
        loss_difference_stderr: Its standard error, over the differences of each window with itself.
    """

    divergence: float | None
    divergence_stderr: float | None
    same_first_choice: float | None
    loss_difference: float | None
    loss_difference_stderr: float | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Agreement":
        """Read what ``asdict`` gave; KeyError, TypeError or ValueError if it is something else."""
        values = {one.name: data[one.name] for one in fields(cls)}
        return cls(**{name: None if value is None else float(value) for name, value in values.items()})


def agreements(data: Mapping[str, Any]) -> dict[str, Agreement | None]:
    """Read agreements by corpus, null where one is unknown; errors as of ``Agreement.from_dict``."""
    return {name: None if found is None else Agreement.from_dict(found) for name, found in data.items()}


@dataclass(repr=False)
class Report(Tabular):
    """A whole run; the fields are the keys of ``report.json``."""

    recipe: dict[str, Any]
    versions: dict[str, str] = field(default_factory=versions)
    machine: dict[str, Any] = field(default_factory=machine)
    model: str = ""
    dense: dict[str, dict[str, Any]] = field(default_factory=lambda: perplexities({}))
    compressed: dict[str, dict[str, Any]] = field(default_factory=lambda: perplexities({}))
    agreement: dict[str, Agreement | None] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)
    bits_per_weight: float = 0.0
    bits_per_parameter: float = 0.0
    share_compressed: float = 0.0
    parameters: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    experts: list[dict[str, Any]] = field(default_factory=list)
    matching: list[dict[str, Any]] = field(default_factory=list)
    distillation: dict[str, Any] = field(default_factory=dict)
    not_compressed: list[dict[str, Any]] = field(default_factory=list)
    finetuning: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    processes: dict[str, int] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    in_domain: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    version: int = VERSION

    @property
    def value_types(self) -> str:
        """Types of the values of S, such as ``int4``; of factors too where these are not ``model``."""
        sparse = dict.fromkeys(layer.value_type for layer in self.layers)
        factors = dict.fromkeys(layer.factor_type for layer in self.layers if layer.rank)
        return " and ".join(sparse) + (f", U and V {' and '.join(factors)}" if {*factors} - {MODEL} else "")

    @property
    def mean_relative_error(self) -> float:
        """Mean over the layers."""
        return sum(layer.relative_error for layer in self.layers) / max(len(self.layers), 1)

    @property
    def mean_relative_error_per_token(self) -> float | None:
        """Mean over the layers that tokens reached; None if there is no such figure."""
        found = [row.relative_error_per_token for row in self.layers if row.relative_error_per_token is not None]
        return sum(found) / len(found) if found else None

    def add_up(self) -> None:
        """Fill in what follows from the layers and from ``linears_dense`` and ``linears_compressed`` of ``bytes``.

        Of ``parameters``, ``model`` and ``blocks`` are there already.
        """
        self.counts = {
            "layers": len(self.layers),
            "extra_damping": sum(layer.damping > 0 for layer in self.layers),
            "dead_inputs": sum(layer.dead_inputs > 0 for layer in self.layers),
            "unsettled": sum(not layer.settled for layer in self.layers),
            "without_data": sum(layer.tokens == 0 for layer in self.layers),
        }
        sizes = self.bytes
        others = sizes["dense"] - sizes["linears_dense"] - sizes.get("outside_saved", 0)
        sizes["compressed"] = others + sizes["linears_compressed"]
        self.values = {
            "linears_dense": sum(layer.shape[0] * layer.shape[1] for layer in self.layers),
            "linears_compressed": sum(layer.values for layer in self.layers),
        }
        self.bits_per_weight = 8 * sizes["linears_compressed"] / self.values["linears_dense"]
        if self.parameters:  # reports of former versions have none
            self.parameters["compressed"] = self.values["linears_dense"]
            self.bits_per_parameter = 8 * sizes["compressed"] / self.parameters["model"]
            self.share_compressed = self.parameters["compressed"] / self.parameters["blocks"]

    def facts(self) -> dict[str, str]:
        """See ``Tabular``."""
        dense, now = self.dense["perplexity"], self.compressed["perplexity"]
        found = {"model": self.model, "algorithm": str(self.recipe.get("algorithm", ""))}
        found |= {f"perplexity, {name}": f"{dense[name]:.2f} → {now[name]:.2f}" for name in now if name in dense}
        if self.bytes.get("compressed"):
            found["whole file"] = f"{human_bytes(self.bytes['dense'])} → {human_bytes(self.bytes['compressed'])}"
        found["bits"] = f"{self.bits_per_weight:.2f} a compressed weight, {self.bits_per_parameter:.2f} a parameter"
        found["mean relative squared error"] = f"{self.mean_relative_error:.5f}, of the layers' outputs"
        found["time"] = f"{self.seconds.get('total', 0.0):.0f} s"
        return found | ({"warnings": str(len(self.warnings))} if self.warnings else {})

    def table(self) -> list[dict[str, Any]]:
        """A row a layer."""
        return [asdict(layer) | {"shown_values": layer.shown_values} for layer in self.layers]

    def to_json(self) -> str:
        """The text of ``report.json``."""
        return as_json(asdict(self), indent=2)

    @classmethod
    def from_file(cls, path: Path) -> "Report":
        """Read ``report.json``; InputError if it is none, or of a version this sparlow does not know."""
        return cls.from_dict(_content(Path(path)), path)

    @classmethod
    def from_dict(cls, data: dict[str, Any], path: Path) -> "Report":
        """Read what ``report.json`` at ``path`` holds; InputError as ``from_file``."""
        try:
            if data["version"] != VERSION:
                raise InputError(
                    f"{path} has version {data['version']}, and this sparlow reads version {VERSION}. Upgrade sparlow."
                )
            more: dict[str, Any] = {which: _measured(data[which]) for which in ("dense", "compressed")}
            more["agreement"] = agreements(data.get("agreement", {}))  # older versions did not measure it
            return cls(**{**data, **more, "layers": [LayerRecord.from_dict(row) for row in data["layers"]]})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is not a report of sparlow: {error}. Choose another directory.") from None


def _content(path: Path) -> dict[str, Any]:
    """The object in ``report.json``; InputError if there is none."""
    try:
        return parse_json(path)
    except InputError as error:
        raise InputError(f"{path} is not a report of sparlow: {error}") from None


def _measured(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read ``dense`` or ``compressed`` in report.json; older versions have no errors and no losses of windows."""
    errors, losses = data.get("perplexity_stderr", {}), data.get("losses", {})
    found = {
        name: Perplexity(float(value), errors.get(name), tuple(map(float, losses.get(name, ()))))
        for name, value in data["perplexity"].items()
    }
    return perplexities(found) | ({"tasks": dict(data["tasks"])} if data.get("tasks") else {})
