"""One fine-tuning run: measure, train, measure again, write, report."""

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparlow.algorithms import REVISION
from sparlow.errors import InputError, RunError
from sparlow.evaluation.agreement import Measured
from sparlow.evaluation.perplexity import perplexity
from sparlow.exporting.adapter import BASE, ORIGIN, sign
from sparlow.exporting.lora import lora
from sparlow.exporting.stored import Stored
from sparlow.files import follow_umask, read_json
from sparlow.finetuning.examples import Examples
from sparlow.finetuning.options import FinetuneOptions
from sparlow.finetuning.parent import Parent, Paths
from sparlow.finetuning.trainer import train
from sparlow.machine import machine, versions
from sparlow.model.artefact.checkpoint import CheckpointWriter
from sparlow.model.artefact.describe import changed_sparse_parts
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.layers import compressed_layers
from sparlow.model.artefact.loader import LOADER
from sparlow.model.artefact.peft_adapter import (
    LowRank,
    put_together,
    take_apart,
    unwrap,
    with_lora,
)
from sparlow.model.artefact.schemes import FORMAT
from sparlow.model.artefact.shards import read_layers
from sparlow.model.forward.decoder import Decoder
from sparlow.model.loading.source import OpenedModel, upcast_for_cpu
from sparlow.model.training.unmoved import undone
from sparlow.progress import Notify, counting
from sparlow.report.html_page import write_reports
from sparlow.report.records import LayerRecord, Perplexity, Report
from sparlow.run.journal import Journal
from sparlow.run.model_card import write_model_card
from sparlow.text import fingerprint as text_fingerprint
from sparlow.text import in_domain, in_domain_warning

CHECKPOINTS = "checkpoints"  # Trainer's, inside the output directory until the run is finished


