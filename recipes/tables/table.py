"""Tables from files, and their columns as numbers."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        ValueError: a file of another kind, or one that has no rows, or a line of a CSV file with other fields than its
            first.
    """
    rows: list[Row]
    if path.suffix == ".csv":
        rows = list(_of_lines(path))
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


def _of_lines(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file)
        names = next(lines, [])
        for fields in filter(None, lines):
            if len(fields) != len(names):
                raise ValueError(
                    f"line {lines.line_num} of {path} has {len(fields)} fields, and the first line names {len(names)}; "
                    "write as many, in quotes where a field has a comma"
                )
            yield {name: None if value in MISSING else value for name, value in zip(names, fields, strict=True)}


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
        """Takes mean and standard deviation of the numbers, and the categories in the order of their names.

        A column whose spread is nothing but rounding of its mean keeps its unit, as with scikit-learn's StandardScaler.
        """
        rows = list(rows)
        numbers = self._numbers(rows)
        known = ~numbers.isnan()
        count = known.sum(0).clamp(min=1)
        self.mean = numbers.nan_to_num(0.0).sum(0) / count
        variance = torch.where(known, numbers - self.mean, 0.0).square().sum(0) / count
        rounding = count * torch.finfo(torch.float64).eps
        is_constant = variance <= rounding * variance + (rounding * self.mean).square()
        self.std = torch.where(is_constant, 1.0, variance.sqrt())
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
        number = float("nan") if value is None else float(value)
    except ValueError:
        raise ValueError(f"column {name!r} has {value!r}, which is no number; name it among data.categorical") from None
    if math.isinf(number):
        raise ValueError(f"column {name!r} has {value!r}, which is not finite; leave it empty where a value is missing")
    return number
