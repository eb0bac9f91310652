from __future__ import annotations

import pytest

from fxprune.errors import InputError
from fxprune.passes import Finetune, FoldBatchNorm, PlanChannels, Reconstruct, RemoveChannels
from fxprune.pipeline.driver import Pipeline
from fxprune.planning.budget import Target
from fxprune.run.options import default_pipeline, make_options, resolve

HALF = (Target.parse("macs=50%"),)


def planners(pipeline: Pipeline) -> list[PlanChannels]:
    return [step for step in pipeline if isinstance(step, PlanChannels)]


def test_one_step_goes_all_the_way() -> None:
    assert planners(default_pipeline(HALF, 0)) == [PlanChannels(macs="50%")]


def test_several_steps_go_equal_parts_of_the_way() -> None:
    pipeline = default_pipeline(HALF, 7, steps=3)
    assert [planner.path for planner in planners(pipeline)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert planners(pipeline)[-1] == PlanChannels(macs="50%")
    names = [type(step) for step in pipeline]
    assert names.count(RemoveChannels) == 3
    assert names.count(FoldBatchNorm) == 1
    epochs = [step.epochs for step in pipeline if isinstance(step, Finetune)]
    assert epochs == [2, 2, 3]


def test_few_epochs_go_to_the_last_step() -> None:
    pipeline = default_pipeline(HALF, 1, steps=3)
    assert [type(step) for step in pipeline].count(Finetune) == 1


def test_a_limit_on_accuracy_alone_leaves_the_targets_open() -> None:
    pipeline, targets = resolve(make_options(max_drop=1.0))
    assert targets == ()
    assert planners(pipeline) == [PlanChannels()]
    assert resolve(make_options())[1] == ()


def test_looks_ahead_where_nothing_mends_later_and_nothing_is_searched() -> None:
    def looks(pipeline: Pipeline) -> list[int | str]:
        return [step.lookahead for step in pipeline if isinstance(step, Reconstruct)]

    assert looks(default_pipeline(HALF, 0, steps=2)) == [0, "auto"]
    assert looks(default_pipeline(HALF, 1)) == [0]
    assert looks(default_pipeline((), 0)) == [0]


def test_epochs_and_steps_are_for_the_default_pipeline() -> None:
    for options in (
        make_options(pipeline="fold-batchnorm", epochs=1),
        make_options(pipeline="fold-batchnorm", steps=2),
        make_options(pipeline="fold-batchnorm", attention="head_dim"),
    ):
        with pytest.raises(InputError, match="default pipeline"):
            resolve(options)
    with pytest.raises(InputError, match="steps is 0"):
        make_options(steps=0)


def test_codes_come_last() -> None:
    names = [step.name for step in default_pipeline(HALF, 0, int8=True)]
    assert names[-4:] == [
        "fold-batchnorm", "insert-observers", "train-quantized", "convert-quantized",
    ]  # fmt: skip
    asked = make_options("macs=50%", int8=True)
    assert resolve(asked)[0] == default_pipeline(HALF, 0, int8=True)
    with pytest.raises(InputError, match="insert-observers,train-quantized"):
        resolve(make_options(pipeline="fold-batchnorm", int8=True))
