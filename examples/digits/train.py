"""Train the digits network from scratch; the result is ``digits.safetensors``.

Run ``python -m examples.digits.train`` in the checkout; it takes about half a minute on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from examples.digits.model import digits_net
from fxprune.data.batches import batches
from fxprune.data.roles import Data
from fxprune.data.sources import load_data

HERE = Path(__file__).parent


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move every batch by up to one pixel each way; the background is -1."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
    return padded[:, :, top : top + 8, left : left + 8]


def train(data: Data, epochs: int = 25, seed: int = 0) -> nn.Module:
    """Return a trained network, in evaluation mode."""
    assert data.train is not None
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = digits_net()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for batch in batches(data.train, 64, seed=seed + epoch):
            optimizer.zero_grad()
            outputs = model(shifted(batch.inputs[0], generator))
            assert batch.target is not None
            F.cross_entropy(outputs, batch.target, label_smoothing=0.05).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the share of the evaluation samples that the model gets right."""
    assert data.eval is not None
    correct = [
        (model(*batch.inputs).argmax(1) == batch.target).sum() for batch in batches(data.eval, 256)
    ]
    return float(torch.stack(correct).sum()) / len(data.eval)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "digits.safetensors")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = load_data("digits")
    model = train(data, options.epochs, options.seed)
    save_file(model.state_dict(), options.out)
    print(f"{accuracy(model, data):.2%} of {len(data.eval or ())} held-out digits; {options.out}")


if __name__ == "__main__":
    main()
