"""Copies of what a rank trains, in host memory, to go back to.

[Note: a good state]
What a spike shows may have been done to the parameters before it. So a copy is good only when a step from it had normal
numbers; until then the one before it is kept. Copies are taken, and put back, between an optimizer's update and
what Lightning does after it (counts the step, steps schedulers), so that both go on alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from lightning_dist.checkpoint.host_memory import HostMemory
from lightning_dist.compat.torch import DisableTorchFunctionSubclass
from lightning_dist.dtensors import local_part
from lightning_dist.placeholder import is_placeholder
from lightning_dist.random_states import RandomStates


class StateCopy:
    """A copy of this rank's part of a training. Communication: none. Memory: on the host, as much as it copies.

    Args:
        modules: whose parameters and buffers are copied: the trained one, and averages of it.
        optimizers: their states and options.
        others: what has ``state_dict`` and ``load_state_dict``: schedulers, the precision plugin.
        device: of the generators, which are copied too.
        memory: for the copies; what it held before is overwritten.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        optimizers: Iterable[Optimizer],
        others: Iterable[Any],
        device: torch.device,
        memory: HostMemory,
    ) -> None:
        memory.reuse()
        tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        self._device, self._random = device, RandomStates.now(device)
        self._others = [(other, memory.snapshot(other.state_dict())) for other in others]
        with DisableTorchFunctionSubclass():
            self._tensors = [(t, memory.copy(local_part(t))) for t in tensors.values() if not is_placeholder(t)]
            self._optimizers = [_OptimizerCopy(optimizer, memory) for optimizer in optimizers]
        memory.synchronize()

    def restore(self) -> None:
        """Puts everything back, in place."""
        with torch.no_grad(), DisableTorchFunctionSubclass():
            for tensor, before in self._tensors:
                local_part(tensor).copy_(before)
                increment_version(tensor)
            for optimizer in self._optimizers:
                optimizer.restore()
        for other, state in self._others:
            other.load_state_dict(copy.deepcopy(state))
        self._random.restore(self._device)


class _OptimizerCopy:
    def __init__(self, optimizer: Optimizer, memory: HostMemory) -> None:
        self._optimizer = optimizer
        self._groups = [{k: _copied(v, memory) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._states = [(p, {k: _copied(v, memory) for k, v in own.items()}) for p, own in optimizer.state.items()]

    def restore(self) -> None:
        state = self._optimizer.state
        for group, before in zip(self._optimizer.param_groups, self._groups, strict=True):
            _put_back(group, before)
        known = {id(parameter) for parameter, _ in self._states}
        for parameter in [parameter for parameter in state if id(parameter) not in known]:
            del state[parameter]
        for parameter, before in self._states:
            own = state[parameter]
            for name in own.keys() - before.keys():
                del own[name]
            _put_back(own, before)


def _copied(value: Any, memory: HostMemory) -> Any:
    return memory.copy(local_part(value)) if isinstance(value, Tensor) else copy.deepcopy(value)


def _put_back(own: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in before.items():
        if isinstance(value, Tensor):
            local_part(own[name]).copy_(value)
        else:
            own[name] = copy.deepcopy(value)


class GoodStates:
    """The last good state of a training, and the newest, which is not known to be good yet; see [Note: a good state].

    Args:
        take: copies the state as it is now, to memory.
        every: steps between two copies.
    """

    def __init__(self, take: Callable[[HostMemory], StateCopy], every: int) -> None:
        self._take, self._every = take, every
        self._memory = HostMemory(), HostMemory()
        self._good: tuple[StateCopy, Any] | None = None
        self._newest: tuple[StateCopy, Any] | None = None
        self._num_steps = 0

    def confirm(self) -> None:
        """A step has normal numbers: the newest copy is good."""
        if self._newest is not None:
            self._good, self._newest = self._newest, None
            self._memory = self._memory[1], self._memory[0]

    def after_update(self, place: Any) -> None:
        """An optimizer has stepped; copies the state if it is time. ``place`` says where the training is."""
        if self._num_steps % self._every == 0:
            self._newest = self._take(self._memory[0]), place
        self._num_steps += 1

    def go_back(self) -> Any:
        """Puts the last good state back, and returns its place; None where there is none yet."""
        self._newest = None
        if self._good is None:
            return None
        self._num_steps = 1
        state, place = self._good
        state.restore()
        return place
