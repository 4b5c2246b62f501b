"""Solves of one shape, one after the other or batched, to see what experts would gain: ``python batched_experts.py``.

What an iteration of 3basil takes is timed on so many experts of a shape: the ridge step with its 2:4 projection, the
low-rank step, and the inverse that each new ρ costs. Once in a loop over experts, as sparlow does it, and once with all
of them in one call of torch each. Seconds are those of this process's CPU, in one thread, the least of a few turns, so
other programs may run beside it.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparlow.linalg.patterns import parse_pattern

SHAPES = ((8, 768, 2048), (8, 256, 256), (32, 256, 256), (64, 96, 64), (128, 48, 32))
RANK = 16


def seconds(run: Callable[[], object], turns: int) -> float:
    """Return the least CPU time of a few turns, after one that does not count."""
    run()
    found = []
    for _ in range(turns):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


class Case:
    """The iterates of so many experts of a shape."""

    def __init__(self, experts: int, out: int, columns: int) -> None:
        torch.manual_seed(0)
        self.Q = torch.randn(experts, out, columns)
        self.D, self.R = torch.randn_like(self.Q), torch.empty_like(self.Q)
        X = torch.randn(columns + 16, columns)  # one for all of them, to save time
        self.H = (X.T @ X / len(X) + torch.eye(columns)).repeat(experts, 1, 1)
        self.M = self.H / self.H.diagonal(dim1=1, dim2=2).amax()
        self.V = torch.randn(experts, RANK, columns)
        self.project = parse_pattern("2:4").projector()

    def in_a_loop(self, step: Callable[[slice | int], object]) -> None:
        """Take a step for one expert after the other."""
        for i in range(len(self.Q)):
            step(i)

    def ridge(self, which: slice | int) -> None:
        """X ← D + Q M, and its projection."""
        Q, D, M, R = (tensor[which] for tensor in (self.Q, self.D, self.M, self.R))
        X = torch.baddbmm(D, Q, M) if Q.ndim > 2 else torch.addmm(D, Q, M)
        self.project(X.flatten(0, -2), R.flatten(0, -2))

    def low_rank(self, which: slice | int) -> None:
        """U of the best fit in the metric, and V."""
        Q, V, M = (tensor[which] for tensor in (self.Q, self.V, self.M))
        U = torch.linalg.qr(Q @ (V - V @ M).mT).Q
        torch.matmul(U.mT, Q)

    def inverse(self, which: slice | int) -> Tensor:
        """Of H, which is positive definite."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.H[which]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'experts':>18}  {'step':10}  {'loop':>10}  {'batched':>10}  gain")
    for experts, out, columns in SHAPES:
        case = Case(experts, out, columns)
        for step in (case.ridge, case.low_rank, case.inverse):
            loop = seconds(partial(case.in_a_loop, step), given.turns)
            batched = seconds(partial(step, slice(None)), given.turns)
            shape = f"{experts} × {out} × {columns}"
            print(f"{shape:>18}  {step.__name__:10}  {loop:9.4f}s  {batched:9.4f}s  {loop / batched:.2f}", flush=True)


if __name__ == "__main__":
    main()
