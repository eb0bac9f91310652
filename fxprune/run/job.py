"""What a run works on: a model, data, passes, and what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from fxprune.calibration.running import fixed_batch
from fxprune.data.batches import batches
from fxprune.data.roles import Data, as_data, subset, without_labels
from fxprune.errors import InputError
from fxprune.graph.capture_check import check_capture, other_batch
from fxprune.graph.facts import CONVERTED, FROZEN, OBSERVED, PLAN, Frozen
from fxprune.graph.program import Program
from fxprune.graph.trace import required_inputs, trace, unwrapped
from fxprune.passes import Finetune
from fxprune.pipeline.context import Context
from fxprune.pipeline.driver import Pipeline
from fxprune.planning.budget import Target
from fxprune.planning.search import Limits, Trial, budgeted, search, winner
from fxprune.run.checkpoint import Checkpoint, fingerprint
from fxprune.run.checks import check_data, check_numbers, sample_inputs
from fxprune.run.measure import Judge
from fxprune.run.options import DEFAULT_TARGETS, Options, attention_of, resolve
from fxprune.search.plan import NetworkPlan
from fxprune.structure.groups import Group, find_groups


@dataclass(frozen=True)
class Job:
    """What a run works on: the dense program, its data, and what is asked of it.

    Attributes:
        dense: the traced model; it stays as it is.
        groups: of the dense program.
        data: its samples by role.
        pipeline: the passes.
        targets: upper limits that the result is checked against.
        options: everything else that was asked for.
        trials: those of a search, if there was one.
        samples: the inputs of a batch of real samples, to compare outputs on.
        alternatives: passes of safer results, tried in turn where the result loses too much.
        notes: what was assumed of the model and the data, what capture left out, and what became
            of a search.
        frontier: plans of further results, by speed-up.
        elsewhere: where the plan is for another machine, the milliseconds of the dense model there
            and those that the plan should take.
        search: every plan of the search, for search.json.

    """

    dense: Program
    groups: tuple[Group, ...]
    data: Data | None
    pipeline: Pipeline
    targets: tuple[Target, ...]
    options: Options
    trials: tuple[Trial, ...] = ()
    samples: tuple[tuple[Any, ...], ...] = ()
    alternatives: tuple[Pipeline, ...] = ()
    notes: tuple[str, ...] = ()
    frontier: Mapping[str, NetworkPlan] = field(default_factory=dict)
    elsewhere: tuple[float, float] | None = None
    search: Mapping[str, Any] | None = None

    @property
    def judge(self) -> Judge:
        """What measures accuracy."""
        options = self.options
        return Judge(
            self.data, self.dense, options.batch_size, options.device, options.threads,
            options.progress,
        )  # fmt: skip

    @property
    def context(self) -> Context:
        """What the passes share."""
        options = self.options
        return Context(
            self.data, options.device, options.seed, options.loss, self.dense, options.progress,
            options.threads or 1, options.provider, options.latency_table, options.shapes,
        )  # fmt: skip

    def without(self, failing: Mapping[Group, str]) -> Job:
        """Return the job with groups frozen, for the reasons that are given."""
        if not failing:
            return self
        why = {str(slot): reason for group, reason in failing.items() for slot in group.slots}
        earlier = self.dense.facts.get(FROZEN.name)
        self.dense.put(FROZEN, Frozen({**earlier.why, **why} if earlier else why))
        return replace(self, groups=find_groups(self.dense, attention_of(self.pipeline)))

    @property
    def fp32_pipeline(self) -> Pipeline:
        """The passes before those that quantize; all of them if none does."""
        steps = self.pipeline.passes
        converts = [n for n, step in enumerate(steps) if CONVERTED in step.gives]
        starts = [n for n, step in enumerate(steps) if OBSERVED in step.gives]
        return Pipeline(steps[: starts[0]]) if starts and converts else self.pipeline

    @property
    def searches_plan(self) -> bool:
        """Whether a plan for the whole network is searched for."""
        options = self.options
        if options.pipeline is not None or options.steps > 1:
            return False
        return all(target.name == "latency" for target in options.targets)

    def with_default_targets(self, note: str) -> Job:
        """Return the job with the targets of a run that neither names nor searches for any."""
        options = replace(self.options, targets=DEFAULT_TARGETS)
        pipeline, targets = resolve(options)
        return replace(self, pipeline=pipeline, targets=targets, notes=(*self.notes, note))

    @property
    def choose_precision(self) -> bool:
        """Whether INT8 is kept only if it turns out better than FP32."""
        return self.options.int8 is None and self.options.pipeline is None


def make_job(
    model: nn.Module | Program,
    example_inputs: tuple[Any, ...] | None,
    data: Any,
    options: Options,
) -> Job:
    """Trace the model, check that the data suits it, and find what can be removed.

    Raises:
        InputError: the options contradict each other, or the data does not suit the model.

    """
    pipeline, targets = resolve(options)
    samples = None if data is None else as_data(data, seed=options.seed)
    if samples is not None:
        samples = without_labels(samples, required_inputs(model))
    program = _program(model, example_inputs, samples)
    notes = tuple(_fixed(program))
    calls: tuple[tuple[Any, ...], ...] = ()
    if samples is not None:
        check_data(samples, program)
        calls = sample_inputs(program, samples)
        notes = (*samples.notes, *notes)
        samples = _limited(samples, options)
    check_numbers(program, (program.example_inputs, *calls))
    if not isinstance(model, Program):
        notes += _compared(model, program, calls, pipeline)
    for note in notes:
        options.progress.note(note)
    groups = find_groups(program, attention_of(pipeline))
    return Job(program, groups, samples, pipeline, targets, options, samples=calls, notes=notes)


def _fixed(program: Program) -> Iterator[str]:
    """Say so if the batch size is not dynamic."""
    size = fixed_batch(program)
    if size is not None:
        yield (
            f"the batch size is fixed to {size}, in the ONNX file too: the model cannot be "
            "captured with a dynamic one"
        )


def _compared(
    model: nn.Module, program: Program, calls: Sequence[tuple[Any, ...]], pipeline: Pipeline
) -> tuple[str, ...]:
    """Compare the program with the model on real samples, as training sees it if there is any."""
    model = unwrapped(model)
    notes = check_capture(model, program, calls)
    if any(isinstance(step, Finetune) for step in pipeline):
        other = other_batch(program, program.example_inputs)
        enough = calls or ([] if other is None else [other])
        notes += check_capture(model, program, enough, training=True)
    return notes


def _program(
    model: nn.Module | Program, example_inputs: tuple[Any, ...] | None, data: Data | None
) -> Program:
    if isinstance(model, Program):
        return model.copy().eval()
    if example_inputs is None:
        if data is None:
            raise InputError(
                "cannot infer the input shape; pass --input-shape 3,224,224 or --data DATA (in "
                "Python, example_inputs or data)"
            )
        example_inputs = next(batches(data.calibration, 1)).inputs
    return trace(model, example_inputs)


def _limited(data: Data, options: Options) -> Data:
    count = options.calibration
    if count is None or count >= len(data.calibration):
        return data
    return replace(data, calibration=subset(data.calibration, count, options.seed))


def with_searched_targets(job: Job) -> Job:
    """Search for the targets of a job that plans and has only a limit on the accuracy lost."""
    drop = job.options.max_drop
    plans = any(PLAN in step.gives for step in job.pipeline)
    if job.searches_plan or drop is None or job.targets or not plans:
        return job
    job.options.progress.say("searching for the smallest model within --max-drop")
    allowed = Limits(drop)
    dense = job.dense.copy().to(job.options.device)

    def accuracy(program: Program) -> float | None:
        return job.judge.program(program, "evaluating").accuracy

    pipeline = job.fp32_pipeline if job.choose_precision else job.pipeline
    trials = search(dense, pipeline, job.context, accuracy, allowed)
    target = Target.parse(winner(trials, allowed).target)
    steps = tuple(budgeted(step, target) for step in job.pipeline)
    return replace(job, pipeline=Pipeline(steps), targets=(target,), trials=trials)


def checkpoint_of(job: Job, folder: Path | None) -> Checkpoint:
    """Return where the job keeps finished passes, in its output folder; nowhere without one."""
    sizes = [f"{role}={len(samples)}" for role, samples in job.data.roles()] if job.data else []
    options = (job.options.seed, job.options.device, job.options.batch_size, *sizes)
    given = "" if folder is None else fingerprint(job.dense, options)
    return Checkpoint(folder, given, tuple(map(str, job.pipeline)))
