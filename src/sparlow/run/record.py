"""The record of a run, as ``sparlow.json`` keeps it (format 1): the only file that knows its keys."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sparlow.errors import InputError
from sparlow.files import RECORD, as_json, read_json, shard_filename
from sparlow.machine import differences
from sparlow.model.artefact.shards import ShardRecord
from sparlow.recipe.allocation import Budget
from sparlow.report.records import Agreement, LayerRecord, Perplexity

FORMAT = 1


@dataclass(frozen=True)
class BlockRecord:
    """A finished block.

    Attributes:
        file: Name of its shard.
        layers: One record for each compressed layer.
        matching: What matching did to it; empty if it was not matched.
    """

    file: str
    layers: list[LayerRecord]
    matching: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def text(self) -> str:
        """What ``sparlow.json`` holds of it, made once: it is written again with every later block."""
        return as_json(asdict(self)).rstrip().replace("\n", "\n  ")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "BlockRecord":
        """Read what ``asdict`` gave; KeyError, TypeError or ValueError if it is something else."""
        layers = [LayerRecord.from_dict(row) for row in data["layers"]]
        return cls(shard_filename(data["file"]), layers, [dict(row) for row in data.get("matching", [])])


@dataclass(frozen=True)
class KeptTraining:
    """A state of distillation.

    Attributes:
        shard: Its file.
        number: Counts the states of one training.
    """

    shard: ShardRecord
    number: int


@dataclass
class RunRecord:
    """All that is known of a run, or of a part of it.

    Attributes:
        fingerprint: What decides the result: recipe, model, calibration windows, format, revision of the solvers.
        blocks_name: Name of the list of blocks in the model.
        finished: Whether the result is whole.
        dense: Perplexities of the dense model, by fingerprint of the text.
        compressed: Those of the finished result.
        agreement: How far the finished result agrees with the dense model, by fingerprint of the text, where known.
        allocation: Budgets that the data decided, by the layer's full name; empty if there is none.
        shards: By the name of the file.
        blocks: Those that are finished, in order.
        seconds: What the blocks done so far have taken, by kind of work.
        training: The last state of distillation that was kept.
        distillation: What distillation did, once the shards are its result; empty before.
        opens_as: Checksums of the small files that decide how the model is opened.
        clearing: The directory still holds another run, which is being removed.
        machines: The first machine that computed a part of it, and each that differs from those before.
    """

    fingerprint: dict[str, Any]
    blocks_name: str
    finished: bool = False
    dense: dict[str, Perplexity] = field(default_factory=dict)
    compressed: dict[str, Perplexity] = field(default_factory=dict)
    agreement: dict[str, Agreement] = field(default_factory=dict)
    allocation: dict[str, Budget] = field(default_factory=dict)
    shards: dict[str, ShardRecord] = field(default_factory=dict)
    blocks: list[BlockRecord] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    training: KeptTraining | None = None
    distillation: dict[str, Any] = field(default_factory=dict)
    opens_as: dict[str, Any] = field(default_factory=dict)
    clearing: bool = False
    machines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def layers(self) -> dict[str, LayerRecord]:
        """Records of all layers by their full names."""
        rows = (layer for block in self.blocks for layer in block.layers)
        return {f"{self.blocks_name}.{layer.block}.{layer.name}": layer for layer in rows}

    def to_dict(self) -> dict[str, Any]:
        """Return the object in ``sparlow.json``; what is unknown or empty now may come later, and is left out."""
        return self._beside([asdict(block) for block in self.blocks])

    def to_text(self) -> str:
        """Return the text of ``sparlow.json``: that of ``to_dict``, of which only what is new is made anew."""
        before, key, after = as_json(self._beside([])).partition('\n "blocks": [')
        blocks = ",\n  ".join(block.text for block in self.blocks)
        return "".join((before, key, f"\n  {blocks}\n " if blocks else "", after))

    def _beside(self, blocks: list[dict[str, Any]]) -> dict[str, Any]:
        """What is known, with these blocks."""
        kept = self.training and {**asdict(self.training.shard), "number": self.training.number}
        always = {
            "format": FORMAT,
            "finished": self.finished,
            "fingerprint": self.fingerprint,
            "blocks_name": self.blocks_name,
            "dense": {text: found.value for text, found in self.dense.items()},
            "compressed": {text: found.value for text, found in self.compressed.items()},
            "allocation": {name: budget.to_dict() for name, budget in self.allocation.items()},
            "shards": {file: {"bytes": shard.bytes, "sha256": shard.sha256} for file, shard in self.shards.items()},
            "blocks": blocks,
        }
        later = {
            "dense_stderr": _errors(self.dense),
            "compressed_stderr": _errors(self.compressed),
            "agreement": {text: asdict(found) for text, found in self.agreement.items()},
            "dense_losses": _losses(self.dense),
            "losses": _losses(self.compressed),
            "seconds": self.seconds,
            "training": kept,
            "distillation": self.distillation,
            "opens_as": self.opens_as,
            "clearing": self.clearing,
            "machines": self.machines,
        }
        return always | {name: value for name, value in later.items() if value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RunRecord":
        """Read what ``to_dict`` gave; InputError, KeyError, TypeError or ValueError if it is something else."""
        shards = {file: _shard({"file": file, **sums}) for file, sums in data["shards"].items()}
        kept = data.get("training")
        record = cls(
            fingerprint=dict(data["fingerprint"]),
            blocks_name=str(data["blocks_name"]),
            finished=bool(data["finished"]),
            dense=_perplexities(data["dense"], data.get("dense_stderr", {}), data.get("dense_losses", {})),
            compressed=_perplexities(
                data.get("compressed", {}), data.get("compressed_stderr", {}), data.get("losses", {})
            ),
            agreement={text: Agreement.from_dict(found) for text, found in data.get("agreement", {}).items()},
            allocation={name: Budget.from_dict(budget) for name, budget in data.get("allocation", {}).items()},
            shards=shards,
            blocks=[BlockRecord.from_dict(block) for block in data["blocks"]],
            seconds={kind: float(spent) for kind, spent in data.get("seconds", {}).items()},
            training=KeptTraining(_shard(kept), int(kept["number"])) if kept else None,
            distillation=dict(data.get("distillation", {})),
            opens_as=dict(data.get("opens_as", {})),
            clearing=bool(data.get("clearing", False)),
            machines=[dict(machine) for machine in data.get("machines", [])],
        )
        for block in record.blocks:
            shards[block.file]  # a KeyError if the shard of a block is not on record
        for machine in record.machines:
            differences(machine, machine)  # as it will be compared
        return record


def read_record(folder: Path) -> RunRecord:
    """Read the record in a directory; InputError if it is missing, damaged or of another format."""
    path = folder / RECORD
    data = read_json(path)
    if data.get("format", FORMAT) != FORMAT:
        raise InputError(f"{path} has format {data['format']}, and this version reads {FORMAT}. Upgrade sparlow.")
    try:
        return RunRecord.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        why = error if isinstance(error, InputError) else f"{error!r} is wrong or missing."
        raise InputError(f"{path} is not a record of sparlow: {why} Choose another directory.") from None


def _shard(data: Mapping[str, Any]) -> ShardRecord:
    return ShardRecord(shard_filename(data["file"]), int(data["bytes"]), str(data["sha256"]))


def _errors(found: Mapping[str, Perplexity]) -> dict[str, float]:
    """Standard errors by text, where they are known."""
    return {text: one.stderr for text, one in found.items() if one.stderr is not None}


def _losses(found: Mapping[str, Perplexity]) -> dict[str, list[float]]:
    """Losses of windows by text, where they are known."""
    return {text: [*one.losses] for text, one in found.items() if one.losses}


def _perplexities(
    values: Mapping[str, Any], errors: Mapping[str, Any], losses: Mapping[str, Any]
) -> dict[str, Perplexity]:
    """Put the standard errors and the losses of windows, of which older records have none, beside the values."""
    known = {text: float(error) for text, error in errors.items()}
    return {
        text: Perplexity(float(value), known.get(text), tuple(map(float, losses.get(text, ()))))
        for text, value in values.items()
    }
