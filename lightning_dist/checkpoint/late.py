"""State that is loaded into a module whose parameters are deferred: kept until they are there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys  # what load_state_dict returns; no public name in torch 2.14
from torch.utils._python_dispatch import TorchDispatchMode  # documented, for all its underscore

from lightning_dist.checkpoint.state import load_model_state


class LateLoads:
    """Stands before ``load_state_dict`` of modules on the meta device, which would copy nothing, without an error.

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
        self._before: list[tuple[nn.Module, Any]] = []
        for part in module.modules():
            if part is module or any(parameter.is_meta for parameter in part.parameters()):
                self._before.append((part, vars(part).get("load_state_dict")))
                vars(part)["load_state_dict"] = partial(self._note, part)
        self._writes: _Writes | None = _Writes(module)
        self._writes.__enter__()

    def _note(self, part: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self._loads.append((part, dict(state_dict) if type(state_dict) is dict else state_dict, strict))
        here = part.state_dict().keys()
        return _IncompatibleKeys([n for n in here if n not in state_dict], [n for n in state_dict if n not in here])

    def leave(self) -> None:
        """Gives the modules their method back; nothing if they have it."""
        for part, before in self._before:
            vars(part).pop("load_state_dict", None)
            if before is not None:
                vars(part)["load_state_dict"] = before
        self._before.clear()
        writes, self._writes = self._writes, None
        if writes is not None:
            writes.__exit__(None, None, None)

    def apply(self) -> None:
        """Loads, in order, what was to be loaded, after :meth:`leave`; the parameters are there by now, in any layout.

        Communication: see :func:`~lightning_dist.checkpoint.state.load_model_state`.

        Raises:
            ValueError: names or shapes that do not fit.
        """
        for part, state, strict in self._loads:
            own = part.state_dict()
            kept = {name: own[name] for name, value in state.items() if _is_meta(value) and name in own}
            load_model_state(part, {**state, **kept} if kept else state, strict, self._source)
        self._loads.clear()


class _Writes(TorchDispatchMode):
    """Refuses writes to deferred parameters, which would be lost."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # kept, so that no other tensor gets their place
        self._deferred = {p.untyped_storage()._cdata: (name, p) for name, p in module.named_parameters() if p.is_meta}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.is_write and isinstance(value, Tensor) and value.is_meta:
                    found = self._deferred.get(value.untyped_storage()._cdata)
                    if found is not None:
                        raise RuntimeError(
                            f"{found[0]} is deferred while a checkpoint is restored, so what is written to it would be "
                            "lost: put it into checkpoint['state_dict'], or use load_state_dict, which is made up for"
                        )
        return func(*args, **(kwargs or {}))


def _is_meta(value: Any) -> bool:
    """Whether it is one of the module's own, deferred, which a hook has put into the state to keep it as it is."""
    return isinstance(value, Tensor) and value.is_meta
