"""Breast Cancer Wisconsin (Diagnostic), which comes with scikit-learn."""

from __future__ import annotations

from sklearn.datasets import load_breast_cancer

from recipes.tables.table import Row


def breast_cancer() -> list[Row]:
    """569 tumours by 30 measurements of their cells, and their ``diagnosis``, of which 212 are malignant: W. Wolberg,
    O. Mangasarian, N. Street and W. Street 1993, https://doi.org/10.24432/C5DW2B, of the UCI Machine Learning
    Repository, under CC BY 4.0.
    """
    loaded = load_breast_cancer()
    names = [name.replace(" ", "_") for name in loaded.feature_names]
    diagnoses = [str(loaded.target_names[target]) for target in loaded.target]
    return [
        {**dict(zip(names, numbers, strict=True)), "diagnosis": diagnosis}
        for numbers, diagnosis in zip(loaded.data.tolist(), diagnoses, strict=True)
    ]
