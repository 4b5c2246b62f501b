"""Progress on disk. The output directory is the journal: finished shards, and ``sparlow.json`` that vouches for them.

``sparlow.json`` is written anew (beside, then renamed) after every shard. A block counts as finished when its record
stands there; a shard without a record is written again. ``finished`` becomes true last.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from sparlow.errors import InputError
from sparlow.files import read_json, replacing, resolve_inside, sha256, shard_filename, sync_folder, write_json
from sparlow.machine import differences, machine, versions
from sparlow.model.artefact.checksums import small_sums
from sparlow.model.artefact.shards import ShardRecord, write_shard
from sparlow.recipe.allocation import Budget
from sparlow.report.records import LayerRecord
from sparlow.run.output_dir import LOCK, NAME

FORMAT = 1
TRAINING = "training-"  # and a number: states of the last pass, until it is done
DISTILLED = "distilled"  # folder of what the last pass over all blocks wrote, until it is moved


class Journal:
    """The record of one run in one directory.

    Args:
        folder: The output directory; it comes into being with the first record.
        fingerprint: What decides the result: recipe, model, calibration windows, format, and revision of the solvers.
        blocks_name: Name of the list of decoder blocks in the model.
        overwrite: Forget a finished result or another run, and remove it when the first record is written.
        device: Where it computes, such as cpu or cuda; on record with the machine.

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
    ) -> None:
        self.folder = folder
        self.state: dict[str, Any] = {
            "format": FORMAT,
            "finished": False,
            "fingerprint": dict(fingerprint),
            "machines": [machine() | {"device": device, **versions()}],
            "blocks_name": blocks_name,
            "dense": {},
            "compressed": {},
            "allocation": {},
            "shards": {},
            "blocks": [],
        }
        if (folder / NAME).exists():
            found = read_state(folder)
            if overwrite and not self._goes_on(found):
                self.state["clearing"] = True
                return
            _refuse_another(folder, found.get("fingerprint", {}), self.state["fingerprint"])
            self._go_on_here(found)

    def _go_on_here(self, found: dict[str, Any]) -> None:
        """Take a record as it is, and add this machine if no part of the run was computed on one of its kind."""
        here = self.state["machines"][0]
        self.state = found
        known = found.get("machines", [])  # none of a run that began before there were such records
        if known and not self.finished and all(differences(record, here) for record in known):
            known.append(here)

    @property
    def warnings(self) -> list[str]:
        """What a careful reader should know of a run that was not all computed on machines of one kind."""
        first, *others = self.state.get("machines") or [{}]
        changed = (", ".join(differences(first, other)) for other in others)
        said = "this run went on elsewhere than it began, so its bits may differ from those of one that never stopped"
        return [f"{said}: {what}" for what in changed]

    @property
    def blocks_done(self) -> int:
        """Blocks whose shard and records are on disk."""
        return len(self.state["blocks"])

    @property
    def finished(self) -> bool:
        """Whether the result is whole."""
        return bool(self.state["finished"])

    @property
    def allocation(self) -> dict[str, dict[str, Any]]:
        """Budgets that the data decided, by the layer's full name; empty if there is none."""
        return dict(self.state.get("allocation", {}))

    @property
    def compressed(self) -> dict[str, float]:
        """Perplexities of the finished result, by fingerprint of the text."""
        return {text: float(value) for text, value in self.state.get("compressed", {}).items()}

    @property
    def dense(self) -> dict[str, float]:
        """Perplexities of the dense model measured so far, by fingerprint of the text."""
        return {text: float(value) for text, value in self.state["dense"].items()}

    def layers(self, block: int) -> list[LayerRecord]:
        """Records of a finished block."""
        return [LayerRecord.from_dict(row) for row in self.state["blocks"][block]["layers"]]

    def _goes_on(self, found: Mapping[str, Any]) -> bool:
        """Whether a directory holds an unfinished part of this very run."""
        return found.get("fingerprint") == self.state["fingerprint"] and not found.get("finished")

    @property
    def distillation(self) -> dict[str, Any]:
        """What the last pass over all blocks did, once their shards are what it made of them; empty before."""
        return dict(self.state.get("distillation", {}))

    def has(self, block: int) -> bool:
        """Whether the shard of a block was recorded, and is on disk as it was written."""
        if block >= self.blocks_done:
            return False
        file = self.state["blocks"][block]["file"]
        return self._is_there({"file": file, **self.state["shards"][file]})

    def _is_there(self, record: Mapping[str, Any]) -> bool:
        """Whether a file is on disk as it was written."""
        path = resolve_inside(self.folder, shard_filename(record["file"]))
        return path.exists() and path.stat().st_size == record["bytes"] and sha256(path) == record["sha256"]

    def require_whole(self) -> None:
        """See that every shard is on disk as it was written, before a finished result is read again.

        Raises:
            InputError: One is not.
        """
        for file, record in self.state["shards"].items():
            if not self._is_there({"file": file, **record}):
                raise InputError(
                    f"The shard {file} of the finished result in {self.folder} is missing or damaged: --overwrite to "
                    "compress again."
                )

    def settle(self) -> None:
        """Bring a last pass over all blocks that was killed to a state from which the run can go on.

        Where it was recorded, what it made takes the place of the shards before it. Where a shard of it is damaged, all
        blocks are forgotten: what they were made of is gone.
        """
        place = self.folder / DISTILLED
        if self.distillation:
            for path in sorted(place.glob("*.safetensors")):
                path.replace(self.folder / path.name)
            if not all(self.has(block) for block in range(self.blocks_done)):
                self.state |= {"blocks": [], "shards": {}, "distillation": {}}
            self.state.pop("training", None)
        if place.is_dir():
            sync_folder(self.folder)
            shutil.rmtree(place)
        self._tidy_training()

    @property
    def training(self) -> Path | None:
        """The last state of the last pass that was kept, if it is on disk as it was written."""
        record = self.state.get("training")
        return self.folder / record["file"] if record and self._is_there(record) else None

    def keep_training(self, tensors: Mapping[str, Tensor]) -> None:
        """Write a state of the last pass over all blocks, and forget the one before it."""
        number = int(self.state["training"]["number"]) + 1 if "training" in self.state else 1
        shard = write_shard(self.folder / f"{TRAINING}{number}.safetensors", tensors)
        self.state["training"] = {**asdict(shard), "number": number}
        self._write()
        self._tidy_training()

    def _tidy_training(self) -> None:
        """Remove states of a training that nobody goes on from."""
        used = self.state.get("training", {}).get("file")
        for path in (*self.folder.glob(f"{TRAINING}*"), *self.folder.glob(f".{TRAINING}*")):
            if path.name != used:
                path.unlink()

    def note_distilled(self, shards: Sequence[ShardRecord], found: Mapping[str, Any]) -> None:
        """Record what the last pass made of all blocks; the shards lie in ``DISTILLED``, and are moved from there."""
        self.state["shards"] |= {s.file: {"bytes": s.bytes, "sha256": s.sha256} for s in shards}
        self.state["distillation"] = dict(found)
        self._write()
        self.settle()

    def begin(self, dense: Mapping[str, float], allocation: Mapping[str, Mapping[str, object]]) -> None:
        """Make the directory and record the dense model's perplexities and what the data decided."""
        self.state["dense"] |= dense
        self.state["allocation"] = dict(allocation)
        self._write()

    @property
    def seconds(self) -> dict[str, float]:
        """What the blocks done so far have taken, by kind of work."""
        return dict(self.state.get("seconds", {}))

    def matching(self, block: int) -> list[dict[str, Any]]:
        """What matching did to a finished block; empty if it was not matched."""
        return list(self.state["blocks"][block].get("matching", []))

    def note_block(
        self,
        shard: ShardRecord,
        layers: Sequence[LayerRecord],
        matching: Sequence[Mapping[str, Any]],
        seconds: Mapping[str, float],
    ) -> None:
        """Record a finished block, whose shard is on disk already, and the seconds spent up to here."""
        self.state["seconds"] = dict(seconds)
        self._note(shard, {"matching": list(matching)}, layers)

    def note_copied(self, shard: ShardRecord, block: Mapping[str, Any], layers: Sequence[LayerRecord]) -> None:
        """Record a block of another result that was written anew: its record there, with the layers as they are now."""
        self._note(shard, block, layers)

    def _note(self, shard: ShardRecord, block: Mapping[str, Any], layers: Sequence[LayerRecord]) -> None:
        """Record a block, for the first time or again; those after it stay if it came out as it was."""
        row = {**block, "file": shard.file, "layers": [asdict(layer) for layer in layers]}
        sums, blocks = {"bytes": shard.bytes, "sha256": shard.sha256}, self.state["blocks"]
        files = [known["file"] for known in blocks]
        i = files.index(shard.file) if shard.file in files else len(files)
        kept = i + 1 if self.state["shards"].get(shard.file) == sums else len(files)
        if kept > i + 1:  # what comes after was made of another block
            self.state.pop("training", None)
        blocks[i:kept] = [row]
        self.state["shards"] = {known["file"]: self.state["shards"].get(known["file"]) for known in blocks}
        self.state["shards"][shard.file] = sums
        self._write()

    def note_rest(self, rest: ShardRecord, recipe: str) -> None:
        """Record the last shard, and the recipe (TOML) in a file of its own."""
        with replacing(self.folder / "recipe.toml") as partial:
            partial.write_text(recipe, encoding="utf-8")
        self.state["shards"][rest.file] = {"bytes": rest.bytes, "sha256": rest.sha256}
        self._write()

    def finish(self, dense: Mapping[str, float], compressed: Mapping[str, float]) -> None:
        """Declare the result whole, with its perplexities by fingerprint of the text; the last write of a run."""
        self.state.setdefault("opens_as", small_sums(self.folder))
        self.state |= {"finished": True, "dense": dict(dense), "compressed": dict(compressed)}
        self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._put()
        if self.state.pop("clearing", False):  # on disk until all is gone: whoever is killed on the way goes on with it
            for path in self.folder.iterdir():
                if path.name not in (NAME, LOCK):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            self._put()

    def _put(self) -> None:
        write_json(self.folder / NAME, self.state)


