"""Where the time of a solve goes on an accelerator, and what rounded products change.

    python benchmarks/accelerator.py [--width 4096] [--rank 64] [--effort 1] [--device cuda] [--json FILE]

One layer (width, width) of random weights, with inputs whose spectrum falls and whose features differ in size. Printed
are milliseconds of each part of an iteration; of two ways to find the threshold of an unstructured pattern; and for
2:4 and 50 % the seconds, the relative error and the share of the dense products of a whole solve, with the loop's
dense product rounded to TF32 (as sparlow does on CUDA) and in float32. Medians of five.
"""

import argparse
from collections.abc import Callable  # noqa: TC003 - one way of importing it in all scripts
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from _layers import machine, write_json
from _timing import times
from torch import Tensor

from sparlow.algorithms import _loop, find, solve, three_basil
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import parse_pattern
from sparlow.linalg.tf32 import rounded_products

TOKENS = 4  # times the width


def problem(width: int, device: str) -> tuple[Tensor, Tensor]:
    """W (width, width) and H of inputs that are correlated and of different sizes."""
    draw = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1).float().pow(-0.7)
    mixing, _ = torch.linalg.qr(torch.randn(width, width, generator=draw).to(device))
    sizes = torch.randn(width, generator=draw).exp().to(device)
    x = (torch.randn(TOKENS * width, width, generator=draw).to(device) * spectrum.to(device)) @ mixing * sizes
    return torch.randn(width, width, generator=draw).to(device) * 0.02, x.T @ x / 64


def parts(W: Tensor, H: Tensor, rank: int, device: str) -> dict[str, float]:
    """Seconds of what an iteration is made of."""
    pattern = parse_pattern("2:4")
    space = Gram.damped(H).coordinates(conditional=True, group=pattern.group)
    loop = _loop.Loop(space.to_scaled(W), space, pattern, rank, rho=0.003)
    project, out = pattern.projector(), torch.empty_like(W)
    scores = W.abs().view(1, -1)
    half = scores.shape[1] // 2

    def rounded() -> None:
        with rounded_products(W.device):
            torch.mm(W, H, out=out)

    calls: dict[str, Callable[[], object]] = {
        "product, float32": lambda: torch.mm(W, H, out=out),
        "product, rounded": rounded,
        "low-rank step": loop.fit_jointly,
        "projection to 2:4": lambda: project(W, out),
        "inverse for one rho": lambda: Gram.damped(H).coordinates().ridge(0.1),
        "threshold by topk": lambda: scores.topk(half, dim=1, sorted=False),
        "threshold by kthvalue": lambda: scores.kthvalue(half, dim=1),
    }
    return {name: median(times(call, device)) for name, call in calls.items()}


def whole(
    W: Tensor, H: Tensor, rank: int, effort: float, device: str, product: dict[str, float]
) -> list[dict[str, Any]]:
    """A solve by each pattern, with rounded products and without."""
    rows = []
    for text in ("2:4", "0.5"):
        for name, context in (("rounded", rounded_products), ("float32", lambda _: nullcontext())):
            found: list[Any] = []

            def run(text: str = text, found: list[Any] = found) -> None:
                found.append(solve(find("3basil")[0], W, Gram.damped(H), parse_pattern(text), rank, {"effort": effort}))

            with patch.object(_loop, "rounded_products", context):
                taken = median(times(run, device))
            stats = found[-1].stats
            alternations, steps = three_basil.refits(effort)
            exact = alternations * (steps + 1) * product["product, float32"]
            share = (stats["iterations"] * product[f"product, {name}"] + exact) / taken
            rows.append(
                {
                    "pattern": text,
                    "products": name,
                    "seconds": taken,
                    "share": share,
                    "relative_error": stats["relative_error"],
                    "iterations": stats["iterations"],
                }
            )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--effort", type=float, default=1.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, dest="json_file")
    args = parser.parse_args()
    W, H = problem(args.width, args.device)
    found = parts(W, H, args.rank, args.device)
    for name, value in found.items():
        print(f"{name}: {value * 1e3:.3f} ms")
    operations = 2 * args.width**3
    for name in ("float32", "rounded"):
        print(f"product, {name}: {operations / found[f'product, {name}'] / 1e12:.1f} Tflop/s")
    rows = whole(W, H, args.rank, args.effort, args.device, found)
    for row in rows:
        print(
            f"{row['pattern']}, products {row['products']}: {row['seconds']:.3f} s, error {row['relative_error']:.6f}, "
            f"{row['iterations']} iterations, {row['share']:.0%} in dense products"
        )
    if args.json_file:
        arguments = {name: value for name, value in vars(args).items() if name != "json_file"}
        write_json(args.json_file, {"machine": machine(), "arguments": arguments, "parts": found, "solves": rows})


if __name__ == "__main__":
    main()
