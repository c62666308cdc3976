"""Batches of data ranks as those of one process: where their samples are, and which of the validation are repeated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dist.verify.batches import Recorded, interleaved, joined, told_alike


def batch_of(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value)


def whole(*batches: Any, batch_split: Any = None, by_loader: bool = False) -> Any:
    """What one process is given for a batch of each rank."""
    ranks = [Recorded([batch], [0], 4.0, by_loader=by_loader) for batch in batches]
    return joined(ranks, batch_split).batches[0]


@pytest.mark.parametrize("split", [{"x": 1, "y": 1, "length": None}, {"x": 1, "y": 1, "names": "each"}, 1])
def test_samples_are_where_batch_split_says(split: Any) -> None:
    """Time first, as recurrent layers of torch have it."""
    of_ranks: list[Any] = [
        {"x": batch_of(v, 7, 2, 3), "y": batch_of(v, 7, 2), "length": 7, "names": ["a", "b"]} for v in (0, 1)
    ]
    found = whole(*of_ranks, batch_split=split)
    assert {name: found[name].shape for name in "xy"} == {"x": (7, 4, 3), "y": (7, 4)}
    assert found["x"][0, :, 0].tolist() == [0, 0, 1, 1]
    assert found["length"] == 7
    assert found["names"] == ["a", "b"] * (2 if "names" in str(split) else 1)


def test_a_function_says_nothing_of_places() -> None:
    assert whole(batch_of(0, 2, 3), batch_of(1, 2, 3), batch_split=lambda batch, parts: [batch]).shape == (4, 3)


def test_loaders_have_their_own_numbers_of_samples() -> None:
    of_ranks = [{"small": batch_of(v, 2, 3), "large": [batch_of(v, 5)], "ended": None} for v in (0, 1)]
    found = whole(*of_ranks, by_loader=True)
    assert (found["small"].shape, found["large"][0].shape, found["ended"]) == ((4, 3), (10,), None)
    found = whole(*((batch_of(v, 2), batch_of(v, 5)) for v in (0, 1)), by_loader=True)
    assert [part.shape for part in found] == [(4,), (10,)]


def test_uneven_parts_of_a_stream_lose_no_batch() -> None:
    """Three batches on each of two ranks, where one process has five of other sizes."""
    given = [Recorded(validation=[list("ace")]), Recorded(validation=[list("bdf")])]
    assert interleaved(given, [5]) == [list("abcdef")]
    tensors = [[batch_of(v, 2) for v in values] for values in ((0, 2, 4), (1, 3, 0))]
    (found,) = interleaved([Recorded(validation=[batches]) for batches in tensors], [5])
    assert [float(batch[0]) for batch in found] == [0, 1, 2, 3, 4]


def test_what_can_not_be_compared_is_repeated_where_there_are_too_many() -> None:
    given = [Recorded(validation=[[object(), object()]]), Recorded(validation=[[object(), object()]])]
    assert len(interleaved(given, [3])[0]) == 3


def test_what_ranks_share_is_no_fault_where_one_process_has_no_other() -> None:
    """A loader of fewer batches than ranks, and one whose batches are all alike."""
    ranks = [Recorded([batch_of(0, 2), batch_of(1, 2)], [0, 1], 4.0)] * 2
    (told,) = told_alike(ranks, replace(ranks[0]))
    assert told.startswith("data ranks 0 and 1 are given the same batch in each step")
    assert told_alike(ranks, replace(ranks[0], length=1.0)) == []
    assert told_alike(ranks, Recorded([batch_of(0, 2)] * 2, [0, 1], 4.0)) == []
    assert told_alike([ranks[0], Recorded([batch_of(0, 2), batch_of(2, 2)], [0, 1], 4.0)], ranks[0]) == []
