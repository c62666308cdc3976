"""``requires_grad`` of sharded parameters, which exist twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_dist.compat.distributed import (
    gathered_of,
    wrap_free_after_forward,
    wrap_free_gathered,
    wrap_show_gathered,
)

_ATTRIBUTE = "flags_of_both"


class Flags:
    """Keeps ``requires_grad`` of a unit's parameters alike on what is sharded and on what is gathered.

    [Note: two objects of one parameter]
    fully_shard registers a parameter's shard with the module, and while it is gathered another object, whose
    ``requires_grad`` it sets to the shard's at each gathering. Optimizers hold the shards. So a user's code may set
    either: the registered one, or that of an optimizer, as ``toggle_optimizer`` does. Both were equal once, so where
    they differ one was set since, to what differs from then.

    Args:
        param_group: what a unit gathers at once.
    """

    def __init__(self, param_group: Any) -> None:
        self._group = param_group
        self._agreed = [p.sharded_param.requires_grad for p in param_group.fsdp_params]
        vars(param_group)[_ATTRIBUTE] = self
        for wrap in (wrap_show_gathered, wrap_free_gathered, wrap_free_after_forward):
            wrap(param_group, self._agree_and)

    @staticmethod
    def of(param_group: Any) -> Flags:
        """Those of a unit, from an earlier run where there was one."""
        return vars(param_group).get(_ATTRIBUTE) or Flags(param_group)

    def _agree_and(self, change: Callable[[], None]) -> None:
        self.agree()
        change()

    def agree(self) -> None:
        """Sets both as whichever was set last. Communication: none."""
        for index, parameter in enumerate(self._group.fsdp_params):
            sharded = parameter.sharded_param
            now = sharded.requires_grad
            gathered = gathered_of(parameter)
            if gathered is not None and gathered.requires_grad != now:
                now = not self._agreed[index]
                sharded.requires_grad_(now)
                gathered.requires_grad_(now)
            self._agreed[index] = now

    def agree_if_gathered(self) -> None:
        """As :meth:`agree`; what is not gathered agrees when it is."""
        if self._group.is_unsharded:
            self.agree()
