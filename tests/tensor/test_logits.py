"""Logits split by vocabulary: any code that looks at them sees the whole, and cross_entropy never gathers them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

from lightning_dist.parallel.tensor.vocab_parallel.logits import VocabLogits
from lightning_dist.parallel.tensor.vocab_parallel.vocabulary import Vocabulary
from tests.support.collectives import Collectives
from tests.support.ranks import RankError, run_on_ranks

pytestmark = pytest.mark.sampled

ROWS = 6


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))


def _both(size: int, shape: tuple[int, ...] = (ROWS,), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Any, Any]:
    """Plain logits, this rank's columns of them, and the logits made of those."""
    torch.manual_seed(5)
    plain = (3 * torch.randn(*shape, size)).to(dtype).requires_grad_()
    mesh = _mesh()
    columns = Vocabulary(mesh, size).own(plain.detach(), -1).clone().requires_grad_()
    return plain, columns, VocabLogits.from_local(columns, mesh, size)


def _targets(size: int, kind: str) -> Tensor:
    torch.manual_seed(6)
    if kind == "probabilities":
        return torch.randn(ROWS, size).softmax(-1)
    targets = torch.randint(size, (ROWS,))
    targets[1] = targets[4] = -100
    return targets


LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.2},
    "weighted": {"weight": True},
    "weighted and smoothed": {"weight": True, "label_smoothing": 0.1},
    "ignoring": {"ignore_index": 2},
}


def _loss(size: int, kind: str, options: dict[str, Any]) -> dict[str, int]:
    plain, columns, logits = _both(size)
    target = _targets(size, kind)
    options = dict(options)
    if options.pop("weight", False):
        options["weight"] = torch.rand(size) + 0.5
    if "ignore_index" in options:
        target = target.clamp(min=0)
    expected = F.cross_entropy(plain, target, **options)
    with Collectives() as counted:
        loss = F.cross_entropy(logits, target, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        scale = torch.arange(1.0, 1 + loss.numel()).view_as(loss)
        (loss * scale).sum().backward()
    (expected * scale).sum().backward()
    own = logits.vocabulary.own(plain.grad, -1)
    torch.testing.assert_close(columns.grad, own, rtol=1e-5, atol=1e-7)
    return dict(counted.count)


@pytest.mark.parametrize("size", [8, 7, 3])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("options", LOSSES)
def test_cross_entropy_equals_torchs_in_two_small_collectives(size: int, kind: str, options: str) -> None:
    """With three columns on two ranks one of them holds a single one; see the next test for none."""
    if kind == "probabilities" and options == "ignoring":
        return  # torch refuses it
    assert run_on_ranks(2, _loss, size, kind, LOSSES[options]) == [{"all-reduce": 2}] * 2


def test_a_rank_without_columns_takes_part() -> None:
    """Four ranks, of which torch's chunk rule gives the last none of six columns."""
    assert run_on_ranks(4, _loss, 6, "classes", {}) == [{"all-reduce": 2}] * 4


def _language_loss(dtype: torch.dtype) -> None:
    """As models do it: shifted, flattened, in float32."""
    size = 9
    plain, columns, logits = _both(size, (2, 5), dtype)
    target = torch.arange(10).view(2, 5) % size

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].float().reshape(-1, size), target[:, 1:].reshape(-1))

    with Collectives() as counted:
        found = loss(logits)
        found.backward()
    assert counted.count == {"all-reduce": 2}
    expected = loss(plain)
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    own = logits.vocabulary.own(plain.grad, -1)
    torch.testing.assert_close(columns.grad, own, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shifted_flattened_loss_is_never_gathered(dtype: torch.dtype) -> None:
    run_on_ranks(2, _language_loss, dtype)


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax of one row": lambda x: F.log_softmax(x[0], dim=0),
    "sum": lambda x: x.sum(),
    "mean of rows": lambda x: x.mean(0),
    "indexing": lambda x: x[:, 3],
    "gather": lambda x: x.gather(1, torch.tensor([[1], [2], [0], [5], [6], [3]])),
    "matmul": lambda x: x @ torch.arange(21.0).view(7, 3),
    "arithmetic": lambda x: (x * 2 + x / 3 - 1).tanh(),
    "with another": lambda x: x * torch.arange(7.0),
    "cat": lambda x: torch.cat([x, x], 1),
    "transpose": lambda x: x.transpose(0, 1).reshape(-1),
    "mse": lambda x: F.mse_loss(x, torch.ones_like(x)),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "max": lambda x: x.max(-1).values,
    "argmax": lambda x: x.argmax(-1),
    "topk": lambda x: x.topk(3).values,
    "topk indices": lambda x: x.topk(3).indices,
    "topk beyond a rank": lambda x: x.topk(6).values,
    "sort": lambda x: x.sort(-1).values,
    "list": lambda x: torch.tensor(x.tolist()),
    "shape": lambda x: torch.tensor([*x.shape, x.size(-1), x.numel(), x.ndim, len(x)]),
    "top-k sampling": lambda x: x.masked_fill(x < x.topk(2).values[:, -1:], -torch.inf).softmax(-1),
    "accuracy": lambda x: torchmetrics.functional.accuracy(x, torch.arange(ROWS), "multiclass", num_classes=7),
    "deepcopy": lambda x: copy.deepcopy(x.detach()) + 0,
}


def _look(name: str) -> dict[str, int]:
    plain, columns, logits = _both(7)
    expected = LOOKS[name](plain)
    with Collectives() as forward:
        found = LOOKS[name](logits)
    found_whole = found.full_tensor() if isinstance(found, VocabLogits) else found
    torch.testing.assert_close(found_whole, expected, rtol=1e-6, atol=1e-6)
    if expected.requires_grad:
        expected.square().sum().backward()
        with Collectives() as backward:
            found.square().sum().backward()
        assert not backward.count
        torch.testing.assert_close(columns.grad, logits.vocabulary.own(plain.grad, -1), rtol=1e-5, atol=1e-6)
    return dict(forward.count)


@pytest.mark.parametrize("name", LOOKS)
def test_code_that_looks_at_logits_sees_the_whole(name: str) -> None:
    costs = {"arithmetic": {}, "shape": {}, "top-k sampling": {"all-gather": 3}}  # it looks in three ways
    for counts in run_on_ranks(2, _look, name):
        assert counts == costs[name] if name in costs else counts.get("all-gather", 0) <= 1, counts
        assert set(counts) <= {"all-gather"}


def _written() -> None:
    plain, _, logits = _both(7)
    plain, logits = plain.detach().clone(), logits.detach()
    for x in (plain, logits):
        x.mul_(2)
        x[:, 2] = -torch.inf
        x[0] = 1
    torch.testing.assert_close(logits.full_tensor(), plain)


def test_logits_can_be_written_in_place() -> None:
    run_on_ranks(2, _written)


def _pickled() -> None:
    import pickle

    pickle.dumps(_both(7)[2].detach())


def test_logits_can_not_be_pickled() -> None:
    with pytest.raises(RankError, match=r"can't be pickled.*Pickle logits.full_tensor\(\)"):
        run_on_ranks(2, _pickled)


def _out_of_range() -> None:
    F.cross_entropy(_both(7)[2], torch.full((ROWS,), 7))


def test_a_target_out_of_range_is_torchs_error() -> None:
    with pytest.raises(RankError, match="Target 7 is out of bounds"):
        run_on_ranks(2, _out_of_range)
