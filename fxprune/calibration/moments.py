"""Second moments of features and of wanted changes of outputs, summed over batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A feature is steady where its variance is a smaller share of its mean square than this.
STEADY_SHARE = 0.01
SMALLEST_MEAN_SQUARE = 1e-30  # of features that are all zero
RELATIVE_JITTER = 1e-12  # variance of constant directions, relative to the mean variance


@dataclass
class Moments:
    """Sums over positions, by group of the layer.

    Attributes:
        gram: features times features, groups x f x f.
        cross: features times wanted changes, groups x f x outputs.
        features: sums of the features, groups x f.
        wanted: sums of the wanted changes, groups x outputs.
        energy: sums of the squares of the wanted changes, groups x outputs.
        count: the number of positions.

    """

    gram: Tensor
    cross: Tensor
    features: Tensor
    wanted: Tensor
    energy: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, groups: int, features: int, outputs: int, device: torch.device | str) -> Moments:
        """Return empty moments; ``outputs`` is 0 if there are no wanted changes."""
        shapes = (features, features), (features, outputs), (features,), (outputs,), (outputs,)
        gram, cross, seen, wanted, energy = (
            torch.zeros(groups, *shape, dtype=torch.float64, device=device) for shape in shapes
        )
        return cls(gram, cross, seen, wanted, energy)

    @property
    def mean(self) -> Tensor:
        """The mean of the features, groups x f."""
        return self.features / self.count

    @property
    def covariance(self) -> Tensor:
        """The covariance of the features, groups x f x f."""
        return self.gram / self.count - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)

    def of(self, chosen: Tensor) -> Moments:
        """Return the moments of some of the features, by their indices."""
        chosen = chosen.to(self.gram.device)
        return replace(
            self,
            gram=self.gram[:, chosen][..., chosen],
            cross=self.cross[:, chosen],
            features=self.features[:, chosen],
        )

    def root(self, *, centred: bool) -> Tensor:
        """Return lower triangles ``L`` with ``L L'`` the covariance, or the mean square."""
        second = self.covariance if centred else self.gram / self.count
        level = second.diagonal(dim1=1, dim2=2).mean(1).clamp_min(SMALLEST_MEAN_SQUARE)
        eye = torch.eye(second.shape[1], dtype=second.dtype, device=second.device)
        found: Tensor = torch.linalg.cholesky(second + RELATIVE_JITTER * level.view(-1, 1, 1) * eye)
        return found

    def to(self, device: torch.device | str) -> Moments:
        """Return the moments on a device."""
        return Moments(
            self.gram.to(device),
            self.cross.to(device),
            self.features.to(device),
            self.wanted.to(device),
            self.energy.to(device),
            self.count,
        )

    def add(self, features: Tensor, wanted: Tensor | None = None) -> None:
        """Count positions: groups x f x n, and groups x outputs x n.

        Products of a call are summed in the precision of the features, and the calls in double
        precision. If features vary little around their means, products are taken of the deviations,
        because single precision would lose them beside the means.
        """
        wanted = features[:, :0] if wanted is None else wanted
        count = features.shape[2]
        gram = features @ features.transpose(1, 2)
        seen, asked = features.mean(2).double(), wanted.mean(2).double()
        square = gram.diagonal(dim1=1, dim2=2) / count
        if bool((square - seen.square() < STEADY_SHARE * square).any()):
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
        """Return the sum of squared errors after a change of weights and bias, groups x outputs.

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
        """Return the fraction of a change, 0 to 1, that minimises each output's squared error."""
        slope = self.energy - self.loss(change, shift)  # 2 met - made
        made = self.loss(-change, -shift) - self.energy  # 2 met + made
        met, made = (slope + made) / 4, (made - slope) / 2
        return torch.where(made > 0, met / made.clamp_min(SMALLEST_MEAN_SQUARE), 0.0).clamp(0, 1)


def _deviations(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return deviations from the means along the last dimension, and the means in float64."""
    rounded = values.mean(2, keepdim=True)
    values = values - rounded
    return values, rounded.squeeze(2).double() + values.mean(2).double()
