"""State that is loaded into a module whose parameters are deferred: kept until they are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys  # what load_state_dict returns; no public name in torch 2.14

from lightning_dist.checkpoint.state import load_model_state


class LateLoads:
    """Stands before ``load_state_dict`` of a module on the meta device, which would copy nothing, without an error.

    A checkpoint is restored before the strategy has set the module up, as in one process, so that hooks may change the
    module (another embedding, say) before optimizers are made for it; and callbacks may load other weights after those.

    Args:
        module: some of whose parameters are on the meta device.
        source: the path of what is loaded, for messages.
    """

    def __init__(self, module: nn.Module, source: object) -> None:
        self._module, self._source = module, source
        self._loads: list[tuple[Mapping[str, Any], bool]] = []
        self._before = vars(module).get("load_state_dict")
        vars(module)["load_state_dict"] = self._note

    def _note(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self._loads.append((state_dict, strict))
        here = self._module.state_dict().keys()
        return _IncompatibleKeys([n for n in here if n not in state_dict], [n for n in state_dict if n not in here])

    def leave(self) -> None:
        """Gives the module its method back."""
        if vars(self._module).get("load_state_dict") == self._note:
            del vars(self._module)["load_state_dict"]
            if self._before is not None:
                vars(self._module)["load_state_dict"] = self._before

    def apply(self) -> None:
        """Loads, in order, what was to be loaded; the parameters are there by now, in any layout.

        Communication: see :func:`~lightning_dist.checkpoint.state.load_model_state`.

        Raises:
            ValueError: names or shapes that do not fit.
        """
        self.leave()
        for state, strict in self._loads:
            own = self._module.state_dict()
            kept = {name: own[name] for name, value in state.items() if _is_meta(value) and name in own}
            load_model_state(self._module, {**state, **kept} if kept else state, strict, self._source)
        self._loads.clear()


def _is_meta(value: Any) -> bool:
    """Whether it is one of the module's own, deferred, which a hook has put into the state to keep it as it is."""
    return isinstance(value, Tensor) and value.is_meta
