"""MedMNIST's files: images and volumes with labels, in one .npz file a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.parts import PartsData

DOWNLOADS = Path("~/.cache/lightning_dist/medmnist")
"""Where the package medmnist puts what it downloads."""


class Scans(Dataset[tuple[Tensor, Tensor]]):
    """Images or volumes held in memory, normalised as they are read, mirrored in training.

    Args:
        scans: ``(count, channels, *size)``, uint8.
        labels: ``(count,)``, int64.
        mean: subtracted from the values.
        std: the values are divided by it.
        flip: mirror every second scan along its last dim, drawn per read.
    """

    def __init__(self, scans: Tensor, labels: Tensor, mean: float, std: float, flip: bool = False) -> None:
        self.scans, self.labels, self.mean, self.std, self.flip = scans, labels, mean, std, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scan = self.scans[index].float().sub_(self.mean).div_(self.std)
        if self.flip and torch.rand(()) < 0.5:
            scan = scan.flip(-1)
        return scan, self.labels[index]


class MedMNIST(PartsData):
    """A data set of MedMNIST v2 (https://doi.org/10.1038/s41597-022-01721-8), or a file of the same layout:
    ``train_images``, ``train_labels``, and likewise ``val`` and ``test``; images ``(count, *size)`` or ``(count, *size,
    3)``, uint8, labels ``(count, 1)``.

    Args:
        name: of the data set, such as ``"nodulemnist3d"``; the package medmnist downloads it if there is no path.
        path: the .npz file.
        num_classes: number of classes.
        in_channels: 1, or 3 for colours.
        image_size: values a side, here so that the model's config can refer to it.
        batch_size: scans per process and step.
        eval_batch_size: scans per process and batch of evaluation, by default ``batch_size``.
        num_workers: processes that read ahead.
        flip: mirror every second scan in training. Where left and right tell classes apart, leave it off.

    Raises:
        ValueError: the file is not as it should be, or has another number of classes, channels or values.
    """

    def __init__(
        self,
        name: str | None = None,
        path: str | Path | None = None,
        *,
        num_classes: int,
        in_channels: int = 1,
        image_size: int = 28,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, eval_batch_size)
        if (name is None) == (path is None):
            raise ValueError("MedMNIST needs a name or a file; pass data.path=FILE.npz, or data.name=nodulemnist3d")
        self.name, self.flip = name, flip
        self.path = DOWNLOADS.expanduser() / f"{name}.npz" if path is None else Path(path).expanduser()
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size

    def prepare_data(self) -> None:
        """Makes sure that the file is there, on one process per node.

        Raises:
            FileNotFoundError: it is not, and could not be downloaded.
        """
        if self.path.is_file():
            return
        advice = f"{self.path} is not there; get the file from https://medmnist.com and pass it as data.path=..."
        if self.name is None:
            raise FileNotFoundError(advice)
        try:
            import medmnist
        except ImportError:
            raise FileNotFoundError(f"{advice}, or `pip install medmnist`, which downloads it") from None
        if self.name not in medmnist.INFO:
            raise ValueError(f"MedMNIST has no {self.name!r}; it has {', '.join(medmnist.INFO)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kind = getattr(medmnist, medmnist.INFO[self.name]["python_class"])
        try:
            kind("train", download=True, root=str(self.path.parent))
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(f"{advice} (the download failed: {error})") from None

    def setup(self, stage: str) -> None:
        """Reads the parts; what normalises them is that of training."""
        if self.parts:
            return
        with np.load(self.path) as file:
            read = {part: self._read(file, part) for part in ("train", "val", "test")}
        self._check_labels(torch.cat([labels for _, labels in read.values()]))
        values = read["train"][0].float()
        mean, std = float(values.mean()), max(float(values.std()), 1e-6)
        for part, (scans, labels) in read.items():
            self.parts[part] = Scans(scans, labels, mean, std, self.flip and part == "train")

    def _read(self, file: np.lib.npyio.NpzFile, part: str) -> tuple[Tensor, Tensor]:
        for key in (f"{part}_images", f"{part}_labels"):
            if key not in file:
                raise ValueError(f"{self.path} has no {key}; it has {', '.join(file)}")
        images, labels = torch.from_numpy(file[f"{part}_images"]), torch.from_numpy(file[f"{part}_labels"]).long()
        if labels.ndim == 2 and labels.shape[1] > 1:
            raise ValueError(f"{self.path} has {labels.shape[1]} labels a scan; this recipe tells one class each")
        labels = labels.flatten()
        has_colours = images.shape[-1] == 3
        scans = images.movedim(-1, 1) if has_colours else images[:, None]
        if scans.shape[1] != self.in_channels or set(scans.shape[2:]) != {self.image_size}:
            told = f"data.in_channels={self.in_channels} and data.image_size={self.image_size}"
            raise ValueError(f"{self.path} has scans of {tuple(images.shape[1:])}, which are not {told}")
        return scans.contiguous(), labels

    def _check_labels(self, labels: Tensor) -> None:
        """Of all parts together: each class has to occur in one of them, or its figures would be of nothing."""
        found = labels.unique().tolist()
        if found == list(range(self.num_classes)):
            return
        counts = found == list(range(len(found)))
        advice = f"pass data.num_classes={len(found)}" if counts else "number the classes that there are from 0 on"
        shown = f"{', '.join(map(str, found[:20]))}{', ...' if len(found) > 20 else ''}"
        raise ValueError(f"{self.path} has the labels {shown}, and data.num_classes={self.num_classes}; {advice}")
