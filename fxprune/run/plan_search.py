"""A path of plans for a whole network, and what trials and measurements say of its points.

Three sets of samples are kept apart: those that repair networks, those that judge trials (both are
parts of the calibration samples), and the evaluation samples, which only check what was chosen.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxprune.calibration.running import fixed_batch
from fxprune.data.batches import Batch, batches
from fxprune.data.datasets import Samples
from fxprune.data.roles import Data, hold_out, subset
from fxprune.errors import BudgetError, InputError
from fxprune.graph.cost import cost
from fxprune.graph.facts import SENSITIVITY
from fxprune.graph.program import Program
from fxprune.latency.layer_config import Form
from fxprune.onnx.benchmark import compare
from fxprune.onnx.export import export_onnx
from fxprune.passes import (
    AnnotateSensitivity,
    ConvertQuantized,
    FoldBatchNorm,
    InsertObservers,
    RecalibrateNorms,
    Reconstruct,
    TrainQuantized,
)
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.driver import Pipeline
from fxprune.planning.budget import Target
from fxprune.planning.search import Trial
from fxprune.planning.widths import Rounding
from fxprune.run.job import Job
from fxprune.run.search_record import search_record
from fxprune.search.damage import Damage
from fxprune.search.descent import Descent, Point
from fxprune.search.latency import open_latency
from fxprune.search.moves import Ranking
from fxprune.search.plan import NetworkPlan, carry_out
from fxprune.training.comparison import Drop, paired_drop
from fxprune.training.evaluate import Evaluation

JUDGING_SHARE, MAX_JUDGING = 0.3, 2000  # of the calibration samples, and how many at most
TRIAL_SAMPLES = 256  # that repair a network in a trial
PRICING_SAMPLES, PRICING_SECONDS = 256, 1.0  # that price a move: how many, and for how long
PATH_SHARE = 0.5  # of the time of a search that the path may take
MAX_SPEEDUP = 12.0  # over the dense network in the same form, where the path ends
LATENCY_TOLERANCE = 0.03  # by how much a measured latency may differ from its limit
CORRECTIONS = 4  # times that predictions are corrected by a measurement
# Shares of the allowed loss, as trials see it, that are tried in turn until the evaluation samples
# confirm one. Trials overstate the loss: they repair quickly, and calibration samples are often
# those that the model was trained on, of which it forgets some.
CONFIDENCE = (4.0, 1.5, 0.6)


class PlanSearch:
    """A path of plans for a job's dense program, and what some of its points turn out to be.

    Attributes:
        trials: points that were repaired and judged, for the report.
        notes: what the report should say about the search.

    Args:
        job: the dense program, the data and the options.
        folder: for the ONNX files that are timed.

    """

    def __init__(self, job: Job, folder: Path) -> None:
        options, data = job.options, job.data
        if data is None:
            raise InputError("a search needs data, and none was given; pass data= or --data")
        self._job, self._start = job, time.monotonic()
        self.trials: list[Trial] = []
        self.notes: list[str] = []
        self._drops: dict[int, Drop] = {}
        repairing, judging = _divided(data.calibration, options.seed)
        self._context = replace(job.context, data=Data(repairing))
        self._judge = replace(job.judge, data=Data(repairing, eval=judging))
        options.progress.say("measuring the latency of the dense model")
        self._dense = job.dense.copy(share=True).to("cpu").eval()
        form: Form = "fp32" if options.int8 is False else "int8"
        self.latency = open_latency(self._dense, form, self._deployed, folder, self._context)
        self.notes += self.latency.table.notes
        self.fp32_ms = self._fp32_ms(folder)
        self.points = self._walk()

    def within_drop(self) -> list[NetworkPlan]:
        """Return the fastest plan that should lose no more than allowed, and safer ones."""
        allowed = self._job.options.allowed_drop
        found = [self._fastest(share * allowed) for share in CONFIDENCE]
        return [self.points[number].plan for number in dict.fromkeys([*found, 0])]

    def within_latency(self) -> list[NetworkPlan]:
        """Return the plan with the least damage whose measured latency meets the target."""
        (target,) = self._job.targets
        return [self.points[self.point_for(target.limit(self.fp32_ms))].plan]

    def frontier(self, factors: Sequence[str]) -> dict[str, NetworkPlan]:
        """Return the plan for each speed-up over the dense model in FP32, where there is one."""
        found = {}
        for factor in factors:
            try:
                limit = Target.of("latency", factor).limit(self.fp32_ms)
                found[factor] = self.points[self.point_for(limit)].plan
            except BudgetError as error:
                self.notes.append(f"the frontier has no model at {factor}: {error}")
        return found

    def elsewhere(self, plan: NetworkPlan) -> tuple[float, float] | None:
        """Return the milliseconds of the dense model and of a plan on another machine, if any."""
        if self.latency.table.network is None:
            return None
        return self.fp32_ms, self._measured(next(one for one in self.points if one.plan is plan))

    def record(self) -> dict[str, Any]:
        """Return what search.json holds: every point, and the loss of those that were tried."""
        drops = {number: drop.points for number, drop in self._drops.items()}
        return search_record(self.points, self.fp32_ms, drops)

    def point_for(self, limit: float) -> int:
        """Return the number of the first point that takes no more milliseconds, as measured.

        Raises:
            BudgetError: the last point takes longer.

        """
        closest: dict[int, float] = {}
        for _ in range(CORRECTIONS):
            number = self._first_within(limit)
            if number in closest:
                break
            point = self.points[number]
            closest[number] = measured = self._measured(point)
            if number == 0 or abs(measured / limit - 1) <= LATENCY_TOLERANCE:
                break
            self._correct(point, measured)
        meeting = [n for n, ms in closest.items() if ms <= limit * (1 + LATENCY_TOLERANCE)]
        if not meeting:
            fastest = min(closest.values())
            raise BudgetError(
                f"no plan that was found takes at most {limit:.3g} ms; the fastest takes "
                f"{fastest:.3g} ms, the dense model {self.fp32_ms:.3g} ms in FP32; allow more, or "
                "search for longer with --search-minutes"
            )
        return min(meeting)

    def _walk(self) -> tuple[Point, ...]:
        """Walk the path from the dense program on, for a part of the time of the search."""
        options = self._job.options
        options.progress.say("scoring units")
        scored = self._dense.copy()
        AnnotateSensitivity(attention=options.attention)(scored, self._context)
        ranking = Ranking(self._dense, scored.get(SENSITIVITY), Rounding())
        damage = Damage(self._dense, self._pricing())
        deadline = self._start + PATH_SHARE * 60 * options.search_minutes
        descent = Descent(ranking, damage.of, self._cost, deadline)
        points = []
        walked = descent.walk(self._dense, self._cost(self._dense) / MAX_SPEEDUP)
        for point in options.progress.track(walked, "searching for faster networks"):
            points.append(point)
            if point.move is not None:
                speedup = self._cost(self._dense) / point.cost
                options.progress.say(f"removed {point.move}: {speedup:.2f}x, {point.damage:.2g}")
        if descent.stopped_by_time:
            self.notes.append(
                f"the search for faster networks ended after its time, at {len(points) - 1} steps; "
                "--search-minutes gives it more, and another run may end elsewhere"
            )
        return tuple(points)

    def _cost(self, program: Program) -> float:
        objective = self._job.options.objective
        if objective == "latency" or self._job.targets:
            return self.latency.predict(program)
        static = cost(program)
        others = {"macs": static.macs, "params": static.params}
        return float(others.get(objective, static.weight_bytes))

    def _pricing(self) -> list[Batch]:
        """Return one batch that prices moves, as large as a second of computing allows."""
        samples, seed = self._context.samples.calibration, self._job.options.seed
        size = fixed_batch(self._dense)
        if size is None:
            (few,) = batches(samples, min(16, len(samples)), seed=seed, limit=16)
            start = time.perf_counter()
            self._dense(*few.inputs)
            each = (time.perf_counter() - start) / len(few)
            size = int(min(PRICING_SAMPLES, max(PRICING_SECONDS / each, 32), len(samples)))
        return list(batches(samples, size, seed=seed, limit=size))

    def _fastest(self, allowed: float) -> int:
        """Bisect for the last point of the path whose trial loses no more than allowed."""
        good, bad = 0, len(self.points)
        while bad - good > 1:
            middle = (good + bad) // 2
            if middle not in self._drops and self._is_late():
                bad = middle
                continue
            good, bad = (middle, bad) if self._drop(middle).points <= allowed else (good, middle)
        return good

    def _is_late(self) -> bool:
        return time.monotonic() > self._start + 60 * self._job.options.search_minutes

    def _drop(self, number: int) -> Drop:
        """Return the accuracy that a point loses on the judging samples after a quick repair."""
        if number not in self._drops:
            start, point = time.perf_counter(), self.points[number]
            program = self._dense.copy()
            carry_out(program, point.plan)
            for step in (RecalibrateNorms(TRIAL_SAMPLES), Reconstruct(TRIAL_SAMPLES)):
                step(program, self._context)
            drop = paired_drop(self._dense_judged, self._judged(program))
            assert drop is not None
            self._drops[number] = drop
            self.trials.append(self._trial(point, program, drop, time.perf_counter() - start))
            self._job.options.progress.say(f"a network of {point.cost:.3g} loses {drop}")
        return self._drops[number]

    def _trial(self, point: Point, program: Program, drop: Drop, seconds: float) -> Trial:
        static, share = cost(program), point.cost / self.points[0].cost
        accuracy = self._dense_judged.accuracy
        assert accuracy is not None
        return Trial(
            f"{self._job.options.objective}={share:.0%}", share, static.params, static.macs,
            accuracy - drop.points / 100, drop.points,
            drop.points <= self._job.options.allowed_drop, seconds,
        )  # fmt: skip

    @functools.cached_property
    def _dense_judged(self) -> Evaluation:
        return self._judged(self._dense)

    def _judged(self, program: Program) -> Evaluation:
        return self._judge.program(program, "judging a trial")

    def _deployed(self, program: Program) -> Program:
        """Return a copy in the form that runs, quantized on few samples: only its time counts."""
        copy = program.copy().to("cpu").eval()
        steps: list[Pass] = [FoldBatchNorm()]
        if self._job.options.int8 is not False:
            steps += [InsertObservers(), TrainQuantized(samples=16, batch_size=16)]
            steps += [ConvertQuantized()]
        Pipeline(steps).run(copy, self._context)
        return copy

    def _fp32_ms(self, folder: Path) -> float:
        """Return the latency of the dense model in FP32, to which targets are relative."""
        if self.latency.form == "fp32":
            return self.latency.dense_ms
        if self.latency.table.network is not None:
            return self.latency.table.network.dense_ms
        path = folder / "fp32.onnx"
        export_onnx(self._dense, path, check=False)
        context = self._context
        found = compare(
            {"int8": folder / "dense.onnx", "fp32": path}, threads=context.threads,
            provider=context.provider, shapes=context.latency_shapes,
        )  # fmt: skip
        return self.latency.dense_ms / found["fp32"].speedup

    def _measured(self, point: Point) -> float:
        program = self._dense.copy()
        carry_out(program, point.plan)
        return self.latency.measure(program)

    def _first_within(self, limit: float) -> int:
        fitting = (n for n, point in enumerate(self.points) if point.cost <= limit)
        return next(fitting, len(self.points) - 1)

    def _correct(self, point: Point, measured: float) -> None:
        """Scale what every point is predicted to save by what this one was measured to save."""
        dense = self.points[0].cost
        factor = (dense - measured) / (dense - point.cost)
        self.points = tuple(
            replace(one, cost=dense - factor * (dense - one.cost)) for one in self.points
        )


def _divided(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    """Divide the calibration samples into those that repair and those that judge."""
    if len(samples) < 4:
        return samples, samples
    judging, repairing = hold_out(samples, seed, JUDGING_SHARE)
    return repairing, subset(judging, MAX_JUDGING, seed)
