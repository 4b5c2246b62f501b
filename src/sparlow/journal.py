"""Progress on disk. The output directory is the journal: finished shards, and ``sparlow.json`` that vouches for them.

``sparlow.json`` is written anew (beside, then renamed) after every shard. A block counts as finished when its record
stands there; a shard without a record is written again. ``finished`` becomes true last.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparlow.errors import InputError, RunError
from sparlow.model.shards import ShardRecord, read_json, replacing, sha256
from sparlow.report import LayerRecord, plain

NAME = "sparlow.json"
FORMAT = 1
_KEYS = {"format", "finished", "fingerprint", "blocks_name", "dense", "shards", "blocks"}


class Journal:
    """The record of one run in one directory.

    Args:
        folder: The output directory; it comes into being with the first record.
        fingerprint: What decides the result: recipe, model, calibration windows, version.
        blocks_name: Name of the list of decoder blocks in the model.
        overwrite: Forget a finished result or another run, and remove it when the first record is written.

    Raises:
        InputError: The directory holds a run with another fingerprint.
    """

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, Any], blocks_name: str, *, overwrite: bool = False
    ) -> None:
        self.folder = folder
        self._clear = False
        self.state: dict[str, Any] = {
            "format": FORMAT,
            "finished": False,
            "fingerprint": dict(fingerprint),
            "blocks_name": blocks_name,
            "dense": {},
            "compressed": {},
            "allocation": {},
            "shards": {},
            "blocks": [],
        }
        if (folder / NAME).exists():
            found = read_json(folder / NAME)
            if overwrite and not self._goes_on(found):
                self._clear = True
                return
            _refuse_another(folder, found.get("fingerprint", {}), self.state["fingerprint"])
            self.state = found

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
        """Whether a directory holds an unfinished and undamaged part of this very run."""
        same = found.get("fingerprint") == self.state["fingerprint"]
        return (
            same
            and not found.get("finished")
            and all(self._sound(file, record) for file, record in found["shards"].items())
        )

    def _sound(self, file: str, record: Mapping[str, Any]) -> bool:
        path = self.folder / file
        return path.exists() and path.stat().st_size == record["bytes"] and sha256(path) == record["sha256"]

    def check_shard(self, block: int) -> None:
        """Raise RunError unless the shard of a finished block is the one that was recorded."""
        file = self.state["blocks"][block]["file"]
        if not self._sound(file, self.state["shards"][file]):
            path = self.folder / file
            raise RunError(f"{path} is missing or damaged since it was written: start again with --overwrite.")

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
        rows = [asdict(layer) for layer in layers]
        self.state["shards"][shard.file] = {"bytes": shard.bytes, "sha256": shard.sha256}
        self.state["blocks"].append({"file": shard.file, "layers": rows, "matching": list(matching)})
        self._write()

    def note_copied(self, shard: ShardRecord, block: Mapping[str, Any], layers: Sequence[LayerRecord]) -> None:
        """Record a block of another result that was written anew: its record there, with the layers as they are now."""
        self.state["shards"][shard.file] = {"bytes": shard.bytes, "sha256": shard.sha256}
        self.state["blocks"].append({**block, "file": shard.file, "layers": [asdict(layer) for layer in layers]})
        self._write()

    def note_rest(self, rest: ShardRecord, recipe: str) -> None:
        """Record the last shard, and the recipe (TOML) in a file of its own."""
        with replacing(self.folder / "recipe.toml") as partial:
            partial.write_text(recipe, encoding="utf-8")
        self.state["shards"][rest.file] = {"bytes": rest.bytes, "sha256": rest.sha256}
        self._write()

    def finish(self, dense: Mapping[str, float], compressed: Mapping[str, float]) -> None:
        """Declare the result whole, with its perplexities by fingerprint of the text; the last write of a run."""
        self.state |= {"finished": True, "dense": dict(dense), "compressed": dict(compressed)}
        self._write()

    def _write(self) -> None:
        if self._clear:
            shutil.rmtree(self.folder)
            self._clear = False
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / NAME) as partial:
            partial.write_text(json.dumps(plain(self.state), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def check_folder(folder: Path, *, overwrite: bool, finished: bool = False) -> None:
    """See that ``folder`` may be written to: new, empty, an unfinished run, or any run of sparlow.

    Args:
        folder: The output directory.
        overwrite: A finished run may be replaced.
        finished: A finished run may be there, and stays as it is.

    Raises:
        InputError: It holds a finished result that is not wanted, or something that is not sparlow's.
    """
    if not folder.exists():
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"{folder} cannot be made, because of {parent}: give another --out.")
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: give a directory with --out.")
    if not any(folder.iterdir()):
        return
    found = read_json(folder / NAME) if (folder / NAME).exists() else {}
    if not found.keys() >= _KEYS:
        raise InputError(f"{folder} is not empty and holds no run of sparlow: give another --out.")
    if found["finished"] and not (overwrite or finished):
        raise InputError(f"{folder} holds a finished result: give another --out, or --overwrite to replace it.")


def read_records(folder: Path) -> dict[str, LayerRecord]:
    """The records of a directory's layers by their full names; InputError if ``sparlow.json`` cannot be read."""
    state = read_json(folder / NAME)
    try:
        layers = [LayerRecord.from_dict(row) for block in state["blocks"] for row in block["layers"]]
        return {f"{state['blocks_name']}.{layer.block}.{layer.name}": layer for layer in layers}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / NAME} is not a record of sparlow: {error!r} is wrong or missing.") from None


def _refuse_another(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if not different:
        return
    for part in ("recipe", "finetuning"):
        old, new = found.get(part), wanted.get(part)
        if part in different and isinstance(old, Mapping) and isinstance(new, Mapping):
            names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
            fields = [f"{name} ({old.get(name)} there, {new.get(name)} now)" for name in names]
            # other options explain other windows, and a model opened in another type
            different = fields + [name for name in different if name == "version"]
            break
    raise InputError(
        f"{folder} holds another run, which differs in {', '.join(different)}: "
        "repeat its command to go on with it, give another --out, or --overwrite to start again."
    )
