"""Small models of single layers and connections that no model zoo tests separately."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Case = tuple[nn.Module, tuple[Any, ...]]


class Recurrent(nn.Module):
    """A recurrent layer between two linears."""

    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.before, self.after = (
            nn.Linear(6, 8),
            nn.Linear(24 if options.get("bidirectional") else 12, 5),
        )
        self.cell = kind(8, 12, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Run over steps; the last one is classified."""
        hidden: Tensor = self.cell(self.before(x))[0].mean(1)
        return self.after.forward(hidden)


class TwoInputs(nn.Module):
    """Two inputs, a shared encoder, a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 16)
        self.join, self.left, self.right = nn.Linear(32, 12), nn.Linear(12, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Encode both with the same weights."""
        both = torch.cat([self.shared(x).relu(), self.shared(y).relu()], 1)
        hidden = self.join(both).relu()
        return {"left": self.left(hidden), "right": self.right(hidden)}


class Products(nn.Module):
    """Einsum contractions, a bilinear map, an embedding and a channels-last concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(20, 12), nn.Parameter(torch.randn(24, 4, 6))
        self.bilinear, self.head = nn.Bilinear(24, 24, 8), nn.Linear(8, 3)
        self.norm = nn.RMSNorm(24)

    def forward(self, tokens: Tensor) -> Tensor:
        """Read tokens."""
        x = self.table(tokens)
        x = self.norm(torch.cat([x, x.tanh()], -1))
        heads = torch.einsum("btc,chd->bthd", x, self.mix)
        x = torch.einsum("bthd,chd->btc", heads, self.mix)
        return self.head.forward(F.gelu(self.bilinear(x, x)).mean(1))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16),
        nn.Conv2d(16, 32, 3, padding=1, groups=16), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.ConvTranspose2d(32, 24, 2, stride=2, groups=4), nn.InstanceNorm2d(24, affine=True),
        nn.Conv2d(24, 12, 1, groups=3), nn.SiLU(), nn.ConvTranspose2d(12, 8, 2, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def _parametrised() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(),
        parametrizations.weight_norm(nn.Conv2d(8, 12, 3), dim=1), nn.ReLU(),
        parametrizations.spectral_norm(nn.Conv2d(12, 8, 3)), nn.ReLU(), nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(8 * 4, 10)),
    )  # fmt: skip


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def _steps() -> tuple[Any, ...]:
    return (torch.randn(2, 5, 6),)


MODELS: Mapping[str, Callable[[], Case]] = {
    "lstm": lambda: (Recurrent(nn.LSTM, num_layers=2).eval(), _steps()),
    "lstm-bidirectional": lambda: (Recurrent(nn.LSTM, bidirectional=True), _steps()),
    "gru": lambda: (Recurrent(nn.GRU), _steps()),
    "rnn": lambda: (Recurrent(nn.RNN), _steps()),
    "convolutions": lambda: (_convolutions(), (torch.randn(2, 3, 8, 8),)),
    "parametrised": lambda: (_parametrised(), (torch.randn(2, 3, 8, 8),)),
    "two-inputs": lambda: (TwoInputs(), (torch.randn(2, 8), torch.randn(2, 8))),
    "products": lambda: (Products(), (torch.arange(14).view(2, 7),)),
    "torch-encoder": lambda: (_encoder(), (torch.randn(2, 6, 32),)),
}
