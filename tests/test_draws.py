from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.graph.draws import FixedDraws
from fxprune.structure.verify import sample_units


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Dropout2d(0.3), nn.Dropout1d(0.9)], ids=repr)
def test_dropout_changes_nothing(layer: nn.Module) -> None:
    x = torch.randn(4, 6, 5) if not isinstance(layer, nn.Dropout2d) else torch.randn(4, 6, 5, 5)
    with FixedDraws():
        assert torch.allclose(layer.train()(x), x)
    assert not torch.allclose(layer(x), x)


def test_stochastic_depth_changes_nothing() -> None:
    x = torch.randn(4, 6)
    noise = torch.empty(4, 1)
    with FixedDraws():
        assert torch.allclose(x * noise.bernoulli_(0.8).div_(0.8), x)
        assert torch.rand(3).tolist() == [0.5] * 3
        assert torch.randn_like(x).tolist() == torch.zeros(4, 6).tolist()
        assert torch.empty(2).uniform_(2, 4).tolist() == [3, 3]
        assert torch.allclose(nn.RReLU().train()(x), nn.RReLU().eval()(x))
        assert torch.equal(torch.multinomial(x.abs(), 2), torch.multinomial(x.abs(), 2))


def test_an_element_does_not_depend_on_how_many_are_drawn() -> None:
    with FixedDraws(normal=0.5):
        assert torch.equal(torch.randn(3), torch.randn(5)[:3])


class Sampling(nn.Module):
    """Draws what it decodes, as a variational autoencoder does."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.encode, self.mean, self.width = nn.Linear(9, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.decode = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 9))

    def forward(self, x: Tensor) -> Tensor:
        y = self.encode(x).relu()
        width = (0.5 * self.width(y)).exp()
        result: Tensor = self.decode(self.mean(y) + width * torch.randn_like(width))
        return result


def test_two_draws_are_not_read_as_a_difference() -> None:
    torch.manual_seed(0)
    program = fxprune.trace(Sampling().eval(), (torch.randn(3, 9),))
    doomed = sample_units(fxprune.find_groups(program), 0.5)
    assert {len(group.units) for group in doomed} == {16, 8, 12}
    assert (error := fxprune.verify_removal(program, doomed).error) is not None
    assert error <= 1e-5
