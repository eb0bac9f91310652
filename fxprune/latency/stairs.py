"""The step in which this host's kernels take time as the channels of a convolution grow.

Kernels compute channels in blocks: on processors with AVX-512, eight channels take as long as
sixteen. Times of a few convolutions at every eighth width show the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxprune.latency.layer_config import Form, LayerConfig
from fxprune.latency.table import Table
from fxprune.pipeline.context import Context
from fxprune.pipeline.progress import Tracker
from fxprune.planning.widths import Rounding

SMALLEST = 8  # channels that kernels compute at once at least
WIDEST = 64
LARGER_STEPS = (32, 16)
GAIN = 0.05  # what narrower widths within a step must save on average for a smaller step


@dataclass(frozen=True)
class WidthSteps:
    """Channels per step of time.

    Attributes:
        dense: of ordinary convolutions.
        depthwise: of depthwise convolutions.

    """

    dense: int
    depthwise: int


FINEST = WidthSteps(SMALLEST, SMALLEST)


def width_steps(table: Table, form: Form = "fp32", progress: Tracker | None = None) -> WidthSteps:
    """Return the steps of one form; the table measures what it lacks."""
    dense, depthwise = step_configs()
    table.fill([*dense, *depthwise], progress, (form,))
    return WidthSteps(*(step_of(table.us(configs, form)) for configs in (dense, depthwise)))


def step_configs() -> tuple[list[LayerConfig], list[LayerConfig]]:
    """Return the convolutions whose times show the steps: ordinary ones and depthwise ones."""
    widths = np.arange(SMALLEST, WIDEST + 1, SMALLEST).tolist()
    dense = [LayerConfig("conv", _square(14), (width, width, width)) for width in widths]
    return dense, [LayerConfig("conv", _square(28), (width, width, 1)) for width in widths]


def rounding_for(
    dense: int | None, depthwise: int | None, floor: int, context: Context
) -> Rounding:
    """Return the rounding of widths that was asked for, or else two steps of this host's kernels.

    Args:
        dense: multiple of ordinary widths; None to measure.
        depthwise: the same where a depthwise convolution runs.
        floor: what every width is a multiple of.
        context: for the threads and the progress of measurements.

    """
    if dense is None or depthwise is None:
        steps = width_steps(Table.of(context), progress=context.progress)
        dense = dense or 2 * steps.dense
        depthwise = depthwise or 2 * steps.depthwise
    return Rounding(dense, depthwise, floor)


def _square(size: int) -> tuple[int, ...]:
    """Return the geometry of a 3 x 3 convolution of a square image, padded by one."""
    return (size, size, 3, 3, *[1] * 8, 0, 0)


def step_of(times: np.ndarray) -> int:
    """Return the largest step within which narrower widths do not save time.

    Args:
        times: at every eighth width, up to 64.

    >>> step_of(np.array([12.1, 10.7, 22.0, 22.6, 38.0, 40.3, 70.7, 63.6]))
    16
    >>> step_of(np.array([10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0]))
    8

    """
    widths = np.arange(SMALLEST, WIDEST + 1, SMALLEST)
    for step in LARGER_STEPS:
        whole = -(-widths // step) * step
        within = widths < whole
        ratios = times[within] / times[whole[within] // SMALLEST - 1]
        if np.exp(np.log(ratios).mean()) > 1 - GAIN:
            return step
    return SMALLEST