def read_records(folder: Path) -> dict[str, LayerRecord]:
    """The records of a directory's layers by their full names; InputError if ``sparlow.json`` cannot be read."""
    state = read_state(folder)
    layers = [LayerRecord.from_dict(row) for block in state["blocks"] for row in block["layers"]]
    return {f"{state['blocks_name']}.{layer.block}.{layer.name}": layer for layer in layers}


def read_state(folder: Path) -> dict[str, Any]:
    """The object in ``sparlow.json``, with records that can be read; InputError if it is anything else."""
    state = read_json(folder / NAME)
    if state.get("format", FORMAT) != FORMAT:
        raise InputError(f"{folder / NAME} has format {state['format']}, this one reads {FORMAT}: upgrade sparlow.")
    try:
        _check_state(state)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{folder / NAME} is not a record of sparlow: {error!r} is wrong or missing.") from None
    return state


def _check_state(state: Mapping[str, Any]) -> None:
    """Read every part once as it will be read later; whatever is raised says that it is damaged."""
    dict(state["fingerprint"]), state["finished"], str(state["blocks_name"])
    for file, record in state["shards"].items():
        shard_filename(file), int(record["bytes"]), str(record["sha256"])
    for block in state["blocks"]:
        state["shards"][block["file"]], list(block.get("matching", []))
        for row in block["layers"]:
            LayerRecord.from_dict(row)
    for numbers in (state["dense"], state.get("compressed", {}), state.get("seconds", {})):
        [float(value) for value in numbers.values()]
    if "training" in state:
        record = state["training"]
        shard_filename(record["file"]), int(record["bytes"]), str(record["sha256"]), int(record["number"])
    for record in state.get("machines", []):
        differences(record, record)
    for budget in state.get("allocation", {}).values():
        Budget.from_dict(budget)


def _refuse_another(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if not different:
        return
    for name, what in (("format", "in the format"), ("solver", "with the solvers of revision")):
        if name in different:
            old, new = found.get(name, "of an older sparlow" if name == "format" else "unknown"), wanted.get(name)
            raise InputError(
                f"{folder} holds a run {what} {old}, and this sparlow has {new}: give another --out, or --overwrite to "
                "compress again."
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
        f"{folder} holds another run, which differs in {', '.join(different)}: "
        "repeat its command to go on with it, give another --out, or --overwrite to start again."
    )
