from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import randomise_norms, trace
from torch import Tensor, nn

import fxprune
from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.errors import InputError
from fxprune.graph.facts import MASKS, Masks
from fxprune.graph.program import Program
from fxprune.passes import Finetune, FoldBatchNorm, RemoveChannels, Sparsify
from fxprune.pipeline.context import Context
from fxprune.reconstruction.masks import blocked, follows, smallest, uniform
from fxprune.run.checks import check_masks

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(36, 4),
    )  # fmt: skip
    return trace(randomise_norms(model).eval(), X[:2])


def weight(program: Program, name: str) -> Tensor:
    return program.tensor(name).detach()


def test_a_block_keeps_its_largest_weights() -> None:
    keep = blocked(torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.1, 0.0, -0.2, 0.3]]), 1, 2, 4)
    assert keep.int().tolist() == [[0, 1, 0, 1, 0, 0, 1, 1]]


@pytest.mark.parametrize(("pattern", "blocks"), [("2:4", (2, 4)), ("1:4", (1, 4))])
def test_blocks_run_along_the_inputs(pattern: str, blocks: tuple[int, int]) -> None:
    program = net()
    outcome = Sparsify(pattern=pattern)(program, Context())
    keep = program.get(MASKS).keep
    assert set(keep) == {"3.weight", "5.weight", "7.weight"}
    for name, axis in (("3.weight", 1), ("5.weight", 0), ("7.weight", 1)):
        assert follows(keep[name], axis, *blocks)
        assert keep[name].float().mean() == blocks[0] / blocks[1]
        assert torch.equal(weight(program, name) != 0, keep[name])
    assert outcome.changes == 3
    reasons = [skip.reason for skip in outcome.skips]
    assert reasons == [f"its {n} inputs per group are not a multiple of 4" for n in (3, 1)]
    assert Sparsify(pattern=pattern)(program, Context()).changes == 0


def test_the_smallest_weights_of_all_go_up_to_the_cap() -> None:
    weights = {"a": torch.tensor([0.1, 0.2, 0.3, 0.4]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    keep = smallest(weights, 0.5, 0.5)
    assert [k.int().tolist() for k in keep.values()] == [[0, 0, 1, 1], [0, 0, 1, 1]]
    keep = smallest(weights, 0.5, 1.0)
    assert [k.int().tolist() for k in keep.values()] == [[0, 0, 0, 0], [1, 1, 1, 1]]
    with pytest.raises(InputError, match="raise the cap"):
        smallest(weights, 0.8, 0.5)


def test_uniform_takes_the_same_share_of_each() -> None:
    weights = {"a": torch.zeros(10), "b": torch.randn(4, 5)}
    assert [int(keep.sum()) for keep in uniform(weights, 0.7).values()] == [3, 6]


def test_masks_from_a_file(tmp_path: Path) -> None:
    program, path = net(), tmp_path / "masks.safetensors"
    keep = torch.rand(4, 36) > 0.5
    save_file({"7.weight": keep}, path)
    Sparsify(pattern="file", file=str(path))(program, Context())
    assert torch.equal(weight(program, "7.weight") != 0, keep)
    save_file({"8.weight": keep}, path)
    with pytest.raises(InputError, match=r"masks '8\.weight'"):
        Sparsify(pattern="file", file=str(path))(net(), Context())
    save_file({"7.weight": keep[:2]}, path)
    with pytest.raises(InputError, match=r"\(2, 36\)"):
        Sparsify(pattern="file", file=str(path))(net(), Context())


def test_zeros_that_are_there_become_a_mask() -> None:
    program = net()
    with torch.no_grad():
        program.tensor("3.weight")[:, 0] = 0
    assert Sparsify(pattern="zeros")(program, Context()).changes == 0
    assert not program.get(MASKS).keep["3.weight"][:, 0].any()


def test_a_second_mask_keeps_the_first() -> None:
    program = net()
    Sparsify(pattern="2:4")(program, Context())
    first = program.get(MASKS).keep["7.weight"]
    Sparsify(pattern="uniform", sparsity=0.75, protect=("3.*",))(program, Context())
    second = program.get(MASKS).keep
    assert not (second["7.weight"] & ~first).any()
    assert "3.weight" in second


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Sparsify(pattern="4:4"), "keeps 4 of every 4"),
        (Sparsify(pattern="some"), "no pattern 'some'"),
        (Sparsify(sparsity=2.0), "from 0 to 1"),
        (Sparsify(pattern="file"), "give file="),
    ],
)
def test_senseless_options(step: Sparsify, message: str) -> None:
    with pytest.raises(InputError, match=message):
        step(net(), Context())


def test_masks_survive_training_and_folding_into_the_file(tmp_path: Path) -> None:
    program, path = net(), tmp_path / "model.onnx"
    samples = Arrays(X, torch.arange(8) % 4)
    context = Context(Data(samples, samples, samples), dense=program.copy())
    for step in (Sparsify(pattern="unstructured"), Finetune(batch_size=4), FoldBatchNorm()):
        step(program, context)
    fxprune.export_onnx(program, path)
    check = check_masks(program, path)
    assert (check.ran, check.passed, check.value) == (True, True, 0)
    keep = {name: torch.zeros_like(keep) for name, keep in program.get(MASKS).keep.items()}
    program.put(MASKS, Masks(keep, "nothing"))
    assert not check_masks(program, path).passed


def test_masks_are_found_where_the_exporter_turns_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.ReLU(), nn.Linear(4, 4))
    program, path = trace(model, torch.randn(2, 5, 8)), tmp_path / "model.onnx"
    Sparsify()(program, Context())
    fxprune.export_onnx(program, path)
    check = check_masks(program, path)
    assert check.passed
    assert "2 masked tensors" in str(check.note)


def test_masks_follow_removal() -> None:
    program = net()
    Sparsify(pattern="uniform")(program, Context())
    (group, *_) = [g for g in fxprune.find_groups(program) if g.frozen_because is None]
    fxprune.remove_units(program, {group: [0]})
    for name, keep in program.get(MASKS).keep.items():
        assert keep.shape == weight(program, name).shape
        assert not weight(program, name)[~keep].any()
    assert MASKS in RemoveChannels.keeps


def test_the_report_says_that_masks_are_in_the_file() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    x, y = torch.randn(16, 4, 6, 6), torch.arange(16) % 4
    passes = "sparsify{pattern=2:4},reconstruct"
    report = fxprune.compile(model, data=(x, y), pipeline=passes, latency_seconds=0.01).report
    assert report.checks["masks"].passed
    assert report.before.params == report.after.params  # zeros are no gain
