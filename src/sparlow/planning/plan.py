"""``sparlow.plan``: what a compression keeps and needs, known before it runs, from the model's config alone."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from transformers import PreTrainedModel

from sparlow.files import as_json, human_bytes
from sparlow.machine import device_available, disk_available, machine, memory_available
from sparlow.model.forward.decoder import Skipped, not_compressed
from sparlow.model.loading.left_out import left_out
from sparlow.model.loading.meta import meta_model
from sparlow.model.loading.objects import require_as_it_is, require_usable
from sparlow.own_settings import own_settings
from sparlow.planning.choices import Choice, LeftOut, choices
from sparlow.planning.duration import seconds
from sparlow.planning.memory import Disk, Stage, disk, stages
from sparlow.planning.microbenchmarks import solver, speed, typical, workspace
from sparlow.planning.routed import notes_of_experts
from sparlow.planning.workload import Layer, Structure, Workload, workload
from sparlow.recipe.recipe import Recipe, RecipeLike, as_recipe, with_calibration
from sparlow.recipe.run_options import RunOptions, listed
from sparlow.report.tabular import Tabular
from sparlow.report.value_types import MODEL

if TYPE_CHECKING:
    from sparlow.recipe.recipe import Calibration

VERSION = 1  # of the keys of ``Plan.to_json``


@dataclass(frozen=True)
class Kind:
    """Linear layers that are alike: of one name within their blocks, one shape, one budget.

    Attributes:
        name: Within the block.
        shape: (out, in).
        pattern: As typed, such as 2:4; None if they stay dense.
        rank: Of U V.
        values: Type of the values of S, ``model`` or ``int4`` and the like with levels and group.
        count: How many there are.
        parameters: Of all of them, biases included.
        bytes_dense: Of all of them, as the model has them.
        bytes_kept: Of all of them, as the result will have them.
    """

    name: str
    shape: tuple[int, int]
    pattern: str | None
    rank: int
    values: str
    count: int
    parameters: int
    bytes_dense: int
    bytes_kept: int


@dataclass(frozen=True, repr=False)
class Plan(Tabular):
    """All that is known before a run.

    Attributes:
        model: As it was named.
        recipe: As in ``report.json``.
        device: Where blocks will run.
        machine: This one, for which memory and time are foreseen; as in ``report.json``.
        layers: By kind, in the order of a block.
        not_compressed: ``name`` (* for the number of the block), ``count``, ``parameters`` and ``why``.
        bytes: ``dense``, ``compressed``, ``linears_dense``, ``linears_compressed``, as in ``report.json``.
        bits_per_weight: Of the compressed layers.
        bits_per_parameter: Of the whole file, without headers.
        share_compressed: Of the parameters of the blocks, those in weights that are compressed.
        disk: Bytes in files.
        baseline: Bytes that this process, with its libraries, holds before a run.
        stages: What each holds beyond that, at most.
        peak_memory: ``rss`` and ``device``, as in ``report.json``.
        available: ``rss`` and ``device`` (bytes that are free now; None: not known) and ``disk`` of the directory.
        seconds: By stage, and ``total``; empty if no time was asked for.
        probe: ``seconds`` it took, and what it found of this machine and the algorithm.
        notes: What the numbers do not know.
        choices: The forms that the model can take, the smallest first: what fits, and what was measured of each.
        left_out: The other forms, and why.
        version: Of these keys.
    """

    model: str
    recipe: dict[str, Any]
    device: str
    machine: dict[str, Any]
    layers: tuple[Kind, ...]
    not_compressed: tuple[dict[str, Any], ...]
    bytes: dict[str, int]
    bits_per_weight: float
    bits_per_parameter: float
    share_compressed: float
    disk: Disk
    baseline: int
    stages: tuple[Stage, ...]
    peak_memory: dict[str, int]
    available: dict[str, int | None]
    seconds: dict[str, float]
    probe: dict[str, Any]
    notes: tuple[str, ...]
    choices: tuple[Choice, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    version: int = VERSION

    def to_json(self) -> str:
        """All fields, as the text of a file."""
        return as_json(asdict(self), indent=2)

    def facts(self) -> dict[str, str]:
        """See ``Tabular``."""
        sizes, free = self.bytes, self.available["rss"]
        found = {
            "model": self.model,
            "whole file": f"{human_bytes(sizes['dense'])} → {human_bytes(sizes['compressed'])}",
            "bits": f"{self.bits_per_weight:.2f} a compressed weight, {self.bits_per_parameter:.2f} a parameter",
            "main memory": f"at most {human_bytes(self.peak_memory['rss'])}"
            + ("" if free is None else f", {human_bytes(free)} are free"),
        }
        return found | ({"time": f"{self.seconds['total'] / 60:.1f} minutes"} if self.seconds else {})

    def table(self) -> list[dict[str, Any]]:
        """A row a kind of layer."""
        return [asdict(kind) for kind in self.layers]


@own_settings()
def plan(
    model: str | Path | PreTrainedModel,
    recipe: RecipeLike | None = None,
    *,
    calibration: "Calibration | None" = None,
    out: str | Path | None = None,
    evaluate: str | Sequence[str] = ("builtin",),
    evaluate_seqlen: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    offload: str = "auto",
    trust_remote_code: bool = False,
    timed: bool | int = True,
    **fields: Any,  # noqa: ANN401 - fields of a recipe have many types
) -> Plan:
    """Predict what ``compress`` keeps and needs with the same arguments. Reads the config of a model and no weights.

    Args:
        model: Hub id (of which the config is fetched), directory, .gguf file (of which the header is read), or a
            transformers model.
        recipe: What would be done.
        calibration: Corpus, file, texts or token windows instead of the recipe's; it is not read.
        out: Directory that would be written, to see what is free there.
        evaluate: Corpora or files on which perplexity would be measured.
        evaluate_seqlen: Tokens in a window of these.
        limit: At most so many windows of each of these.
        device: "auto", or torch's name of a device.
        offload: Where to keep block inputs between blocks: "cpu", "disk", or "auto" for the fastest that fits.
        trust_remote_code: Let a model bring Python code of its own.
        timed: Try the algorithm on small layers, to tell how long a run takes; some seconds. A number stands for True
            if the model's layers have so many parameters, else for False.
        fields: Of the recipe, such as ``pattern="2:4"``, in the place of what it says.

    Raises:
        InputError: Something given cannot be used; what it is.
    """
    recipe = with_calibration(as_recipe(recipe, fields), calibration)
    options = RunOptions(device, offload, listed(evaluate), evaluate_seqlen, limit, trust_remote_code)
    require_usable(model)
    if isinstance(model, PreTrainedModel):
        require_as_it_is(model, recipe.dtype, device)
        shape, name = model, model.config.name_or_path or type(model).__name__
    else:
        shape, name = meta_model(str(model), dtype=recipe.dtype, trust_remote_code=trust_remote_code), str(model)
    found = plan_of(name, Structure(shape), recipe, options, out=None if out is None else Path(out), timed=timed)
    here = not isinstance(model, PreTrainedModel) and Path(name).is_dir()  # headers of a hub id would be a download
    lost = left_out(shape, name) if here and any(Path(name).glob("*.safetensors")) else []
    return replace(found, notes=(*found.notes, *lost))


@own_settings()
def plan_of(
    name: str,
    structure: Structure,
    recipe: Recipe,
    options: RunOptions,
    *,
    out: Path | None = None,
    timed: bool | int = True,
) -> Plan:
    """Plan a model of which the structure is there, as where many recipes are planned for one.

    Args:
        name: Of the model.
        structure: Its.
        recipe: What would be done.
        options: How.
        out: As of ``plan``.
        timed: The same.

    Raises:
        InputError: The recipe does not fit the model, or an option the machine.
    """
    work = workload(structure, recipe, options, out=out)
    baseline = psutil.Process().memory_info().rss
    if not isinstance(timed, bool):
        timed = sum(layer.parameters for block in work.blocks for layer in block.layers) >= timed
    return _planned(name, work, out or Path(), baseline, timed=timed)


def _planned(name: str, work: Workload, out: Path, baseline: int, *, timed: bool) -> Plan:
    start = time.perf_counter()
    like = typical(work.kinds)
    space = workspace(work.recipe, like, work.stored_in)
    found: dict[str, Any] = {"workspace": asdict(space)}
    spent: dict[str, float] = {}
    if timed:
        here, solving = speed(work.device, work.computed_in), solver(work.recipe, like, work.device)
        found |= {"speed": asdict(here), "solver": asdict(solving)}
        spent = seconds(work, here, solving)
    counted = stages(work, space)
    linears = [layer for block in work.blocks for layer in block.compressed]
    sizes = _sizes(work, linears)
    device = max(stage.device for stage in counted)
    possible, left = choices(work.structure, work.recipe)
    return Plan(
        model=name,
        recipe=work.recipe.to_dict(),
        device=str(work.device),
        machine=machine(),
        layers=tuple(_kinds(work)),
        not_compressed=tuple(_skipped(work.structure.model, work)),
        bytes=sizes,
        bits_per_weight=8 * sizes["linears_compressed"] / sum(layer.weights for layer in linears),
        bits_per_parameter=8 * sizes["compressed"] / work.parameters,
        share_compressed=sum(layer.weights for layer in linears) / sum(block.parameters for block in work.blocks),
        disk=disk(work),
        baseline=baseline,
        stages=tuple(counted),
        peak_memory={"rss": baseline + max(stage.cpu for stage in counted), "device": device},
        available={
            "rss": memory_available(),
            "device": device_available(work.device),
            "disk": disk_available(out),
        },
        seconds=spent,
        probe={"seconds": time.perf_counter() - start, **found},
        notes=tuple(_notes(work)),
        choices=possible,
        left_out=left,
    )


def _sizes(work: Workload, linears: Sequence[Layer]) -> dict[str, int]:
    """Bytes of the model and of what is compressed, before and after."""
    sizes = {
        "dense": work.parameters * work.stored,
        "compressed": work.kept_bytes,
        "linears_dense": sum(layer.parameters for layer in linears) * work.stored,
        "linears_compressed": sum(layer.kept_bytes(work.stored) for layer in linears),
    }
    return sizes | ({"outside_saved": work.selection.ends.saved} if work.selection.ends.saved else {})


def _kinds(work: Workload) -> list[Kind]:
    alike: dict[tuple[Any, ...], list[Layer]] = {}
    for block in work.blocks:
        for layer in block.layers:
            alike.setdefault((layer.shown, layer.shape, layer.budget), []).append(layer)
    return [
        Kind(
            name=name,
            shape=shape,
            pattern=str(budget.pattern) if budget else None,
            rank=budget.rank if budget else 0,
            values=budget.shown_values if budget else MODEL,
            count=len(layers),
            parameters=sum(layer.parameters for layer in layers),
            bytes_dense=sum(layer.parameters for layer in layers) * work.stored,
            bytes_kept=sum(layer.kept_bytes(work.stored) for layer in layers),
        )
        for (name, shape, budget), layers in alike.items()
    ]


def _skipped(model: PreTrainedModel, work: Workload) -> list[dict[str, Any]]:
    """Return rows of what stays as it is; modules of the same name in different blocks share a row."""
    prefix = f"{work.name}."
    compressed = [f"{prefix}{i}.{layer.name}" for i, block in enumerate(work.blocks) for layer in block.compressed]
    rows: dict[tuple[str, str], list[Skipped]] = {}
    for row in not_compressed(model, compressed, work.selection.dense):
        _, _, within = row.name.removeprefix(prefix).partition(".")
        name = f"{prefix}*.{within}" if row.name.startswith(prefix) else row.name
        rows.setdefault((name, row.why), []).append(row)
    return [
        {"name": name, "count": len(those), "parameters": sum(row.parameters for row in those), "why": why}
        for (name, why), those in rows.items()
    ]


def _notes(work: Workload) -> list[str]:
    recipe = work.recipe
    notes = [*([work.selection.picked] if work.selection.picked else []), *work.selection.warnings]
    if work.selection.ends.saved:
        notes.append(f"Stored: {work.selection.ends}.")
    if recipe.allocate != "uniform":
        moved = "densities" if recipe.allocate == "owl" else "ranks and densities"
        notes.append(f"--allocate {recipe.allocate} moves {moved} between layers, and the total stays about the same.")
    if not work.streamed and not work.there:
        notes.append("A weight of a block is shared with another, so the whole model is held in memory.")
    notes += notes_of_experts(work)
    if work.recipe.match:
        notes.append("Training may stop early, so it may take less time.")
    if work.evaluation:
        notes.append("Where the tokenizer begins a text with a token of its own, perplexity is measured twice.")
    if recipe.calibration != "windows":
        notes.append("The time to fetch the model and the text is not counted.")
    return notes
