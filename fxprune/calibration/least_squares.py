"""Least squares from second moments: a layer's weights from what it sees and what it should add.

For features ``x`` and wanted changes ``r`` of the outputs, the change ``D`` of the weights is

    min over D   sum ||r - x D' - b||^2 + ridge * m * ||D||^2,     m = mean of the features' squares

so the ridge pulls towards the weights as they are. Moments are sums over any number of batches, in
float64. Where weights are masked, every output has a support of its own and a system of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.errors import FxpruneError

BLOCK = 2**23  # elements of a block of systems
MOST_FEATURES = 8192  # of a system: its moments take half a gigabyte
LEAST = 1e-12  # the smallest ridge, so that features that never vary do no harm
FLOOR = 1e-30  # of the features' mean square, where they are all zero
DIRECT = 2 * 10**11  # multiplications for all masked systems; more are solved stepwise
STEADY = 0.01  # the share of a feature's mean square that variance is, below which it is steady
DAMPINGS = 12  # of singular systems, up to a tenth of their diagonal
STEPS = 60  # of that, at most
NEAR = 1e-4  # the share of the residual that may be left


@dataclass
class Moments:
    """Sums over positions, by group of the layer.

    Attributes:
        gram: features times features, groups x f x f.
        cross: features times wanted changes, groups x f x outputs.
        features: sums of the features, groups x f.
        wanted: sums of the wanted changes, groups x outputs.
        energy: sums of the squares of the wanted changes, groups x outputs.
        count: how many positions.

    """

    gram: Tensor
    cross: Tensor
    features: Tensor
    wanted: Tensor
    energy: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, groups: int, features: int, outputs: int, device: torch.device) -> Moments:
        """Return the moments of nothing."""
        shapes = (features, features), (features, outputs), (features,), (outputs,), (outputs,)
        gram, cross, seen, wanted, energy = (
            torch.zeros(groups, *shape, dtype=torch.float64, device=device) for shape in shapes
        )
        return cls(gram, cross, seen, wanted, energy)

    def add(self, features: Tensor, wanted: Tensor) -> None:
        """Count positions: groups x f x n, and groups x outputs x n.

        Products are summed in their own precision here, over the calls in double precision. Where
        features hardly vary about their means, products are of what they deviate by, since single
        precision would keep little of it beside the means.
        """
        count = features.shape[2]
        gram = features @ features.transpose(1, 2)
        seen, asked = features.mean(2).double(), wanted.mean(2).double()
        square = gram.diagonal(dim1=1, dim2=2) / count
        if bool((square - seen.square() < STEADY * square).any()):
            features, seen = _deviations(features)
            wanted, asked = _deviations(wanted)
            gram = features @ features.transpose(1, 2)
            self.gram.baddbmm_(count * seen.unsqueeze(2), seen.unsqueeze(1))
            self.cross.baddbmm_(count * seen.unsqueeze(2), asked.unsqueeze(1))
            self.energy += count * asked.square()
        self.gram += gram
        self.cross += features @ wanted.transpose(1, 2)
        self.features += count * seen
        self.wanted += count * asked
        self.energy += wanted.square().sum(2)
        self.count += count

    def centred(self) -> Moments:
        """Return the moments of deviations from the means."""
        mean = self.features / self.count
        wanted = self.wanted / self.count
        return Moments(
            self.gram - torch.einsum("gi,gj->gij", mean, self.features),
            self.cross - torch.einsum("gi,go->gio", mean, self.wanted),
            torch.zeros_like(self.features),
            torch.zeros_like(self.wanted),
            self.energy - wanted * self.wanted,
            self.count,
        )

    def loss(self, change: Tensor, shift: Tensor) -> Tensor:
        """Return the sum of squares that a change of weights and bias leaves, groups x outputs.

        Args:
            change: of the weights, groups x outputs x f.
            shift: of the bias, groups x outputs.

        """
        made = (change @ self.gram * change).sum(2)
        made += 2 * shift * (change @ self.features.unsqueeze(2)).squeeze(2)
        made += self.count * shift.square()
        met = (change * self.cross.transpose(1, 2)).sum(2) + shift * self.wanted
        return self.energy - 2 * met + made

    def best_step(self, change: Tensor, shift: Tensor) -> Tensor:
        """Return the share of a change, 0 to 1, that leaves each output's least sum of squares."""
        slope = self.energy - self.loss(change, shift)  # 2 met - made
        made = self.loss(-change, -shift) - self.energy  # 2 met + made
        met, made = (slope + made) / 4, (made - slope) / 2
        return torch.where(made > 0, met / made.clamp_min(FLOOR), 0.0).clamp(0, 1)


def _deviations(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return deviations from the means along the last dimension, and the means in float64."""
    near = values.mean(2, keepdim=True)
    values = values - near
    return values, near.squeeze(2).double() + values.mean(2).double()  # what rounding left


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
        f"the second moments of what a layer reads are not {what}; look for values that are "
        "infinite, not numbers, or out of all proportion in the model or in the calibration data"
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
