"""A table of applicants, in parts that have the same share of bad ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch.utils.data import Dataset

from recipes.credit_risk.table import Encoding, Row, read_table
from recipes.parts import PartsData

SPLIT_SEED = 0
"""Seed of the fixed splits; the run's own seed does not move a row from one part to another."""

GERMAN_CREDIT = Path(__file__).with_name("german_credit.csv")
"""1,000 applicants, 300 bad: Statlog (German Credit Data), H. Hofmann 1994, https://doi.org/10.24432/C5NC77, of the UCI
Machine Learning Repository, under CC BY 4.0. The codes of its categories are written out, with names for the columns.
"""


class Applicants(Dataset[dict[str, torch.Tensor]]):
    """Rows as tensors: ``numbers`` (NaN where one is missing), ``categories``, and the ``label``, 1 for bad.

    Args:
        rows: of a table.
        encoding: that was learned.
        labels: of the rows.
    """

    def __init__(self, rows: Sequence[Row], encoding: Encoding, labels: Sequence[int]) -> None:
        self.numbers, self.categories = encoding.encode(rows)
        self.labels = torch.tensor(labels, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"numbers": self.numbers[index], "categories": self.categories[index], "label": self.labels[index]}


class TableData(PartsData):
    """Any table of applicants: one fold to test on, and of the others a part to validate on.

    Args:
        target: the column to foretell.
        bad: its value for those that do not pay back.
        numeric: columns of numbers.
        categorical: columns of categories. What is in neither is left aside.
        path: a .csv or .parquet file; by default the German credit data that come with this recipe.
        fold: the part of the table that is tested on, one of ``num_folds``, stratified.
        num_folds: parts of the table.
        val_fraction: of the rest, to validate on.
        batch_size: rows per process and step.
        eval_batch_size: rows per process and batch of evaluation, by default ``batch_size``.
        num_workers: processes that read ahead.
        num_numeric, num_categorical: how many columns there are, here so that the model's config can refer to them.
        num_categories: room for categories of all columns together, likewise.

    Raises:
        ValueError: what the config says of the table is not so; the message has what is.
    """

    def __init__(
        self,
        target: str,
        bad: Any,
        numeric: Sequence[str],
        categorical: Sequence[str],
        path: str | Path | None = None,
        fold: int = 0,
        num_folds: int = 5,
        val_fraction: float = 0.2,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        *,
        num_numeric: int,
        num_categorical: int,
        num_categories: int,
    ) -> None:
        super().__init__(batch_size, num_workers, eval_batch_size)
        self.path = GERMAN_CREDIT if path is None else Path(path).expanduser()
        self.target, self.bad, self.numeric, self.categorical = target, bad, list(numeric), list(categorical)
        self.fold, self.num_folds, self.val_fraction = fold, num_folds, val_fraction
        self.num_categories = num_categories
        if not 0 <= fold < num_folds:
            raise ValueError(f"data.fold={fold} is none of data.num_folds={num_folds}; choose one from 0 on")
        for name, told, columns in (
            ("num_numeric", num_numeric, self.numeric),
            ("num_categorical", num_categorical, self.categorical),
        ):
            if told != len(columns):
                raise ValueError(f"data.{name}={told}, and {len(columns)} such columns are named; set it to that")

    def setup(self, stage: str) -> None:
        """Reads the table, splits it, and learns the encoding from the rows to train on."""
        if self.parts:
            return
        rows = read_table(self.path)
        if lacking := [n for n in (self.target, *self.numeric, *self.categorical) if n not in rows[0]]:
            raise ValueError(f"{self.path.name} has no column {lacking[0]!r}; its columns are {', '.join(rows[0])}")
        labels = [int(str(row[self.target]) == str(self.bad)) for row in rows]
        if len(set(labels)) < 2:
            values = sorted({str(row[self.target]) for row in rows})
            raise ValueError(f"data.bad={self.bad!r}, and {self.target!r} has the values {', '.join(values[:5])}")
        folds = StratifiedKFold(self.num_folds, shuffle=True, random_state=SPLIT_SEED).split(rows, labels)
        rest, test = list(folds)[self.fold]
        stratify = [labels[index] for index in rest]
        train, val = train_test_split(rest, test_size=self.val_fraction, random_state=SPLIT_SEED, stratify=stratify)
        self.encoding = encoding = Encoding(self.numeric, self.categorical)
        encoding.learn(rows[index] for index in train)
        if len(encoding.categories) > self.num_categories:
            raise ValueError(
                f"data.num_categories={self.num_categories}, and the columns have {len(encoding.categories)} with one "
                "each for what is missing; set it to that or more"
            )
        for name, part in (("train", train), ("val", val), ("test", test)):
            self.parts[name] = Applicants([rows[i] for i in part], encoding, [labels[i] for i in part])
