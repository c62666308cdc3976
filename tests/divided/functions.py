"""What user code does with parameters: reads of them, and writes to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHAPE = (12, 4)
WHOLE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
OTHER = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
INPUT = torch.randn(2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

READS: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda p: p.norm(),
    "float of a norm": lambda p: torch.tensor(float(p.norm())),
    "torch.norm": torch.norm,
    "norm of rows": lambda p: p.norm(dim=1),
    "1-norm": lambda p: p.norm(1),
    "largest": lambda p: p.norm(float("inf")),
    "linalg.norm": torch.linalg.norm,
    "linalg.vector_norm": torch.linalg.vector_norm,
    "foreach norm": lambda p: torch.stack(torch._foreach_norm([p])),
    "sum": lambda p: p.sum(),
    "sum of columns": lambda p: p.sum(0),
    "mean": lambda p: p.mean(),
    "std": lambda p: p.std(),
    "max": lambda p: p.max(),
    "max of magnitudes": lambda p: p.abs().max(),
    "count": lambda p: (p > 0).sum(),
    "all": lambda p: torch.tensor(bool((p == p).all())),
    "item": lambda p: torch.tensor(p[0, 0].item()),
    "tolist": lambda p: torch.tensor(p.tolist(), dtype=torch.float64),
    "numpy": lambda p: torch.as_tensor(p.detach().numpy()),
    "len": lambda p: torch.tensor(len(p)),
    "iterate": lambda p: torch.stack([row.sum() for row in p]),
    "transposed": lambda p: p.T @ torch.ones(12, dtype=torch.float64),
    "linear": lambda p: F.linear(INPUT, p),
    "gram": lambda p: (p.T @ p - torch.eye(4, dtype=torch.float64)).pow(2).sum(),
    "singular values": torch.linalg.svdvals,
    "scaled": lambda p: p * 2,
    "reflected": lambda p: 1 - p,
    "power of": lambda p: 2**p,
    "beside a plain tensor": lambda p: p + OTHER,
    "normalised": lambda p: (p - p.mean(0)) / p.std(0),
    "where": lambda p: torch.where(p > 0, p, torch.zeros_like(p)),
    "maximum": lambda p: torch.max(p, torch.zeros_like(p)),
    "as a vector": lambda p: nn.utils.parameters_to_vector([p]),
    "concatenated": lambda p: torch.cat([p.flatten(), p.flatten()]),
    "other dtype": lambda p: p.float(),
    "equal": lambda p: torch.tensor(torch.equal(p.detach(), WHOLE)),
}


def _assign(p: Any) -> None:
    p.data = OTHER.clone()


def _assign_what_it_was(p: Any) -> None:
    before = p.data.clone()
    p.data = p.data * 0.5 + OTHER
    p.data = before * 3


def _assign_and_take_back(p: Any) -> None:
    before = p.data
    p.data = p.data + OTHER
    p.mul_(2)
    p.data = before


def _rows(p: Any) -> None:
    p.data[2:5] = 7


def _mask(p: Any) -> None:
    p[p > 0] = 0.25


def _kept_view(p: Any) -> None:
    view = p.data.view(-1)
    p.data.mul_(2)
    view[0] = view[1] + 1


def _each_row(p: Any) -> None:
    for row in p:
        row.mul_(2)


def _isub(p: Any) -> None:
    p.data -= 0.1 * OTHER


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "data = whole": _assign,
    "data = what it was": _assign_what_it_was,
    "data = what it still was": _assign_and_take_back,
    "data.clamp_": lambda p: p.data.clamp_(-0.1, 0.1),
    "data[rows]": _rows,
    "data.view": lambda p: p.data.view(-1)[3].fill_(9.0),
    "a view that is kept": _kept_view,
    "rows of an iteration": _each_row,
    "p[mask]": _mask,
    "p[0].zero_": lambda p: p[0].zero_(),
    "data[:, 1].fill_": lambda p: p.data[:, 1].fill_(3),
    "data -=": _isub,
    "copy_": lambda p: p.copy_(OTHER),
    "copy_ of itself": lambda p: p.copy_(p.flip(0)),
    "add_ a whole": lambda p: p.add_(OTHER, alpha=2),
    "mul_ a row": lambda p: p.mul_(OTHER[0]),
    "lerp_": lambda p: p.lerp_(OTHER, 0.3),
    "addcdiv_": lambda p: p.addcdiv_(OTHER, OTHER.abs() + 1, value=0.3),
    "divided by the norms of rows": lambda p: p.div_(p.norm(dim=1, keepdim=True)),
    "renorm_": lambda p: p.renorm_(2, 0, 0.1),
    "out=": lambda p: torch.mul(p, 2, out=p),
    "foreach with a number": lambda p: torch._foreach_mul_([p], 0.5),
    "foreach with a whole": lambda p: torch._foreach_add_([p], [OTHER]),
    "fill_diagonal_": lambda p: p.data.fill_diagonal_(4),
    "vector_to_parameters": lambda p: nn.utils.vector_to_parameters(torch.arange(48.0, dtype=torch.float64), [p]),
    "init.constant_": lambda p: nn.init.constant_(p, 2.0),
    "init.eye_": nn.init.eye_,
    "init.normal_": nn.init.normal_,
    "init.uniform_": nn.init.uniform_,
    "init.trunc_normal_": nn.init.trunc_normal_,
    "init.orthogonal_": nn.init.orthogonal_,
    "init.xavier_uniform_": nn.init.xavier_uniform_,
    "init.kaiming_normal_": nn.init.kaiming_normal_,
    "init.sparse_": lambda p: nn.init.sparse_(p, 0.3),
    "noise": lambda p: p.add_(torch.randn_like(p)),
}
