"""The image data modules: what they read, how they split it, what they refuse."""

import gzip

import lightning as L
import pytest
import torch
from PIL import Image

from recipes.image_classification import ImageClassifier, PixelBaselines
from recipes.image_classification.data import FASHION_MNIST_FILES, Digits, FashionMNIST, ImageFolders, read_idx


def idx(values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.numpy().tobytes()


@pytest.fixture
def fashion_files(tmp_path):
    for part, count in (("train", 100), ("test", 20)):
        images, labels = FASHION_MNIST_FILES[part]
        pixels = torch.arange(count * 28 * 28).reshape(count, 28, 28).to(torch.uint8)
        (tmp_path / f"{images}.gz").write_bytes(gzip.compress(idx(pixels)))
        (tmp_path / labels).write_bytes(idx((torch.arange(count) % 10).to(torch.uint8)))
    return tmp_path


def test_digits_split_is_disjoint_stratified_and_whole():
    data = Digits()
    data.setup("fit")
    sizes = {part: len(images) for part, images in data.parts.items()}
    assert sizes == {"train": 1257, "val": 180, "test": 360}
    seen = []
    for images in data.parts.values():
        top, left = images.shift
        whole = images._padded[:, :, top:, left : left + 8]
        seen += [tuple(image.flatten().tolist()) for image in whole]
        shares = images.labels.bincount(minlength=10) / len(images)
        assert shares.max() - shares.min() < 0.02
    # scikit-learn's 1,797 digits are all different, so an image in two parts would be counted once.
    assert len(set(seen)) == 1797


def test_digits_batches_have_the_promised_shapes():
    data = Digits(batch_size=32)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.shape == (32,)
    assert labels.dtype == torch.int64
    assert len(data.train_dataloader()) == 1257 // 32
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 180


def test_digits_are_normalised_by_the_training_pixels():
    data = Digits(shift=0)
    data.setup("fit")
    pixels = torch.stack([image for image, _ in data.parts["train"]])
    assert abs(float(pixels.mean())) < 1e-5
    assert float(pixels.std()) == pytest.approx(1.0, abs=1e-4)


def test_shift_moves_columns_of_training_images_only():
    shifted, still = Digits(shift=1), Digits(shift=0)
    shifted.setup("fit")
    still.setup("fit")
    torch.manual_seed(0)
    expected = still.parts["train"][0][0][0]
    drawn = {tuple(shifted.parts["train"][0][0].flatten().tolist()) for _ in range(40)}
    assert len(drawn) == 3
    assert tuple(expected.flatten().tolist()) in drawn
    for columns in (slice(1, 8), slice(0, 7)):
        moved = {tuple(torch.tensor(image).reshape(8, 8)[:, columns].flatten().tolist()) for image in drawn}
        kept = expected[:, 0:7] if columns.start else expected[:, 1:8]
        assert tuple(kept.flatten().tolist()) in moved
    assert torch.equal(shifted.parts["val"][0][0], still.parts["val"][0][0])


def test_digits_refuse_a_size_they_do_not_have():
    with pytest.raises(ValueError, match="image_size=8, and image_size=16 was asked"):
        Digits(image_size=16)


def test_fashion_mnist_reads_idx_files_gzipped_or_not(fashion_files):
    data = FashionMNIST(root=fashion_files, num_val=20, flip=False)
    data.prepare_data()
    data.setup("fit")
    assert {part: len(images) for part, images in data.parts.items()} == {"train": 80, "val": 20, "test": 20}
    assert data.parts["val"].labels.bincount().tolist() == [2] * 10
    image, label = data.parts["test"][3]
    train = data.parts["train"]
    pixels = torch.arange(3 * 784, 4 * 784).to(torch.uint8).float().reshape(1, 28, 28)
    assert int(label) == 3
    assert torch.allclose(image, (pixels - train.mean) / train.std)


def test_fashion_mnist_flips_half_of_the_training_images(fashion_files):
    data = FashionMNIST(root=fashion_files, num_val=20)
    data.setup("fit")
    torch.manual_seed(0)
    plain = FashionMNIST(root=fashion_files, num_val=20, flip=False)
    plain.setup("fit")
    original = plain.parts["train"][0][0]
    drawn = [data.parts["train"][0][0] for _ in range(100)]
    flipped = sum(torch.equal(image, original.flip(-1)) for image in drawn)
    assert 30 < flipped < 70
    assert flipped + sum(torch.equal(image, original) for image in drawn) == 100


def test_missing_fashion_mnist_names_directory_file_and_remedy(tmp_path):
    data = FashionMNIST(root=tmp_path / "nowhere", download=False)
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*nowhere.*data\.root"):
        data.prepare_data()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "not an IDX file"),
        (idx(torch.zeros(2, 3, dtype=torch.uint8))[:-1], "has 17 bytes, and its header promises 18"),
    ],
)
def test_broken_idx_files_are_refused(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file")


def test_cut_gzip_is_refused(tmp_path):
    (tmp_path / "file.gz").write_bytes(gzip.compress(idx(torch.zeros(50, dtype=torch.uint8)))[:-9])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        read_idx(tmp_path / "file.gz")


@pytest.fixture
def image_folder(tmp_path):
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (20, 30), (80 * label, 40 * index, 0)).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


def test_image_folder_gives_images_of_one_size(image_folder):
    data = ImageFolders(image_folder, num_classes=2, image_size=16, batch_size=4, num_workers=0)
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (4, 3, 16, 16)
        assert set(labels.tolist()) <= {0, 1}


def test_missing_image_folder_names_path_and_expectation(image_folder):
    data = ImageFolders(image_folder, num_classes=2)
    with pytest.raises(FileNotFoundError, match=r"test is not there; expected .*one directory of images per class"):
        data.setup("test")


def test_image_folder_of_other_classes_is_refused(image_folder):
    with pytest.raises(ValueError, match=r"has 2 classes and num_classes=3"):
        ImageFolders(image_folder, num_classes=3).setup("fit")
    (image_folder / "val" / "dog").rename(image_folder / "val" / "eel")
    with pytest.raises(ValueError, match="different classes"):
        ImageFolders(image_folder, num_classes=2).setup("fit")


def test_models_of_pixels_stand_beside_the_network():
    data = Digits(batch_size=64)
    module = ImageClassifier(
        lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
        lambda groups: torch.optim.SGD(groups, 0.01),
        num_classes=10,
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    baselines = PixelBaselines(["nearest_neighbours", "ridge"])
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[baselines], **quiet)
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    plain = Digits(shift=0)
    plain.setup("fit")
    (train, val, test) = (
        tuple(torch.stack(column) for column in zip(*plain.parts[part], strict=True))
        for part in ("train", "val", "test")
    )
    known, labels = (torch.cat(pair) for pair in zip(train, val, strict=True))
    distances = torch.cdist(test[0].flatten(1), known.flatten(1))
    nearest = labels[distances.topk(3, largest=False).indices].mode(1).values
    accuracy = float((nearest == test[1]).float().mean())
    assert tested["test/nearest_neighbours/accuracy"] == pytest.approx(accuracy, abs=0.01)
    assert 0.9 < tested["test/ridge/accuracy"] < 0.97
    with pytest.raises(ValueError, match="there is no model 'forest' of pixels"):
        PixelBaselines(["forest"])
