"""3BASiL: three-block ADMM for sparse plus low-rank decomposition (Makni et al., 2025, arXiv 2603.01376).

    minimise  tr((W − S − L) H (W − S − L)ᵀ)   s.t.  S = D,  D on the pattern,  L = U V of rank ≤ r

Everything below is in the coordinates T = W E, G = E⁻¹ H E⁻¹ of a diagonal E; S, D, L are scaled alike, and Y is the
multiplier of S = D divided by ρ. With M = ρ (G + ρI)⁻¹ the paper's ridge step is S = R + (Z − R) M for R = T − L
and Z = D − Y, so X = S + Y = D − (Z − R) + (Z − R) M: one product. D is what the pattern keeps of X, and Y the rest,
so Z = 2 D − X; the loop carries X, D and Q = T − Z, of which Z − R = L − Q.

Deviations from the paper, all of them measured (docs/solver.md):

* ``schedule="joint"``, the default, takes the best L *together with* S instead of after it. For a given Z, minimising
  over S in closed form leaves ρ tr((Q − L)(I − M)(Q − L)ᵀ), because G (G + ρI)⁻¹ = I − M: L is the best rank-r fit of Q
  in the metric I − M. Two blocks of ADMM remain instead of three, at the same cost a step, and
  the objective ends far lower in as many steps, because L no longer trails S.
* It scales an input by what the others leave of it unexplained (``Gram.conditional_scale``), where the paper takes its
  norm, E = diag(H)^½. So D is chosen by what an entry costs once the others of its row have made up for it.
* L comes from one warm-started subspace step, not from an SVD; ρ starts at 0.003 and rises by a fixed factor, so that
  the result is decided by one dial, ``effort``: the steps spent at each ρ.
* On CUDA that one product is rounded to TF32: M is small where G is not, so little is lost (docs/solver.md).
* After the last projection S and L are refitted on the fixed support; the paper stops there. Below effort 1 little is
  refitted: a step of the loop, which may still move the support, then gains more than one of the refit. What is
  returned is always the best L for the S that is returned.

With a grid of few bits, D is what the pattern keeps of X *rounded to the grid* from a ρ on, so that U V and the other
values make up for rounding as they do for pruning. Scales are chosen among some near the last ones whenever ρ rises; a
book is learned once, when the grid begins. Then factors, scales and values are fitted in turns, ``linalg/grid_fit.py``.
Without a low-rank part a sweep over the columns, as in GPTQ, is tried as well, and the better of the two is finished;
that costs one sweep. A finer grid, and one with the other schedules, is fitted to the result.

``schedule="paper"`` keeps the paper's coordinates, its order of the three blocks and its rule for ρ (its section 3).
``schedule="literal"`` is the paper's algorithm without any of these deviations, at effort 0.5, its pace: L from an SVD
in every step, an exact selection in the place of a sampled threshold, no rounding to TF32, and no refit, so that S and
L are those of the last step. It takes some twenty times as long as "joint" and ends higher.

The paper's Theorem 1 (ρ never falls and Σ 1/ρ is finite: the iterates converge) is for its own three steps, each of
them solved exactly: for "literal". The ρ of all three schedules rises by a factor above 1 to the end, so its condition
holds; but "paper" takes one subspace step for L, and "joint" minimises over S and L together, for which nothing is
proven here. What can be said of them is measured.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sparlow.algorithms._loop import Loop, pace
from sparlow.algorithms._registry import Count, Positive, decomposer
from sparlow.algorithms._results import Decomposition, SolveStats, thinned
from sparlow.linalg.conjugate_gradient import fit_on_support
from sparlow.linalg.coordinates import Coordinates
from sparlow.linalg.gram import Gram
from sparlow.linalg.grid_fit import finished, stored, swept_fit
from sparlow.linalg.grid_projection import GridProjection
from sparlow.linalg.grid_target import GridTarget
from sparlow.linalg.lowrank import best_fit, subspace_step
from sparlow.linalg.patterns import Pattern
from sparlow.linalg.shared_rows import summed

SETTLED = {
    "joint": 1e-2,
    "paper": 3e-4,
    "literal": 3e-4,
}  # share of the support changing between two looks, below which a loop stops
RHO = 0.003  # where the joint schedule begins
ON_GRID = 0.05  # ρ from which on it projects on a grid too; before, rounding would be all that decides
FEW_BITS = 4  # of a grid that changes what is found; a finer one is fitted to the result as well
LEAST = 60  # steps of the joint schedule at effort 1, at least: where the support rests at once, each still gains
REFITS = 5  # alternations of least squares on the support with the low-rank fit; more gain less than 0.1 %
REFIT_STEPS, FEWEST = 6, 2  # conjugate-gradient steps in each, at effort 1 and at least


@decomposer("3basil", aliases={"three-basil": {}}, usual=True, by_rows=True)
def three_basil(
    W: Tensor,
    gram: Gram,
    pattern: Pattern,
    rank: int,
    grid: GridTarget | None = None,
    *,
    effort: Positive = 0.5,
    schedule: Literal["joint", "paper", "literal"] = "joint",
    max_steps: Count = 2000,
) -> Decomposition:
    """Find S and U V together by ADMM, then refit them on the support found.

    Args:
        effort: Time against quality: steps (and seconds) grow with it, the error falls. 0.2 is quick, 2 thorough; the
            default is where perplexity hardly falls any more (docs/solver.md).
        schedule: "joint" (two blocks, ρ rising evenly), "paper" (three blocks, ρ following the support) or "literal"
            (the published algorithm to the letter: an SVD in every step, no refit).
        max_steps: Bound on the number of iterations.
    """
    papers, literal = schedule != "joint", schedule == "literal"
    if grid is not None and not papers and grid.grid.bits <= FEW_BITS:
        return _joint_on_grid(W, gram, pattern, rank, grid, effort, max_steps)
    space = gram.coordinates(conditional=not papers, group=pattern.group)
    rho, growth = (0.1, 1.1) if papers else (RHO, pace(effort)[1])
    loop = Loop(space.to_scaled(W), space, pattern, rank, rho, growth=growth, exact=literal)
    run = _paper if papers else _joint
    steps, change = run(loop, effort, max_steps)
    own = {"rho": loop.rho, "support_change": change}
    stats = SolveStats(steps, converged=change < SETTLED[schedule], more=own, trace=thinned(loop.looks))
    if literal:
        return Decomposition(space.from_scaled(loop.D), loop.U, space.from_scaled(loop.V), stats)
    mask = space.interleave(pattern.mask(space.deinterleave(loop.X).abs()))
    T, S, U, V = loop.T, loop.X * mask, loop.U, loop.V
    del loop  # frees memory for the matrices of the refit
    S, U, V = _refit(T, space, mask, S, U, V, *refits(effort))
    return Decomposition(space.from_scaled(S), U, space.from_scaled(V), stats)


def refits(effort: float) -> tuple[int, int]:
    """Alternations of the refit, and conjugate-gradient steps in each; below effort 1 both fall with its square."""
    share = min(effort, 1.0) ** 2
    return max(round(REFITS * share), 1), max(round(REFIT_STEPS * share), FEWEST)


def _joint(loop: Loop, effort: float, max_steps: int) -> tuple[int, float]:
    """Raise ρ at its pace; take ``LEAST``·effort at least, so that more effort never means fewer."""
    every, factor = pace(effort)

    def step() -> None:
        loop.fit_jointly()
        loop.update()

    least = round(LEAST * effort)
    return _run(loop, step, every, lambda _: factor, SETTLED["joint"], min_steps=least, max_steps=max_steps)


def _joint_on_grid(
    W: Tensor, gram: Gram, pattern: Pattern, rank: int, target: GridTarget, effort: float, max_steps: int
) -> Decomposition:
    """The joint schedule, its projection on pattern ∩ grid from ``ON_GRID`` on, then the finish.

    Where everything is kept, nothing happens before the grid begins, so it begins at once.
    """
    space = gram.coordinates(conditional=True, group=pattern.group)
    rho, (every, factor) = RHO if target.masked else ON_GRID, pace(effort)
    loop = Loop(space.to_scaled(W), space, pattern, rank, rho, growth=factor)
    steps = _raise_to(loop, ON_GRID, effort, max_steps)
    points = GridProjection(loop.X, loop.project if target.masked else None, space, target)
    loop.move_to(points)
    change, before, entries = 1.0, loop.D.clone(), summed(W.numel())
    while steps < max_steps:
        for _ in range(every):
            loop.fit_jointly()
            loop.update()
        steps += every
        change = summed(torch.ne(loop.D, before).count_nonzero().item()) / entries
        loop.looks.append((steps, change))
        if change < SETTLED["joint"]:
            break
        loop.raise_rho(factor)
        points.follow(loop.X)
        before = points(loop.X, before)
    own = {"rho": loop.rho, "support_change": change}
    stats = SolveStats(steps, converged=change < SETTLED["joint"], more=own, trace=thinned(loop.looks))
    mask = pattern.mask(space.deinterleave(loop.X).abs()) if target.masked else None
    S, U, V = points.points(loop.X, mask), loop.U, space.from_scaled(loop.V)
    del loop, points  # frees memory for the finish
    fit = stored(W, gram, S, U, V, target)
    if not rank:  # without a low-rank part a layer of outliers may end higher than a sweep over it
        fit = min(fit, swept_fit(W, gram, mask, fit, target), key=lambda fit: fit.error)
    fit = finished(W, gram, fit, target)
    return Decomposition(fit.S, fit.U, fit.V, stats, fit.values, fit.factors)


def _raise_to(loop: Loop, rho: float, effort: float, max_steps: int) -> int:
    """Take the joint schedule until ρ reaches ``rho``; return the steps taken."""
    every, factor = pace(effort)
    steps = 0
    while loop.rho < rho and steps < max_steps:
        for _ in range(every):
            loop.fit_jointly()
            loop.update()
        steps += every
        loop.raise_rho(factor)
    return steps


def _paper(loop: Loop, effort: float, max_steps: int) -> tuple[int, float]:
    """The paper's order, its rule for ρ and, at effort 0.5, its pace; at least 100 steps."""

    def step() -> None:
        Y = loop.X - loop.D
        loop.update()
        loop.fit_to_residual(loop.X - Y)

    def growth(change: float) -> float:
        return 1.1 if change > 0.1 else 1.05 if change > 0.005 else 1.02  # noqa: PLR2004 - the paper's thresholds

    every = max(round(20 * effort), 1)
    return _run(loop, step, every, growth, SETTLED["paper"], min_steps=100, max_steps=max_steps)


def _run(
    loop: Loop,
    step: Callable[[], None],
    every: int,
    growth: Callable[[float], float],
    settled: float,
    *,
    min_steps: int,
    max_steps: int,
) -> tuple[int, float]:
    """Step, and look at the support every so often; return (steps taken, share of the support that last changed)."""
    done, change = 0, 1.0
    while done < max_steps:
        for _ in range(min(every, max_steps - done)):
            step()
            done += 1
        change = loop.support_change()
        loop.looks.append((done, change))
        if done >= min_steps and change < settled:
            break
        loop.raise_rho(growth(change))
    return done, change


def _refit(
    T: Tensor, space: Coordinates, mask: Tensor, S: Tensor, U: Tensor, V: Tensor, alternations: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Alternate least squares on the support with the low-rank fit, and end on the best L for the last S."""
    G = space.G
    for left in reversed(range(alternations)):
        S = fit_on_support(T - U @ V, G, S, mask, steps)
        if V.shape[0] and left:
            U, V = subspace_step(T - S, G, V)
    if V.shape[0]:
        U, V = best_fit(T - S, G, V, space.root)
    return S, U, V
