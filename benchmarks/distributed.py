"""One compression by several processes beside the same by one: how far apart they end, bytes sent, seconds.

    python benchmarks/distributed.py [--processes 2] [--json FILE] MODEL -- OPTIONS

OPTIONS are those of ``sparlow compress``. Each process has one thread here. Printed are the largest difference between
the relative errors of a layer, relative to the one process's; both perplexities; seconds without evaluation; and the
bytes that a process gave to collective operations, a block.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _layers import machine, write_json

from sparlow.report.records import Report


def main() -> None:
    """Run both and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of sparlow compress, after --")
    args = parser.parse_args()
    args.options = [option for option in args.options if option != "--"]
    with tempfile.TemporaryDirectory() as folder:
        alone = _run(Path(folder) / "alone", 1, args)
        several = _run(Path(folder) / "several", args.processes, args)
    found = compared(alone, several)
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {value}")
    if args.json:
        write_json(args.json, {"machine": machine(), "options": args.options, "processes": args.processes, **found})


def compared(alone: Report, several: Report) -> dict[str, Any]:
    """What differs between two reports of the same compression."""
    pairs = list(zip(alone.layers, several.layers, strict=True))
    return {
        "largest_difference_of_relative_errors": max(
            abs(other.relative_error / one.relative_error - 1) for one, other in pairs
        ),
        "mean_relative_error": [alone.mean_relative_error, several.mean_relative_error],
        "perplexity": [list(report.compressed["perplexity"].values()) for report in (alone, several)],
        "seconds": [report.seconds["total"] - report.seconds["evaluate"] for report in (alone, several)],
        "bytes_per_block": several.processes["bytes_per_block"],
    }


def _run(out: Path, processes: int, args: argparse.Namespace) -> Report:
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *start, "-m", "sparlow", "compress", args.model, "--out", str(out), *args.options]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # noqa: S603 - the user's own command
    return Report.from_file(out / "report.json")


if __name__ == "__main__":
    main()
