"""Images to classify: handwritten digits, Fashion-MNIST, or a folder per class."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import sklearn.datasets
import sklearn.model_selection
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from recipes.parts import PartsData

SPLIT_SEED = 0
"""Seed of the fixed splits; the run's own seed does not move a sample from one part to another."""

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

DOWNLOADS = Path("~/.cache/lightning_dist/fashion_mnist")
"""Where torchvision's download goes if no ``root`` is given."""

FASHION_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class ImageTensors(Dataset[tuple[Tensor, Tensor]]):
    """Images held in memory, normalised and augmented one by one as they are read.

    Args:
        images: ``(count, channels, height, width)``, uint8.
        labels: ``(count,)``, int64.
        mean: subtracted from the pixels.
        std: the pixels are divided by it.
        shift: greatest shift, in pixels, up or down and left or right, drawn per read.
        flip: mirror every second image, drawn per read.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: float,
        std: float,
        shift: tuple[int, int] = (0, 0),
        flip: bool = False,
    ) -> None:
        self.labels = labels
        self.mean, self.std, self.shift, self.flip = mean, std, shift, flip
        self._size = images.shape[-2:]
        # Padded once, so that a shift is a view.
        self._padded = torch.nn.functional.pad(images, (shift[1], shift[1], shift[0], shift[0]))

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self) -> Tensor:
        """All images without augmentation, normalised, ``(count, channels * height * width)``."""
        (top, left), (height, width) = self.shift, self._size
        images = self._padded[..., top : top + height, left : left + width]
        return images.flatten(1).float().sub_(self.mean).div_(self.std)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        (top, left), (height, width) = self.shift, self._size
        if any(self.shift):
            top = int(torch.randint(2 * top + 1, ()))
            left = int(torch.randint(2 * left + 1, ()))
        image = self._padded[index, :, top : top + height, left : left + width]
        image = image.float().sub_(self.mean).div_(self.std)
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image, self.labels[index]


class ImageData(PartsData):
    """Parts of images in memory."""

    def _split(
        self,
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        shift: tuple[int, int],
        flip: bool,
    ) -> None:
        """Fills the parts: normalised by the training pixels, augmented only in training."""
        pixels = train[0].float()
        mean, std = float(pixels.mean()), float(pixels.std())
        self.parts = {
            "train": ImageTensors(*train, mean, std, shift, flip),
            "val": ImageTensors(*val, mean, std),
            "test": ImageTensors(*test, mean, std),
        }


class Digits(ImageData):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, in 1,257 to train on, 180 and 360 held out.

    Args:
        batch_size: samples per process and step.
        shift: greatest shift in pixels left or right, in training. The digits fill their rows, so a shift up or
            down would cut them.
        num_workers: processes that read ahead.
        eval_batch_size: samples per process and batch of evaluation.
        num_classes: 10; here so that the model's config can refer to it.
        in_channels: 1, likewise.
        image_size: 8, likewise.
    """

    def __init__(
        self,
        batch_size: int = 32,
        shift: int = 1,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
        *,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 8,
    ) -> None:
        super().__init__(batch_size, num_workers, eval_batch_size)
        self.shift = shift
        _check_shape("digits", {"num_classes": (num_classes, 10), "in_channels": (in_channels, 1)})
        _check_shape("digits", {"image_size": (image_size, 8)})

    def setup(self, stage: str) -> None:
        """Reads the images, which come with scikit-learn, and splits them."""
        if self.parts:
            return
        digits = sklearn.datasets.load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8)[:, None]
        labels = torch.from_numpy(digits.target).long()
        rest, test = _stratified_split(torch.arange(len(labels)), labels, 360)
        train, val = _stratified_split(rest, labels, 180)
        self._split(
            (images[train], labels[train]),
            (images[val], labels[val]),
            (images[test], labels[test]),
            (0, self.shift),
            flip=False,
        )


