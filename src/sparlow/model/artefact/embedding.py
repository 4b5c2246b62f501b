"""The embedding and the output head in few bits: every entry has a code, and each row, or some of its columns, a scale.

In memory both stay ordinary modules that hold the decoded numbers. Their attribute ``stored`` says how they are packed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparlow.errors import InputError
from sparlow.linalg.grid import GROUP, WHOLE_ROW, Grid, GridValues, make_grid
from sparlow.model.artefact.bitmask import rows_at_a_time
from sparlow.model.artefact.dtypes import StoredDtypes
from sparlow.model.artefact.outside import EMBEDDING, HEAD, Outside, are_tied, check_outside, mark, outside_modules
from sparlow.model.artefact.shards import by_layer, layer_records, read_headers
from sparlow.model.artefact.stored_form import SCALE_TYPES, StoredForm, take_packed

KEEP = "keep"
KINDS = ("int8", "int4")
_CLIPS = 16  # scales that are tried between half of what holds the largest entry of a group and all of it


def chosen(model: PreTrainedModel, embedding: str, head: str) -> dict[str, tuple[Outside, str]]:
    """Return what is to be quantised, and to what, by the name of the module.

    Args:
        model: It may be on the meta device.
        embedding: ``keep``, ``int8`` or ``int4``.
        head: The same; of a model that ties the two, what the embedding is.

    Raises:
        InputError: There is no such thing, or one tensor would be stored in two ways.
    """
    there, asked = outside_modules(model), {EMBEDDING: embedding, HEAD: head}
    for what, kind in asked.items():
        if kind not in (KEEP, *KINDS):
            raise InputError(f"The {what} cannot be stored as {kind}. Give int8, int4 or keep.")
        if kind != KEEP and what not in there:
            raise InputError(f"{type(model).__name__} has no {what} that could be stored in {kind}. Leave it as it is.")
    found = {there[what].name: (there[what], kind) for what, kind in asked.items() if kind != KEEP}
    if found and embedding != head and are_tied(model):
        raise InputError(
            f"The embedding and the output head are one tensor, which cannot be stored as {embedding} and as {head}. "
            "Give both the same."
        )
    return found


def grid_of(kind: str, group: int | str | None = None) -> Grid:
    """Return the grid of an embedding or a head.

    Args:
        kind: ``int8`` or ``int4``.
        group: Columns that share a scale, or ``row``; if left out, a row in 8 bits, and 128 columns in 4.
    """
    levels = "integer" if kind == "int8" else "half"
    grid = make_grid(kind, levels, group or (WHOLE_ROW if kind == "int8" else GROUP))
    if grid is None:
        raise InputError(f"There is no grid of {kind}. Give int8 or int4.")
    return grid


@torch.no_grad()
def quantise(
    model: PreTrainedModel,
    embedding: str = "int8",
    head: str = "int8",
    *,
    group: int | str | None = None,
    storage: StoredDtypes | None = None,
) -> list[str]:
    """Round the embedding and the head, in place, to what they are stored as.

    Args:
        model: Its weights outside of the blocks are in memory. Tied weights are rounded once.
        embedding: ``keep``, ``int8`` or ``int4``.
        head: The same.
        group: Columns that share a scale, see ``grid_of``.
        storage: The types of the stored weights, where the model computes in another.

    Returns:
        The names of the modules.

    Raises:
        InputError: They cannot be quantised, or are not finite.
    """
    done: dict[int, StoredForm] = {}
    found = chosen(model, embedding, head)
    for name, (outside, kind) in found.items():
        W = outside.weight
        if id(W) not in done:
            if W.is_meta:
                raise InputError(f"The {outside.what} {name} is not in memory, so it cannot be quantised.")
            dtype = storage.of_layer(name) if storage else W.dtype
            values = rounded(W.detach(), grid_of(kind, group), dtype)
            done[id(W)] = StoredForm(values, dtype=dtype)
            W.data = _decoded(W, values).to(dtype).to(W.dtype)
        mark(outside.module, done[id(W)])
    return list(found)


@contextmanager
def quantised(model: PreTrainedModel, embedding: str, head: str, **options: Any) -> Iterator[list[str]]:  # noqa: ANN401 - of ``quantise``
    """Within this context, the embedding and the head are quantised; afterwards they are what they were."""
    before = [(outside.module, outside.module.weight.data) for outside, _ in chosen(model, embedding, head).values()]
    try:
        yield quantise(model, embedding, head, **options)
    finally:
        for module, data in before:
            module.weight.data = data
            vars(module).pop("stored", None)


@contextmanager
def restored(model: PreTrainedModel, shard: Path) -> Iterator[None]:
    """Within this context, the embedding and the head have the numbers that a shard holds, if it holds them in codes.

    Raises:
        InputError: The shard does not fit the model.
    """
    headers = read_headers([shard])
    parts, records = by_layer(headers), layer_records(headers)
    before = []
    try:
        for outside in outside_modules(model).values():
            record = records.get(outside.name)
            if record is None or outside.name not in parts:
                continue
            check_outside(outside, parts[outside.name], record)
            W = outside.weight
            with safe_open(shard, framework="pt") as file:
                state = {
                    f"{outside.name}.{part}": file.get_tensor(f"{outside.name}.{part}") for part in record.scheme.parts
                }
            weight, _ = take_packed(
                state, f"{outside.name}.", (W.shape[0], W.shape[1]), record.scheme.grid, record.scheme.dtype
            )
            before.append((W, W.data))
            W.data = weight.S.to(W)
        yield
    finally:
        for W, data in before:
            W.data = data


def saved_bytes(
    model: PreTrainedModel,
    embedding: str,
    head: str,
    *,
    group: int | str | None = None,
    storage: StoredDtypes | None = None,
) -> int:
    """Return how many bytes of a model's file quantising saves, tied weights counted once; shapes are all it takes."""
    storage = storage or StoredDtypes.of(model)
    found = list(chosen(model, embedding, head).values())
    saved = 0
    for outside, kind in found[:1] if found and are_tied(model) else found:
        W = outside.weight
        saved += W.numel() * storage.of_layer(outside.name).itemsize - weight_bytes(
            (W.shape[0], W.shape[1]), kind, group
        )
    return saved


