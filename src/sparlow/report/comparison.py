"""The record of a comparison: one row a method, and ``compare.json`` (version 1)."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparlow.files import write_json
from sparlow.machine import machine, versions
from sparlow.report.records import Report

VERSION = 1  # of the keys of compare.json
NAME = "compare.json"


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

    @classmethod
    def of(cls, name: str, report: Report) -> "Row":
        """What a comparison wants to know of a run."""
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
        )


@dataclass
class Comparison:
    """All methods so far; the fields are the keys of ``compare.json``."""

    model: str
    recipe: dict[str, Any]
    evaluation: dict[str, Any]
    dense: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    machine: dict[str, Any] = field(default_factory=machine)
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Write ``compare.json`` whole or not at all."""
        write_json(folder / NAME, asdict(self))