class FashionMNIST(ImageData):
    """Fashion-MNIST (https://arxiv.org/abs/1708.07747): 28 x 28 pixels, 55,000 + 5,000 + 10,000 images.

    Args:
        batch_size: samples per process and step.
        root: directory of the four IDX files, gzipped or not, or of torchvision's download. By default Debian's
            package if installed, else ``~/.cache/lightning_dist/fashion_mnist``.
        download: let torchvision download what is missing.
        shift: greatest shift in pixels, both ways, in training.
        flip: mirror every second image in training.
        num_val: images of the training set that are held out for validation.
        num_workers: processes that read ahead.
        eval_batch_size: samples per process and batch of evaluation.
        num_classes: 10; here so that the model's config can refer to it.
        in_channels: 1, likewise.
        image_size: 28, likewise.
    """

    def __init__(
        self,
        batch_size: int = 64,
        root: str | Path | None = None,
        download: bool = True,
        shift: int = 0,
        flip: bool = True,
        num_val: int = 5000,
        num_workers: int = 0,
        eval_batch_size: int | None = 250,
        *,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
    ) -> None:
        super().__init__(batch_size, num_workers, eval_batch_size)
        if root is None:
            root = DEBIAN_FASHION_MNIST if DEBIAN_FASHION_MNIST.is_dir() else DOWNLOADS
        self.root = Path(root).expanduser()
        self.download = download
        self.shift, self.flip, self.num_val = shift, flip, num_val
        _check_shape("Fashion-MNIST", {"num_classes": (num_classes, 10), "in_channels": (in_channels, 1)})
        _check_shape("Fashion-MNIST", {"image_size": (image_size, 28)})

    def prepare_data(self) -> None:
        """Makes sure that the files are there, on one process per node.

        Raises:
            FileNotFoundError: they are not, and ``download`` is off or failed.
        """
        missing = [n for names in FASHION_MNIST_FILES.values() for n in names if self._find(n) is None]
        if not missing:
            return
        reason = "download is off"
        if self.download:
            try:
                torchvision.datasets.FashionMNIST(self.root, download=True)
                return
            except (RuntimeError, OSError) as error:
                reason = f"the download failed: {error}"
        raise FileNotFoundError(self._expectation(missing[0], reason))

    def setup(self, stage: str) -> None:
        """Reads the files and holds out a stratified part of the training set."""
        if self.parts:
            return
        images, labels = self._read("train")
        train, val = _stratified_split(torch.arange(len(labels)), labels, self.num_val)
        self._split(
            (images[train], labels[train]),
            (images[val], labels[val]),
            self._read("test"),
            (self.shift, self.shift),
            self.flip,
        )

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        tensors = []
        for name in FASHION_MNIST_FILES[part]:
            path = self._find(name)
            if path is None:
                raise FileNotFoundError(self._expectation(name, "it is not there"))
            tensors.append(read_idx(path))
        images, labels = tensors
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{self.root} has {part} images of shape {tuple(images.shape)} and labels of shape "
                f"{tuple(labels.shape)}; expected (count, height, width) and (count,)"
            )
        return images[:, None], labels.long()

    def _find(self, name: str) -> Path | None:
        folders = (self.root, self.root / "FashionMNIST" / "raw")
        candidates = (folder / f"{name}{ending}" for folder in folders for ending in ("", ".gz"))
        return next((path for path in candidates if path.is_file()), None)

    def _expectation(self, name: str, reason: str) -> str:
        return (
            f"Fashion-MNIST: no {name} or {name}.gz in {self.root} ({reason}); pass the directory that has the four "
            "IDX files as data.root=..., or install Debian's package dataset-fashion-mnist"
        )


