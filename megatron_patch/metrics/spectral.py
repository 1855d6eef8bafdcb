"""The top singular value of sharded weight matrices, by Lanczos with full reorthogonalisation and a bound on its error.

Power iteration needs hundreds of products to separate the top of a random matrix' spectrum from what follows to 1e-3;
Lanczos needs tens. It runs on `M^T M`, where M is W, or its transpose for a row-parallel W: so the basis vectors x are
whole on every rank and are orthogonalised without communication. All layers advance together: one step costs one
all-reduce per shard group, of the partial sums of `M^T (M x)`, however many layers there are. P parts of a fused layer
(q, k, v) run side by side: each has its own column, and is 0 in the rows of the other parts.

**When to stop.** After k exact steps `prod_i (A - theta_i) x_1 = beta_1 ... beta_k x_{k+1}`, where A = M^T M, theta are
the Ritz values and beta the norms of the residuals. Its component along the top singular vector gives, for the top
eigenvalue lambda, `prod_i (lambda - theta_i) <= beta_1 ... beta_k / c`, with c the component of the start vector. For a
random one c is below delta / sqrt(N) with a probability under delta only, whatever the matrix. So the largest lambda
that obeys the inequality bounds the true one, also where a cluster has hidden it from the residual.

Source: van Dorsselaer, Hochstenbach, van der Vorst, SIAM J. Matrix Anal. Appl. 22 (2001) 837, section 3.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_patch.metrics.reduce import all_reduce_sum
from megatron_patch.metrics.views import Group, LinearView

TOLERANCE = 1e-3
"""A layer is done when the bound on the relative error of each of its parts is below this."""
DOUBT = 1e-3
"""Probability delta with which an unlucky start vector may void the bound, for the worst of matrices."""
CHECK_EVERY = 6
"""Steps between two looks at the bound, each of which waits for the device."""
MOST_STEPS = 200
"""No spectrum needs more up to a width of a million: delta and TOLERANCE need ln(2 sqrt(N)/delta) / sqrt(8 TOLERANCE)
steps (Chebyshev)."""
ROUNDING = 2e-6
"""What fp32 products may add to the error; and a residual is not known any better, relative to A."""


@dataclass(frozen=True)
class TopSingularValue:
    """The top singular values of the parts of a layer; NaN where the weight holds a number that is not finite."""

    view: LinearView
    values: Tensor
    """float64 [P]; never too large but for rounding."""
    errors: Tensor
    """Bounds of the relative error, float64 [P]: the true values are at most `values * (1 + errors)`."""


class _Lanczos:
    """The recurrence of one layer. Basis vectors are columns, x [N, P]; scalars are float64 [P]."""

    def __init__(self, view: LinearView, largest: Tensor) -> None:
        """Start from a random vector; `largest` [P] is the size of the entries that all ranks of the group agree on."""
        parts = len(view.rows)
        self.view = view
        self.row = view.kind == "row"
        self._mask = torch.nn.functional.one_hot(view.row_part, parts).float() if parts > 1 else None
        # Powers of two are exact. Without them squares of entries below 1e-19 would vanish in fp32.
        exponent = -torch.log2(largest.clamp_min(1e-45)).round().clamp(-120, 120)
        self.scale = torch.exp2(torch.where(largest > 0, exponent, 0)).float()
        length = view.row_part.shape[0] if self.row else view.columns
        generator = torch.Generator().manual_seed(length)
        self.x = torch.randn(length, parts, generator=generator).to(view.row_part.device)
        if self.row:
            self.x = self._of_part(self.x)
        self.x = _unit(self.x)[0]
        whole = torch.full_like(largest, length)
        self._dimension = view.row_part.bincount(minlength=parts) if self.row else whole
        self._basis: list[Tensor] = []
        self._alphas: list[Tensor] = []
        self._betas: list[Tensor] = []
        self.bound = largest.new_full((parts,), math.inf)
        """Relative; of the last look."""

    def product(self) -> Tensor:
        """Return this rank's contribution to M^T M x, [N, P], in units of scale^2."""
        weight = self.view.weight().float()
        if self.row:
            return self._of_part(weight @ (weight.T @ (self.x * self.scale) * self.scale))
        return weight.T @ (self._of_part(weight @ (self.x * self.scale)) * self.scale)

    def advance(self, product: Tensor) -> None:
        """Take the sum over the group, and go to the next basis vector; 0 where there is none."""
        self._basis.append(self.x)
        self._alphas.append((self.x.double() * product.double()).sum(0))
        rest, beta = _unit(self._orthogonal(product))
        # Where the Krylov space is exhausted, the rest is rounding: as good a direction to go on as any, once it is
        # orthogonal again. Not so where the basis already spans everything.
        following = _unit(self._orthogonal(rest))[0]
        self.x = torch.where(len(self._basis) < self._dimension, following, 0)
        self._betas.append(beta)

    def look(self) -> bool:
        """Update the bound; return whether another step is needed."""
        tridiagonal, betas = self._tridiagonal(), torch.stack(self._betas, 1).cpu()
        finite = tridiagonal.isfinite().all(-1).all(-1) & betas.isfinite().all(-1)
        ritz = torch.linalg.eigvalsh(torch.where(finite[:, None, None], tridiagonal, 0))
        top = ritz[:, -1:].clamp_min(0)
        known = betas.clamp_min(ROUNDING * top)  # no residual is known any better
        goal = known.log().sum(1, keepdim=True) - math.log(DOUBT / math.sqrt(self.x.shape[0]))
        low, high = top, 4 * top  # beyond twice the singular value the bound is of no use
        for _ in range(40):
            middle = (low + high) / 2
            below = (middle - ritz).log().sum(1, keepdim=True) < goal
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        bound = torch.where(top > 0, (high / top).sqrt() - 1 + ROUNDING, 0)[:, 0]
        self.bound = torch.where(finite, bound, math.nan)
        return bool((self.bound > TOLERANCE).any()) and len(self._alphas) < MOST_STEPS

    def to_ritz_vector(self) -> None:
        """Let x be the combination of the basis that belongs to the largest Ritz value."""
        weights = torch.linalg.eigh(self._tridiagonal().nan_to_num(0, 0, 0))[1][:, :, -1].float()  # [P, k]
        x = torch.einsum("knp,pk->np", torch.stack(self._basis), weights.to(self.x.device))
        self.x = _unit(x)[0]

    def result(self, product: Tensor) -> TopSingularValue:
        """Return |M x| of the Ritz vector, from the sum over the group of `product`."""
        square = (self.x.double() * product.double()).sum(0).clamp_min(0)
        bound = self.bound.to(square.device)
        return TopSingularValue(self.view, square.sqrt() / self.scale + 0 * bound, bound)

    def _tridiagonal(self) -> Tensor:
        """Return A in the basis, [P, k, k], on the CPU: there small matrices are no worse, and need no GPU library."""
        alphas, betas = torch.stack(self._alphas, 1).cpu(), torch.stack(self._betas, 1).cpu()[:, :-1]
        return torch.diag_embed(alphas) + torch.diag_embed(betas, offset=1) + torch.diag_embed(betas, offset=-1)

    def _orthogonal(self, vectors: Tensor) -> Tensor:
        """Remove what the basis can express. Once leaves fp32's resolution of what is removed; twice is enough."""
        basis = torch.stack(self._basis)
        for _ in range(2):
            vectors = vectors - torch.einsum("knp,kp->np", basis, torch.einsum("knp,np->kp", basis, vectors))
        return vectors

    def _of_part(self, rows: Tensor) -> Tensor:
        return rows if self._mask is None else rows * self._mask


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return columns at norm 1, and the norms, float64; a column of zeros stays one."""
    norms = torch.linalg.vector_norm(vectors.double(), dim=0)
    return torch.where(norms > 0, vectors.double() / norms, 0).float(), norms


def _largest_entries(view: LinearView) -> Tensor:
    """Return the largest absolute entry of each part of this rank's shard, float64 [P]; not finite if any entry is."""
    rows = view.weight().detach().abs().amax(1).double()
    parts = rows.new_zeros(len(view.rows)).scatter_reduce_(0, view.row_part, rows, "amax")
    # A number that is not finite spoils the products of all parts, since W is multiplied as a whole.
    return parts + 0 * rows.sum()


