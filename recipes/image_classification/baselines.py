"""Models of scikit-learn on the same pixels, beside the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from recipes.image_classification.data import ImageTensors
from recipes.parts import PartsData

MODELS = {
    "logistic_regression": lambda: make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)),
    "nearest_neighbours": lambda: KNeighborsClassifier(3),
    "ridge": lambda: RidgeClassifier(alpha=100.0),
}
"""Only ridge regression takes seconds on as many images as Fashion-MNIST has, the others minutes."""


class PixelBaselines(Callback):
    """Logs at the end of a test ``test/NAME/accuracy`` of simple models, which train on the images to train on and to
    validate on: they choose nothing by the latter.

    Args:
        names: of :data:`MODELS`.

    Raises:
        ValueError: there is no such model.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name not in MODELS]:
            raise ValueError(f"there is no model {unknown[0]!r} of pixels; there are {', '.join(MODELS)}")
        self.names = list(names)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fits them, on every rank alike."""
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, PartsData) or not all(isinstance(p, ImageTensors) for p in data.parts.values()):
            return
        parts: dict[str, Any] = dict(data.parts)
        known = [parts["train"], parts["val"]]
        pixels = torch.cat([part.pixels() for part in known]).numpy()
        labels = torch.cat([part.labels for part in known]).numpy()
        for name in self.names:
            accuracy = MODELS[name]().fit(pixels, labels).score(parts["test"].pixels().numpy(), parts["test"].labels)
            pl_module.log(f"test/{name}/accuracy", float(accuracy))