class ImageFolders(ImageData):
    """Images in ``root/train/CLASS/*``, ``root/val/CLASS/*`` and, for testing, ``root/test/CLASS/*``.

    In training, a random crop and mirror; in evaluation, the centre.

    Args:
        root: the directory that has the three.
        num_classes: number of directories in each.
        image_size: pixels a side of what the network sees.
        batch_size: samples per process and step.
        num_workers: processes that read and decode ahead.
        eval_batch_size: samples per process and batch of evaluation.
        min_area: least share of an image's area that a training crop has.
        mean: of the channels, subtracted; ImageNet's by default.
        std: of the channels, divided by.
        in_channels: 3; here so that the model's config can refer to it.
    """

    def __init__(
        self,
        root: str | Path,
        num_classes: int,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 4,
        eval_batch_size: int | None = None,
        min_area: float = 0.35,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        *,
        in_channels: int = 3,
    ) -> None:
        super().__init__(batch_size, num_workers, eval_batch_size)
        _check_shape("image folders", {"in_channels": (in_channels, 3)})
        self.root = Path(root).expanduser()
        self.num_classes = num_classes
        normalize = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
        self._train_transform = v2.Compose(
            [v2.RandomResizedCrop(image_size, scale=(min_area, 1.0)), v2.RandomHorizontalFlip(), *normalize]
        )
        resize = v2.Resize(math.ceil(image_size / 0.875))
        self._eval_transform = v2.Compose([resize, v2.CenterCrop(image_size), *normalize])

    def setup(self, stage: str) -> None:
        """Lists the files of the parts that the stage reads.

        Raises:
            FileNotFoundError: a directory that the stage reads is not there.
            ValueError: it has no images, or not ``num_classes`` classes, or other ones than training.
        """
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        for part in needed[stage]:
            if part not in self.parts:
                self.parts[part] = self._open(part)

    def _open(self, part: str) -> torchvision.datasets.ImageFolder:
        folder = self.root / part
        if not folder.is_dir():
            raise FileNotFoundError(
                f"image folder: {folder} is not there; expected {self.root}/train, {self.root}/val and "
                f"{self.root}/test with one directory of images per class; pass the right one as data.root=..."
            )
        transform = self._train_transform if part == "train" else self._eval_transform
        try:
            images = torchvision.datasets.ImageFolder(str(folder), transform)
        except FileNotFoundError as error:
            raise ValueError(f"image folder: {folder} needs one directory of images per class: {error}") from None
        if len(images.classes) != self.num_classes:
            raise ValueError(
                f"image folder: {folder} has {len(images.classes)} classes and num_classes={self.num_classes}; "
                "pass what it has as data.num_classes=..."
            )
        for other, opened in self.parts.items():
            assert isinstance(opened, torchvision.datasets.ImageFolder)
            if opened.classes != images.classes:
                raise ValueError(f"image folder: {folder} and {self.root / other} have different classes")
        return images


def read_idx(path: Path) -> Tensor:
    """The tensor in an IDX file of unsigned bytes, gzipped or not (http://yann.lecun.com/exdb/mnist).

    Raises:
        ValueError: the file is no such file, or is cut short.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if len(data) != start + math.prod(shape):
        raise ValueError(
            f"{path} has {len(data)} bytes, and its header promises {start + math.prod(shape)}; get the file again"
        )
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).reshape(shape)


def _stratified_split(indices: Tensor, labels: Tensor, num_held_out: int) -> tuple[Tensor, Tensor]:
    """Two disjoint parts of ``indices``, the second of ``num_held_out``, with the same shares of every class."""
    kept, held_out = sklearn.model_selection.train_test_split(
        indices.numpy(), test_size=num_held_out, stratify=labels[indices].numpy(), random_state=SPLIT_SEED
    )
    return torch.from_numpy(kept), torch.from_numpy(held_out)


def _check_shape(data: str, asked: dict[str, tuple[int, int]]) -> None:
    for name, (value, actual) in asked.items():
        if value != actual:
            raise ValueError(f"{data} has {name}={actual}, and {name}={value} was asked; leave it out")
