"""How the time of a solve grows with the width of the layer, and how much of it is the one dense product.

    python benchmarks/width.py [--widths 256,512,1024,2048] [--patterns 2:4,0.5] [--effort 1] [--repeats 3]
        [--json FILE]

Solves square random layers whose inputs are correlated, by 3basil at rank width / 16, and fits seconds = a·widthᵏ.
Printed for each width are the median of the seconds, the iterations, and the shares of the loop's time and of the whole
solve's that the iterations' products (out, in) × (in, in) would take alone, at the throughput that such a product has
here, measured beside it. The loop is all but the refit; factorisations and the low-rank step count against its product.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _layers import machine, write_json
from torch import Tensor

import sparlow
from sparlow.algorithms import three_basil


def problem(width: int) -> tuple[Tensor, Tensor]:
    """Return W (width, width) and H, whose spectrum falls as that of real layers: like 1 / index."""
    generator = torch.Generator().manual_seed(width)
    W = torch.randn(width, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator) / math.sqrt(width)
    X = torch.randn(4 * width, width, generator=generator) * (1 + torch.arange(width)).rsqrt() @ mixing
    return W, 2 * X.T @ X


def solve(width: int, pattern: str, effort: float, repeats: int) -> dict[str, Any]:
    """Solve a layer several times; the product is measured after each, so that both see the same machine."""
    W, H = problem(width)
    seconds, refits, product, iterations = [], [], [], 0
    refit = three_basil._refit  # noqa: SLF001 - measured from inside

    def timed(*given: Any) -> Any:  # noqa: ANN401 - whatever it takes and gives
        start = time.perf_counter()
        result = refit(*given)
        refits.append(time.perf_counter() - start)
        return result

    for _ in range(repeats):
        with patch.object(three_basil, "_refit", timed):
            found = sparlow.decompose(W, H, pattern=pattern, rank=width // 16, effort=effort)
        iterations = int(found.stats["iterations"])
        seconds.append(float(found.stats["seconds"]))
        product.append(_product_seconds(W, H))
    median, one = statistics.median(seconds), statistics.median(product)
    return {
        "width": width,
        "pattern": pattern,
        "seconds": median,
        "iterations": iterations,
        "share": iterations * one / median,
        "share_of_loop": iterations * one / (median - statistics.median(refits)),
        "operations_per_second": 2 * width**3 / one,
    }


def _product_seconds(W: Tensor, H: Tensor) -> float:
    out, times = torch.empty_like(W), []
    for _ in range(7):
        start = time.perf_counter()
        torch.addmm(W, W, H, out=out)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def exponent(rows: list[dict[str, Any]]) -> float:
    """Of width, by least squares on the logarithms of the seconds."""
    x = [math.log(row["width"]) for row in rows]
    y = [math.log(row["seconds"]) for row in rows]
    return statistics.linear_regression(x, y).slope


def main() -> None:
    """Solve, fit and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", default="256,512,1024,2048")
    parser.add_argument("--patterns", default="2:4,0.5")
    parser.add_argument("--effort", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "effort": args.effort, "repeats": args.repeats, "patterns": {}}
    for pattern in args.patterns.split(","):
        rows = []
        for width in map(int, args.widths.split(",")):
            rows.append(solve(width, pattern, args.effort, args.repeats))
            row = rows[-1]
            shares = f"{row['share_of_loop']:.0%} of the loop, {row['share']:.0%} of all"
            print(
                f"{pattern}, width {width}: {row['seconds']:.2f} s, {row['iterations']} iterations, "
                f"products {shares}, at {row['operations_per_second'] / 1e9:.0f} GFLOP/s",
                flush=True,
            )
        found["patterns"][pattern] = {"exponent": exponent(rows), "rows": rows}
        print(f"{pattern}: seconds grow as width to the power of {exponent(rows):.2f}", flush=True)
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
