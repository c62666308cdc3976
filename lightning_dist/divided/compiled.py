"""What torch.compile sees of divided parameters.

[Note: compiled modules see parts]
torch.compile follows ``__torch_function__`` of a class into what it traces, and a :class:`Divided` would have it trace
how the whole is gathered (seen in torch 2.14: the parameters then get no gradient, without a word). Parts that are
divided read their local tensors, which a plain DTensor gives it in one operation. So while a compiled module runs, the
divided tensors in it are of torch's own class. Compiled functions that reach one in another way are refused.

[Note: hooks lie outside of what is compiled]
Hooks of a module, fully_shard's and ours, gather and note; none of that belongs into a graph. Where the module's class
is the user's, torch compiles its forward alone. Where it is torch's own (a ``TransformerEncoderLayer``, a
``Sequential``) its hooks are traced too (seen in torch 2.14): with ``fullgraph=True`` that is refused, and without it
each block is compiled anew, until the limit of recompilations. There too, forward alone is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_dist.compat.torch import COMPILED_CALL, OptimizedModule, call_uncompiled, compiled_call
from lightning_dist.divided.tensor import Divided
from lightning_dist.patches import Patches


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has a part of it, which can't see through a parameter of another class."""
    return any(compiled_call(child) is not None or isinstance(child, OptimizedModule) for child in module.modules())


def compile_inside_of_hooks(module: nn.Module, options: dict[str, Any]) -> None:
    """As ``module.compile(**options)``; see [Note: hooks lie outside of what is compiled]."""
    if type(module).forward.__module__.startswith("torch.") and "forward" not in vars(module):
        vars(module)[COMPILED_CALL] = _HooksOutside(module, torch.compile(module.forward, **options))
    else:
        module.compile(**options)


class _HooksOutside:
    def __init__(self, module: nn.Module, compiled: Callable[..., Any]) -> None:
        self._module, self._compiled = module, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = vars(self._module)
        if "forward" in own:  # somebody has put another one there since
            return call_uncompiled(self._module, *args, **kwargs)
        own["forward"] = self._compiled
        try:
            return call_uncompiled(self._module, *args, **kwargs)
        finally:
            del own["forward"]


def show_parts_to_compiled(module: nn.Module, patches: Patches) -> None:
    """Makes the compiled modules in it see plain DTensors; see [Note: compiled modules see parts]."""
    for child in module.modules():
        if isinstance(child, OptimizedModule):
            if not isinstance(child.forward, _SeesParts):
                patches.set(child, "forward", _SeesParts(child, child.forward))
        elif (compiled := compiled_call(child)) is not None and not isinstance(compiled, _SeesParts):
            patches.set(child, COMPILED_CALL, _SeesParts(child, compiled))


class _SeesParts:
    def __init__(self, module: nn.Module, compiled: Callable[..., Any]) -> None:
        self._module, self._compiled = module, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors: list[Any] = [*self._module.parameters(), *self._module.buffers()]
        divided: list[tuple[Any, type]] = [(tensor, type(tensor)) for tensor in tensors if isinstance(tensor, Divided)]
        for tensor, _ in divided:
            tensor.__class__ = DTensor
        try:
            return self._compiled(*args, **kwargs)
        finally:
            for tensor, before in divided:
                tensor.__class__ = before
