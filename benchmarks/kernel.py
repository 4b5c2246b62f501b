"""Products by the kernel of packed layers beside torch's dense ones: milliseconds, GB/s, and ratios.

    python benchmarks/kernel.py [--shapes 2048x2048,8192x2048] [--forms int8:2:4,int4:dense] [--tokens 1] [--rank 0]
        [--path avx2] [--activations float] [--inputs bf16] [--repeats 15] [--json FILE]

A form is a type of values (bf16, fp16, fp32, int8, int4, int3, int2), then a pattern (2:4, 16:32, free or dense). Calls
take turns: torch in float32, torch in bfloat16, then each form, over as many copies of a weight as are larger than the
caches together, so that weights come from memory. Printed are the medians, the bytes of the weight read a second, and
how many times quicker than torch's float32 and bfloat16. Threads are torch's: set OMP_NUM_THREADS.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from _layers import machine, write_json
from torch import Tensor

from sparlow.linalg.grid import FactorScales, GridValues, make_grid
from sparlow.linalg.patterns import parse_pattern
from sparlow.model.artefact.stored_form import PackedWeight, StoredForm, Weight, pack_weight
from sparlow.runtime.product import forced, operand

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BEYOND = 96 << 20  # bytes of all copies of a weight, more than a cache holds


def packed(form: str, shape: tuple[int, int], rank: int) -> PackedWeight:
    """Return a random weight of a form."""
    values, _, pattern = form.partition(":")
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator)
    mask = parse_pattern("0.5" if pattern == "free" else pattern or "dense").mask(W.abs())
    U, V = (torch.randn(size, generator=generator) for size in ((shape[0], rank), (rank, shape[1])))
    if values in FLOATS:
        dtype = FLOATS[values]
        return pack_weight(Weight((W * mask).to(dtype), U.to(dtype), V.to(dtype)), None)
    grid = make_grid(values)
    if grid is None:
        raise SystemExit(f"There are no values of type {values}.")
    levels = grid.uniform().bfloat16()
    scale = torch.full((shape[0], grid.groups(shape[1])), 3 / float(levels[-1])).bfloat16()
    found = GridValues(grid, scale, levels, masked=pattern != "dense")
    S = found.decode(found.encode(W)) * mask
    steps = torch.full((rank,), 1 / 64).bfloat16()
    U, V = ((part * 30).round().clamp(-127, 127) / 64 for part in (U, V))
    return pack_weight(Weight(S, U, V), StoredForm(found, FactorScales(steps, steps) if rank else None, torch.float32))


def packed_call(
    form: str, shape: tuple[int, int], x: Tensor, rank: int, *, rounded: bool
) -> tuple[Callable[[], Any], int]:
    """Return a call that multiplies by the next copy of a weight, and the bytes of the weight."""
    weight = packed(form, shape, rank)
    size = sum(t.nbytes for t in weight.tensors.values())
    copies = [
        operand({part: t.clone() for part, t in weight.tensors.items()}, shape, weight.grid, None)
        for _ in range(max(1, BEYOND // size))
    ]
    turn = cycle(copies)
    return lambda: next(turn).product(x, rounded=rounded), size


def dense_call(shape: tuple[int, int], x: Tensor, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """Return the same of torch's dense product."""
    size = shape[0] * shape[1] * dtype.itemsize
    turn = cycle([torch.randn(shape).to(dtype) for _ in range(max(1, BEYOND // size))])
    given = x.to(dtype)
    return lambda: torch.nn.functional.linear(given, next(turn)), size


def measured(calls: dict[str, tuple[Callable[[], Any], int]], repeats: int) -> Iterator[tuple[str, float, int]]:
    """Yield the name, the median milliseconds and the bytes of each call; calls take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, (call, _) in calls.items():
            start = time.perf_counter()
            for _ in range(4):
                call()
            if turn > 1:
                seconds[name].append((time.perf_counter() - start) / 4)
    for name, (_, size) in calls.items():
        yield name, 1000 * statistics.median(seconds[name]), size


def rows_of(given: argparse.Namespace, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Measure all forms at one shape."""
    x = torch.randn(given.tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(FLOATS[given.inputs])
    calls = {f"torch {name}": dense_call(shape, x, FLOATS[name]) for name in ("fp32", "bf16")}
    for form in given.forms.split(","):
        calls[form] = packed_call(form, shape, x, given.rank, rounded=given.activations == "int8")
    found = {name: (ms, size) for name, ms, size in measured(calls, given.repeats)}
    return [
        {
            "shape": "x".join(map(str, shape)),
            "form": name,
            "ms": ms,
            "gb_per_s": size / ms / 1e6,
            "times_fp32": found["torch fp32"][0] / ms,
            "times_bf16": found["torch bf16"][0] / ms,
        }
        for name, (ms, size) in found.items()
    ]


def main() -> None:
    """Measure, and print a line for each form and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="2048x2048,8192x2048")
    parser.add_argument("--forms", default="bf16:dense,bf16:16:32,int8:dense,int8:16:32,int8:2:4,int4:dense,int4:2:4")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--path", default=None, help="instruction set; the best if left out")
    parser.add_argument("--activations", default="float", choices=("float", "int8"))
    parser.add_argument("--inputs", default="fp32", choices=FLOATS, help="their type, before any rounding")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    from sparlow.runtime.build import library

    path = given.path or library().paths[-1]
    found = []
    print(f"{path}, {torch.get_num_threads()} threads, {given.tokens} tokens, activations {given.activations}")
    print(f"{'shape':>12} {'form':>12} {'ms':>8} {'GB/s':>6} {'× fp32':>7} {'× bf16':>7}")
    with forced(path):
        for text in given.shapes.split(","):
            out, columns = map(int, text.split("x"))
            for row in rows_of(given, (out, columns)):
                found.append(row)
                print(
                    f"{row['shape']:>12} {row['form']:>12} {row['ms']:8.3f} {row['gb_per_s']:6.1f} "
                    f"{row['times_fp32']:7.2f} {row['times_bf16']:7.2f}"
                )
    if given.json:
        write_json(
            given.json, {"machine": machine(), "path": path, "settings": vars(given) | {"json": None}, "rows": found}
        )


if __name__ == "__main__":
    main()
