"""Credit risk: how probable it is that an applicant does not pay back, from the columns of a table."""

from recipes.credit_risk.baselines import Baselines
from recipes.credit_risk.data import TableData
from recipes.credit_risk.module import CreditScorer

__all__ = ["Baselines", "CreditScorer", "TableData"]
