"""Tables from files, and their columns as numbers."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Row = Mapping[str, Any]

MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "null", "None")
"""What stands in a file where there is no value."""


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV or Parquet file, by the names of their columns; None where a value is missing.

    Raises:
        ValueError: a file of another kind, or one that has no rows.
    """
    rows: list[Row]
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [
                {name: None if value in MISSING else value for name, value in row.items()}
                for row in csv.DictReader(file)
            ]
    elif path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(f"{path.name} is a Parquet file, which pyarrow reads; pip install pyarrow") from error
        rows = parquet.read_table(path).to_pylist()
    else:
        raise ValueError(f"{path.name} is neither a .csv nor a .parquet file; write the table as one of them")
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


@dataclass
class Encoding:
    """How columns become numbers, as the rows say from which it was learned.

    Args:
        numeric: columns of numbers.
        categorical: columns of categories.
    """

    numeric: Sequence[str]
    categorical: Sequence[str]
    mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    std: Tensor = field(default_factory=lambda: torch.ones(0))
    categories: dict[tuple[str, Any], int] = field(default_factory=dict)
    """The number of each category of a column; None is what is missing, or was not there."""

    def learn(self, rows: Iterable[Row]) -> None:
        """Takes mean and standard deviation of the numbers, and the categories in the order of their names."""
        rows = list(rows)
        numbers = self._numbers(rows)
        known = ~numbers.isnan()
        count = known.sum(0).clamp(min=1)
        self.mean = numbers.nan_to_num(0.0).sum(0) / count
        squares = torch.where(known, numbers - self.mean, 0.0).square().sum(0) / count
        self.std = squares.sqrt().clamp(min=1e-6)
        for name in self.categorical:
            found = sorted({str(row[name]) for row in rows if row[name] is not None})
            for category in (None, *found):
                self.categories[name, category] = len(self.categories)

    def encode(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Standardised numbers ``(rows, numeric)``, not a number where one is missing, and the numbers of categories
        ``(rows, categorical)``, which no two columns share.
        """
        numbers = (self._numbers(rows) - self.mean) / self.std
        return numbers.float(), torch.tensor(
            [[self._category(name, row[name]) for name in self.categorical] for row in rows], dtype=torch.int64
        )

    def _numbers(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([[_number(name, row[name]) for name in self.numeric] for row in rows], dtype=torch.float64)

    def _category(self, name: str, value: Any) -> int:
        unknown = self.categories[name, None]
        return unknown if value is None else self.categories.get((name, str(value)), unknown)


def _number(name: str, value: Any) -> float:
    try:
        return float("nan") if value is None else float(value)
    except ValueError:
        raise ValueError(f"column {name!r} has {value!r}, which is no number; name it among data.categorical") from None
