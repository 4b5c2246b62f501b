"""The bridge: walk a model block by block and give every linear layer to an algorithm. Imports both worlds."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparlow.algorithms import check_budget, solve
from sparlow.errors import InputError, RunError
from sparlow.evaluation import perplexity, require_tokenizer
from sparlow.journal import Journal, check_folder
from sparlow.linalg.gram import Gram, GramAccumulator
from sparlow.model.blocks import decoder_blocks, linears, not_compressed, observe, record, run_block
from sparlow.model.checkpoint import CheckpointWriter, read_block
from sparlow.model.layers import SparseLowRankLinear
from sparlow.model.source import OpenedModel, fingerprint, open_model
from sparlow.recipe import Recipe
from sparlow.report import LayerRecord, Report, peak_memory
from sparlow.text import calibration_windows, evaluation_windows
from sparlow.text import fingerprint as text_fingerprint

MICRO_BATCH_TOKENS = 4096  # tokens that pass through a block at a time


@dataclass(frozen=True)
class Progress:
    """One step of a run, for whoever shows it.

    Attributes:
        stage: What is going on: "dense perplexity", "blocks", "compressed perplexity".
        done: Steps finished.
        total: Steps in all.
        layer: The layer that was just compressed, if that is the step.
    """

    stage: str
    done: int
    total: int
    layer: LayerRecord | None = None


Notify = Callable[[Progress], None]


def compress(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    calibration: str | Path | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    evaluate: Sequence[str] = ("builtin",),
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    notify: Notify = lambda _: None,
) -> Report:
    """Compress every linear layer of every decoder block of a causal language model.

    Args:
        model: Hub id, directory, .gguf file, or a transformers model, which is then compressed in place.
        recipe: What to do; the defaults of ``Recipe`` if left out.
        calibration: Corpus, file, or token windows (n, seqlen) int64; instead of the recipe's.
        tokenizer: Needed with a transformers model if text is used.
        out: Directory to write as the run proceeds; an unfinished one is resumed. Without it nothing is written.
        evaluate: Corpora or files on which perplexity is measured, dense first and compressed at the end.
        device: "auto" (an accelerator if there is one), or torch's name of a device. A model object stays where it is.
        overwrite: Replace a result of sparlow in ``out``.
        trust_remote_code: Let a model bring Python code of its own.
        notify: Called after every step.

    Returns:
        The report, which is also written to ``out`` as ``report.json`` and ``report.html``.

    Raises:
        InputError: Something given cannot be used; nothing was written.
        RunError: The run could not go on; with ``out``, the same call resumes it.
    """
    recipe = recipe or Recipe()
    if isinstance(calibration, str | Path):
        recipe = recipe.changed(calibration=str(calibration))
    elif isinstance(calibration, Tensor):
        recipe = recipe.changed(calibration=None, samples=calibration.shape[0], seqlen=calibration.shape[-1])
    folder = None if out is None else Path(out)
    if folder is not None:
        check_folder(folder, overwrite=overwrite)
    opened = _open(model, tokenizer, recipe, device, trust_remote_code=trust_remote_code)
    windows = _windows(calibration, opened, recipe)
    run = _Run(opened, recipe, windows, folder, notify, overwrite=overwrite)
    return run.go(_evaluation(evaluate, opened, recipe))


def _open(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    device: str,
    *,
    trust_remote_code: bool,
) -> OpenedModel:
    if isinstance(model, PreTrainedModel):
        return OpenedModel(model.eval(), tokenizer, model.config._name_or_path, fingerprint(model))  # noqa: SLF001 - its only name
    opened = open_model(str(model), dtype=recipe.dtype, device=pick_device(device), trust_remote_code=trust_remote_code)
    return replace(opened, tokenizer=tokenizer or opened.tokenizer)


def pick_device(name: str) -> str:
    """Resolve "auto": an accelerator if there is one, else the CPU."""
    if name != "auto":
        return name
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def _windows(calibration: str | Path | Tensor | None, opened: OpenedModel, recipe: Recipe) -> Tensor:
    """The calibration windows (samples, seqlen) int64."""
    if isinstance(calibration, Tensor):
        vocabulary = opened.model.get_input_embeddings().weight.shape[0]
        if calibration.ndim != 2 or calibration.dtype != torch.int64 or calibration.numel() == 0:  # noqa: PLR2004
            raise InputError("Calibration windows must be a tensor (windows, seqlen) of int64 token ids.")
        if calibration.min() < 0 or calibration.max() >= vocabulary:
            raise InputError(f"Calibration windows hold token ids outside of the vocabulary of {vocabulary}.")
        return calibration.cpu()
    if recipe.calibration is None:
        raise InputError("There is no calibration text: name a corpus or a file, or give token windows.")
    tokenizer = require_tokenizer(opened.tokenizer, opened.name)
    return calibration_windows(
        recipe.calibration, tokenizer, samples=recipe.samples, seqlen=recipe.seqlen, seed=recipe.seed
    )


def _evaluation(corpora: Sequence[str], opened: OpenedModel, recipe: Recipe) -> dict[str, Tensor]:
    """Windows of every corpus, cut before the run so that a missing file is noticed at once."""
    if not corpora:
        return {}
    tokenizer = require_tokenizer(opened.tokenizer, opened.name)
    return {name: evaluation_windows(name, tokenizer, seqlen=max(recipe.seqlen, 2)) for name in corpora}


class _Run:
    """One compression from the checks to the report."""

    def __init__(
        self,
        opened: OpenedModel,
        recipe: Recipe,
        windows: Tensor,
        folder: Path | None,
        notify: Notify,
        *,
        overwrite: bool,
    ) -> None:
        self.opened, self.recipe, self.windows, self.notify = opened, recipe, windows, notify
        self.model = opened.model
        self.blocks_name, self.blocks = decoder_blocks(self.model)
        self.pattern, self.rank = recipe.parsed_pattern, recipe.used_rank
        self.report = Report(recipe=recipe.to_dict(), model=opened.name)
        self.clock = _Clock(self.report.seconds)
        self.check_layers()
        self.folder = folder
        self.journal: Journal | None = None
        if folder is not None:
            decides = {
                "recipe": recipe.to_dict(),
                "model": opened.fingerprint,
                "calibration": text_fingerprint(windows),
                "version": version("sparlow"),
            }
            self.journal = Journal(folder, decides, overwrite=overwrite)

    def check_layers(self) -> None:
        """Every layer must fit the recipe and hold finite numbers, before anything is computed or written."""
        names = [(i, name, linear) for i, block in enumerate(self.blocks) for name, linear in linears(block).items()]
        if not names:
            raise InputError(f"{self.opened.name} has no plain linear layer in its decoder blocks: nothing to compress.")
        for i, name, linear in names:
            try:
                check_budget(self.recipe.found_algorithm, (linear.out_features, linear.in_features), self.pattern, self.rank)
            except InputError as error:
                raise InputError(f"{self.blocks_name}.{i}.{name}: {error}") from None
            if not torch.isfinite(linear.weight).all():
                raise InputError(f"{self.blocks_name}.{i}.{name}: the weight holds NaN or infinity; the model is damaged.")

    def go(self, evaluation: Mapping[str, Tensor]) -> Report:
        """Measure, walk, write, measure."""
        with self.clock("total"):
            self.measure_dense(evaluation)
            linear_bytes = self.walk()
            self.finish_files()
            for name, windows in evaluation.items():
                self.report.compressed["perplexity"][name] = self.perplexity("compressed perplexity", windows)
            self.fill_report(linear_bytes)
        if self.folder is not None:
            from sparlow.page import write_reports

            write_reports(self.report, self.folder)
        return self.report

    def measure_dense(self, evaluation: Mapping[str, Tensor]) -> None:
        """The sanity gate: a number for the model as it came, before any number for what becomes of it."""
        known = self.journal.dense if self.journal else {}
        self.report.bytes["dense"] = sum(p.numel() * p.element_size() for p in self.model.parameters())
        for name, windows in evaluation.items():
            value = known.get(name) or self.perplexity("dense perplexity", windows)
            if value != value:  # noqa: PLR0124 - NaN
                self.name_what_is_not_finite(windows[:1])
            if value > self.model.config.get_text_config().vocab_size:
                self.report.warnings.append(f"the dense model is no better than chance on {name}: perplexity {value:.0f}")
            self.report.dense["perplexity"][name] = value
        if self.journal and not self.journal.blocks_done:
            self.journal.note_dense(self.report.dense["perplexity"])

    def name_what_is_not_finite(self, windows: Tensor) -> None:
        """Raise InputError with the first layer of the dense model whose numbers are not finite."""
        recording = record(self.model, windows, micro_batch=1)
        hidden = recording.hidden
        for i, block in enumerate(self.blocks):
            label = f"{self.blocks_name}.{i}"
            hidden = observe(block, recording.calls[i], hidden, GramAccumulator, label=label).outputs
        raise InputError(f"The dense model's perplexity is not a number: check the weights of {self.opened.name}.")

    def perplexity(self, stage: str, windows: Tensor) -> float:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.notify(Progress(stage, done, len(windows)))

        with self.clock("evaluate"):
            return perplexity(self.model, windows, advance)

    @torch.no_grad()
    def walk(self) -> dict[str, int]:
        """Compress block after block; return the bytes of the linear layers, dense and compressed."""
        with self.clock("walk"):
            micro_batch = max(MICRO_BATCH_TOKENS // self.windows.shape[1], 1)
            recording = record(self.model, self.windows, micro_batch=micro_batch)
        writer = self.new_writer()
        done = self.journal.blocks_done if self.journal else 0
        bytes_dense = bytes_compressed = 0
        hidden = recording.hidden
        for i, block in enumerate(self.blocks):
            bytes_dense += sum(_bytes(linear) for linear in linears(block).values())
            if i < done:
                self.restore(i, block)
            else:
                layers = self.compress_block(i, block, recording.calls[i], hidden)
                self.report.layers += layers
                if writer and self.journal:
                    with self.clock("save"):
                        self.journal.note_block(writer.write_block(i, block), layers)
            bytes_compressed += sum(_packed_bytes(m) for m in block.modules() if isinstance(m, SparseLowRankLinear))
            with self.clock("walk"):
                hidden = [run_block(block, x, recording.calls[i][len(x)]).to(x.device) for x in hidden]
            self.notify(Progress("blocks", i + 1, len(self.blocks)))
        return {"linears_dense": bytes_dense, "linears_compressed": bytes_compressed}

    def new_writer(self) -> CheckpointWriter | None:
        if self.folder is None:
            return None
        return CheckpointWriter(self.folder, self.model, self.blocks_name, len(self.blocks))

    def restore(self, i: int, block: nn.Module) -> None:
        """Take a block of an earlier run from its shard."""
        assert self.journal is not None  # noqa: S101 - only a journal knows of finished blocks
        self.journal.check_shard(list(self.journal.state["shards"])[i])
        read_block(self.journal.folder, i, block)
        self.report.layers += [layer for layer in self.journal.layers if layer.block == i]

    def compress_block(self, i: int, block: nn.Module, calls: Mapping[int, Any], hidden: list[Tensor]) -> list[LayerRecord]:
        """Replace every linear of one block; return a record each."""
        with self.clock("statistics"):
            seen = observe(block, calls, hidden, GramAccumulator, label=f"{self.blocks_name}.{i}")
            moments = {owner: stat.second_moment(len(self.windows)) for owner, stat in seen.statistics.items()}
        records = []
        gram, of = None, None
        for name, linear in sorted(linears(block).items(), key=lambda item: seen.owner.get(item[0], "")):
            owner = seen.owner.get(name)
            if gram is None or owner != of:  # neighbours in this order share one Gram, and its factorisations
                gram, of = self.gram(linear, None if owner is None else moments[owner]), owner
            with self.clock("solve"):
                found = self.compress_layer(i, block, name, linear, gram, seen_data=owner is not None)
            records.append(found)
            self.notify(Progress("blocks", i, len(self.blocks), found))
        return records

    def gram(self, linear: nn.Linear, moment: Tensor | None) -> Gram:
        if moment is None:
            return Gram.identity(linear.in_features, linear.weight.device)
        return Gram.damped(moment, absolute=self.recipe.damping, relative=self.recipe.relative_damping)

    def compress_layer(
        self, i: int, block: nn.Module, name: str, linear: nn.Linear, gram: Gram, *, seen_data: bool
    ) -> LayerRecord:
        """Solve one layer and put the result in its place."""
        try:
            found = solve(
                self.recipe.found_algorithm, linear.weight, gram, self.pattern, self.rank, self.recipe.parsed_options
            )
        except RunError as error:
            raise RunError(f"{self.blocks_name}.{i}.{name}: {error}") from error
        bias = None if linear.bias is None else linear.bias.detach()
        block.set_submodule(name, SparseLowRankLinear(found.S, found.U, found.V, bias))
        warnings = _warnings(found.stats, seen_data=seen_data)
        self.report.warnings += [f"{self.blocks_name}.{i}.{name}: {warning}" for warning in warnings]
        return LayerRecord(
            block=i,
            name=name,
            shape=(linear.out_features, linear.in_features),
            pattern=str(self.pattern),
            density=(found.S != 0).float().mean().item(),
            rank=self.rank,
            relative_error=float(found.stats["relative_error"]),
            iterations=int(found.stats["iterations"]),
            seconds=float(found.stats["seconds"]),
            damping=float(found.stats["damping"]),
            warnings=warnings,
        )

    def finish_files(self) -> None:
        """Write what lies outside of the blocks and the files that make the directory a model."""
        writer = self.new_writer()
        if writer is None or self.journal is None:
            return
        with self.clock("save"):
            rest = writer.write_rest(self.model)
            writer.finish(self.model, self.opened.tokenizer)
            self.journal.finish(rest)

    def fill_report(self, linear_bytes: Mapping[str, int]) -> None:
        report = self.report
        linear_weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
        saved = linear_bytes["linears_dense"] - linear_bytes["linears_compressed"]
        report.bytes |= {"compressed": report.bytes["dense"] - saved, **linear_bytes}
        report.bits_per_weight = 8 * linear_bytes["linears_compressed"] / linear_weights
        report.peak_memory = peak_memory()
        names = {f"{self.blocks_name}.{layer.block}.{layer.name}" for layer in report.layers}
        report.not_compressed = [asdict(row) for row in not_compressed(self.model, names)]


def _warnings(stats: Mapping[str, Any], *, seen_data: bool) -> tuple[str, ...]:
    found = []
    if not seen_data:
        found.append("no calibration token reached this layer, so it was compressed without data")
    if stats["damping"]:
        found.append(f"a factorisation needed {stats['damping']:.1g} of extra damping")
    if stats["dead_columns"]:
        found.append(f"{stats['dead_columns']} input features were always zero; their weights were dropped")
    if not stats.get("converged", True):
        found.append(f"the solver had not settled after {stats['iterations']} iterations")
    return tuple(found)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _packed_bytes(layer: SparseLowRankLinear) -> int:
    """Bytes on disk: kept values, one bit a weight (whole bytes a row), U, V and the bias."""
    rest = sum(p.numel() * p.element_size() for name, p in layer.named_parameters() if name != "S")
    rows, columns = layer.S.shape
    return int((layer.S != 0).sum()) * layer.S.element_size() + rows * ((columns + 7) // 8) + rest


class _Clock:
    """Adds up seconds by name."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        seconds |= dict.fromkeys(("total", "walk", "statistics", "solve", "matching", "save", "evaluate"), 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
