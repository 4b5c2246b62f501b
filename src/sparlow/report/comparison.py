"""The record of a comparison: one row a method, and ``compare.json`` (version 1)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparlow.errors import InputError
from sparlow.files import read_json, write_json
from sparlow.machine import machine, versions
from sparlow.report.records import Agreement, Report, agreements
from sparlow.report.tabular import Tabular
from sparlow.report.value_types import MODEL

VERSION = 1  # of the keys of compare.json
NAME = "compare.json"
MATCHED = "+match"  # the suffix of a method with matching, if it is compared without matching too
ABOUT = ("algorithm", "pattern", "rank", "match", "seed")  # fields of a recipe that a table shows of each run


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: As asked for.
        perplexity: By corpus.
        mean_relative_error: Over the layers.
        seconds: Of compressing: everything but evaluation.
        bytes: Of the whole model as stored.
        bits_per_weight: Of the compressed layers.
        bits_per_parameter: Of the whole file.
        share_compressed: Of the parameters of the blocks.
        peak_memory: Resident, in bytes.
        layers: Block, name within it and relative error of every layer.
        agreement: With the dense model, by corpus; None where it is not known.
        values: Types of the values kept.
        losses: Of every window by corpus, see ``records.Perplexity``; none where an older version measured.
        tasks: By name, as ``sparlow evaluate`` gives them.
        recipe: Its own, whole; empty where an older version wrote it.

    The name is that of the method, with ``MATCHED`` if it is matched; behind blanks what was varied, ``field=value``.
    """

    name: str
    perplexity: dict[str, float]
    mean_relative_error: float
    seconds: float
    bytes: int
    bits_per_weight: float
    bits_per_parameter: float
    share_compressed: float
    peak_memory: int
    layers: list[tuple[int, str, float]]
    agreement: dict[str, Agreement | None] = field(default_factory=dict)
    values: str = MODEL
    losses: dict[str, list[float]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def series(self) -> str:
        """The method, with or without matching, whatever was varied."""
        return self.name.split(" ")[0].removesuffix(MATCHED)

    @property
    def group(self) -> str:
        """The name without the seed."""
        return " ".join(word for word in self.name.split(" ") if not word.startswith("seed="))

    @property
    def with_matching(self) -> str:
        """What the same method with matching would be called."""
        head, *rest = self.group.split(" ")
        return "" if head.endswith(MATCHED) else " ".join([f"{head}{MATCHED}", *rest])

    @property
    def without_matching(self) -> str:
        """The name without the seed, the same with matching and without."""
        head, *rest = self.group.split(" ")
        return " ".join([head.removesuffix(MATCHED), *rest])

    @property
    def about(self) -> dict[str, Any]:
        """What a table shows of its recipe."""
        return {name: self.recipe.get(name) for name in ABOUT}

    @classmethod
    def of(cls, name: str, report: Report) -> "Row":
        """Return the row of a run in a comparison."""
        return cls(
            name=name,
            perplexity=report.compressed["perplexity"],
            mean_relative_error=report.mean_relative_error,
            seconds=report.seconds["total"] - report.seconds["evaluate"],
            bytes=report.bytes["compressed"],
            bits_per_weight=report.bits_per_weight,
            bits_per_parameter=report.bits_per_parameter,
            share_compressed=report.share_compressed,
            peak_memory=report.peak_memory["rss"],
            layers=[(layer.block, layer.name, layer.relative_error) for layer in report.layers],
            agreement=report.agreement,
            values=report.value_types,
            losses=report.compressed.get("losses", {}),
            tasks=report.compressed.get("tasks", {}),
            recipe=report.recipe,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Row":
        """Read what ``asdict`` gave; KeyError, TypeError or ValueError if it is something else."""
        layers = [(block, name, error) for block, name, error in data["layers"]]
        return cls(**{**data, "layers": layers, "agreement": agreements(data.get("agreement", {}))})


@dataclass(repr=False)
class Comparison(Tabular):
    """All methods so far; the fields are the keys of ``compare.json``.

    Attributes:
        model: As the user called it.
        recipe: Of the first method of the last call.
        evaluation: The texts that perplexities were measured on.
        settings: Of each method, what it shares with the others.
        dense: Of the dense model.
        rows: A method each.
        failed: Why a method has no row.
        versions: Of the packages.
        machine: What it ran on.
        version: Of these keys.
    """

    model: str
    recipe: dict[str, Any]
    evaluation: dict[str, Any]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    dense: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    machine: dict[str, Any] = field(default_factory=machine)
    version: int = VERSION

    @classmethod
    def found_in(cls, folder: Path) -> "Comparison | None":
        """Read ``compare.json``, if there is one; InputError if it is none, or of another version."""
        path = folder / NAME
        if not path.exists():
            return None
        data = read_json(path)
        if data.get("version") != VERSION:
            raise InputError(f"{path} is no comparison of this version. Choose another --out, or add --overwrite.")
        try:
            return cls(**{**data, "rows": [Row.from_dict(row) for row in data["rows"]]})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} cannot be read ({error}). Choose another --out, or add --overwrite.") from None

    def take_over(self, earlier: "Comparison | None", folder: Path) -> None:
        """Keep the rows of methods that an earlier call, if there was one, has compared, and this one does not.

        Raises:
            InputError: They were made or measured otherwise, so that they cannot stand in one table with these.
        """
        if earlier is None:
            return
        kept = [name for name in earlier.settings if name not in self.settings]
        for name in kept:
            why = self._difference(earlier, name)
            if why:
                raise InputError(
                    f"{folder} holds a comparison with {name}, which differs in {why}. Compare {name} again too, "
                    "choose another --out, or add --overwrite to drop it."
                )
        self.settings = {name: earlier.settings[name] for name in kept} | self.settings
        self.rows = [row for row in earlier.rows if row.name in kept]
        self.failed = {name: reason for name, reason in earlier.failed.items() if name in kept}
        self.dense = earlier.dense if kept else {}

    def _difference(self, earlier: "Comparison", name: str) -> str | None:
        """Say in what an earlier method differs from those of this call."""
        for key in ("model", "evaluation"):
            if getattr(earlier, key) != getattr(self, key):
                return f"{key} ({getattr(earlier, key)} there, {getattr(self, key)} now)"
        was = earlier.settings[name]
        for now in self.settings.values():
            for key in was.keys() & now.keys():
                if was[key] != now[key]:
                    return f"{key} ({was[key]} there, {now[key]} now)"
        return None

    def facts(self) -> dict[str, str]:
        """See ``Tabular``."""
        found = {"model": self.model, "methods": ", ".join(row.name for row in self.rows)}
        return found | ({"failed": ", ".join(self.failed)} if self.failed else {})

    def table(self) -> list[dict[str, Any]]:
        """A row a method, with a column for each text that perplexity was measured on."""
        rows = []
        for row in self.rows:
            found = {name: value for name, value in asdict(row).items() if isinstance(value, str | int | float)}
            rows.append(found | {f"perplexity, {name}": value for name, value in row.perplexity.items()})
        return rows

    def write(self, folder: Path) -> None:
        """Write ``compare.json`` whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)  # a run that fails at once leaves no directory
        write_json(folder / NAME, asdict(self))
