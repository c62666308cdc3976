"""The state that a user's own objects hold in Python, to be put back after something that counts for nothing."""

from __future__ import annotations

import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric


class Snapshot:
    """What objects hold in Python, to be put back: attributes, containers and their contents, tensors and arrays.

    Objects of the user's own classes are followed; tensors within lists, which collect, are taken for unchanged.

    Args:
        owners: whose attributes are kept.
        data: they are data sets, whose tensors are taken for unchanged; else data sets are left out.
        of_module: gives what restores a module that an owner holds; None, as by default, leaves it out.
    """

    def __init__(
        self,
        owners: Iterable[Any],
        data: bool = False,
        of_module: Callable[[nn.Module], Callable[[], None] | None] = lambda _: None,
    ) -> None:
        owners = list(owners)
        self._data, self._of_module = data, of_module
        self._undos: list[Callable[[], object]] = []
        self._seen = {id(owner) for owner in owners}
        for owner in owners:
            self._keep_attributes(owner)

    def restore(self) -> None:
        """Everything is as it was."""
        for undo in self._undos:
            undo()

    def add(self, *values: Any) -> None:
        """These too."""
        for value in values:
            self._keep(value)

    def _keep_attributes(self, owner: Any) -> None:
        attributes = {name: value for name, value in vars(owner).items() if name not in _attributes_of_lightning()}

        def undo() -> None:
            for name in vars(owner).keys() - attributes.keys() - _attributes_of_lightning():
                del vars(owner)[name]
            vars(owner).update(attributes)

        self._undos.append(undo)
        self.add(*attributes.values())

    def _keep(self, root: Any) -> None:
        waiting = [(root, False)]
        while waiting:
            value, nested = waiting.pop()
            if isinstance(value, (str, bytes, int, float, type(None), type)) or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            if isinstance(value, (Dataset, DataLoader)) and not self._data:
                continue
            if isinstance(value, DataLoader):
                self._keep_attributes(value)
            elif isinstance(value, torch.Generator):
                self._undos.append(partial(value.set_state, value.get_state()))
            elif isinstance(value, nn.Module):
                self._undos += filter(None, [self._of_module(value)])
            elif isinstance(value, (Tensor, np.ndarray)):
                if not nested and not self._data and _may_be_written(value):
                    self._undos.append(_undo(value))
            elif isinstance(value, (list, deque)):
                self._undos.append(_undo(value))
                waiting += [(inner, True) for inner in value]
            elif isinstance(value, (dict, set)):
                self._undos.append(_undo(value))
                waiting += [(inner, nested) for inner in value.values()] if isinstance(value, dict) else []
            elif isinstance(value, tuple):
                waiting += [(inner, nested) for inner in value]
            elif hasattr(value, "__dict__") and is_users(type(value)):
                self._keep_attributes(value)


def _may_be_written(value: Tensor | np.ndarray) -> bool:
    """Whether Python code may write to it in an evaluation step; a mapped file is no state, and may be large."""
    if isinstance(value, np.ndarray):
        return value.flags.writeable and not isinstance(value, np.memmap)
    return not isinstance(value, nn.Parameter)


def _undo(value: Any) -> Callable[[], None]:
    """Gives a tensor, an array or a container what it holds now; an empty list keeps later items without their rows."""
    before: Any = value.detach().clone() if isinstance(value, Tensor) else value.copy()

    def undo() -> None:
        if isinstance(value, np.ndarray):
            value[...] = before
        elif isinstance(value, Tensor):
            if value.shape == before.shape:
                with torch.no_grad():
                    value.copy_(before)
        elif isinstance(value, (dict, set)):
            value.clear()
            value.update(before)
        else:
            emptied = [] if before else [_emptied(item) for item in value]
            value.clear()
            value.extend(before if before or any(item is None for item in emptied) else emptied)

    return undo


def _emptied(item: Any) -> Any:
    """The item with none of its rows; None where it has no rows."""
    if isinstance(item, (Tensor, np.ndarray)):
        return item[:0] if item.ndim else None
    if type(item) is list:
        return []
    if type(item) not in (tuple, dict):
        return None
    parts = [_emptied(inner) for inner in (item.values() if type(item) is dict else item)]
    if any(part is None for part in parts):
        return None
    return dict(zip(item, parts, strict=True)) if type(item) is dict else tuple(parts)


@cache
def _attributes_of_lightning() -> frozenset[str]:
    """What every LightningModule has of its own, parameters, buffers and submodules among it."""
    return frozenset(vars(pl.LightningModule()))


def is_users(kind: type) -> bool:
    """Whether a class is of the user's own code, not of Python, of an installed package or of this one."""
    return not issubclass(kind, Metric) and _is_users_module(kind.__module__)


@cache
def _is_users_module(name: str) -> bool:
    if name.split(".")[0] in ("builtins", "lightning_dist"):
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return name == "__main__"
    installed = any(folder in file for folder in ("site-packages", "dist-packages"))
    return not installed and not file.startswith(sysconfig.get_paths()["stdlib"])
