from __future__ import annotations

import pytest
import torch
from support import assert_same, check, randomise_norms, trace
from torch import Tensor, nn

from fxprune.graph.text import graph_text
from fxprune.passes.fold_batchnorm import FoldBatchNorm
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Outcome

X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def norm(channels: int, kind: type[nn.modules.batchnorm._BatchNorm] = nn.BatchNorm2d) -> nn.Module:
    return randomise_norms(kind(channels), channels)


def test_folds_into_the_convolution_before_it() -> None:
    outcome = check(
        FoldBatchNorm(),
        nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), norm(6), nn.ReLU()),
        X,
        before="""
        input_1: 1x4x8x8 = input
        conv2d: 1x6x6x6 = conv2d(input_1, <0.weight 6x4x3x3>)
        batch_norm: 1x6x6x6 = batch_norm(conv2d, <1.weight 6>, <1.bias 6>, <1.running_mean 6>, \
<1.running_var 6>, False, 0.1, 1e-05, False)
        relu: 1x6x6x6 = relu(batch_norm)
        return relu
        """,
        after="""
        input_1: 1x4x8x8 = input
        conv2d: 1x6x6x6 = conv2d(input_1, <0.weight 6x4x3x3>, <0.bias 6>)
        relu: 1x6x6x6 = relu(conv2d)
        return relu
        """,
    )
    assert outcome == Outcome(1)


LAYERS = {
    "dense": (nn.Conv2d(4, 6, 3), norm(6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), norm(6)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), norm(4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), norm(6)),
    "grouped transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), norm(6)),
    "depthwise transposed": (nn.ConvTranspose2d(4, 8, 3, groups=4), norm(8)),
    "not affine": (
        nn.Conv2d(4, 6, 1), randomise_norms(nn.BatchNorm2d(6, affine=False, eps=0.1))
    ),
    "linear": (nn.Flatten(), nn.Linear(256, 6, bias=False), norm(6, nn.BatchNorm1d)),
    "one dimension": (nn.Flatten(2), nn.Conv1d(4, 6, 3), norm(6, nn.BatchNorm1d)),
    "three dimensions": (nn.Unflatten(3, (2, 4)), nn.Conv3d(4, 6, 2), norm(6, nn.BatchNorm3d)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_folds_into_any_layer(layers: tuple[nn.Module, ...], dtype: torch.dtype) -> None:
    model = nn.Sequential(*layers).to(dtype).eval()
    program = trace(model, X.to(dtype))
    assert FoldBatchNorm()(program, Context()) == Outcome(1)
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    assert not [name for name in program.graph_module.state_dict() if "running" in name]
    with torch.no_grad():
        assert_same(program(X.to(dtype)), model(X.to(dtype)))


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), norm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y  # type: ignore[no-any-return]


class Shared(Fork):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(self.conv(x)))  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.second = nn.Conv2d(4, 4, 1), norm(4), nn.Conv2d(4, 4, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.bn(self.first(x)))  # type: ignore[no-any-return]


class Computed(Fork):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight / x.abs().sum()
        return self.bn(nn.functional.conv2d(x, weight))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(8, 8), norm(4, nn.BatchNorm1d)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x[:, :, 0]))  # type: ignore[no-any-return]


REFUSED = {
    "the output of conv2d is used elsewhere too": Fork(),
    "the weight or bias of conv2d is shared with another layer": Shared(),
    "the weight or bias of conv2d is shared with another layer ": Tied(),
    "div is computed, not stored; fold needs constant weights": Computed(),
    "the channels of linear are not along the dimension that it normalises": Tokens(),
    "its input is not a convolution or linear layer": nn.Sequential(nn.ReLU(), norm(4)),
    "it has no running statistics; it normalises by the batch even in evaluation": nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
    ),
}


@pytest.mark.parametrize(("reason", "model"), REFUSED.items())
def test_leaves_what_it_cannot_fold(reason: str, model: nn.Module) -> None:
    program = trace(model, X)
    state = {name: tensor.clone() for name, tensor in program.graph_module.state_dict().items()}
    outcome = FoldBatchNorm()(program, Context())
    assert outcome.changes == 0
    (skip,) = outcome.skips
    assert (skip.node, skip.reason) == ("batch_norm", reason.strip())
    after = program.graph_module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in state.items())


def test_leaves_a_norm_in_training_mode() -> None:
    program = trace(nn.Sequential(nn.Conv2d(4, 4, 1), norm(4)), X).train()
    (skip,) = FoldBatchNorm()(program, Context()).skips
    assert skip.reason == "it is in training mode; call Program.eval() first"


def test_one_norm_after_two_convolutions_folds_into_both() -> None:
    class Twice(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.second(self.bn(self.first(x))))  # type: ignore[no-any-return]

    model = Twice().eval()
    program = trace(model, X)
    assert FoldBatchNorm()(program, Context()) == Outcome(2)
    with torch.no_grad():
        assert_same(program(X), model(X))


def test_a_new_bias_does_not_take_the_name_of_another_tensor() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
            self.bias = nn.Parameter(torch.randn(8))
            self.bn = norm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(nn.functional.conv2d(x, self.weight)) + self.bias  # type: ignore[no-any-return]

    model = Named().eval()
    program = trace(model, X)
    assert FoldBatchNorm()(program, Context()) == Outcome(1)
    assert set(program.graph_module.state_dict()) == {"weight", "bias", "bias_1"}
    with torch.no_grad():
        assert_same(program(X), model(X))


class Joined(nn.Module):
    """A norm after a concat of slices, in another order than the layers computed them."""

    def __init__(self, *, spare: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.norm = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(10),
        )
        self.spare = spare

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        cut = torch.ops.aten.slice.Tensor
        parts = [cut(two, 1, 0, 2), cut(one, 1, 1, 4), cut(two, 1, 2, 6), cut(one, 1, 0, 1)]
        y = self.norm(torch.cat(parts, 1))
        return y + one.mean() if self.spare else y  # type: ignore[no-any-return]


def test_folds_into_layers_that_a_concat_joins() -> None:
    x = torch.randn(2, 3, 6, 6)
    for model in (Joined(), nn.Sequential(Joined(), nn.ReLU())):
        program = trace(randomise_norms(model), x)
        expected = program(x)
        assert FoldBatchNorm()(program, Context()).changes == 1
        assert "batch_norm" not in graph_text(program)
        assert not any(
            node.target is torch.ops.aten.batch_norm.default for node in program.graph.nodes
        )
        assert_same(program(x), expected)


def test_leaves_a_concat_whose_parts_have_other_readers() -> None:
    program = trace(randomise_norms(Joined(spare=True)), torch.randn(2, 3, 6, 6))
    (skip,) = FoldBatchNorm()(program, Context()).skips
    assert skip.reason == "the output of conv2d is used elsewhere too"
