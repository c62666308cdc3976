"""Logistic regression and gradient boosting of scikit-learn on the same rows, beside the network."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from recipes.tables.data import Rows, TableData


def baselines(train: list[Rows], test: Rows) -> dict[str, np.ndarray[Any, Any]]:
    """Probabilities that the tested rows are of the positive class, by the name of what foretells them."""
    every = [*train, test]
    numbers = torch.cat([part.numbers for part in every]).numpy()
    categories = torch.cat([part.categories for part in every]).numpy()
    labels = torch.cat([part.labels for part in every]).numpy()
    known, held_out = slice(0, -len(test)), slice(-len(test), None)
    one_hot = np.zeros((len(labels), 0))
    if categories.shape[1]:
        encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(categories[known])
        one_hot = encoder.transform(categories)
    linear = np.hstack([np.nan_to_num(numbers), np.isnan(numbers), one_hot])
    columns = np.hstack([numbers, one_hot])
    found = {}
    for name, model, inputs in (
        ("logistic_regression", LogisticRegression(C=0.1, max_iter=2000), linear),
        (
            "gradient_boosting",
            HistGradientBoostingClassifier(learning_rate=0.05, max_iter=100, random_state=0),
            columns,
        ),
    ):
        found[name] = model.fit(inputs[known], labels[known]).predict_proba(inputs[held_out])[:, 1]
    return found


class Baselines(Callback):
    """Logs at the end of a test ``test/NAME/auc`` and ``test/NAME/brier`` of the baselines, which train on the rows to
    train on and to validate on: they choose nothing by the latter.
    """

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fits them, on every rank alike."""
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, TableData):
            return
        parts: dict[str, Any] = dict(data.parts)
        labels = parts["test"].labels.numpy()
        for name, probabilities in baselines([parts["train"], parts["val"]], parts["test"]).items():
            pl_module.log(f"test/{name}/auc", float(roc_auc_score(labels, probabilities)))
            pl_module.log(f"test/{name}/brier", float(brier_score_loss(labels, probabilities)))
