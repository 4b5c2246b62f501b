"""ALPS: pruning by ADMM, then least squares on the support (Meng et al., 2024, arXiv 2406.07831).

    minimise  tr((W − S) H (W − S)ᵀ)   s.t.  S = D,  D on the pattern

In unit-diagonal coordinates, T = W E and G = E⁻¹ H E⁻¹ with E = diag(H)^½, as in the paper. With Y, the multiplier
divided by ρ, and M = ρ (G + ρI)⁻¹ its three updates take one product an iteration, because (G + ρI)⁻¹ G = I − M:

    X = S + Y ← T + Y + (D − T − Y) M,    D ← P(X),    Y ← X − D

ρ starts at 0.1 and rises every third iteration, the faster the more of the support has changed since; once none of it
has, the support is final. Deviations from the paper:

* (G + ρI)⁻¹ comes from a Cholesky factorisation for each ρ, not from the eigenvectors of G.
* Unstructured, the threshold of an iteration is that of a sample; the last projection is exact.
* Conjugate gradients step each row by itself and for a fixed number of steps, without a tolerance.
"""

import torch
from torch import Tensor

from sparlow.algorithms._registry import Count, pruner
from sparlow.algorithms._results import Pruned, SolveStats, thinned
from sparlow.linalg.conjugate_gradient import fit_on_support
from sparlow.linalg.coordinates import Coordinates
from sparlow.linalg.gram import Gram
from sparlow.linalg.patterns import Pattern
from sparlow.linalg.shared_rows import summed

RHO = 0.1  # penalty to start from
EVERY = 3  # iterations between two looks at the support


@pruner("alps", by_rows=True)
def alps(W: Tensor, gram: Gram, pattern: Pattern, *, max_steps: Count = 300, refit: int = 10) -> Pruned:
    """Find the support by ADMM, then the best values on it by conjugate gradients.

    Args:
        max_steps: Bound on the ADMM iterations; 15 to 60 are usual.
        refit: Conjugate-gradient steps at the end; 0 for none.
    """
    space = gram.coordinates(group=pattern.group)
    T = space.to_scaled(W)
    X, stats = _admm(T, space, pattern, max_steps)
    mask = space.interleave(pattern.mask(space.deinterleave(X).abs()))
    return Pruned(space.from_scaled(fit_on_support(T, space.G, X * mask, mask, refit)), stats)


def _admm(T: Tensor, space: Coordinates, pattern: Pattern, max_steps: int) -> tuple[Tensor, SolveStats]:
    """Iterate until the support of D rests; return the last X = S + Y (out, in), equal to S where D is not zero."""
    project, kept = pattern.projector(), max(summed(pattern.kept((T.shape[0], T.shape[1]))), 1)
    D, Y = project(T, torch.empty_like(T)), torch.zeros_like(T)
    seen = D.bool()
    X, work = torch.empty_like(T), torch.empty_like(T)  # written into: new memory costs more than the sums
    rho, M = RHO, space.ridge(RHO)
    looks: list[tuple[int, float]] = []
    for step in range(1, max_steps + 1):
        Y += T
        torch.addmm(Y, torch.sub(D, Y, out=work), M, out=X)
        project(X, D)
        torch.sub(X, D, out=Y)
        if step % EVERY == 0:
            mask = D.bool()
            change = summed((mask ^ seen).count_nonzero().item()) / kept
            looks.append((step, change))
            if not change:
                return X, SolveStats(step, converged=True, trace=thinned(looks))
            factor = 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1  # noqa: PLR2004 - the paper's rule
            rho, seen = rho * factor, mask
            Y /= factor  # the multiplier itself stays as it is
            M = space.ridge(rho)
    return X, SolveStats(max_steps, converged=False, trace=thinned(looks))
