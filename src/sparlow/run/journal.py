"""The record of progress in the output directory: finished shards, and ``sparlow.json`` with their checksums.

``sparlow.json`` is rewritten atomically after every shard. A block is finished once its record is in there; a shard
without a record is written again. ``finished`` becomes true last.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sparlow.distributed import Processes
from sparlow.errors import InputError
from sparlow.evaluation.agreement import Measured
from sparlow.files import replacing, resolve_inside, sync_folder
from sparlow.machine import differences, machine, versions
from sparlow.model.artefact.checksums import small_sums
from sparlow.model.artefact.shards import ShardRecord, write_shard
from sparlow.recipe.allocation import Budget
from sparlow.report.records import LayerRecord, Perplexity
from sparlow.run.arrival import arrived, wrong_with
from sparlow.run.output_dir import LOCK, NAME
from sparlow.run.record import BlockRecord, KeptTraining, RunRecord, read_record

TRAINING = "training-"  # and a number: states of distillation, until it is done
DISTILLED = "distilled"  # folder of the shards that distillation wrote, until they are moved


class Journal:
    """The record of one run in one directory.

    Args:
        folder: The output directory. It is created with the first record.
        fingerprint: What decides the result: recipe, model, calibration windows, format, and revision of the solvers.
        blocks_name: Name of the list of decoder blocks in the model.
        overwrite: Ignore a finished result or another run, and remove it when the first record is written.
        device: Type of the device that computes, such as cpu or cuda. It is recorded with the machine.
        writes: Whether this process writes the directory. Any other one does not look there before ``share`` has told
            it what there is, since it may see the directory late.
        late: Whether this process may see files late, because another machine writes them.

    Raises:
        InputError: The directory holds a run with another fingerprint.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        blocks_name: str,
        *,
        overwrite: bool = False,
        device: str = "cpu",
        writes: bool = True,
        late: bool = False,
    ) -> None:
        self.folder, self._late = folder, late
        self._seen: set[ShardRecord] = set()  # that others wrote, and that are here
        here = machine() | {"device": device, **versions()}
        self.record = RunRecord(dict(fingerprint), blocks_name, machines=[here])
        if writes and (folder / NAME).exists():
            found = read_record(folder)
            same = found.fingerprint == self.record.fingerprint
            if overwrite and (found.finished or not same):
                self.record.clearing = True
                return
            _refuse_another(folder, found.fingerprint, self.record.fingerprint)
            self.record = found
            # a run that began before there were such records has none
            if found.machines and not found.finished and all(differences(known, here) for known in found.machines):
                found.machines.append(here)

    @property
    def warnings(self) -> list[str]:
        """A sentence for each machine that differs from the one on which the run began."""
        first, *others = self.record.machines or [{}]
        changed = (", ".join(differences(first, other)) for other in others)
        so = "so its bits may differ from those of a run that never stopped"
        return [f"This run was resumed on a machine that differs ({what}), {so}." for what in changed]

    def share(self, processes: Processes) -> None:
        """Give all processes the record that the first process has, however long it has worked since they met."""
        if processes.size > 1:
            self.record = RunRecord.from_dict(processes.first_finds(self.record.to_dict))

    def shard(self, file: str) -> Path | None:
        """Return the path of a shard; None if it is not on record.

        Where another machine writes, this waits until the file is here as it was written.

        Raises:
            RunError: It does not come.
        """
        record = self.record.shards.get(file)
        return self._path(record) if record else None

    def _path(self, shard: ShardRecord) -> Path:
        if not self._late or shard in self._seen:
            return resolve_inside(self.folder, shard.file)
        path = arrived(self.folder, shard)
        self._seen.add(shard)
        return path

    @property
    def blocks_done(self) -> int:
        """Number of blocks whose shard and records are on disk."""
        return len(self.record.blocks)

    def has(self, block: int) -> bool:
        """Whether the shard of a block is recorded, and its checksum on disk is as recorded."""
        return block < self.blocks_done and self._is_there(self.record.shards[self.record.blocks[block].file])

    def _is_there(self, shard: ShardRecord) -> bool:
        """Whether a file is on disk as it was written."""
        return not wrong_with(resolve_inside(self.folder, shard.file), shard)

    def require_whole(self) -> None:
        """See that every shard is on disk as it was written, before a finished result is read again.

        Raises:
            InputError: One is not.
        """
        for file, shard in self.record.shards.items():
            if not self._is_there(shard):
                raise InputError(
                    f"The shard {file} of the finished result in {self.folder} is missing or damaged. Add --overwrite "
                    "to compress again."
                )

    def settle(self) -> None:
        """Recover from a kill during distillation.

        If its result was recorded, move its shards into place; if one of them is damaged, discard all blocks, since the
        originals are gone.
        """
        place = self.folder / DISTILLED
        if self.record.distillation:
            for path in sorted(place.glob("*.safetensors")):
                path.replace(self.folder / path.name)
            if not all(self.has(block) for block in range(self.blocks_done)):
                self.record.blocks, self.record.shards, self.record.distillation = [], {}, {}
            self.record.training = None
        if place.is_dir():
            sync_folder(self.folder)
            shutil.rmtree(place)
        self._tidy_training()

    @property
    def training(self) -> Path | None:
        """File of the last state of distillation, if its checksum is as recorded."""
        kept = self.record.training
        return self.folder / kept.shard.file if kept and self._is_there(kept.shard) else None

    def training_for(self, processes: Processes) -> Path | None:
        """Return the same in every process if the first one finds it: all go on from it, or none."""
        found = processes.first_finds(lambda: self.training is not None)
        return self._path(self.record.training.shard) if self.record.training and found else None

    def keep_training(self, tensors: Mapping[str, Tensor]) -> None:
        """Write a state of distillation, and remove the one before it."""
        number = self.record.training.number + 1 if self.record.training else 1
        shard = write_shard(self.folder / f"{TRAINING}{number}.safetensors", tensors)
        self.record.training = KeptTraining(shard, number)
        self._write()
        self._tidy_training()

    def _tidy_training(self) -> None:
        """Remove the states of training that will not be resumed."""
        used = self.record.training and self.record.training.shard.file
        for path in (*self.folder.glob(f"{TRAINING}*"), *self.folder.glob(f".{TRAINING}*")):
            if path.name != used:
                path.unlink()

    def note_distilled(self, shards: Sequence[ShardRecord], found: Mapping[str, Any]) -> None:
        """Record the result of distillation, then move its shards from ``DISTILLED`` into place."""
        self.record.shards |= {shard.file: shard for shard in shards}
        self.record.distillation = dict(found)
        self._write()
        self.settle()

    def begin(self, dense: Mapping[str, Perplexity], allocation: Mapping[str, Budget]) -> None:
        """Create the directory, and record the dense model's perplexities and the budgets that the data decided."""
        self.record.dense |= dense
        self.record.allocation = dict(allocation)
        self._write()

    def note_block(
        self,
        shard: ShardRecord,
        layers: Sequence[LayerRecord],
        matching: Sequence[Mapping[str, Any]],
        seconds: Mapping[str, float],
    ) -> None:
        """Record a finished block, whose shard is on disk already, and the seconds spent up to here."""
        self.record.seconds = dict(seconds)
        self._note(shard, BlockRecord(shard.file, list(layers), [dict(row) for row in matching]))

    def note_copied(self, shard: ShardRecord, block: BlockRecord, layers: Sequence[LayerRecord]) -> None:
        """Record a block that was copied from another result: its record there, with the layers as they are now."""
        self._note(shard, replace(block, file=shard.file, layers=list(layers)))

    def _note(self, shard: ShardRecord, row: BlockRecord) -> None:
        """Record a block, for the first time or again. Later blocks stay on record if its shard is as before."""
        blocks, shards = self.record.blocks, self.record.shards
        files = [known.file for known in blocks]
        i = files.index(shard.file) if shard.file in files else len(files)
        kept = i + 1 if shards.get(shard.file) == shard else len(files)
        if kept > i + 1:  # what comes after was made of another block
            self.record.training = None
        blocks[i:kept] = [row]
        shards[shard.file] = shard
        self.record.shards = {known.file: shards[known.file] for known in blocks}
        self._write()

    def note_rest(self, rest: ShardRecord, recipe: str) -> None:
        """Record the last shard, and the recipe (TOML) in a file of its own."""
        with replacing(self.folder / "recipe.toml") as partial:
            partial.write_text(recipe, encoding="utf-8")
        self.record.shards[rest.file] = rest
        self._write()

    @property
    def measured(self) -> dict[str, Measured]:
        """What is on record of the finished result, by fingerprint of the text."""
        agreement = self.record.agreement
        return {text: Measured(found, agreement.get(text)) for text, found in self.record.compressed.items()}

    def finish(self, dense: Mapping[str, Perplexity], result: Mapping[str, Measured]) -> None:
        """Record that the result is finished, with what was measured by fingerprint of the text: a run's last write."""
        self.record.opens_as = self.record.opens_as or small_sums(self.folder)
        self.record.finished, self.record.dense = True, dict(dense)
        self.record.compressed = {text: found.perplexity for text, found in result.items()}
        self.record.agreement = {text: found.agreement for text, found in result.items() if found.agreement}
        self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._put()
        if self.record.clearing:  # stays on disk until all is removed, in case the run is killed here
            self.record.clearing = False
            for path in self.folder.iterdir():
                if path.name not in (NAME, LOCK):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            self._put()

    def _put(self) -> None:
        with replacing(self.folder / NAME) as partial:
            partial.write_text(self.record.to_text(), encoding="utf-8")


def _refuse_another(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if not different:
        return
    for name, what in (("format", "in the format"), ("solver", "with the solvers of revision")):
        if name in different:
            old, new = found.get(name, "of an older sparlow" if name == "format" else "unknown"), wanted.get(name)
            raise InputError(
                f"{folder} holds a run {what} {old}, and this sparlow has {new}. Choose another --out, or add "
                "--overwrite to compress again."
            )
    for part in ("recipe", "finetuning"):
        old, new = found.get(part), wanted.get(part)
        if part in different and isinstance(old, Mapping) and isinstance(new, Mapping):
            names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
            fields = [f"{name} ({old.get(name)} there, {new.get(name)} now)" for name in names]
            # other options explain other windows, and a model opened in another type
            different = fields
            break
    raise InputError(
        f"{folder} holds another run, which differs in {', '.join(different)}. "
        "Repeat its command to resume it, choose another --out, or add --overwrite to start again."
    )
