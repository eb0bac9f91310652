"""How much accuracy a change costs: a paired comparison of two evaluations, with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxprune.training.evaluate import Evaluation

Z90 = 1.645  # standard errors on either side of a 90 % interval


@dataclass(frozen=True)
class Drop:
    """Accuracy lost, in percentage points, judged sample by sample.

    Attributes:
        points: the mean loss; negative for a gain.
        error: its standard error.
        samples: number of predictions compared.

    """

    points: float
    error: float
    samples: int

    @property
    def upper(self) -> float:
        """The upper end of the 90 % interval of the loss."""
        return self.points + Z90 * self.error

    @property
    def lower(self) -> float:
        """The lower end of the 90 % interval of the loss."""
        return self.points - Z90 * self.error

    def samples_needed(self, limit: float) -> int | None:
        """Return how many samples would show that the loss is within a limit; None if it is not."""
        room = limit - self.points
        if room <= 0:
            return None
        return math.ceil(self.samples * (Z90 * self.error / room) ** 2)

    def __str__(self) -> str:
        return (
            f"{self.points:.2f} points lost (90 % interval {self.lower:.2f} to {self.upper:.2f}, "
            f"{self.samples:,} predictions)"
        )


def paired_drop(before: Evaluation, after: Evaluation) -> Drop | None:
    """Compare two evaluations on the same samples; None if accuracy is unknown.

    The variance is that of the differences of single predictions, of which one more is counted than
    was seen, so that a sample without any difference does not claim certainty.
    """
    if before.hits is None or after.hits is None or len(before.hits) != len(after.hits):
        return None
    count = len(before.hits)
    if not count:
        return None
    lost = before.hits.double() - after.hits.double()
    mean = float(lost.mean())
    variance = float((lost - mean).square().sum() + 1) / count
    return Drop(100 * mean, 100 * math.sqrt(variance / count), count)
