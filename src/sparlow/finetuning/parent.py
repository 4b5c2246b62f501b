"""What fine-tuning starts from, and where it writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparlow.errors import InputError
from sparlow.exporting.adapter import ORIGIN
from sparlow.model.artefact.describe import in_blocks
from sparlow.model.artefact.shards import read_layers
from sparlow.model.loading.place import require_result
from sparlow.report.records import Report
from sparlow.run.record import RunRecord, read_record

FRESH_RANK = 16  # of the adapters of a model that was only pruned


@dataclass(frozen=True)
class Parent:
    """The finished result that is fine-tuned.

    Attributes:
        folder: Its directory.
        record: Its ``sparlow.json``.
        report: Its ``report.json``.
        ranks: By the layer's full name.
        shapes: (out, in), likewise.
    """

    folder: Path
    record: RunRecord
    report: Report
    ranks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]

    @classmethod
    def read(cls, folder: Path) -> "Parent":
        """Look into a directory.

        Raises:
            InputError: It holds no finished result of sparlow.
        """
        state = read_record(folder)
        if not state.finished:
            raise InputError(f"{folder} is an unfinished run. Repeat the command that began it: it goes on from there.")
        ranks = {name: record.scheme.rank for name, record in in_blocks(read_layers(folder)).items()}
        report = Report.from_file(folder / "report.json")
        shapes = {f"{state.blocks_name}.{row.block}.{row.name}": row.shape for row in report.layers}
        if not ranks or ranks.keys() != shapes.keys():
            raise InputError(
                f"{folder} has no compressed layers, or others than its report.json says. Give what compress wrote."
            )
        return cls(folder, state, report, ranks, shapes)

    def ranks_to_train(self, fresh: int | None) -> dict[str, int]:
        """The rank of the adapter of each layer that gets one: its own; if no layer has a low-rank part, ``fresh``.

        Raises:
            InputError: ``fresh`` does not fit.
        """
        own = {name: rank for name, rank in self.ranks.items() if rank}
        if own:
            if fresh is not None:
                raise InputError(
                    f"{self.folder} already has a low-rank part, whose ranks stay as they are. Leave out --rank."
                )
            return own
        most = min(min(shape) for shape in self.shapes.values())
        rank = min(FRESH_RANK, most) if fresh is None else fresh
        if not 1 <= rank <= most:
            raise InputError(
                f"The rank {rank} is not possible. Give --rank from 1 to {most}, the smallest side of a layer."
            )
        return dict.fromkeys(self.ranks, rank)


@dataclass(frozen=True)
class Paths:
    """The directory that is read, the one that is written, and the folder for the adapter, if any."""

    folder: Path
    out: Path
    peft: Path | None

    def check(self) -> None:
        """Check that writing overwrites nothing of value.

        Raises:
            InputError: A directory is in use for something else.
        """
        require_result(self.folder)
        folder, out = self.folder.resolve(), self.out.resolve()
        if out in (folder, *folder.parents):
            raise InputError(f"Writing to {self.out} would replace {self.folder}. Choose another --out.")
        if self.peft is None:
            return
        if self.peft.resolve() in (folder, *folder.parents, out, *out.parents):
            raise InputError(f"The adapter cannot be put into {self.peft}. Give --peft a folder of its own.")
        foreign = self.peft.exists() and not self.peft.is_dir()
        if foreign or (self.peft.is_dir() and any(self.peft.iterdir()) and not (self.peft / ORIGIN).exists()):
            raise InputError(f"{self.peft} is not empty and holds no adapter of sparlow. Choose another --peft.")
