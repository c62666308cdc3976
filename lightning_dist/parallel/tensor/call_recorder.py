"""What modules are given and return while the module around them runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn

from lightning_dist.compat.torch import FORWARD_HOOKS, FORWARD_HOOKS_WITH_KWARGS, FORWARD_PRE_HOOKS
from lightning_dist.parallel.tensor.overrides import overridden
from lightning_dist.parallel.tensor.region import Region
from lightning_dist.parallel.tensor.users_hooks import others


class CallRecorder:
    """Notes the calls of some modules while the one around them runs.

    Args:
        module: around them.
        names: of the modules, below it.

    Attributes:
        calls: by name, the positional arguments, the arguments by name, and the output of each call.
        shared: by name, whether each of the three is whole for a rank's part: it was copied to the region, and no
            row-wise layer reduced it since.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self.module, self.names = module, names
        self.calls: dict[str, list[tuple[Any, Any, Any]]] = {name: [] for name in names}
        self.shared: dict[str, list[tuple[bool, bool, bool]]] = {name: [] for name in names}
        self._reduced: set[str] = set()
        regions = {name: region for name, child in module.named_modules() if (region := Region.of(child)) is not None}
        self._copying = [name for name, region in regions.items() if region.copies_inputs]
        self._reducing = [name for name, region in regions.items() if region.reduces_output]
        own = regions.get("")
        self._in_positions = own is not None and own.positions is not None

    def recording(self) -> AbstractContextManager[None]:
        """While it lasts, calls are recorded, and users' hooks are not called."""
        values: dict[str, Any] = {}
        for name in dict.fromkeys([*self.names, *self._reducing]):
            child = self.module.get_submodule(name)
            hooks = others(child, FORWARD_HOOKS)
            if name:
                hooks[-1] = partial(self._note, name)
                values[f"{name}.{FORWARD_HOOKS}"] = hooks
                values[f"{name}.{FORWARD_HOOKS_WITH_KWARGS}"] = {**vars(child)[FORWARD_HOOKS_WITH_KWARGS], -1: True}
                values[f"{name}.{FORWARD_PRE_HOOKS}"] = others(child, FORWARD_PRE_HOOKS)
        return overridden(self.module, values)

    def _note(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        part = next((p for p in reversed(self._copying) if not p or name.startswith(f"{p}.")), None)
        before = self._in_positions or (part is not None and part not in self._reduced)
        if name in self._reducing and part is not None:
            self._reduced.add(part)
        after = self._in_positions or (part is not None and part not in self._reduced)
        if name in self.calls:
            self.calls[name].append((args, kwargs, output))
            self.shared[name].append((before, before, after))
