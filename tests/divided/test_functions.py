"""A divided tensor stands for the whole: every rank reads the whole's numbers, and writes reach the parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_dist.divided import Divided, as_divided, readers
from lightning_dist.parallel.tensor.shards import shard_of, shard_placement
from tests.divided.functions import READS, WHOLE, WRITES
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled


def rows(whole: Tensor) -> DTensor:
    """As fully_shard divides."""
    return distribute_tensor(whole, _mesh("dp_shard"), [Shard(0)])


def uneven_rows(whole: Tensor) -> DTensor:
    """Of which the last rank has fewer."""
    return distribute_tensor(whole[:11], _mesh("dp_shard"), [Shard(0)])


def columns(whole: Tensor) -> DTensor:
    """As tp divides the input of a row-wise layer."""
    return _on_tensor_axis(whole, 1, 1)


def packed(whole: Tensor) -> DTensor:
    """As tp divides queries, keys and values in one matrix."""
    return _on_tensor_axis(whole, 0, 3)


def _on_tensor_axis(whole: Tensor, dim: int, pieces: int) -> DTensor:
    mesh, place = _mesh("tp"), shard_placement(dim, pieces)
    part = shard_of(whole, place, mesh)
    return DTensor.from_local(part, mesh, [place], run_check=False, shape=whole.shape, stride=whole.stride())


def _mesh(axis: str) -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(axis,))


def gathered(tensor: Any) -> Tensor:
    """The whole by hand: each rank's part and which elements those are, told by numbering the whole's."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch._C.DisableTorchFunction():
        numbers = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
        place, mesh = tensor.placements[0], tensor.device_mesh
        if mesh.mesh_dim_names == ("tp",):
            where = shard_of(numbers, place, mesh)
        else:
            where = distribute_tensor(numbers, mesh, tensor.placements).to_local()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (where.long().flatten(), tensor.to_local().detach().flatten()))
        whole = torch.empty(tensor.numel(), dtype=tensor.dtype)
        for index, values in everyone:
            whole[index] = values
        return whole.view(tensor.shape)


def _parameters(divide: Callable[[Tensor], DTensor]) -> tuple[Any, nn.Parameter]:
    whole = WHOLE[:11] if divide is uneven_rows else WHOLE
    return as_divided(nn.Parameter(divide(WHOLE.clone()))), nn.Parameter(whole.clone())


def _difference(mine: Any, plain: Any) -> str:
    mine, plain = gathered(mine), plain.detach()
    if mine.shape != plain.shape or mine.dtype != plain.dtype:
        return f"{tuple(mine.shape)} {mine.dtype} / {tuple(plain.shape)} {plain.dtype}"
    return "" if torch.allclose(mine.double(), plain.double(), rtol=1e-6, atol=1e-9) else f"{mine} / {plain}"


def _read(divide: Callable[[Tensor], DTensor]) -> list[str]:
    wrong = []
    for name, read in READS.items():
        if divide is uneven_rows and name in ("equal", "beside a plain tensor", "transposed"):
            continue
        for differentiably in (False, True):
            mine, plain = _parameters(divide)
            with torch.set_grad_enabled(differentiably):
                found, expected = read(mine), read(plain)
            wrong += [f"{name}: {text}" for text in [_difference(found, expected)] if text]
            if differentiably and expected.requires_grad:
                found.double().pow(2).sum().backward()
                expected.double().pow(2).sum().backward()
                wrong += [f"gradient of {name}: {text}" for text in [_difference(mine.grad, plain.grad)] if text]
    return wrong


def _write(divide: Callable[[Tensor], DTensor]) -> list[str]:
    wrong = []
    for name, write in WRITES.items():
        if divide is rows and name == "init.sparse_":  # draws which elements by itself, on each data rank its own
            continue
        mine, plain = _parameters(divide)
        with torch.no_grad():
            torch.manual_seed(7)
            write(plain)
            torch.manual_seed(7 if dist.get_rank() == 0 or divide in (columns, packed) else 8)  # data ranks draw apart
            write(mine)
        wrong += [f"{name}: {text}" for text in [_difference(mine, plain)] if text]
        assert type(mine) is Divided
    return wrong


