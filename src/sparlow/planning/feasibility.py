"""Check before any weight is read that memory and disk suffice, and find options that would make a run fit."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from sparlow.errors import InputError
from sparlow.files import human_bytes
from sparlow.machine import device_available, disk_available, existing_parent, memory_available
from sparlow.model.loading.meta import UnknownAheadError, meta_model
from sparlow.model.loading.objects import require_usable
from sparlow.model.loading.source import resolve_model_path
from sparlow.planning.memory import disk, stages, written_already
from sparlow.planning.microbenchmarks import BOUND, Workspace, typical, workspace
from sparlow.planning.workload import Structure, Workload, workload
from sparlow.recipe.recipe import Recipe
from sparlow.recipe.run_options import RunOptions

FORCE = "Use --force to run anyway."
MUCH_LESS = 0.75  # of what is foreseen; how much was really missing, nobody knows


def require_feasible(
    model: str | Path | PreTrainedModel,
    recipes: Mapping[Path | None, Recipe],
    options: RunOptions,
    processes: int = 1,
) -> None:
    """Raise InputError if memory or disk do not suffice for runs on one model, one run after the other.

    Reads the model's config and no weights. Where only the weights say what a model holds, nothing is checked.

    Args:
        model: Hub id, directory, .gguf file, or a transformers model.
        recipes: By the directory that each writes; None writes nothing, and holds the whole model in memory.
        options: How all of them run.
        processes: Those that share the work.
    """
    works: dict[Path | None, Workload] = {}
    structures: dict[str, Structure | None] = {}  # by the type of the weights
    for folder, recipe in recipes.items():
        if recipe.dtype not in structures:
            structures[recipe.dtype] = known_ahead(model, recipe.dtype, trust_remote_code=options.trust_remote_code)
        structure = structures[recipe.dtype]
        if structure is not None:
            works[folder] = workload(
                structure, recipe, options, streamed=folder is not None, processes=processes, out=folder
            )
    if works:
        require_resources(works)


def known_ahead(model: str | Path | PreTrainedModel, dtype: str, *, trust_remote_code: bool) -> Structure | None:
    """Return the structure of a model without reading weights; None where only these say what it holds."""
    require_usable(model)
    if isinstance(model, PreTrainedModel):
        return Structure(model)
    try:
        shape = meta_model(resolve_model_path(str(model)), dtype=dtype, trust_remote_code=trust_remote_code)
        return Structure(shape)
    except UnknownAheadError:
        return None


def require_resources(works: Mapping[Path | None, Workload]) -> None:
    """Raise InputError if memory or disk do not suffice for runs, one after the other.

    Args:
        works: By the directory that each writes; None writes nothing.
    """
    for work in works.values():
        require_memory(work)
    require_disk(works)


def require_memory(work: Workload) -> None:
    """Raise InputError if memory does not suffice. The message names options that would make the run fit.

    A bound on what solving takes comes first. Only where that does not fit, it is measured on small layers.
    """
    if not shortage(work, BOUND):
        return
    space = workspace(work.recipe, typical(work.kinds), work.stored_in)
    why = shortage(work, space)
    if why:
        options = " or ".join(options_that_fit(work, lambda changed: not shortage(changed, space)))
        advice = f"It would fit with {options}." if options else "No option makes it fit."
        raise InputError(f"{why} {advice} {FORCE}")


def options_that_help(
    model: str | Path | PreTrainedModel,
    recipe: Recipe,
    options: RunOptions,
    processes: int = 1,
    out: Path | None = None,
) -> list[str]:
    """Return options with which a run that ran out of memory needs much less, as far as can be said without weights.

    Args:
        model: Hub id, directory, .gguf file, or a transformers model.
        recipe: Of the run.
        options: How it ran.
        processes: Those that shared the work.
        out: The directory that it wrote.
    """
    structure = known_ahead(model, recipe.dtype, trust_remote_code=options.trust_remote_code)
    if structure is None:
        return []
    work = workload(structure, recipe, options, streamed=out is not None, processes=processes, out=out)
    now = _fullest(work)
    return options_that_fit(
        work, lambda changed: all(less <= MUCH_LESS * most for less, most in zip(_fullest(changed), now, strict=True))
    )


def _fullest(work: Workload) -> tuple[int, int]:
    """Return the most bytes of main memory and of the accelerator that a run is foreseen to hold."""
    counted = stages(work, BOUND)
    return max(stage.cpu for stage in counted), max(stage.device for stage in counted)


def shortage(work: Workload, space: Workspace) -> str | None:
    """Say which memory is too small, with the numbers; None if there is enough."""
    counted = stages(work, space)
    for part, available in (("cpu", memory_available()), ("device", device_available(work.device))):
        worst = max(counted, key=lambda stage: getattr(stage, part))
        needed = getattr(worst, part)
        if available is not None and needed > available:
            kind = "main memory" if part == "cpu" else f"memory on {work.device}"
            numbers = f"needs {human_bytes(needed)}, {human_bytes(available)} is available"
            return f"Not enough {kind}: the stage {worst.name!r} {numbers}."
    return None


def options_that_fit(work: Workload, fits: Callable[[Workload], bool]) -> list[str]:
    """Return options that make a run fit: single ones or, if none is enough, the smallest combinations."""
    changes = _changes(work)
    single = [words for words, change in changes if fits(change(work))]
    fewer = [_largest_that_fits(work, name, fits) for name in ("samples", "seqlen")]
    found = [*single, *(words for words in fewer if words)]
    for size in range(2, len(changes) + 1):
        if not found:
            found = [_joined(those) for those in itertools.combinations(changes, size) if fits(_changed(work, those))]
    if found or not changes:
        return found
    if work.together:  # without any matching it does not matter which
        changes = [change for change in changes if change[0] != BY_BLOCK]
    last = _largest_that_fits(_changed(work, changes), "samples", fits)
    return [f"{_joined(changes)} and {last}"] if last else []


BY_BLOCK = "--match-preset blocks"
Change = tuple[str, Callable[[Workload], Workload]]  # as it is typed, and what it makes of a run


def _changes(work: Workload) -> list[Change]:
    """Return the options that can be changed, each with what it changes."""
    found: list[Change] = []
    if work.place != "disk":
        found.append(("--offload disk", lambda w: replace(w, offload="disk")))
    if work.together:
        found.append((BY_BLOCK, lambda w: replace(w, recipe=w.recipe.changed(match_preset="blocks"))))
    if work.recipe.match:
        found.append(("--no-match", lambda w: replace(w, recipe=w.recipe.changed(match=False))))
    if work.evaluation:
        found.append(("--evaluate ''", lambda w: replace(w, evaluation={})))
    return found


def _changed(work: Workload, changes: Sequence[Change]) -> Workload:
    for _, change in changes:
        work = change(work)
    return work


def _joined(changes: Sequence[Change]) -> str:
    return " and ".join(words for words, _ in changes)


def _largest_that_fits(work: Workload, name: str, fits: Callable[[Workload], bool]) -> str | None:
    """Return the first value that fits among a half, a quarter, … of the samples or of the tokens in each."""
    count = getattr(work.recipe, name) // 2
    while count:
        if fits(replace(work, recipe=work.recipe.changed(**{name: count}))):
            return f"--{name} {count}"
        count //= 2
    return None


def require_disk(works: Mapping[Path | None, Workload]) -> None:
    """Raise InputError if the results, each in its directory, and hidden states do not fit where they are written.

    What an unfinished or replaced run has written there already counts as free.
    """
    out = next(iter(works.values())).folder
    why = _disk_shortage(works)
    if not why:
        return
    shared = next(iter(works.values()))

    def fits(changed: Workload) -> bool:
        return not _disk_shortage({folder: _with_changes(work, shared, changed) for folder, work in works.items()})

    found, in_memory = options_that_fit(shared, fits), replace(shared, offload="cpu")
    if shared.place == "disk" and fits(in_memory) and not shortage(in_memory, BOUND):
        found = ["--offload cpu", *found]
    advice = f"It would fit with {' or '.join(found)}." if found else f"Free some, or choose another --out than {out}."
    raise InputError(f"{why} {advice} {FORCE}")


def _with_changes(work: Workload, shared: Workload, changed: Workload) -> Workload:
    """Apply to another run of a comparison the change that was tried on the first."""
    names = ("match", "match_preset", "samples", "seqlen")
    same = {n: getattr(changed.recipe, n) for n in names if getattr(changed.recipe, n) != getattr(shared.recipe, n)}
    return replace(work, recipe=work.recipe.changed(**same), offload=changed.offload, evaluation=changed.evaluation)


def _disk_shortage(works: Mapping[Path | None, Workload]) -> str | None:
    """Say which disk has too little space, with the numbers; None if there is enough."""
    parts_of = [
        ("the result", folder, max(disk(work).out - written_already(folder), 0))
        for folder, work in works.items()
        if folder is not None
    ]
    most = max(works.values(), key=lambda work: disk(work).hidden)  # they go before the next run begins
    parts_of.append(("hidden states", most.folder, disk(most).hidden))
    needs: dict[int, list[tuple[str, Path, int]]] = {}
    for part in parts_of:
        needs.setdefault(existing_parent(part[1]).stat().st_dev, []).append(part)
    for parts in needs.values():
        needed, free = sum(size for _, _, size in parts), disk_available(parts[0][1])
        if needed > free:
            what, where, _ = max(parts, key=lambda part: part[2])
            numbers = f"needs {human_bytes(needed)}, {human_bytes(free)} is free"
            return f"Not enough disk: the run {numbers}, mostly for {what} in {where}."
    return None
