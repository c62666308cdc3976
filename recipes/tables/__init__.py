"""Tables with a column of two classes: numbers and categories, missing values among them, as networks take them."""

from recipes.tables.baselines import Baselines
from recipes.tables.data import TableData
from recipes.tables.module import RowClassifier

__all__ = ["Baselines", "RowClassifier", "TableData"]