def weight_bytes(shape: tuple[int, int], kind: str, group: int | str | None = None) -> int:
    """Return the bytes that an embedding or head (vocabulary, features) takes, its scales included."""
    return int(grid_of(kind, group).bytes(shape, shape[1]))


def rounded(W: Tensor, grid: Grid, dtype: torch.dtype) -> GridValues:
    """Return the grid (scales of 16 bits) on which a dense matrix is rounded to nearest with the least squared error.

    Args:
        W: (out, in).
        grid: Its kind; a book is not learned here.
        dtype: That W is stored in.
    """
    scale_type = dtype if dtype in SCALE_TYPES else torch.bfloat16
    levels = grid.uniform().to(W.device)
    scales = [_scales(rows.float(), grid, levels, scale_type) for rows in torch.split(W, rows_at_a_time(W.shape[1]))]
    return GridValues(grid, torch.cat(scales), levels, masked=False)


def _scales(W: Tensor, grid: Grid, levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scale (rows, groups) of each group: in 8 bits the largest entry decides, else what errs least."""
    if not W.isfinite().all():
        raise InputError(
            "The embedding or the output head holds NaN or infinity, so the model is damaged. Fetch it anew."
        )
    width, groups = min(grid.group or W.shape[1], W.shape[1]), grid.groups(W.shape[1])
    Z = nn.functional.pad(W, (0, groups * width - W.shape[1])).view(len(W), groups, width)
    whole = Z.abs().amax(2) / levels[-1]  # (rows, groups)
    best = whole.to(dtype)
    if grid.bits == 8:  # noqa: PLR2004 - clipping gains nothing there
        return best
    errors = torch.full_like(whole, torch.inf)
    inside = nn.functional.pad(torch.ones_like(W[:1]), (0, groups * width - W.shape[1])).view(1, groups, width)
    for clip in torch.linspace(0.5, 1.0, _CLIPS).tolist():
        scale = (whole * clip).to(dtype)
        step = scale.float().unsqueeze(2)
        z = Z / torch.where(step == 0, 1.0, step)
        nearest = (z.floor() + 0.5 if levels[0] % 1 else z.round()).clamp(levels[0], levels[-1])
        found = ((nearest * step - Z).square() * inside).sum(2)
        best = torch.where(found < errors, scale, best)
        errors = torch.minimum(found, errors)
    return best


def _decoded(W: Tensor, values: GridValues) -> Tensor:
    size = rows_at_a_time(W.shape[1])
    rows = zip(torch.split(W, size), torch.split(values.scale, size), strict=True)
    parts = (GridValues(values.grid, scale, values.levels, masked=False) for _, scale in rows)
    return torch.cat(
        [grid.decode(grid.encode(some)) + 0.0 for some, grid in zip(torch.split(W, size), parts, strict=True)]
    )
