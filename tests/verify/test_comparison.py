"""What a comparison tells apart: masks beside other numbers, and how far weights have moved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dist.layout import Layout
from lightning_dist.verify.activations import Activations
from lightning_dist.verify.comparison import Comparison, Tolerance, compare
from lightning_dist.verify.departure import Departure, first_departure
from lightning_dist.verify.distances import distance
from lightning_dist.verify.training import Record

FLOAT64, FLOAT32, BFLOAT16 = map(Tolerance.of, (torch.float64, torch.float32, torch.bfloat16))
MASKS = [float("-inf"), -1e9, torch.finfo(torch.float32).min, torch.finfo(torch.float64).min, -1e4]
ONES = torch.ones(4, 3, dtype=torch.float64)


def mask(value: float) -> Tensor:
    return torch.triu(torch.full((8, 8), value, dtype=torch.float64), 1)


@pytest.fixture
def compared(tmp_path: Path) -> Any:
    """Compares weights of a layout with those of one process, that had a step."""

    def compare_weights(
        mine: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
        start: Mapping[str, Tensor] | None = None,
        tolerance: Tolerance = FLOAT64,
        shares: Mapping[str, Tensor] | None = None,
        **fields: Any,
    ) -> Comparison:
        records = []
        for number, weights in enumerate((expected, mine)):
            squares: Any = [{name: {(): 1.0} for name in expected}]
            record = Record(**{"squares": squares, "batch_of": [0], **fields})
            for what, tensors in {"weights": weights, "start": start or expected, "shares": shares or {}}.items():
                record.files[what] = tmp_path / f"{what}-{number}.pt"
                torch.save(dict(tensors), record.files[what])
            records.append(record)
        return compare(records[1:], records[0], Layout.parse("tp=1"), tolerance)  # type: ignore[arg-type]

    return compare_weights


@pytest.mark.parametrize("value", MASKS)
def test_a_mask_among_buffers_hides_no_other_buffer(compared: Any, value: float) -> None:
    expected = {"mean": 1e-2 * ONES, "mask": mask(value)}
    found = compared({**expected, "mean": expected["mean"] * (1 + 1e-7)}, expected, buffers={"mean", "mask"})
    assert [wrong.kind for wrong in found.wrong] == ["buffers"]
    assert found.departure.name == "mean"


@pytest.mark.parametrize("value", MASKS)
def test_a_mask_that_is_another_is_told(compared: Any, value: float) -> None:
    other = mask(value).T.clone()
    assert compared({"mask": other}, {"mask": mask(value)}, buffers={"mask"}).wrong
    assert compared({"mask": mask(value)}, {"mask": mask(value)}, buffers={"mask"}).wrong == []
    beside = mask(value)
    beside[0, 0] = 1e-3  # one of its zeros
    assert compared({"mask": beside}, {"mask": mask(value)}, buffers={"mask"}).wrong


@pytest.mark.parametrize("value", MASKS)
def test_a_frozen_mask_hides_no_weight(compared: Any, value: float) -> None:
    squares: Any = [{"small": {(): 1.0}}]
    start = {"small": 1e-3 * ONES, "mask": mask(value)}
    expected = {**start, "small": 1.001e-3 * ONES}
    found = compared({**expected, "small": 1.0011e-3 * ONES}, expected, start, squares=squares)
    assert found.departure.name == "small"
    assert compared(expected, expected, start, squares=squares).wrong == []


def departure(
    mine: Mapping[str, Tensor], expected: Mapping[str, Tensor], given: tuple[Tensor, ...] = ()
) -> Departure | None:
    """Of what modules of these names return, and that of one process."""
    recorded = []
    for outputs in (mine, expected):
        found = Activations(dict.fromkeys(outputs, "Linear"))
        found.outputs = {(name, "output", 0): {0: output} for name, output in outputs.items()}
        found.outputs_in_order = [(place, 0) for place in found.outputs]
        recorded.append(found)
    for found, tensor in zip(recorded, given, strict=False):
        found.inputs[next(iter(mine)), "input", 0] = {0: tensor}
    return first_departure(recorded[1], recorded[:1], Layout.parse("tp=1"), 1e-8)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", MASKS)
def test_a_mask_among_outputs_hides_none(value: float) -> None:
    expected = {"mask": mask(value), "layer": ONES}
    assert departure(expected, expected) is None
    found = departure({**expected, "layer": 1.001 * ONES}, expected)
    assert found is not None
    assert found.name == "layer"
    found = departure({**expected, "mask": mask(value).T.clone()}, expected)
    assert found is not None
    assert found.name == "mask"


def test_huge_numbers_are_compared_by_themselves() -> None:
    whole = torch.tensor([1e9, 1.0], dtype=torch.float64)
    assert distance(torch.tensor([1e9 + 1, 1.0], dtype=torch.float64), whole, 0.0) == pytest.approx(1e-9)
    assert distance(torch.tensor([1e9, 1.1], dtype=torch.float64), whole, 0.0) == pytest.approx(0.1)
    nan = torch.tensor([float("nan"), 1.0], dtype=torch.float64)
    assert distance(nan, nan.clone(), 0.0) == 0
    assert distance(-torch.tensor([torch.inf]), torch.tensor([torch.inf]), 0.0) == torch.inf


def test_what_a_module_is_given_is_told_before_what_it_returns() -> None:
    found = departure({"layer": 2 * ONES}, {"layer": ONES}, (2 * ONES, ONES))
    assert found is not None
    assert (found.kind, found.name) == ("input", "layer")
    assert "what layer (Linear) is given departs already" in found.sentence
    found = departure({"layer": 2 * ONES}, {"layer": ONES}, (ONES, ONES))
    assert found is not None
    assert found.kind == "output"


# ---------------------------------------------------------------- weights, by how far they have moved


@pytest.mark.parametrize("tolerance", [FLOAT64, FLOAT32, BFLOAT16])
def test_a_step_that_is_not_taken_is_told_however_small_it_is(compared: Any, tolerance: Tolerance) -> None:
    expected = {"weight": ONES + 1e-6}
    found = compared({"weight": ONES}, expected, {"weight": ONES}, tolerance)
    assert "weights" in [wrong.kind for wrong in found.wrong]
    assert found.departure.sentence.endswith("and no gradient departs: look at the optimizer")
    assert compared(expected, expected, {"weight": ONES}, tolerance).wrong == []


def test_a_hundredth_of_a_step_is_told_where_all_entries_lack_it(compared: Any) -> None:
    """As weight decay is; single entries may be that far away, as their gradients may be rounding."""
    torch.manual_seed(0)
    start = torch.ones(1000, dtype=torch.float64)
    moved = 1e-3 * torch.randn(1000, dtype=torch.float64).sign()
    without = compared({"w": start + moved}, {"w": start + moved - 1e-5}, {"w": start}, FLOAT32)
    assert [wrong.kind for wrong in without.wrong] == ["steps of weights"]
    single = moved.clone()
    single[0] *= -1
    assert compared({"w": start + single}, {"w": start + moved}, {"w": start}, FLOAT64).wrong
    single[0] = moved[0] * 0.5
    assert compared({"w": start + single}, {"w": start + moved}, {"w": start}, FLOAT32).wrong == []


def test_a_weight_whose_gradient_is_rounding_may_move_anywhere(compared: Any) -> None:
    start, expected, mine = ({"key.bias": ONES + move, "weight": ONES} for move in (0, 1e-3, -1e-3))
    squares: Any = [{"key.bias": {(): 1e-34}, "weight": {(): 1.0}}]
    assert compared(mine, expected, start, squares=squares).wrong == []
    heard: Any = [{"key.bias": {(): 1e-4}, "weight": {(): 1.0}}]
    for tolerance in (FLOAT64, FLOAT32, BFLOAT16):
        assert compared(mine, expected, start, tolerance, squares=heard).wrong


def test_entries_whose_gradients_are_rounding_may_move_anywhere(compared: Any) -> None:
    """A third of a packed bias is that of keys."""
    start, expected = {"bias": torch.zeros(12)}, {"bias": torch.full((12,), 1e-3)}
    keys = torch.arange(12) // 4 == 1
    mine = {"bias": expected["bias"].where(~keys, -1e-3)}
    shares = {"bias": torch.ones(12).where(~keys, 1e-12)}
    for tolerance in (FLOAT64, FLOAT32, BFLOAT16):
        assert compared(mine, expected, start, tolerance, shares).wrong == []
        assert compared(mine, expected, start, tolerance).wrong


def test_rounding_of_a_weight_in_its_dtype_is_no_step(compared: Any) -> None:
    start = {"w": torch.full((64,), 1000.0)}
    expected = {"w": start["w"] + 1e-4}
    mine = {"w": expected["w"].nextafter(torch.tensor(2000.0))}
    assert compared(mine, expected, start, FLOAT32).wrong == []
