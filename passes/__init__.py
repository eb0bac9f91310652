"""The passes that come with fxprune, one per module, and those that plug-ins add."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points

from fxprune.errors import InputError
from fxprune.passes.annotate_sensitivity import AnnotateSensitivity
from fxprune.passes.apply_plan import ApplyPlan
from fxprune.passes.convert_quantized import ConvertQuantized
from fxprune.passes.finetune import Finetune
from fxprune.passes.fold_batchnorm import FoldBatchNorm
from fxprune.passes.implant_attention import ImplantAttention
from fxprune.passes.implant_low_rank import ImplantLowRank
from fxprune.passes.insert_observers import InsertObservers
from fxprune.passes.plan_channels import PlanChannels
from fxprune.passes.recalibrate_norms import RecalibrateNorms
from fxprune.passes.reconstruct import Reconstruct
from fxprune.passes.remove_blocks import RemoveBlocks
from fxprune.passes.remove_channels import RemoveChannels
from fxprune.passes.sparsify import Sparsify
from fxprune.passes.train_quantized import TrainQuantized
from fxprune.pipeline.contract import Pass

ALL: tuple[type[Pass], ...] = (
    ApplyPlan,
    RemoveBlocks,
    AnnotateSensitivity,
    PlanChannels,
    RemoveChannels,
    ImplantLowRank,
    ImplantAttention,
    Sparsify,
    RecalibrateNorms,
    Reconstruct,
    Finetune,
    FoldBatchNorm,
    InsertObservers,
    TrainQuantized,
    ConvertQuantized,
)

__all__ = [
    "ALL",
    "AnnotateSensitivity",
    "ApplyPlan",
    "ConvertQuantized",
    "Finetune",
    "FoldBatchNorm",
    "ImplantAttention",
    "ImplantLowRank",
    "InsertObservers",
    "PlanChannels",
    "RecalibrateNorms",
    "Reconstruct",
    "RemoveBlocks",
    "RemoveChannels",
    "Sparsify",
    "TrainQuantized",
    "known",
]


def known() -> Mapping[str, type[Pass]]:
    """Return every pass by name: those of ``ALL`` and those of the entry points ``fxprune.passes``.

    Raises:
        InputError: two passes have one name, or an entry point is not a pass.

    """
    found = {step.name: step for step in ALL}
    for point in entry_points(group="fxprune.passes"):
        step = point.load()
        if not (isinstance(step, type) and issubclass(step, Pass)):
            raise InputError(f"the entry point '{point.value}' in fxprune.passes is not a pass")
        if (other := found.setdefault(step.name, step)) is not step:
            raise InputError(
                f"two passes are called '{step.name}': {other.__module__}.{other.__qualname__} and "
                f"{point.value}; uninstall one of them"
            )
    return found


if __name__ != "fxprune.passes":  # the folder is importable from a checkout, under the wrong name
    raise ImportError("import fxprune.passes, not passes")
