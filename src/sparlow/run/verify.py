"""Check a result on disk against its record: checksums by ``artefact.describe``, patterns by ``linalg.patterns``."""

from pathlib import Path

from torch import Tensor

from sparlow.errors import InputError
from sparlow.linalg.patterns import parse_pattern
from sparlow.model.artefact.describe import verify
from sparlow.model.artefact.shards import read_layers
from sparlow.run.output_dir import NAME
from sparlow.run.record import read_record


def recorded_patterns(directory: Path) -> dict[str, str]:
    """The pattern of each layer by its full name, from ``sparlow.json``; empty if there is none."""
    if not (directory / NAME).exists():
        return {}
    return {name: layer.pattern for name, layer in read_record(directory).layers.items()}


def verify_artefact(directory: Path) -> list[str]:
    """Read the whole directory; return one sentence for each thing that is wrong.

    Raises:
        InputError: It is no directory of sparlow.
    """
    if not (directory / NAME).exists():
        raise InputError(f"{directory} has no {NAME} to verify it against. Give a directory that sparlow wrote.")
    records = read_record(directory).layers

    def check(name: str, S: Tensor) -> str | None:
        record = records.get(name)
        if record is None:
            return f"{name} is compressed, but not recorded in {NAME}."
        density = (S != 0).float().mean().item()
        if abs(density - record.density) > 1e-6:  # noqa: PLR2004 - rounding of a mean in float32
            return f"{name} has density {density:.6f}, but {record.density:.6f} is recorded."
        try:
            return parse_pattern(record.pattern).violation(name, S)
        except InputError as error:
            return f"{name}: {error}"

    problems = verify(directory, check)
    stored = read_layers(directory)
    return problems + [
        f"{name} is recorded in {NAME}, but not in the shards." for name in records if name not in stored
    ]
