"""``sparlow.inspect`` and ``sparlow.verify``: what is in a compressed directory, and whether it is what was written."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from sparlow.files import human_bytes
from sparlow.model.artefact.describe import LayerInfo, count_parameters, describe
from sparlow.model.loading.place import require_result
from sparlow.report.tabular import Tabular
from sparlow.run.verify import recorded_patterns, verify_artefact

MANY = 8  # layers of a block that differ in a number only, such as its experts, from which on they share a line


class Line(NamedTuple):
    """A line of what is shown of a directory, for one layer or for many that differ in a number only."""

    layer: str
    shape: str
    pattern: str
    values: str
    density: str
    rank: str
    bytes: str


@dataclass(frozen=True, repr=False)
class Inspection(Tabular):
    """What is in a compressed directory.

    Attributes:
        directory: It.
        layers: Its compressed weights.
        patterns: Of the layers, by name, where they are on record.
        bytes: Of all shards.
        linear_bytes: Of the compressed layers in the blocks.
        values: Numbers kept in these.
        weights: Entries of their dense weights.
        bits_per_weight: Of these.
        bits_per_parameter: Of the whole file.
        share_compressed: Of the parameters of the blocks.
    """

    directory: str
    layers: tuple[LayerInfo, ...]
    patterns: dict[str, str]
    bytes: int
    linear_bytes: int
    values: int
    weights: int
    bits_per_weight: float
    bits_per_parameter: float
    share_compressed: float

    def facts(self) -> dict[str, str]:
        """See ``Tabular``."""
        return {
            "directory": self.directory,
            "layers": f"{len(self.layers)}, {self.values:,} of {self.weights:,} values",
            "whole file": human_bytes(self.bytes),
            "bits": f"{self.bits_per_weight:.2f} a compressed weight, {self.bits_per_parameter:.2f} a parameter",
            "compressed": f"{self.share_compressed:.1%} of the parameters of the blocks",
        }

    def table(self) -> list[dict[str, Any]]:
        """A row a layer."""
        return [asdict(layer) | {"pattern": self.patterns.get(layer.name)} for layer in self.layers]

    def lines(self, *, every: bool) -> list[Line]:
        """What is shown of the layers.

        Args:
            every: A line for each; else those of a block that differ in a number only share one, where there are many.
        """
        kinds: dict[tuple[str, tuple[int, int]], list[LayerInfo]] = {}
        for layer in self.layers:
            kinds.setdefault((_kind(layer.name), layer.shape), []).append(layer)
        found: list[Line] = []
        for (kind, _), layers in kinds.items():
            if every or len(layers) < MANY:
                found += [self._line(layer.name, [layer]) for layer in layers]
            else:
                found.append(self._line(f"{kind} ({len(layers)})", layers))
        return found

    def _line(self, name: str, layers: Sequence[LayerInfo]) -> Line:
        out, columns = layers[0].shape
        low, high = min(layer.rank for layer in layers), max(layer.rank for layer in layers)
        return Line(
            name,
            f"{out} × {columns}",
            _all_of(self.patterns.get(layer.name, "–") for layer in layers),
            _all_of(layer.dtype for layer in layers),
            f"{fmean(layer.density for layer in layers):.4f}",
            str(low) if low == high else f"{low} to {high}",
            f"{sum(layer.bytes for layer in layers):,}",
        )

    def to_dict(self) -> dict[str, Any]:
        """As ``sparlow inspect --json`` prints it."""
        found = super().to_dict() | {"layers": self.table()}
        del found["patterns"], found["directory"]
        return found


def _kind(name: str) -> str:
    """Return a layer's name with a star for each number behind that of its block."""
    block = re.match(r".*?\.\d+\.", name)
    end = block.end() if block else len(name)
    return name[:end] + re.sub(r"\b\d+\b", "*", name[end:])


def _all_of(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


@dataclass(frozen=True, repr=False)
class Verification(Tabular):
    """What was found when a directory was read as a whole; true if nothing is wrong.

    Attributes:
        directory: It.
        problems: A sentence for each thing that is wrong.
    """

    directory: str
    problems: tuple[str, ...]

    def __bool__(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def facts(self) -> dict[str, str]:
        """See ``Tabular``."""
        good = "checksums, shapes, patterns and densities are as recorded"
        return {"directory": self.directory, "found": good if self else f"{len(self.problems)} problems"}

    def table(self) -> list[dict[str, Any]]:
        """A row a problem."""
        return [{"problem": problem} for problem in self.problems]


def inspect(folder: str | Path) -> Inspection:
    """Return what is in a compressed directory; only headers are read.

    Args:
        folder: A finished directory of ``compress`` or ``finetune``.

    Raises:
        InputError: It is none of sparlow's, or is damaged.
    """
    folder = require_result(Path(folder))
    layers, patterns, counted = describe(folder), recorded_patterns(folder), count_parameters(folder)
    inside = [layer for layer in layers if not layer.outside]
    shards = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    linear = sum(layer.bytes for layer in inside)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in inside)
    return Inspection(
        directory=str(folder),
        layers=tuple(layers),
        patterns=patterns,
        bytes=shards,
        linear_bytes=linear,
        values=sum(layer.kept + layer.rank * sum(layer.shape) for layer in inside),
        weights=weights,
        bits_per_weight=8 * linear / max(weights, 1),
        bits_per_parameter=8 * shards / max(counted.model, 1),
        share_compressed=counted.compressed / max(counted.blocks, 1),
    )


def verify(folder: str | Path) -> Verification:
    """Read a compressed directory as a whole, and check it against its record: checksums, shapes, patterns, densities.

    Args:
        folder: A finished directory of ``compress`` or ``finetune``.

    Raises:
        InputError: It is none of sparlow's.
    """
    found = verify_artefact(require_result(Path(folder)))
    return Verification(str(folder), tuple(found))
