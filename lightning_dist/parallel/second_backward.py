"""Gradients of gradients through sharded units.

[Note: second derivatives under dp_shard]
fully_shard frees a unit's parameters when its backward has run. With ``create_graph=True`` (a gradient penalty, a
physics-informed loss) that backward was only the first one: what it computed holds the parameters, and the step's own
backward reads them, before any hook of the unit could gather them again. So from the first backward with a graph until
the end of the step's backward units stay gathered, as without resharding; the first backward reduces nothing, since
``torch.autograd.grad`` puts no gradient anywhere. The nodes that hold it run before those of the unit's forward, so the
parameters' gradients are complete when the unit reduces them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_dist.compat.distributed import gathered_of


class SecondBackward:
    """Keeps units gathered from a first backward to the step's own; see [Note: second derivatives under dp_shard].

    Memory: the whole parameters of the units that a first backward ran through, until the step's own has ended.
    Communication: none of its own.
    """

    def __init__(self) -> None:
        self._groups: list[Any] = []
        self._free: list[Callable[[], None]] = []
        self._reached: set[int] = set()
        self._in_first = False
        self._holds = False
        self._in_step = False
        self.refuses = False
        """Whether what backward passes hold is freed by somebody else: a pipeline's schedule."""

    def watch(self, param_group: Any) -> None:
        """Wraps what fully_shard does before a group's backward, after it, and when it frees the group.

        They are those of the class, also where an earlier run has put others in their place.
        """
        kind = type(param_group)
        gather, free = kind.pre_backward.__get__(param_group), kind.reshard.__get__(param_group)
        reduce = param_group.post_backward

        def pre_backward(*args: Any) -> None:
            self._reached.add(id(param_group))
            if torch.is_grad_enabled():
                self._refuse_unknown()
                self._in_first = self._holds = True
            gather(*args)

        def post_backward(*args: Any) -> None:
            if not self._in_first:
                reduce(*args)

        def reshard() -> None:
            if not self._holds:
                free()

        param_group.pre_backward, param_group.post_backward, param_group.reshard = pre_backward, post_backward, reshard
        self._groups.append(param_group)
        self._free.append(free)

    def _refuse_unknown(self) -> None:
        if self._in_step or self.refuses:
            raise RuntimeError(
                "a backward pass with create_graph=True through sharded blocks, "
                f"{'under pp' if self.refuses else 'by backward(), which leaves gradients with a graph'}: under "
                "dp_shard, take it with torch.autograd.grad, "
                f"{'and without pp' if self.refuses else 'and call the loss backward once'}, or use dp_replicate"
            )

    def begin(self) -> None:
        """The step's own backward begins."""
        self._in_first, self._in_step = False, True
        self._reached.clear()

    def has_reached(self, param_group: Any) -> bool:
        """Whether the step's own backward has come to a group."""
        return id(param_group) in self._reached

    def end(self) -> list[Any]:
        """The step's own backward has ended: frees what was held.

        Returns:
            The groups with gradients that no hook of their units has seen: those that only second derivatives reach.
        """
        self._in_step = False
        if not self._holds:
            return []
        return [group for group in self._groups if any(map(_has_gradient, group.fsdp_params))]

    def free(self) -> None:
        """Frees what was held, once its gradients are reduced."""
        if self._holds:
            self._holds = False
            for free in self._free:
                free()

    def forget(self) -> None:
        """Drops what is left of a step that did not end."""
        self._in_first = self._holds = self._in_step = False


def _has_gradient(parameter: Any) -> bool:
    gathered = gathered_of(parameter)
    return gathered is not None and gathered.grad is not None
