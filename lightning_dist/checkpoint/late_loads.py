"""State that is loaded into a module whose parameters are deferred: kept until they are there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_dist.checkpoint.module_state import load_model_state
from lightning_dist.compat.operators import written_arguments
from lightning_dist.compat.torch import IncompatibleKeys, TorchDispatchMode, memory_of
from lightning_dist.patches import Patches


class LateLoads:
    """Wraps ``load_state_dict`` of modules on the meta device, which would copy nothing, without an error.

    A checkpoint is restored before the strategy has set the module up, as in one process, so that hooks may change the
    module (another embedding, say) before optimizers are made for it; and hooks and callbacks may load other weights
    after those, into parts of the module too. What they write to its parameters in place is refused.

    Args:
        module: some of whose parameters are on the meta device.
        source: the path of what is loaded, for messages.
    """

    def __init__(self, module: nn.Module, source: object) -> None:
        self._source = source
        self._loads: list[tuple[nn.Module, Mapping[str, Any], bool]] = []
        self._patches = Patches()
        for part in module.modules():
            if part is module or any(parameter.is_meta for parameter in part.parameters()):
                self._patches.set(part, "load_state_dict", partial(self._note, part))
        writes = _RefusedWrites(module)
        writes.__enter__()
        self._patches.also(partial(writes.__exit__, None, None, None))

    def _note(self, part: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self._loads.append((part, dict(state_dict) if type(state_dict) is dict else state_dict, strict))
        here = part.state_dict().keys()
        return IncompatibleKeys([n for n in here if n not in state_dict], [n for n in state_dict if n not in here])

    def leave(self) -> None:
        """Gives the modules their method back; nothing if they have it."""
        self._patches.undo()

    def apply(self) -> None:
        """Loads, in order, what was to be loaded, after :meth:`leave`; the parameters are there by now, in any layout.

        Communication: see :func:`~lightning_dist.checkpoint.module_state.load_model_state`.

        Raises:
            ValueError: names or shapes that do not fit.
        """
        for part, state, strict in self._loads:
            own = part.state_dict()
            kept = {name: own[name] for name, value in state.items() if _is_meta(value) and name in own}
            load_model_state(part, {**state, **kept} if kept else state, strict, self._source)
        self._loads.clear()


class _RefusedWrites(TorchDispatchMode):
    """Refuses writes to deferred parameters, which would be lost."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # kept, so that no other tensor gets their place
        self._deferred = {memory_of(p): (name, p) for name, p in module.named_parameters() if p.is_meta}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in written_arguments(func, args, kwargs or {}):
            found = self._deferred.get(memory_of(value)) if isinstance(value, Tensor) and value.is_meta else None
            if found is not None:
                raise RuntimeError(
                    f"{found[0]} is deferred while a checkpoint is restored, so what is written to it would be lost: "
                    "put it into checkpoint['state_dict'], or use load_state_dict, which is made up for"
                )
        return func(*args, **(kwargs or {}))


def _is_meta(value: Any) -> bool:
    """Whether it is one of the module's own, deferred, which a hook has put into the state to keep it as it is."""
    return isinstance(value, Tensor) and value.is_meta