class FineTuning:
    """The run itself; ``begin`` writes first.

    Args:
        parent: What is fine-tuned.
        opened: It, opened.
        paths: Checked.
        plan: How to train.
        ranks: Of the adapters, by the layer's full name.
        notify: Called after every step.
    """

    def __init__(
        self,
        parent: Parent,
        opened: OpenedModel,
        paths: Paths,
        plan: FinetuneOptions,
        ranks: Mapping[str, int],
        notify: Notify,
    ) -> None:
        self.parent, self.opened, self.paths, self.plan = parent, opened, paths, plan
        self.ranks, self.notify = ranks, notify
        self.storage = StoredDtypes.of(opened.model)
        self.model = upcast_for_cpu(opened.model)
        if self.model.dtype == torch.float16:
            self.model = self.model.float()  # gradients leave the range of float16
        self.decoder = Decoder.of(self.model)
        self.journal: Journal
        self.undone: list[str] = []

    def begin(self, examples: Examples, *, overwrite: bool) -> None:
        """Begin or resume the record of this run.

        Raises:
            InputError: The output directory or the adapter's folder holds another run.
        """
        decides = {
            **self.parent.record.fingerprint,
            "format": FORMAT,
            "solver": REVISION,
            "parent": self.opened.fingerprint,
            "finetuning": self.options(),
            "text": examples.fingerprint,
        }
        device = self.model.device.type
        self.journal = Journal(self.paths.out, decides, self.decoder.name, overwrite=overwrite, device=device)
        peft = self.paths.peft
        if peft and (peft / ORIGIN).exists() and not overwrite and read_json(peft / ORIGIN).get("run") != decides:
            raise InputError(f"{peft} holds another adapter. Choose another --peft, or add --overwrite to replace it.")
        self.journal.begin(self.parent.record.dense, self.parent.record.allocation)

    def options(self) -> dict[str, Any]:
        """What decides the result beside the model and the text."""
        fresh = None if any(self.parent.ranks.values()) else next(iter(self.ranks.values()))
        return {**self.plan.deciding(), "fresh_rank": fresh}

    def go(self, examples: Examples, evaluation: Mapping[str, Tensor]) -> Report:
        """Run, or resume. ``evaluation`` maps names to token windows (n, seqlen) on which perplexity is measured."""
        start = time.perf_counter()
        known = self.parent.record.compressed
        before = {
            name: known.get(text_fingerprint(text)) or self.perplexity("perplexity before", text)
            for name, text in evaluation.items()
        }
        dense = {name: self.parent.record.dense.get(text_fingerprint(text)) for name, text in evaluation.items()}
        losses = self.train(examples)
        after = {name: self.perplexity("perplexity after", text) for name, text in evaluation.items()}
        self.write()
        report = self.report()
        trained_on = in_domain(self.plan.dataset, evaluation)
        calibrated_on = in_domain(report.recipe["calibration"], evaluation)
        report.warnings += examples.warnings(self.plan.block_size) + in_domain_warning("training", trained_on)
        report.finetuning = {
            "parent": str(self.parent.folder),
            "parent_fingerprint": self.opened.fingerprint,
            **self.options(),
            "windows": len(examples),
            "chats": dict(examples.chats),
            "trainable": sum(rank * sum(self.parent.shapes[name]) for name, rank in self.ranks.items()),
            "loss": losses,
            "perplexity": {
                when: {name: one.value for name, one in found.items()}
                for when, found in (("before", before), ("after", after))
            },
            "dense": {name: one.value for name, one in dense.items() if one},
            "in_domain": [name for name in evaluation if name in trained_on or name in calibrated_on],
            "seconds": time.perf_counter() - start,
            "machine": machine(),
            "versions": versions() | {name: version(name) for name in ("peft", "accelerate")},
        }
        if self.paths.peft:
            self.write_adapter(self.paths.peft)
        write_reports(report, self.paths.out)
        write_model_card(report, self.paths.out, self.opened.companions)
        found = {text_fingerprint(text): Measured(after[name]) for name, text in evaluation.items()}
        self.journal.finish(self.journal.record.dense, found)
        self.remove_checkpoints()
        return report

    def perplexity(self, stage: str, windows: Tensor) -> Perplexity:
        """Measure the model as it is; ``stage`` is what the progress bar says."""
        found = perplexity(self.model, windows, counting(self.notify, stage, len(windows)))
        if math.isnan(found.value):
            raise RunError(
                f"The {stage} is not a number: the model's activations leave the range of their type. "
                "Compress it anew with --dtype float32."
            )
        return found

    def train(self, examples: Examples) -> list[float]:
        """Put the trained U and V into the model, rounded as they will be stored; return the losses."""
        parts = take_apart(self.model)
        starts: dict[str, LowRank] = {name: part for name, part in parts.items() if len(part.V)}
        wrapped = with_lora(self.model, starts, self.ranks, self.plan.seed)
        losses = train(wrapped, examples, self.plan, self.paths.out / CHECKPOINTS, self.notify)
        self.model, trained = unwrap(wrapped, self.storage.dtype)
        put_together(self.model, parts | trained)
        self.undone = self.rounded_away(starts, trained)
        return losses

    def rounded_away(self, starts: Mapping[str, LowRank], trained: Mapping[str, LowRank]) -> list[str]:
        """Warn if rounding to the type they are stored in left the numbers where they were."""
        pairs = [(old.to(new), new) for name in starts for old, new in zip(starts[name], trained[name], strict=True)]
        count = sum(new.numel() for _, new in pairs)
        same = sum(int((old == new).sum()) for old, new in pairs)
        said = undone(same / count, self.storage.dtype) if count else None
        return [f"{said}: raise --lr or --steps, or compress with --dtype float32"] if said else []

    def write(self) -> None:
        """Write the shards and what makes the directory a model.

        Raises:
            RunError: It cannot be written, or S is not what it was.
        """
        writer = CheckpointWriter(self.paths.out, self.model, self.decoder, storage=self.storage)
        for i, (block, record) in enumerate(zip(self.decoder.blocks, self.parent.record.blocks, strict=True)):
            if not self.journal.has(i):
                layers = [self.with_rank(row) for row in record.layers]
                self.journal.note_copied(writer.write_block(i, block), record, layers)
        rest = writer.write_rest(self.model)
        changed = changed_sparse_parts(self.parent.folder, self.paths.out)
        if changed:
            raise RunError(f"The sparse part of {changed[0]} has changed, which is a bug in sparlow. Report it.")
        patterns = {name: row.scheme.pattern for name, row in read_layers(self.parent.folder).items()}
        loader, beside = (self.parent.folder / LOADER).exists(), self.opened.companions
        writer.finish(self.model, self.opened.tokenizer, patterns=patterns, companions=beside, loader=loader)
        self.journal.note_rest(rest, (self.parent.folder / "recipe.toml").read_text("utf-8"))

    def write_adapter(self, peft: Path) -> None:
        """Write what was trained as an adapter, with its base, as ``export`` does with a result."""
        sign(peft, self.journal.record.fingerprint, [])  # first, so that a run that is killed may write it again
        lora(Stored(self.paths.out)).write(peft, self.notify)
        for folder in (peft, peft / BASE):
            follow_umask(folder)

    def report(self) -> Report:
        """The parent's report with the sizes as they are now."""
        report = replace(self.parent.report)
        report.layers = [self.with_rank(row) for row in report.layers]
        packed = (self.storage.packed_bytes(layer, name) for name, layer in compressed_layers(self.model).items())
        report.bytes = {**report.bytes, "linears_compressed": sum(packed)}
        report.warnings = report.warnings + self.journal.warnings + self.undone
        report.add_up()
        return report

    def with_rank(self, row: LayerRecord) -> LayerRecord:
        """The record of a layer with its rank as it is now."""
        name = self.decoder.layer_name(row.block, row.name)
        return replace(row, rank=self.ranks.get(name, self.parent.ranks[name]))

    def remove_checkpoints(self) -> None:
        """Remove Trainer's checkpoints; keep what its integrations have written."""
        folder = self.paths.out / CHECKPOINTS
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
