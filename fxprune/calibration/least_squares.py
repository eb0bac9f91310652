"""Least squares from second moments: a layer's weights from what it sees and what it should add.

For features ``x`` and wanted changes ``r`` of the outputs, the change ``D`` of the weights is

    min over D   sum ||r - x D' - b||^2 + ridge * m * ||D||^2,     m = mean of the features' squares

so the ridge pulls towards the weights as they are. Where weights are masked, every output has a
support of its own and a system of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.calibration.moments import Moments
from fxprune.errors import FxpruneError

BLOCK = 2**23  # elements of a block of systems
MOST_FEATURES = 8192  # of a system: its moments take half a gigabyte
LEAST = 1e-12  # the smallest ridge, so that features that never vary do no harm
FLOOR = 1e-30  # of the features' mean square, where they are all zero
DIRECT = 2 * 10**11  # multiplications for all masked systems; more are solved stepwise
DAMPINGS = 12  # of singular systems, up to a tenth of their diagonal
STEPS = 60  # of that, at most
NEAR = 1e-4  # the share of the residual that may be left


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
    scale = used.gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(FLOOR)
    eye = torch.eye(used.gram.shape[1], dtype=torch.float64, device=used.gram.device)
    gram = used.gram + (max(ridge, LEAST) * scale).view(-1, 1, 1) * eye
    if keep is None or bool(keep.all()):
        change = _cholesky(gram, used.cross).transpose(1, 2)
    else:
        change = _on_support(gram, used.cross, keep)
    shift = torch.zeros_like(moments.wanted)
    if bias:
        mean = moments.features / moments.count
        shift = moments.wanted / moments.count - (change @ mean.unsqueeze(2)).squeeze(2)
    return change, shift


def _cholesky(gram: Tensor, cross: Tensor) -> Tensor:
    return torch.cholesky_solve(cross, factorise(gram))


def factorise(systems: Tensor) -> Tensor:
    """Return the Cholesky factors of symmetric systems, batch x f x f.

    Those that rounding has left without one are damped, ten times as much each time, from
    ``LEAST`` of their mean diagonal on, until they have one.

    Raises:
        FxpruneError: the systems are not finite, or far from positive definite.

    """
    level = systems.diagonal(dim1=1, dim2=2).mean(1).clamp_min(FLOOR) * LEAST
    eye = torch.eye(systems.shape[1], dtype=systems.dtype, device=systems.device)
    for _ in range(DAMPINGS):
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
    """Solve one system per output, in which the weights that are not kept do not take part."""
    groups, outputs, features = keep.shape
    if groups * outputs * features**3 // 3 > DIRECT:
        return _stepwise(gram, cross, keep)
    found = torch.zeros(keep.shape, dtype=gram.dtype, device=gram.device)
    size = max(1, BLOCK // gram.shape[1] ** 2)
    for group in range(groups):
        for start in range(0, outputs, size):
            part = keep[group, start : start + size].to(gram.dtype)
            pairs = part.unsqueeze(2) * part.unsqueeze(1)
            systems = gram[group] * pairs + torch.diag_embed(1 - part)
            wanted = (cross[group].T[start : start + size] * part).unsqueeze(2)
            found[group, start : start + size] = _cholesky(systems, wanted).squeeze(2) * part
    return found


def _stepwise(gram: Tensor, cross: Tensor, keep: Tensor) -> Tensor:
    """Solve the systems of all outputs at once by conjugate gradients, scaled by the diagonal.

    A step costs one product with the moments, where a factorisation would have to be made for
    every output.
    """
    kept = keep.to(gram.dtype)
    scale = kept / gram.diagonal(dim1=1, dim2=2).unsqueeze(1)
    residual = cross.transpose(1, 2) * kept
    found, direction = torch.zeros_like(residual), residual * scale
    slope = (residual * direction).sum(2, keepdim=True)
    goal = NEAR**2 * slope
    for _ in range(STEPS):
        image = direction @ gram * kept
        length = slope / (direction * image).sum(2, keepdim=True).clamp_min(FLOOR)
        found += length * direction
        residual -= length * image
        ready = residual * scale
        last, slope = slope, (residual * ready).sum(2, keepdim=True)
        if bool((slope <= goal).all()):
            break
        direction = ready + slope / last.clamp_min(FLOOR) * direction
    return found
