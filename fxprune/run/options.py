"""What a run is asked to do, and the pipeline and targets that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional as F

from fxprune import passes
from fxprune.errors import InputError
from fxprune.graph.facts import Preference
from fxprune.onnx.benchmark import CPU, check_provider, parse_shapes
from fxprune.passes import (
    AnnotateSensitivity,
    ApplyPlan,
    ConvertQuantized,
    Finetune,
    FoldBatchNorm,
    InsertObservers,
    PlanChannels,
    RecalibrateNorms,
    Reconstruct,
    RemoveChannels,
    TrainQuantized,
)
from fxprune.pipeline.context import Loss
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.driver import Pipeline
from fxprune.pipeline.progress import Tracker
from fxprune.pipeline.text import parse
from fxprune.pipeline.values import check_choice
from fxprune.planning.budget import Budget, Target
from fxprune.search.plan import NetworkPlan

Objective = Literal["latency", "size", "macs", "params"]
DEFAULT_DROP = 1.0  # percentage points that a search may lose if no limit is given
DEFAULT_TARGETS = (Target.parse("macs=50%"),)


@dataclass(frozen=True)
class Options:
    """What a run is asked to do; the defaults here are those of ``fxprune.compile``.

    Attributes:
        targets: upper limits for the result.
        max_drop: largest accuracy loss allowed, in percentage points; without targets, the
            smallest model within it is searched for. None for no limit.
        objective: what a search without targets minimizes.
        search_minutes: how long a search may take.
        frontier: speed-ups over the dense model, such as 2x, at which further models are written.
        epochs: of fine-tuning in the default pipeline; 0 for none.
        steps: pruning rounds of the default pipeline, which divides the epochs among them.
        attention: remove whole heads, or narrow every head, in the default pipeline.
        int8: whether the default pipeline quantizes to INT8; None keeps the better of INT8 and
            FP32.
        standard_onnx: write operators of the ONNX standard only; without it, INT8 files may use
            faster ones of ONNX Runtime, which the report names.
        pipeline: the passes; None for the default ones.
        calibration: the largest number of calibration samples; None for all.
        batch_size: samples per step when accuracy is measured.
        seed: of all randomness.
        device: where passes run the model, such as ``cpu`` or ``cuda``.
        threads: of PyTorch and ONNX Runtime; None leaves PyTorch's, and measures latency on one.
        provider: execution provider of ONNX Runtime that latency is measured with.
        latency_table: file of the times of another machine to plan for, from a kit.
        latency_shape: shapes at which latency is measured, as ``name=1x26`` per input.
        verify: check on random units that removing them equals zeroing them, before the passes.
        onnx: write model.onnx, and compare and time it in ONNX Runtime.
        latency_seconds: how long the latency of the results is measured, in seconds.
        resume: continue after the last finished pass of a run that was killed.
        loss: ``loss(outputs, target) -> scalar``, for training and sensitivities.
        progress: how progress is shown.
        origin: further entries of the recipe's ``[run]``, such as the model's file.

    """

    # Those that a recipe's [run] may set.
    RECIPE_FIELDS: ClassVar[tuple[str, ...]] = (
        "max_drop", "objective", "search_minutes", "calibration", "batch_size", "seed", "device",
        "threads", "verify", "onnx", "standard_onnx", "provider", "latency_table",
        "latency_shape",
    )  # fmt: skip

    targets: tuple[Target, ...] = ()
    max_drop: float | None = None
    objective: Objective = "latency"
    search_minutes: float = 15.0
    frontier: tuple[str, ...] = ()
    epochs: int = 0
    steps: int = 1
    attention: Preference = "heads"
    int8: bool | None = None
    standard_onnx: bool = False
    pipeline: Pipeline | None = None
    calibration: int | None = None
    batch_size: int = 128
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    provider: str = CPU
    latency_table: Path | None = None
    latency_shape: tuple[str, ...] = ()
    verify: bool = True
    onnx: bool = True
    latency_seconds: float = 2.0
    resume: bool = False
    loss: Loss = F.cross_entropy
    progress: Tracker = field(default_factory=Tracker)
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least_one = ("steps", "batch_size", "calibration", "threads")
        lowest = {"epochs": 0, "max_drop": 0, "search_minutes": 0, **dict.fromkeys(at_least_one, 1)}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise InputError(f"{name.replace('_', '-')} is {value}; it must be at least {low}")
        check_provider(self.provider)
        _ = self.shapes
        check_choice("attention", self.attention, Preference)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"the device '{self.device}' cannot be used: {reason}") from error

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of inputs at which latency is measured, by name."""
        return parse_shapes(self.latency_shape)

    @property
    def allowed_drop(self) -> float:
        """Return the percentage points of accuracy that a search may lose."""
        return DEFAULT_DROP if self.max_drop is None else self.max_drop

    def recipe_fields(self) -> dict[str, Any]:
        """Return what a recipe's ``[run]`` sets: everything that is not a default."""
        defaults = {option.name: option.default for option in fields(self)}
        changed = {
            name: _written(value)
            for name in self.RECIPE_FIELDS
            if (value := getattr(self, name)) != defaults[name]
        }
        return {**self.origin, **changed}


