"""What a pass may use besides the program: data, device, seed, the dense model, progress."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fxprune.data.roles import Data, as_data
from fxprune.errors import InputError
from fxprune.graph.program import Program
from fxprune.pipeline.progress import Tracker

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Context:
    """What passes share in one run.

    Attributes:
        data: a ``Data``, or a dataset, loader or mapping that ``as_data`` accepts; None for none.
        device: where passes that run the model put it.
        seed: the source of all randomness.
        loss: ``loss(outputs, target) -> scalar`` (mean over the batch).
        dense: the program before the first pass; the pipeline fills it in if absent.
        progress: how long work shows itself.
        threads: number of threads of ONNX Runtime, where latency matters.
        provider: execution provider of ONNX Runtime, where latency matters.
        latency_table: file of the times of another machine to plan for; None for this one.
        latency_shapes: shapes of inputs at which latency is measured, by name; the others have the
            shapes that the program was traced with, for one sample.
        recovery: quick forms of the passes that restore accuracy after removal; a pass that tries
            plans runs them before it judges. The pipeline fills it in from its own passes.

    """

    data: Any = None
    device: str = "cpu"
    seed: int = 0
    loss: Loss = F.cross_entropy
    dense: Program | None = None
    progress: Tracker = field(default_factory=Tracker)
    threads: int = 1
    provider: str = "CPUExecutionProvider"
    latency_table: Path | None = None
    latency_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    recovery: tuple[Callable[[Program, Context], object], ...] = ()

    @functools.cached_property
    def samples(self) -> Data:
        """The data, as datasets with roles; ``InputError`` if none was given."""
        if self.data is None:
            raise InputError("this pass needs data; pass data= or --data")
        return as_data(self.data)
