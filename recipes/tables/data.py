"""A table in parts, each with the same share of rows of the class that is looked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch.utils.data import Dataset

from recipes.parts import PartsData
from recipes.tables.table import Encoding, Row, read_table

SPLIT_SEED = 0
"""Seed of the fixed splits; the run's own seed does not move a row from one part to another."""


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows as tensors: ``numbers`` (NaN where one is missing), ``categories``, and ``label``, 1 for the positive class.

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
    """Any table with a column of two classes to foretell: one fold to test on, and of the others a part to validate on.

    Args:
        target: the column to foretell.
        positive: its value for the class that is looked for, such as applicants that do not pay back.
        numeric: columns of numbers.
        categorical: columns of categories. What is in neither is left aside.
        path: a .csv or .parquet file.
        otherwise: gives the rows where there is no path.
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
        positive: Any,
        numeric: Sequence[str],
        categorical: Sequence[str],
        path: str | Path | None = None,
        otherwise: Callable[[], Sequence[Row]] | None = None,
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
        if path is None and otherwise is None:
            raise ValueError("there is no table; pass a .csv or .parquet file as data.path=...")
        self.path, self._otherwise = None if path is None else Path(path).expanduser(), otherwise
        self.target, self.positive, self.numeric, self.categorical = target, positive, list(numeric), list(categorical)
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

    def rows(self) -> Sequence[Row]:
        """The table."""
        if self.path is not None:
            return read_table(self.path)
        assert self._otherwise is not None
        return self._otherwise()

    def setup(self, stage: str) -> None:
        """Reads the table, splits it, and learns the encoding from the rows to train on."""
        if self.parts:
            return
        rows = self.rows()
        if lacking := [n for n in (self.target, *self.numeric, *self.categorical) if n not in rows[0]]:
            raise ValueError(f"{self._name} has no column {lacking[0]!r}; its columns are {', '.join(rows[0])}")
        labels = self._labels(rows)
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
            self.parts[name] = Rows([rows[i] for i in part], encoding, [labels[i] for i in part])

    @property
    def _name(self) -> str:
        return self.path.name if self.path else "the table"

    def _labels(self, rows: Sequence[Row]) -> list[int]:
        """1 for each row of the positive class, 0 for those of the other."""
        targets = [row[self.target] for row in rows]
        if missing := sum(target is None or target != target for target in targets):
            raise ValueError(
                f"{missing} of the {len(rows)} rows of {self._name} have no {self.target!r}, so their class is not "
                "known; leave these rows out of the table"
            )
        values = sorted(set(map(str, targets)))
        told = f"{', '.join(values[:5])}{', ...' if len(values) > 5 else ''}"
        if str(self.positive) not in values or len(values) < 2:
            raise ValueError(f"data.positive={self.positive!r}, and {self.target!r} has the values {told}")
        if len(values) > 2:
            raise ValueError(
                f"{self.target!r} of {self._name} has {len(values)} values ({told}), and this recipe tells two classes "
                "apart; leave the rows of others out, or write one value for all that are not data.positive"
            )
        return [int(str(target) == str(self.positive)) for target in targets]