@pytest.mark.parametrize("divide", [rows, uneven_rows, columns, packed])
def test_every_rank_reads_the_whole(divide: Any) -> None:
    assert run_on_ranks(2, _read, divide) == [[], []]


@pytest.mark.parametrize("divide", [rows, columns, packed])
def test_writes_reach_the_parts(divide: Any) -> None:
    assert run_on_ranks(2, _write, divide) == [[], []]


def _copies() -> tuple[bool, float]:
    mine, plain = _parameters(rows)
    copied = copy.deepcopy(mine)
    with torch.no_grad():
        mine.zero_()
    is_parameter = isinstance(copied, nn.Parameter) and type(copied) is Divided and copied.requires_grad
    return is_parameter, float((gathered(copied) - plain).abs().max())


def test_a_deep_copy_is_divided_and_its_own() -> None:
    assert run_on_ranks(2, _copies) == [(True, 0.0)] * 2


def _refusals() -> list[str]:
    mine, _ = _parameters(rows)
    told = []
    for wrong in (
        lambda: setattr(mine, "data", torch.zeros(3)),
        lambda: setattr(mine, "data", mine.data.float()),
        lambda: mine.register_hook(lambda gradient: gradient),
        lambda: mine.mul_(2),
    ):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            wrong()
        told.append(str(caught.value))
    return told


def test_what_cannot_be_is_refused_on_all_ranks() -> None:
    for told in run_on_ranks(2, _refusals):
        shape, dtype, hook, leaf = told
        assert "its shape and dtype stay those that it was divided with" in shape
        assert "float32" in dtype
        assert "on_after_backward or on_before_optimizer_step" in hook
        assert "a leaf Variable that requires grad is being used in an in-place operation" in leaf


def _read_on_rank_zero() -> str:
    mine, _ = _parameters(rows)
    rank_zero_only.rank = dist.get_rank()  # type: ignore[attr-defined]
    try:
        rank_zero_only(lambda: float(mine.norm()))()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_reader_that_only_rank_zero_runs_is_refused() -> None:
    first, second = run_on_ranks(2, _read_on_rank_zero)
    assert "all ranks have to ask" in first
    assert second == ""


def _read_on_one_rank() -> str:
    readers.PATIENCE = timedelta(seconds=1)
    mine, _ = _parameters(rows)
    for _ in range(2):
        float(mine.norm())  # all ranks do
    try:
        if dist.get_rank() == 1:
            float(mine.norm())
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_reader_that_only_one_rank_runs_is_told_in_time() -> None:
    first, second = run_on_ranks(2, _read_on_one_rank)
    assert first == ""
    assert "_read_on_one_rank, line" in second
    assert "all ranks have to ask" in second


def _optimizers() -> list[str]:
    wrong = []
    for divide in (rows, packed):
        for make in (
            lambda p: torch.optim.AdamW(p, 0.1),
            lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
            lambda p: torch.optim.AdamW(p, 0.1, fused=True),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=False),
            lambda p: torch.optim.Adafactor(p, 0.1),
            lambda p: torch.optim.Rprop(p, 0.1),
            lambda p: torch.optim.LBFGS(p, 0.1),
        ):
            mine, plain = _parameters(divide)
            beside = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]  # plain, in the same group
            for parameter, other in ((mine, beside[0]), (plain, beside[1])):
                optimizer = make([parameter, other])

                def closure(parameter: Any = parameter, other: Any = other, optimizer: Any = optimizer) -> Tensor:
                    optimizer.zero_grad()
                    loss = ((parameter - 0.3) ** 2).sum() + (other**2).sum()
                    loss.backward()
                    return loss

                for _ in range(3):
                    optimizer.step(closure)
            wrong += [f"{make(beside)}: {text}" for text in [_difference(mine, plain)] if text]
    return wrong


def test_optimizers_step_as_over_whole_parameters() -> None:
    assert run_on_ranks(2, _optimizers) == [[], []]
