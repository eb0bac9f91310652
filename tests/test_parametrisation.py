from __future__ import annotations

import pytest
import torch
from support import assert_same, randomise_norms
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import fxprune
from fxprune.structure.verify import sample_units


def newer() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(),
        parametrizations.weight_norm(nn.Conv2d(8, 12, 3), dim=1), nn.ReLU(),
        parametrizations.spectral_norm(nn.Conv2d(12, 8, 3)), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def older() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        first, second = (weight_norm(nn.Conv2d(size, 8, 3)) for size in (3, 8))
    return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(128, 5))


@pytest.mark.parametrize("make", [newer, older])
def test_weights_are_plain_and_channels_are_removed_exactly(make: object) -> None:
    torch.manual_seed(0)
    assert callable(make)
    model = randomise_norms(make()).eval()
    x = torch.randn(2, 3, 8, 8)
    program = fxprune.trace(model, (x,))
    names = set(dict(program.graph_module.named_parameters()))
    assert {"0.weight", "2.weight"} <= names
    assert not any("original" in name or "weight_g" in name for name in names)
    assert_same(program(x), model(x))
    doomed = sample_units(fxprune.find_groups(program), 0.5)
    assert len(doomed) >= 2
    check = fxprune.verify_removal(program, doomed)
    assert check.error is not None
    assert check.error <= 1e-5


def test_norms_without_running_statistics_keep_their_mode() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            flat = self.weight.view(1, self.out_channels, -1)
            weight = nn.functional.batch_norm(flat, None, None, training=True, eps=1e-5)
            return nn.functional.conv2d(input, weight.view_as(self.weight), self.bias)

    model = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 4, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    program = fxprune.trace(model, (x,)).train().eval()
    assert_same(program(x), model(x))
    group = next(g for g in fxprune.find_groups(program) if g.frozen_because is None)
    assert group.mixed_by == ("batch_norm_1",), "its statistics run over the input channels"
