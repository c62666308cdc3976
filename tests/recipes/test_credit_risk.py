"""The credit risk recipe: tables, their parts, what a score is measured by, and the experiment's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from omegaconf import OmegaConf
from pyarrow import parquet
from sklearn.metrics import brier_score_loss, roc_auc_score, roc_curve
from sklearn.preprocessing import StandardScaler

from recipes.credit_risk import german_credit
from recipes.credit_risk.metrics import credit_metrics
from recipes.tables import Baselines, RowClassifier, TableData
from recipes.tables.baselines import baselines
from recipes.tables.models import ColumnMLP, ColumnTransformer
from recipes.tables.table import Encoding, read_table
from tests.support.source import ROOT

CONF: dict[str, Any] = {
    name: value
    for name, value in OmegaConf.to_container(OmegaConf.load(ROOT / "conf/data/german_credit.yaml")).items()  # type: ignore[union-attr]
    if name not in ("_target_", "otherwise")
} | {"otherwise": german_credit}


def table(tmp_path: Path, **changes: Any) -> TableData:
    """Forty applicants, some of whose values are missing."""
    lines = [
        f"{'' if n % 5 == 0 else n},{'abc'[n % 3] if n % 4 else '?'},{'good' if n % 3 else 'bad'}" for n in range(40)
    ]
    path = tmp_path / "table.csv"
    path.write_text("age,kind,paid\n" + "\n".join(lines) + "\n")
    arguments = {"target": "paid", "positive": "bad", "numeric": ["age"], "categorical": ["kind"], "path": path}
    sizes = {"num_numeric": 1, "num_categorical": 1, "num_categories": 4, "num_folds": 4}
    return TableData(**{**arguments, **sizes, **changes})


def test_missing_values_and_unknown_categories_are_told_apart_from_others() -> None:
    encoding = Encoding(["age"], ["kind", "place"])
    encoding.learn(
        [
            {"age": "1", "kind": "a", "place": "a"},
            {"age": None, "kind": None, "place": "b"},
            {"age": 3.0, "kind": "b", "place": "a"},
        ]
    )
    numbers, categories = encoding.encode(
        [{"age": 5, "kind": "b", "place": "a"}, {"age": None, "kind": "new", "place": None}]
    )
    assert numbers[0] == 3.0  # mean 2, standard deviation 1
    assert numbers[1].isnan()
    assert categories.tolist() == [[2, 4], [0, 3]]


def test_columns_are_scaled_as_scikit_learn_does() -> None:
    draw = np.random.default_rng(0)
    columns = {"tiny": 1e-9 * draw.normal(size=50), "constant": np.full(50, 0.1), "large": 1e9 + draw.normal(size=50)}
    known = [dict(zip(columns, map(float, values), strict=True)) for values in zip(*columns.values(), strict=True)]
    others: list[Any] = [{"tiny": 3e-9, "constant": 1.1, "large": 1e9}]
    encoding = Encoding(list(columns), [])
    encoding.learn(known)
    scaler = StandardScaler().fit([list(row.values()) for row in known])
    for rows in (known, others):
        expected = scaler.transform([list(row.values()) for row in rows])
        np.testing.assert_allclose(encoding.encode(rows)[0], expected, rtol=1e-5, atol=1e-6)
    assert float(encoding.encode(others)[0][0, 1]) == pytest.approx(1.0)  # a constant column keeps its unit


@pytest.mark.parametrize(("value", "told"), [("-inf", "'-inf'"), (float("inf"), "inf")])
def test_a_number_that_is_not_finite_is_refused_by_its_column(value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=f"column 'income' has {told}, which is not finite"):
        Encoding(["age", "income"], []).learn([{"age": 1, "income": 2}, {"age": None, "income": value}])


@pytest.mark.parametrize("line", ["30,radio, tv,good", "30,car"])
def test_a_line_with_other_fields_than_the_first_is_told(line: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f'age,purpose,paid\n31,"radio, tv",bad\n\n{line}\n')
    with pytest.raises(ValueError, match=rf"line 4 of .* has {line.count(',') + 1} fields, and the first line names 3"):
        read_table(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["bad", "good", "?", "good", ""], "2 of the 5 rows of table.csv have no 'paid'"),
        (["bad", "good", "late"], r"'paid' of table.csv has 3 values \(bad, good, late\), and this recipe tells two"),
    ],
)
def test_rows_without_a_class_or_of_a_third_are_refused(values: list[str], message: str, tmp_path: Path) -> None:
    data = table(tmp_path)
    (tmp_path / "table.csv").write_text("age,kind,paid\n" + "".join(f"1,a,{value}\n" for value in values))
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_each_row_is_tested_in_one_fold_and_parts_have_the_same_share_of_bad_ones() -> None:
    tested = []
    for fold in range(5):
        data = TableData(**{**CONF, "fold": fold})
        data.setup("fit")
        sizes = {name: len(part) for name, part in data.parts.items()}  # type: ignore[arg-type]
        assert sizes == {"train": 640, "val": 160, "test": 200}
        assert [float(part.labels.mean()) for part in data.parts.values()] == pytest.approx([0.3] * 3)  # type: ignore[attr-defined]
        numbers = data.parts["test"].numbers * data.encoding.std + data.encoding.mean  # type: ignore[attr-defined]
        tested += numbers.round().int().tolist()
        seen = data.parts["train"].numbers  # type: ignore[attr-defined]
        torch.testing.assert_close(seen.mean(0), torch.zeros(7), atol=1e-5, rtol=0)  # the other parts have no say
    rows = data.rows()
    assert sorted(tested) == sorted([int(row[name]) for name in data.numeric] for row in rows)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_categories": 3}, "data.num_categories=3, and the columns have 4"),
        ({"target": "payed"}, "has no column 'payed'; its columns are age, kind, paid"),
        ({"positive": "never"}, "data.positive='never', and 'paid' has the values bad, good"),
        (
            {"numeric": ["kind"], "categorical": ["age"], "num_categories": 80},
            "column 'kind' has '[abc]', which is no number",
        ),
        ({"num_numeric": 2}, "data.num_numeric=2, and 1 such columns are named"),
        ({"fold": 4}, "data.fold=4 is none of data.num_folds=4"),
        ({"path": None}, "there is no table; pass a .csv or .parquet file"),
    ],
)
def test_what_a_config_says_wrongly_is_told(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        table(tmp_path, **changes).setup("fit")


def test_a_parquet_file_is_read_as_a_csv_file_is(tmp_path: Path) -> None:
    from_csv = table(tmp_path)
    from_csv.setup("fit")
    rows = [
        {**row, "age": None if row["age"] is None else int(row["age"])} for row in read_table(tmp_path / "table.csv")
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")
    from_parquet = table(tmp_path, path=tmp_path / "table.parquet")
    from_parquet.setup("fit")
    for one, other in zip(from_csv.parts.values(), from_parquet.parts.values(), strict=True):
        torch.testing.assert_close(vars(one), vars(other), equal_nan=True)


def test_a_file_of_another_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "table.xlsx").touch()
    with pytest.raises(ValueError, match=r"neither a \.csv nor a \.parquet file"):
        read_table(tmp_path / "table.xlsx")


def test_a_score_is_measured_as_others_measure_it() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (301,), generator=generator)
    probabilities = (0.3 * labels + 0.7 * torch.rand(301, generator=generator)).clamp(0, 1)
    metrics = credit_metrics(cost_of_bad=5.0)
    for piece, of_piece in zip(probabilities.split(50), labels.split(50), strict=True):
        for name, metric in metrics.items():
            metric.update(piece, of_piece.float() if name == "brier" else of_piece)
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    auc = roc_auc_score(labels, probabilities)
    false_positives, true_positives, _ = roc_curve(labels, probabilities)
    weights, right = np.where(labels == 1, 5.0, 1.0), (probabilities > 1 / 6).numpy() == (labels.numpy() == 1)
    expected = {"auc": auc, "gini": 2 * auc - 1, "ks": (true_positives - false_positives).max()}
    expected |= {
        "brier": brier_score_loss(labels, probabilities),
        "cost_weighted_accuracy": weights[right].sum() / weights.sum(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert 0 < found["calibration_error"] < 0.3


@pytest.mark.parametrize("network", [ColumnTransformer, ColumnMLP])
def test_networks_take_missing_numbers(network: Any) -> None:
    model = network(2, 1, 5)
    numbers, categories = torch.tensor([[1.0, float("nan")], [float("nan"), 0.5]]), torch.tensor([[4], [0]])
    logits = model(numbers, categories)
    assert logits.shape == (2,)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_baselines_foretell_what_others_report() -> None:
    """Logistic regression reaches an AUC of 0.75 to 0.82 on a fold of these data."""
    data = TableData(**CONF)
    data.setup("fit")
    parts: Any = data.parts
    found = baselines([parts["train"], parts["val"]], parts["test"])
    for probabilities in found.values():
        assert 0.75 < roc_auc_score(parts["test"].labels, probabilities) < 0.85


def test_baselines_are_logged_beside_the_network() -> None:
    import lightning as L

    data = TableData(**{**CONF, "batch_size": 64})
    module = RowClassifier(
        lambda: ColumnMLP(7, 13, 80),
        lambda groups: torch.optim.AdamW(groups, 2e-3),
        metrics=lambda: credit_metrics(5.0),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Baselines()],
    )
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert {"test/auc", "test/ks", "test/logistic_regression/auc", "test/gradient_boosting/brier"} <= tested.keys()
