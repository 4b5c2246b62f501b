"""What ``sparlow inspect`` shows."""

from pathlib import Path

from sparlow.cli import display, results
from sparlow.errors import InputError, RunError
from sparlow.run.inspection import inspect, verify


def show(directory: Path, json_file: Path | None, *, check: bool) -> list[str]:
    """Print what is in a directory; return what is wrong with it, which is looked for only with ``check``."""
    problems = [*verify(directory).problems] if check else []
    try:
        found = inspect(directory)
    except InputError as error:
        if problems:
            raise RunError(" ".join(problems)) from error
        raise
    display.show_layers(found.layers, found.patterns)
    display.out.print(
        f"{len(found.layers)} layers, {found.values:,} of {found.weights:,} values, {found.linear_bytes:,} bytes, "
        f"{found.bits_per_weight:.2f} bits a weight; all shards {found.bytes:,} bytes\n"
        f"{found.share_compressed:.1%} of the parameters of the blocks are compressed; the whole file has "
        f"{found.bits_per_parameter:.2f} bits a parameter",
        highlight=False,
    )
    if check and not problems:
        display.out.print("verified: checksums, shapes, patterns and densities are as recorded", highlight=False)
    results.put(json_file, found.to_dict() | {"problems": problems if check else None})
    return problems
