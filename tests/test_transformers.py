"""PyTorch's own transformer modules, whose calls take other ways than their captures."""

from __future__ import annotations

import pytest
import torch
from support import assert_same
from torch import Tensor, nn

import fxprune


class Padded(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.kind, self.embed, self.out = kind, nn.Embedding(30, 16), nn.Linear(16, 3)
        norm = nn.LayerNorm(16) if kind == "final norm" else None
        nested = kind != "no nested tensors"
        self.encoder = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=nested)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens.eq(0)
        if self.kind == "float mask":
            padding = torch.zeros(tokens.shape).masked_fill(padding, float("-inf"))
        result: Tensor = self.out(self.encoder(self.embed(tokens), src_key_padding_mask=padding))
        return result.mean(1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bool mask", "float mask", "final norm", "no nested tensors"])
def test_padding_is_what_a_call_makes_of_it(kind: str) -> None:
    torch.manual_seed(0)
    model = Padded(kind).eval()
    right, left, none = (torch.randint(1, 30, (2, 7)) for _ in range(3))
    right[0, -2:] = left[1, :3] = 0
    with torch.no_grad():
        for example in (right, left, none):
            program = fxprune.trace(model, (example,))
            for tokens in (right, left, none, torch.cat([right, left])):
                assert_same(program(tokens), model(tokens))


class Causal(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed, self.out = kind, nn.Embedding(20, 16), nn.Linear(16, 20)
        self.whole = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        match self.kind:
            case "encoder":
                y = self.whole.encoder(x, mask=mask)
            case "hint":
                y = self.whole.encoder(x, mask=mask, is_causal=True)
            case "decoder":
                y = self.whole.decoder(x, x.flip(1), tgt_mask=mask)
            case _:
                y = self.whole(x, x, src_mask=mask, tgt_mask=mask, memory_mask=mask)
        result: Tensor = self.out(y)
        return result


@pytest.mark.parametrize("kind", ["encoder", "hint", "decoder", "whole"])
def test_causal_masks_are_captured(kind: str) -> None:
    torch.manual_seed(0)
    model, tokens = Causal(kind).eval(), torch.randint(0, 20, (2, 6))
    program = fxprune.trace(model, (tokens,))
    with torch.no_grad():
        assert_same(program(tokens), model(tokens))
        later = tokens.clone()
        later[:, 4:] = 1
        assert_same(program(later), model(later))
