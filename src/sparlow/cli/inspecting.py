"""What ``sparlow inspect`` shows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sparlow.cli import display
from sparlow.errors import InputError, RunError
from sparlow.files import as_json
from sparlow.model.artefact.describe import LayerInfo, describe
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
    if json:
        print(_as_json(layers, patterns, shards, problems if verify else None), end="")  # noqa: T201 - for a program
        return problems
    display.show_layers(layers, patterns)
    found = _totals(layers)
    display.out.print(
        f"{len(layers)} layers, {found['values']:,} of {found['weights']:,} values, {found['linear_bytes']:,} bytes, "
        f"{found['bits_per_weight']:.2f} bits a weight; all shards {shards:,} bytes",
        highlight=False,
    )
    if verify and not problems:
        display.out.print("verified: checksums, shapes, patterns and densities are as recorded", highlight=False)
    return problems


def _totals(layers: Sequence[LayerInfo]) -> dict[str, float]:
    linear = sum(layer.bytes for layer in layers)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    values = sum(layer.kept + layer.rank * sum(layer.shape) for layer in layers)
    bits = 8 * linear / max(weights, 1)
    return {"linear_bytes": linear, "values": values, "weights": weights, "bits_per_weight": bits}


def _as_json(
    layers: Sequence[LayerInfo], patterns: Mapping[str, str], shards: int, problems: Sequence[str] | None
) -> str:
    rows = [{**asdict(layer), "pattern": patterns.get(layer.name)} for layer in layers]
    return as_json({"layers": rows, "bytes": shards, **_totals(layers), "problems": problems}, indent=2)
