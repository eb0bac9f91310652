"""Least squares from second moments: a layer's weights from its inputs and its output's error.

For features ``x`` and wanted changes ``r`` of the outputs, the change ``D`` of the weights is

    min over D   sum ||r - x D' - b||^2 + ridge * m * ||D||^2,     m = mean of the features' squares

so the ridge pulls towards the current weights. If weights are masked, every output has its own
support and its own system.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.calibration.moments import Moments
from fxprune.errors import FxpruneError

SYSTEM_BLOCK_ELEMENTS = 2**23  # of the masked systems that are factorised at a time
MAX_FEATURES = 8192  # of a system: its moments take half a gigabyte
MIN_RELATIVE_RIDGE = 1e-12  # keeps systems with constant features solvable
MIN_MEAN_SQUARE = 1e-30  # of features that are all zero
MAX_DIRECT_PRODUCTS = 2 * 10**11  # to factorise all masked systems; beyond, they are iterated
MAX_DAMPINGS = 12  # of singular systems, up to a tenth of their diagonal
MAX_CG_STEPS = 60
CG_RELATIVE_RESIDUAL = 1e-4  # at which the iteration stops


def solve(
    moments: Moments, ridge: float, *, bias: bool, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the change of the weights, groups x outputs x f, and of the bias, groups x outputs.

    Args:
        moments: of all positions.
        ridge: relative to the mean square of the features.
        bias: whether there is a bias to change.
        keep: which weights may change, groups x outputs x f; None for all.

    Raises:
        FxpruneError: the moments are not finite.

    """
    used = moments.centred() if bias else moments
    scale = used.gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(MIN_MEAN_SQUARE)
    eye = torch.eye(used.gram.shape[1], dtype=torch.float64, device=used.gram.device)
    gram = used.gram + (max(ridge, MIN_RELATIVE_RIDGE) * scale).view(-1, 1, 1) * eye
    if keep is None or bool(keep.all()):
        change = torch.cholesky_solve(used.cross, factorise(gram)).transpose(1, 2)
    else:
        change = _on_support(gram, used.cross, keep)
    shift = torch.zeros_like(moments.wanted)
    if bias:
        mean = moments.features / moments.count
        shift = moments.wanted / moments.count - (change @ mean.unsqueeze(2)).squeeze(2)
    return change, shift


def factorise(systems: Tensor) -> Tensor:
    """Return the Cholesky factors of symmetric systems, batch x f x f.

    Systems that are not positive definite because of rounding are damped, first by
    ``MIN_RELATIVE_RIDGE`` of their mean diagonal, then ten times as much at every further try.

    Raises:
        FxpruneError: the systems are not finite, or far from positive definite.

    """
    level = systems.diagonal(dim1=1, dim2=2).mean(1).clamp_min(MIN_MEAN_SQUARE) * MIN_RELATIVE_RIDGE
    eye = torch.eye(systems.shape[1], dtype=systems.dtype, device=systems.device)
    for _ in range(MAX_DAMPINGS):
        factors: Tensor
        factors, failed = torch.linalg.cholesky_ex(systems)
        if not bool(failed.any()):
            return factors
        level = level * 10
        systems = systems + ((failed > 0) * level).view(-1, 1, 1) * eye
    what = "definite" if bool(systems.isfinite().all()) else "finite"
    raise FxpruneError(
        f"the second moments of a layer's inputs are not {what}; check the model and "
        "the calibration data for infinite, NaN or extremely large values"
    )


def _on_support(gram: Tensor, cross: Tensor, keep: Tensor) -> Tensor:
    """Solve one system per output, without the weights that are masked."""
    groups, outputs, features = keep.shape
    if groups * outputs * features**3 // 3 > MAX_DIRECT_PRODUCTS:
        return _iterate(gram, cross, keep)
    found = torch.zeros(keep.shape, dtype=gram.dtype, device=gram.device)
    size = max(1, SYSTEM_BLOCK_ELEMENTS // gram.shape[1] ** 2)
    for group in range(groups):
        for start in range(0, outputs, size):
            part = keep[group, start : start + size].to(gram.dtype)
            pairs = part.unsqueeze(2) * part.unsqueeze(1)
            systems = gram[group] * pairs + torch.diag_embed(1 - part)
            wanted = (cross[group].T[start : start + size] * part).unsqueeze(2)
            found[group, start : start + size] = (
                torch.cholesky_solve(wanted, factorise(systems)).squeeze(2) * part
            )
    return found


def _iterate(gram: Tensor, cross: Tensor, keep: Tensor) -> Tensor:
    """Solve the systems of all outputs at once by conjugate gradients, scaled by the diagonal.

    A step costs one product with the moments; a direct solution factorises a system per output.
    """
    kept = keep.to(gram.dtype)
    scale = kept / gram.diagonal(dim1=1, dim2=2).unsqueeze(1)
    residual = cross.transpose(1, 2) * kept
    found, direction = torch.zeros_like(residual), residual * scale
    slope = (residual * direction).sum(2, keepdim=True)
    goal = CG_RELATIVE_RESIDUAL**2 * slope
    for _ in range(MAX_CG_STEPS):
        image = direction @ gram * kept
        length = slope / (direction * image).sum(2, keepdim=True).clamp_min(MIN_MEAN_SQUARE)
        found += length * direction
        residual -= length * image
        ready = residual * scale
        last, slope = slope, (residual * ready).sum(2, keepdim=True)
        if bool((slope <= goal).all()):
            break
        direction = ready + slope / last.clamp_min(MIN_MEAN_SQUARE) * direction
    return found