def _written(value: Any) -> Any:
    """Return a value as a recipe writes it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def make_options(
    target: str | Iterable[str] | None = None,
    pipeline: str | Pipeline | None = None,
    **options: Any,
) -> Options:
    """Make options of what users write: targets and pipelines as text.

    Raises:
        InputError: an option cannot be read.

    """
    if isinstance(pipeline, str):
        pipeline = parse(pipeline, passes.known())
    return Options(targets=parse_targets(target), pipeline=pipeline, **options)


def parse_targets(target: str | Iterable[str] | None) -> tuple[Target, ...]:
    """Read targets from text, several joined by commas or in a list."""
    if not isinstance(target, (str, Iterable, type(None))):
        raise InputError(f"target is {target!r}; write it as text, such as target='macs=50%'")
    texts = [target] if isinstance(target, str) else list(target or ())
    return Budget(tuple(Target.parse(part) for text in texts for part in text.split(","))).targets


def resolve(options: Options) -> tuple[Pipeline, tuple[Target, ...]]:
    """Return the passes to run, and the targets that the result is held to.

    Targets go into the last ``plan-channels`` of a given pipeline. Without targets those of that
    pass count. There are none if they are to be searched for.

    Raises:
        InputError: the options contradict each other.

    """
    pipeline, targets = _resolved(options)
    if not options.onnx and any(target.name == "latency" for target in targets):
        raise InputError(
            "latency is measured in ONNX Runtime, which --no-onnx leaves out; limit macs instead"
        )
    searches = options.max_drop is not None and not targets and options.pipeline is None
    if not options.onnx and searches:
        raise InputError(
            "without a target, max-drop searches for the fastest model, and latency is measured in "
            "ONNX Runtime, which --no-onnx leaves out; add a target such as macs=50%"
        )
    if not options.onnx and options.int8:
        raise InputError("INT8 runs in ONNX Runtime, which --no-onnx leaves out; use --fp32")
    return pipeline, targets


def _resolved(options: Options) -> tuple[Pipeline, tuple[Target, ...]]:
    if options.pipeline is None:
        targets = options.targets
        codes = options.int8 is not False and options.onnx
        pipeline = default_pipeline(
            targets, options.epochs, options.steps, int8=codes, attention=options.attention
        )
        return pipeline, targets
    if options.epochs or options.steps > 1 or options.int8 or options.attention != "heads":
        raise InputError(
            "epochs, steps, attention and int8 belong to the default pipeline; in your own "
            "pipeline write finetune{epochs=...}, plan-channels{path=...} for each early round, "
            "annotate-sensitivity{attention=...}, and "
            "insert-observers,train-quantized,convert-quantized after fold-batchnorm"
        )
    steps = list(options.pipeline)
    planners = [n for n, step in enumerate(steps) if isinstance(step, PlanChannels)]
    if not planners:
        return options.pipeline, options.targets
    planner = steps[planners[-1]]
    assert isinstance(planner, PlanChannels)
    if not options.targets:
        return options.pipeline, planner.targets
    cleared: dict[str, Any] = {target.name: None for target in planner.targets}
    steps[planners[-1]] = replace(planner, **cleared | limits(options.targets))
    return Pipeline(steps), options.targets


def attention_of(pipeline: Pipeline) -> Preference:
    """Return which factor of attention widths a pipeline removes."""
    steps = (step.attention for step in pipeline if isinstance(step, AnnotateSensitivity))
    return next(steps, "heads")


def limits(targets: tuple[Target, ...]) -> dict[str, Any]:
    """Return targets as options of ``plan-channels``."""
    return {target.name: str(target).partition("=")[2] for target in targets}


def default_pipeline(
    targets: tuple[Target, ...], epochs: int, steps: int = 1, *, int8: bool = False,
    attention: Preference = "heads",
) -> Pipeline:  # fmt: skip
    """Return the passes of a run that names none.

    Several steps each go an equal part of the way, as a ratio of costs; the early ones need not
    land exactly. Every cut is made good by reconstruction, which needs no labels; the last one, if
    no training follows and this is no search, with a look ahead. Epochs are shared out among the
    steps, what does not divide to the last.
    """
    found: list[Pass] = []
    for step in range(1, steps + 1):
        last = step == steps
        plan = PlanChannels(**limits(targets))
        if not last:
            plan = replace(plan, path=round(step / steps, 6), tolerance=0.1, corrections=0)
        share = epochs // steps + (epochs % steps if last else 0)
        found += [
            AnnotateSensitivity(attention=attention),
            plan,
            RemoveChannels(),
            RecalibrateNorms(),
            Reconstruct(lookahead="auto" if last and not share and targets else 0),
            *[Finetune(epochs=share)] * (share > 0),
        ]
    codes = (InsertObservers(), TrainQuantized(), ConvertQuantized()) if int8 else ()
    return Pipeline((*found, FoldBatchNorm(), *codes))


def pipeline_for_plan(plan: NetworkPlan, options: Options) -> Pipeline:
    """Return the passes that carry out a plan for the whole network and restore its accuracy."""
    found: list[Pass] = []
    if plan.branches or plan.units:
        found = [
            ApplyPlan(plan.branches, plan.units, plan.attention),
            RecalibrateNorms(),
            Reconstruct(lookahead="auto"),
        ]
    found += [Finetune(epochs=options.epochs)] * (options.epochs > 0)
    int8 = (InsertObservers(), TrainQuantized(), ConvertQuantized())
    return Pipeline((*found, FoldBatchNorm(), *(int8 if options.int8 is not False else ())))
