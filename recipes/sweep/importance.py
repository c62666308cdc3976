"""How much each swept key decides of which job is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recipes.sweep.jobs import Jobs

FEWEST = 8
"""Jobs with a value, below which nothing is said."""

PER_KEY = 4
"""And for each swept key."""

LARGEST = 3e38
"""Number of single precision, in which forests reckon."""


@dataclass(frozen=True)
class Importance:
    """What decided.

    Args:
        shares: of each key, 0 to 1, together 1; the largest first. Empty where nothing can be said.
        told: how sure that is, or why nothing can be said; a sentence.
    """

    shares: dict[str, float]
    told: str


def importance(jobs: Jobs) -> Importance:
    """Permutation importance (Breiman 2001) in scikit-learn's random forest, which predicts the place of a job among
    all from its keys: by how much worse it predicts when the values of one key are dealt out anew. Places rather than
    values: a single loss that exploded would decide all.
    """
    measured = [job for job in jobs.ranked if jobs.value(job) is not None]
    needed = max(FEWEST, PER_KEY * len(jobs.keys))
    if not jobs.keys or len(measured) < needed:
        few = f"{len(measured)} of the jobs have a value; {needed} are needed to tell what decides"
        return Importance({}, few if jobs.keys else "no key differs between the jobs")
    import numpy as np
    from sklearn.inspection import permutation_importance

    rows = np.array([[job.values.get(key, "") for key in jobs.keys] for job in measured], dtype=object)
    values = [jobs.value(job) for job in measured]
    places = np.array([values.index(value) for value in values], dtype=float)  # equal values share a place
    forest = _forest(rows).fit(rows, places)
    explained = float(forest[-1].oob_score_)
    if explained <= 0:
        return Importance({}, "the keys do not tell which job is better: chance, or another key, decides more")
    worse = permutation_importance(forest, rows, places, n_repeats=20, random_state=0).importances_mean.clip(0)
    shares = dict(zip(jobs.keys, (worse / (worse.sum() or 1)).tolist(), strict=True))
    told = f"from {len(measured)} jobs; the keys tell {explained:.0%} of the differences of jobs left out"
    return Importance(dict(sorted(shares.items(), key=lambda item: -item[1])), told)


def _forest(rows: Any) -> Any:
    """Numbers as they are, anything else a column for each value."""
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, OneHotEncoder

    numbers = [column for column in range(rows.shape[1]) if all(map(is_number, rows[:, column]))]
    others = [column for column in range(rows.shape[1]) if column not in numbers]
    columns = make_column_transformer(
        (FunctionTransformer(lambda part: part.astype(float)), numbers),
        (OneHotEncoder(handle_unknown="ignore"), others),
        sparse_threshold=0,
    )
    return make_pipeline(columns, RandomForestRegressor(200, oob_score=True, random_state=0))


def is_number(text: str) -> bool:
    """Whether a value of an override is one, and can be drawn and reckoned with: not infinite in single precision."""
    try:
        return abs(float(text)) <= LARGEST
    except ValueError:
        return False
