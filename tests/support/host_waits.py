"""Counts where the host would wait for the device, on the CPU too: its tensors then stand for those of a device."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, autograd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dist.parallel.pipeline import runner
from lightning_dist.ranks import LayoutRanks, groups_of_hosts
from tests.support.device import device_type

READ, UPLOAD = "read", "upload"
"""Kinds of waits: for a value; for a copy to the device from memory that is not pinned, which goes behind all else."""


@contextmanager
def hosts_apart() -> Iterator[None]:
    """While it lasts, the hosts of a run have process groups of their own, as where ranks compute on devices."""

    def apart(ranks: LayoutRanks) -> Any:
        if vars(ranks)["_hosts"] is None:
            assert ranks.mesh is not None
            vars(ranks)["_hosts"] = groups_of_hosts(ranks.mesh, ranks.timeout)
        return vars(ranks)["_hosts"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayoutRanks, "hosts", property(apart))
        patch.setattr(runner, "host_group", lambda _, all_groups, __: _of_hosts(all_groups))
        yield


def _of_hosts(all_groups: list[list[int]]) -> Any:
    made, _ = dist.new_subgroups_by_enumeration(all_groups, backend="gloo")
    return made


_aten = torch.ops.aten
_READING = {
    *(_aten._local_scalar_dense, _aten.is_nonzero, _aten.equal, _aten.nonzero, _aten.masked_select, _aten.argwhere),
    *(_aten._unique, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive, _aten.bincount),
}
"""Operators whose result, or its shape, the host has to see."""
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
"""Operators that look for what is true in the masks that they are given."""
_MAKING = {
    *(torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer, torch.zeros, torch.ones),
    *(torch.empty, torch.full, torch.arange, torch.rand, torch.randn, torch.randint, torch.randperm, torch.eye),
}
_FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray}
_NEW = {Tensor.new_tensor, Tensor.new}
_MOVING = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type}
_HOST = "_is_on_host"


class HostWaits:
    """Counts the waits of the host for the device while it is entered, backward passes included.

    ``count`` is by kind, see ``READ`` and ``UPLOAD``; ``places`` by kind, function, and the line that called it.

    On the CPU each tensor counts as one of the device, but for those that code makes without a device or on ``"cpu"``
    by this name (a ``torch.device`` may be the strategy's), what comes of those alone, and copies of others to the host
    that don't block. On a device, what its tensors are asked.
    """

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self._open = ExitStack()

    def __enter__(self) -> HostWaits:
        functions, engine = _Functions(self), autograd._engine_run_backward

        def with_hooks_seen(*args: Any, **kwargs: Any) -> Any:
            with functions:  # torch left it for all that Tensor.backward calls
                return engine(*args, **kwargs)

        self._open.callback(setattr, autograd, "_engine_run_backward", engine)
        autograd._engine_run_backward = with_hooks_seen
        for mode in (functions, _Operators(self)):
            self._open.enter_context(mode)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def note(self, kind: str, function: str) -> None:
        """A wait happens now."""
        self.count[kind] += 1
        self.places[f"{kind} by {function} in {_place()}"] += 1

    def __str__(self) -> str:
        return "\n".join(f"{number} {place}" for place, number in sorted(self.places.items())) or "none"


def _place() -> str:
    """The innermost line that belongs neither to torch nor to this file, and that of the project where it is another's.

    A line of torch for what has no other, as in a thread of its own.
    """
    frame, lines = sys._getframe(1), list[str]()
    while frame is not None:
        path = frame.f_code.co_filename
        is_own = "lightning_dist" in path or "/tests/" in path
        if path != __file__ and (not lines or is_own) and not _is_of_torch(path):
            lines.append(f"{'/'.join(Path(path).parts[-3:])}:{frame.f_lineno} {frame.f_code.co_name}")
            if is_own:
                break
        frame = frame.f_back  # type: ignore[assignment]
    return ", for ".join(lines) or "torch"


def _is_of_torch(path: str) -> bool:
    return "/site-packages/torch/" in path or path.startswith("<")


def on_device(value: Any) -> bool:
    """Whether it is a tensor of the device, or stands for one."""
    if not isinstance(value, Tensor) or value.device.type == "meta":
        return False
    return value.device.type != "cpu" or (device_type() == "cpu" and not getattr(value, _HOST, False))


def _names_host(device: Any) -> bool:
    return device is None or (isinstance(device, str) and device.startswith("cpu"))


class _Functions(TorchFunctionMode):
    """Sees what code asks of tensors, and which it makes on the host."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _MOVING and args:
            return self._moved(func, args, kwargs)
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__) and on_device(args[0]):
            self._waits.note(READ, func.__name__)
        result = func(*args, **kwargs)
        if func in _MAKING:
            is_host = _names_host(kwargs.get("device")) and not any(map(on_device, tensors))
            if func in _FROM_NUMBERS and not is_host and not any(map(on_device, args)):
                self._waits.note(UPLOAD, func.__name__)
        elif func in _NEW:
            is_host = not on_device(args[0])
            if not is_host:
                self._waits.note(UPLOAD, func.__name__)
        else:
            is_host = bool(tensors) and not any(map(on_device, tensors))
        return _marked(result, is_host)

    def _moved(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A tensor that may go from the host to the device, or back."""
        tensor, target = args[0], [*args[1:], *kwargs.values()]
        result = func(*args, **kwargs)
        if func is Tensor.type or not isinstance(result, Tensor):
            return _marked(result, not on_device(tensor)) if isinstance(result, Tensor) else result
        to_host = func is Tensor.cpu or any(isinstance(value, str) and value.startswith("cpu") for value in target)
        to_host |= any(isinstance(value, Tensor) and not on_device(value) for value in target)
        to_device = func is Tensor.cuda or any(isinstance(value, torch.device) or on_device(value) for value in target)
        if device_type() != "cpu":
            to_host, to_device = not on_device(result), on_device(result)
        if on_device(tensor) and to_host:
            return self._crossed(READ, func, tensor, result, kwargs, True)
        if not on_device(tensor) and to_device:
            return self._crossed(UPLOAD, func, tensor, result, kwargs, False)
        return _marked(result, not on_device(tensor))

    def _crossed(self, kind: str, func: Any, tensor: Tensor, result: Tensor, kwargs: Any, is_host: bool) -> Tensor:
        if not kwargs.get("non_blocking"):
            self._waits.note(kind, func.__name__)
        return _marked(result.clone() if result is tensor else result, is_host)


def _marked(result: Any, is_host: bool) -> Any:
    if device_type() == "cpu":
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and getattr(leaf, _HOST, False) != is_host:
                setattr(leaf, _HOST, is_host)
    return result


class _Operators(TorchDispatchMode):
    """Sees what runs, that of backward passes included."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = self._kind(getattr(func, "overloadpacket", None), args, kwargs or {})
        if kind is not None:
            self._waits.note(kind, func.__name__)
        return func(*args, **(kwargs or {}))

    def _kind(self, operator: Any, args: Any, kwargs: Any) -> str | None:
        """That of the wait that it is; None for none."""
        if operator in _READING:
            return READ if any(map(on_device, args)) else None
        if operator in _INDEXING:
            masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
            fills = len(masks) == 1 and len(args) > 2 and args[2].numel() == 1  # as masked_fill does
            return READ if masks and not fills and on_device(args[0]) else None
        blocks = operator is _aten.copy_ and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if not blocks or on_device(args[0]) == on_device(args[1]):
            return None
        return UPLOAD if on_device(args[0]) else READ


__name__ = "torch.host_waits"  # as the package asks which line of the user's calls, and this is none
