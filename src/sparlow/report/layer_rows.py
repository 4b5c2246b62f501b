"""The table of layers on the page of a run: a row a layer, or a row for all that differ in a number only."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from sparlow.report.layer_charts import by_kind
from sparlow.report.records import LayerRecord
from sparlow.report.wording import duration, plain, short

HEAD = (
    *("block", "layer", "pattern", "values", "shape", "density", "rank"),
    *("relative squared error", "each token by its size", "iterations", "time", "tokens"),
)


def layer_rows(layers: Sequence[LayerRecord]) -> Iterator[tuple[str, ...]]:
    """Yield the rows below ``HEAD``, by block.

    Where there are as many names of layers as a mixture of experts has, those of a block that differ in a number only
    share a row: means of errors, with the worst, of density and iterations, the whole time, and from which to which the
    others go.
    """
    kinds = by_kind(layers)
    for block in sorted({layer.block for layer in layers}):
        yield from (_row(kind, found[block]) for kind, found in kinds.items() if block in found)


def _row(kind: str, layers: Sequence[LayerRecord]) -> tuple[str, ...]:
    name = layers[0].name if len(layers) == 1 else f"{kind} ({len(layers)})"
    said = (
        _one_of(layer.pattern for layer in layers),
        _one_of(layer.shown_values for layer in layers),
        _one_of(f"{layer.shape[0]} × {layer.shape[1]}" for layer in layers),
    )
    density = fmean(layer.density for layer in layers)
    per_token = [one for layer in layers if (one := layer.relative_error_per_token) is not None]
    errors = (_mean_and_worst([layer.relative_error for layer in layers]), _mean_and_worst(per_token))
    iterations = plain(round(fmean(layer.iterations for layer in layers)))
    cost = (iterations, duration(sum(layer.seconds for layer in layers)), _range(layer.tokens for layer in layers))
    return (str(layers[0].block), name, *said, f"{density:.4f}", _range(layer.rank for layer in layers), *errors, *cost)


def _mean_and_worst(errors: Sequence[float]) -> str:
    if len(errors) < 2:  # noqa: PLR2004 - a mean of several
        return short(errors[0] if errors else None)
    return f"{short(fmean(errors))} (at most {short(max(errors))})"


def _one_of(values: Iterable[str]) -> str:
    found = [*dict.fromkeys(values)]
    return found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"


def _range(values: Iterable[int]) -> str:
    found = sorted({*values})
    return plain(found[0]) if len(found) == 1 else f"{plain(found[0])} to {plain(found[-1])}"
