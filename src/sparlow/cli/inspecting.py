"""What ``sparlow inspect`` shows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sparlow.cli import display
from sparlow.errors import InputError, RunError
from sparlow.files import as_json
from sparlow.model.artefact.describe import LayerInfo, count_parameters, describe
from sparlow.run.verify import recorded_patterns, verify_artefact


def show(directory: Path, *, verify: bool, json: bool) -> list[str]:
    """Print what is in a directory; return what is wrong with it, which is looked for only with ``verify``."""
    problems = verify_artefact(directory) if verify else []
    try:
        layers, patterns = describe(directory), recorded_patterns(directory)
    except InputError as error:
        if problems:
            raise RunError(" ".join(problems)) from error
        raise
    shards = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    found = _totals(layers, directory, shards)
    if json:
        text = _as_json(layers, patterns, found, shards, problems if verify else None)
        print(text, end="")  # noqa: T201 - for a program
        return problems
    display.show_layers(layers, patterns)
    display.out.print(
        f"{len(layers)} layers, {found['values']:,} of {found['weights']:,} values, {found['linear_bytes']:,} bytes, "
        f"{found['bits_per_weight']:.2f} bits a weight; all shards {shards:,} bytes\n"
        f"{found['share_compressed']:.1%} of the parameters of the blocks are compressed; the whole file has "
        f"{found['bits_per_parameter']:.2f} bits a parameter",
        highlight=False,
    )
    if verify and not problems:
        display.out.print("verified: checksums, shapes, patterns and densities are as recorded", highlight=False)
    return problems


def _totals(layers: Sequence[LayerInfo], directory: Path, shards: int) -> dict[str, float]:
    inside = [layer for layer in layers if not layer.outside]
    linear = sum(layer.bytes for layer in inside)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in inside)
    values = sum(layer.kept + layer.rank * sum(layer.shape) for layer in inside)
    bits = 8 * linear / max(weights, 1)
    counted = count_parameters(directory)
    return {
        "linear_bytes": linear,
        "values": values,
        "weights": weights,
        "bits_per_weight": bits,
        "bits_per_parameter": 8 * shards / max(counted.model, 1),
        "share_compressed": counted.compressed / max(counted.blocks, 1),
    }


def _as_json(
    layers: Sequence[LayerInfo],
    patterns: Mapping[str, str],
    totals: Mapping[str, float],
    shards: int,
    problems: Sequence[str] | None,
) -> str:
    rows = [{**asdict(layer), "pattern": patterns.get(layer.name)} for layer in layers]
    return as_json({"layers": rows, "bytes": shards, **totals, "problems": problems}, indent=2)
