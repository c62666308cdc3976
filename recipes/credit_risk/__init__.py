"""Credit risk: how probable it is that an applicant does not pay back; see :mod:`recipes.tables` for how."""

from __future__ import annotations

from pathlib import Path

from recipes.credit_risk.metrics import credit_metrics
from recipes.tables.table import Row, read_table

__all__ = ["credit_metrics", "german_credit"]

GERMAN_CREDIT = Path(__file__).with_name("german_credit.csv")
"""1,000 applicants, 300 bad: Statlog (German Credit Data), H. Hofmann 1994, https://doi.org/10.24432/C5NC77, of the UCI
Machine Learning Repository, under CC BY 4.0. The codes of its categories are written out, with names for the columns.
"""


def german_credit() -> list[Row]:
    """The rows of :data:`GERMAN_CREDIT`."""
    return read_table(GERMAN_CREDIT)
