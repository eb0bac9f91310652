from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fxprune.data.batches import batches
from fxprune.data.roles import Data, as_data
from fxprune.errors import InputError


class Squares(Dataset[Any]):
    """Item n is (n, n squared), made one by one."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index)]), index * index


def collected(dataset: Any, **options: Any) -> list[int]:
    return [int(x) for batch in batches(dataset, 3, **options) for x in batch.inputs[0].flatten()]


def test_batches_keep_the_order_and_pair_targets() -> None:
    found = list(batches(Squares(), 4))
    assert [len(batch) for batch in found] == [4, 4, 2]
    assert collected(Squares()) == list(range(10))
    for batch in found:
        assert batch.target is not None
        assert batch.inputs[0].flatten().square().tolist() == batch.target.tolist()


def test_a_seed_shuffles_reproducibly_and_a_limit_cuts_after_shuffling() -> None:
    whole = collected(Squares(), seed=3)
    assert sorted(whole) == list(range(10))
    assert whole != list(range(10))
    assert collected(Squares(), seed=3, limit=4) == whole[:4]
    assert collected(Squares(), seed=4) != whole


@pytest.mark.parametrize("dataset", [Squares(), DataLoader(Squares(), batch_size=7)])
def test_without_eval_a_fifth_is_held_out_and_told(dataset: Any) -> None:
    data = as_data(dataset)
    assert data.eval is not None
    held_out, rest = collected(data.eval), collected(data.train)
    assert (len(held_out), len(rest)) == (2, 8)
    assert sorted(held_out + rest) == list(range(10))
    assert collected(data.calibration) == rest
    assert collected(as_data(dataset).eval) == held_out
    assert "2 of 10 samples" in data.notes[0]


def test_tensors_and_arrays_pair_up() -> None:
    x, y = torch.randn(10, 3), torch.arange(10)
    for source in ((x, y), (x.numpy(), y.numpy()), TensorDataset(x, y)):
        data = as_data({"train": source, "eval": source})
        (batch,) = batches(data.calibration, 10)
        assert torch.equal(batch.inputs[0], x)
        assert batch.target is not None
        assert torch.equal(batch.target, y)
        assert data.notes == ()


def test_inputs_alone_are_unlabelled() -> None:
    x = torch.randn(4, 3)
    for source in (x, x.numpy(), list(x), TensorDataset(x)):
        (batch,) = batches(as_data({"train": source, "eval": None}).calibration, 4)
        assert batch.target is None
        assert torch.equal(batch.inputs[0], x)


def test_a_tuple_of_inputs_stays_one_sample() -> None:
    samples = [((torch.ones(2), torch.zeros(3)), 1)] * 4
    (batch,) = batches(samples, 4)
    assert [tuple(x.shape) for x in batch.inputs] == [(4, 2), (4, 3)]
    assert batch.target is not None
    assert batch.target.tolist() == [1] * 4


def test_roles_default_to_each_other() -> None:
    data = as_data({"calibration": Squares(), "eval": Squares()})
    assert data.train is data.calibration
    assert "training uses the calibration samples" in data.notes[0]
    assert as_data({"calibration": Squares(), "train": None, "eval": None}).train is None
    assert as_data({"train": Squares(), "eval": None}).eval is None
    assert dict(data.roles()).keys() == {"calibration", "train", "eval"}


def test_a_loaders_own_collate_function_is_used() -> None:
    def doubled(items: list[Any]) -> Any:
        return 2 * torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])

    data = as_data({"train": DataLoader(Squares(), collate_fn=doubled)})
    assert all(value % 2 == 0 for value in collected(data.train))
    assert sorted(collected(data.train) + collected(data.eval)) == list(range(0, 20, 2))


def test_data_is_returned_as_it_is() -> None:
    data = Data(Squares())
    assert as_data(data) is data


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"test": [1]}, "unknown keys test"),
        ({"eval": [1]}, "no samples for calibration"),
        ({"train": []}, "train has no samples"),
        (Stream(), "map-style"),
        (3, "map-style"),
        ((np.zeros(3), np.zeros(4)), "lengths 3, 4"),
    ],
)
def test_what_is_no_data_is_told(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_data(source)


def test_batches_are_laid_out_by_rows() -> None:
    images = torch.zeros(4, 6, 6, 3).permute(0, 3, 1, 2)
    for dataset in (images, list(images), TensorDataset(images)):
        (batch,) = batches(as_data({"train": dataset}).calibration, 8)
        assert batch.inputs[0].is_contiguous()