def _reduce(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Sum several tensors over the group in one all-reduce."""
    if not tensors:
        return []
    pieces = torch.split(
        all_reduce_sum(torch.cat([tensor.reshape(-1) for tensor in tensors]), group), [t.numel() for t in tensors]
    )
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def _products(runs: Sequence[_Lanczos], group: Group) -> list[Tensor]:
    """Return M^T M x of every layer; only what is partial is sent."""
    products = [run.product() for run in runs]
    split = [run.view.kind != "replicated" for run in runs]
    summed = iter(_reduce([product for product, s in zip(products, split, strict=True) if s], group))
    return [next(summed) if s else product for product, s in zip(products, split, strict=True)]


class TopSingularValues:
    """Measures the layers of this rank together. Nothing is kept from one measurement to the next.

    Memory during one: N floats per part and step (N: fan-in, fan-out of a row-parallel layer).

    Args:
        views: the layers; peers in a shard group have the same ones in the same order.
    """

    def __init__(self, views: Sequence[LinearView]) -> None:
        groups: dict[int, list[LinearView]] = {}
        for view in views:
            groups.setdefault(id(view.shard_group), []).append(view)
        self._groups = list(groups.values())

    def measure(self) -> Iterator[TopSingularValue]:
        """Yield the result of each layer, the same on all ranks of its shard group; a collective call."""
        for views in self._groups:
            yield from self._measure(views, views[0].shard_group)

    @staticmethod
    def _measure(views: Sequence[LinearView], group: Group) -> Iterator[TopSingularValue]:
        runs = []
        # The sum over ranks is not the maximum, but as good a scale; and one NaN is everybody's.
        for view, largest in zip(views, _reduce([_largest_entries(view) for view in views], group), strict=True):
            if largest.isfinite().all():
                runs.append(_Lanczos(view, largest))
            else:
                nothing = torch.full_like(largest, math.nan)
                yield TopSingularValue(view, nothing, nothing)
        going = runs
        while going:
            for _ in range(CHECK_EVERY):
                for run, product in zip(going, _products(going, group), strict=True):
                    run.advance(product)
            # Who goes on is decided together: a rank must not stop because its own rounding said so.
            votes = torch.tensor([float(run.look()) for run in going], device=views[0].row_part.device)
            going = [run for run, vote in zip(going, all_reduce_sum(votes, group).tolist(), strict=True) if vote]
        for run in runs:
            run.to_ritz_vector()
        for run, product in zip(runs, _products(runs, group), strict=True):
            yield run.result(product)
