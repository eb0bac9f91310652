from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fxprune.data.batches import batches
from fxprune.data.images import Scaling, read_image
from fxprune.data.roles import as_data
from fxprune.data.sources import check_inputs, check_labels, load_data
from fxprune.errors import InputError

PLAIN = Scaling(mean=(0.0,), std=(1.0,))


def paint(path: Path, value: int, size: tuple[int, int] = (6, 4)) -> None:
    """Write an image of one grey value; the size is width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("ant", "bee")):
        for shot in range(5):
            paint(tmp_path / "train" / name / f"{shot}.png", 100 * number + shot)
        paint(tmp_path / "val" / name / "0.png", 100 * number + 50)
    return tmp_path


def test_a_folder_with_train_and_val(folder: Path) -> None:
    data = load_data(str(folder), PLAIN)
    assert data.eval is not None
    (batch,) = batches(data.calibration, 100)
    assert batch.target is not None
    assert batch.target.tolist() == [0] * 5 + [1] * 5
    assert batch.inputs[0].shape == (10, 3, 4, 6)
    values = [*range(5), *range(100, 105)]
    assert torch.allclose(batch.inputs[0][:, 0, 0, 0] * 255, torch.tensor(values).float())
    assert len(data.eval) == 2
    image, label = data.eval[1]
    assert (image.shape, int(label)) == ((3, 4, 6), 1)


def test_a_folder_of_classes_holds_some_out(folder: Path) -> None:
    data = load_data(str(folder / "train"))
    assert data.eval is not None
    assert (len(data.calibration), len(data.eval)) == (8, 2)
    assert any("ImageNet" in note for note in data.notes)


def test_a_flat_folder_is_unlabelled(folder: Path) -> None:
    data = load_data(str(folder / "train" / "ant"), PLAIN, channels=1)
    (batch,) = batches(data.calibration, 100)
    assert batch.target is None
    assert batch.inputs[0].shape[1:] == (1, 4, 6)


def test_images_are_resized_and_cropped(tmp_path: Path) -> None:
    paint(tmp_path / "wide.png", 7, (30, 10))
    assert read_image(tmp_path / "wide.png", Scaling((8, 8))).shape == (8, 8, 3)
    assert read_image(tmp_path / "wide.png", Scaling()).shape == (10, 30, 3)


def test_a_folder_without_images_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images"):
        load_data(str(tmp_path))


def test_an_unreadable_image_is_named(folder: Path) -> None:
    (folder / "train" / "ant" / "3.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"3\.png cannot be read"):
        list(batches(load_data(str(folder)).calibration, 100))


def test_images_of_several_sizes_are_told(folder: Path) -> None:
    paint(folder / "train" / "ant" / "9.png", 1, (8, 8))
    with pytest.raises(InputError, match="--image-size"):
        load_data(str(folder))


def test_folders_of_different_classes_are_told(folder: Path) -> None:
    paint(folder / "val" / "cat" / "0.png", 1)
    with pytest.raises(InputError, match="different classes: cat"):
        load_data(str(folder))


def test_npz_of_bytes_is_normalised(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(10, dtype=np.uint8))
    data = load_data(str(tmp_path / "a.npz"), Scaling(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0)))
    for samples in (data.calibration, data.eval):
        assert samples is not None
        (batch,) = batches(samples, 100)
        assert batch.target is not None
        expected = (x[batch.target.numpy()] / 255 - [0.1, 0.2, 0.3]) / [0.5, 1.0, 2.0]
        found = batch.inputs[0].permute(0, 2, 3, 1).numpy()
        assert np.allclose(found, expected, atol=1e-6)
        assert batch.target.dtype == torch.int64


def test_npz_of_floats_is_taken_as_it_is(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(10, 7))
    np.savez(tmp_path / "a.npz", x=x)
    (batch,) = batches(load_data(str(tmp_path / "a.npz")).calibration, 100)
    assert batch.target is None
    assert batch.inputs[0].dtype == torch.float32
    assert all(np.isclose(x, row, atol=1e-6).all(1).any() for row in batch.inputs[0].numpy())


def test_broken_npz_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(InputError, match="no such file"):
        load_data(str(path))
    path.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(InputError, match="cannot be read"):
        load_data(str(path))
    np.savez(path, images=np.zeros(3))
    with pytest.raises(InputError, match="holds images"):
        load_data(str(path))
    np.savez(path, x=np.zeros((3, 2)), y=np.zeros(4))
    with pytest.raises(InputError, match="3 samples in x and 4 in y"):
        load_data(str(path))
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="cannot be read"):
        load_data(str(path))


def test_digits_are_split_the_same_way_every_time() -> None:
    pytest.importorskip("sklearn")
    first, second = load_data("digits"), load_data("digits")
    assert first.eval is not None
    assert second.eval is not None
    assert (len(first.calibration), len(first.eval)) == (1437, 360)
    assert torch.equal(first.eval[0][0], second.eval[0][0])
    check_labels(first, 10)
    check_inputs(first, (torch.zeros(1, 1, 8, 8),))


def test_a_factory_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mydata_for_test.py").write_text(
        "import torch\ndef make(count):\n    return torch.zeros(count, 2), torch.arange(count)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    data = load_data("mydata_for_test:make", options={"count": 10})
    assert len(data.calibration) == 8
    with pytest.raises(InputError, match="failed with TypeError"):
        load_data("mydata_for_test:make", options={"wrong": 10})
    with pytest.raises(InputError, match="did you mean make"):
        load_data("mydata_for_test:mak")
    with pytest.raises(InputError, match="there is no module"):
        load_data("nowhere_to_be_found:make")


def test_unknown_data_is_told() -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        load_data("digit")


@pytest.mark.parametrize(("labels", "wrong"), [([0, 10, 3], 10), ([0, -1, 3], -1)])
@pytest.mark.parametrize("in_memory", [True, False])
def test_labels_out_of_range_are_told(labels: list[int], wrong: int, in_memory: bool) -> None:
    x = torch.zeros(3, 2)
    source = (x, torch.tensor(labels)) if in_memory else list(zip(x, labels, strict=True))
    with pytest.raises(InputError, match=f"the label {wrong}, but the model's 10 outputs"):
        check_labels(as_data({"train": source}), 10)


def test_inputs_of_another_shape_are_told() -> None:
    with pytest.raises(InputError, match="3x28x28, but the model takes 3x32x32"):
        check_inputs(as_data(torch.zeros(4, 3, 28, 28)), (torch.zeros(1, 3, 32, 32),))


def test_constants_must_fit_the_channels() -> None:
    with pytest.raises(InputError, match="--mean has 2 values"):
        Scaling(mean=(0.1, 0.2))(torch.zeros(1, 2, 2, 3, dtype=torch.uint8))
    with pytest.raises(InputError, match="--std must be positive"):
        Scaling(std=(0.0,))(torch.zeros(1, 2, 2, 3, dtype=torch.uint8))
