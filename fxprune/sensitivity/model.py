"""A program as a function of its weights: losses, labels, precision, and the output's curvature."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fxprune.data.batches import Batch
from fxprune.errors import FxpruneError, InputError
from fxprune.graph.program import Program
from fxprune.pipeline.context import Loss

Precision = Literal["fp32", "bf16", "fp16"]
LabelSource = Literal["data", "predicted", "sampled"]
LossKind = Literal["cross-entropy", "squared-error", "other"]
DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def kind_of(loss: Loss) -> LossKind:
    """Recognise the losses whose curvature in the outputs is known in closed form."""
    if loss is F.cross_entropy:
        return "cross-entropy"
    if loss is F.mse_loss:
        return "squared-error"
    if isinstance(loss, nn.CrossEntropyLoss) and loss.weight is None and loss.reduction == "mean":
        return "cross-entropy"
    if isinstance(loss, nn.MSELoss) and loss.reduction == "mean":
        return "squared-error"
    return "other"


@dataclass(frozen=True, eq=False)
class Objective:
    """A loss over a program's outputs, with labels where the data has none.

    Attributes:
        loss: ``loss(outputs, target) -> scalar``, a mean over the batch.
        labels: from the data (where it has them), the model's predictions, or drawn from its
            predicted distribution (cross-entropy only).

    """

    loss: Loss
    labels: LabelSource = "data"

    @property
    def kind(self) -> LossKind:
        """What the loss is, as far as it is known."""
        return kind_of(self.loss)

    def target(self, outputs: Any, given: Any, generator: torch.Generator) -> Any:
        """Return the labels to use for a batch."""
        if self.labels == "data" and given is not None:
            return given
        match self.kind, self.labels:
            case "cross-entropy", "sampled":
                return _sampled(_logits(outputs).detach(), generator)
            case "cross-entropy", _:
                return _logits(outputs).detach().argmax(1)
            case "squared-error", "data" | "predicted":
                return _logits(outputs).detach()
        raise InputError(
            f"labels='{self.labels}' needs labels in the data for the loss "
            f"{getattr(self.loss, '__name__', type(self.loss).__name__)}; "
            "give labelled samples, or use cross-entropy or a squared error"
        )

    def __call__(self, outputs: Any, target: Any) -> Tensor:
        """Return the loss in single precision at least."""
        loss: Tensor = self.loss(_widened(outputs), target)
        return loss

    def root(self, outputs: Tensor, target: Any, signs: Tensor) -> Tensor:
        """Multiply random signs by a root of the loss's curvature in the outputs.

        With ``A`` the Hessian of the loss in the outputs, the result is ``L signs`` where
        ``L L' = A``: for cross-entropy ``A = (diag(p) - p p') / n`` and
        ``L = (I - p 1') diag(sqrt p) / sqrt n``, for a squared error ``A = 2 I / n``.
        """
        if self.kind == "squared-error":
            return signs * math.sqrt(2 / outputs.numel())
        share = outputs.detach().to(signs.dtype).softmax(1)
        scaled = share.sqrt() * signs
        vector = scaled - share * scaled.sum(1, keepdim=True)
        positions = outputs.numel() // outputs.shape[1]
        ignored = getattr(self.loss, "ignore_index", -100)
        if isinstance(target, Tensor) and not target.is_floating_point():
            valid = target != ignored
            vector = vector * valid.unsqueeze(1)
            positions = max(int(valid.sum()), 1)
        return vector / math.sqrt(positions)


def _logits(outputs: Any) -> Tensor:
    found = single_tensor(outputs)
    if found is None:
        raise InputError(
            "the model has several outputs, so its predictions cannot be used as labels; "
            "give labelled samples and a loss that takes all outputs"
        )
    return found


def single_tensor(outputs: Any) -> Tensor | None:
    """Return the only floating-point tensor among the outputs, or None if there are several."""
    found = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return found[0] if len(found) == 1 and found[0].is_floating_point() else None


def traced_output(program: Program) -> Tensor | None:
    """Return the fake tensor of a program's only output, or None if there are several."""
    outputs = program.graph.output_node().args[0]
    return single_tensor(pytree.tree_map_only(fx.Node, lambda node: node.meta["val"], outputs))


def _sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    # The Gumbel trick draws on the CPU, so that devices agree.
    uniform = torch.rand(logits.shape, generator=generator).to(logits.device).clamp(min=1e-20)
    return (logits.float() - (-uniform.log()).log()).argmax(1)


def _widened(outputs: Any) -> Any:
    narrow = (torch.float16, torch.bfloat16)
    return pytree.tree_map_only(
        Tensor, lambda value: value.float() if value.dtype in narrow else value, outputs
    )


@dataclass(frozen=True, eq=False)
class Weights:
    """The parameters that derivatives are taken in: detached leaves, by parameter name."""

    leaves: Mapping[str, Tensor]

    @classmethod
    def of(cls, program: Program, names: Sequence[str]) -> Weights:
        """Take leaves for these parameters; aliases of a tensor share its leaf."""
        made: dict[int, Tensor] = {}
        leaves = {}
        for name in names:
            tensor = program.tensor(name)
            if id(tensor) not in made:
                made[id(tensor)] = tensor.detach().clone().requires_grad_()
            leaves[name] = made[id(tensor)]
        return cls(leaves)

    def outputs(self, program: Program, batch: Batch, precision: Precision = "fp32") -> Any:
        """Run the program with the leaves in place of its parameters."""
        with differentiable(precision, str(next(iter(self.leaves.values())).device.type)):
            return functional_call(program.graph_module, dict(self.leaves), batch.inputs)


@contextmanager
def differentiable(precision: Precision, device: str) -> Iterator[None]:
    """Let gradients flow twice (attention in its plain form), in the precision wanted."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if precision != "fp32":
            stack.enter_context(torch.autocast(device, dtype=DTYPES[precision]))
        yield


def lacks_derivative(error: Exception) -> bool:
    """Return whether PyTorch raised an error because an operator has no derivative."""
    text = str(error)
    return ("derivative" in text and "not implemented" in text) or any(
        words in text for words in ("no autograd formula", "does not require grad")
    )


@contextmanager
def explained(criterion: str) -> Iterator[None]:
    """Say what to do where an operator of the model has no second derivative."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not lacks_derivative(error):
            raise
        raise FxpruneError(
            f"{criterion} needs second derivatives, but an operator of the model has none: "
            f"{str(error).splitlines()[0]}; use gauss-newton, fisher or taylor"
        ) from error
