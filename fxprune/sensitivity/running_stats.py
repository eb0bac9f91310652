"""When to stop probing: the ranking at the cut has settled."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

SQRT_2 = 2**0.5


@dataclass(eq=False)
class Tally:
    """Means and standard errors of samples that arrive one after another (Welford).

    Attributes:
        size: how many quantities each sample holds.
        count: how many samples have been counted.
        dropped: how many were not finite, and were not.

    """

    size: int
    count: int = 0
    dropped: int = 0
    mean: Tensor = field(init=False)
    _squares: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean = torch.zeros(self.size, dtype=torch.float64)
        self._squares = torch.zeros(self.size, dtype=torch.float64)

    def add(self, sample: Tensor) -> None:
        """Count a sample, or drop it if anything in it is not finite."""
        if not bool(sample.isfinite().all()):
            self.dropped += 1
            return
        self.count += 1
        delta = sample - self.mean
        self.mean += delta / self.count
        self._squares += delta * (sample - self.mean)

    @property
    def error(self) -> Tensor:
        """Standard error of the mean; infinite with fewer than two samples."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.inf)
        return (self._squares / (self.count * (self.count - 1))).sqrt()


def misplaced(scores: Tensor, errors: Tensor, cut: float) -> float:
    """Expected number of units on the wrong side when the lowest share ``cut`` is taken.

    Each unit's true score is taken as normal about its estimate; a unit is misplaced if it lies on
    the other side of the threshold. A taken unit that should stay comes with one that stays and
    should be taken; both count.
    """
    order = scores.sort().values
    number = min(max(round(cut * len(order)), 0), len(order))
    if number in (0, len(order)):
        return 0.0
    threshold = (order[number - 1] + order[number]) / 2
    distance = (scores - threshold).abs()
    certain = errors == 0
    deviations = distance / errors.masked_fill(certain, 1.0)
    wrong = torch.special.erfc(deviations / SQRT_2) / 2
    return float(wrong.masked_fill(certain, 0.0).sum())


@dataclass(frozen=True)
class StoppingRule:
    """Probe until the expected overlap of the cut is good enough, or the cap is reached.

    Attributes:
        cut: the share of all units, counted from the least sensitive, whose membership matters.
        tolerance: the share of them that may be expected to be wrong; 0 never stops early.
        least: probes before the first test, since a standard error needs some.
        cap: probes at most.

    """

    cut: float
    tolerance: float
    least: int
    cap: int

    def wrong_share(self, scores: Tensor, errors: Tensor) -> float:
        """Return the expected share of the cut that belongs elsewhere."""
        number = max(round(self.cut * len(scores)), 1)
        return misplaced(scores, errors, self.cut) / 2 / number

    def settled(self, scores: Tensor, errors: Tensor, count: int) -> bool:
        """Whether enough has been seen."""
        if count < self.least or self.tolerance <= 0:
            return False
        return self.wrong_share(scores, errors) <= self.tolerance

    def next_round(self, count: int) -> int:
        """How many probes to make before the next test: a growing number, within the cap."""
        return max(min(max(self.least, count // 4), self.cap - count), 0)
