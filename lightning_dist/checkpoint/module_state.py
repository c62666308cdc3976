"""The state of a module under the plain model's names, and back into any layout, now or when its parameters exist."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import Module

from lightning_dist.checkpoint.lazy_tensors import LazyTensor, in_layout_of
from lightning_dist.compat.operators import written_arguments
from lightning_dist.compat.torch import IncompatibleKeys, TorchDispatchMode, memory_of, set_versions, versions_of
from lightning_dist.dtensors import local_part, place_like
from lightning_dist.patches import Patches
from lightning_dist.placeholder import is_placeholder

_COMPILED = "_orig_mod."
"""What ``torch.compile`` puts into the names of a module it wraps."""


class DoesNotFit(ValueError, RuntimeError):
    """Weights of another architecture; a ``RuntimeError``, as torch's own, for code that expects one."""


def model_state(module: Module) -> dict[str, Any]:
    """``module.state_dict()`` under the names of the plain model; the user's own hooks and overrides are respected.

    Args:
        module: the bare LightningModule, its parameters plain tensors or DTensors.

    Returns:
        Tensors that share memory with the module's. Names of one tied parameter have the same object as their value, so
        that whoever writes them can write it once.
    """
    state = module.state_dict()
    if any(_COMPILED in name for name in state):
        _rename_in_order(state)
    _tie(module, state)
    return state


def load_model_state(
    module: Module, state: Mapping[str, Any], strict: bool = True, source: object = None
) -> tuple[list[str], list[str]]:
    """Puts the plain model's state into a module of any layout. Nothing is communicated, but see
    :func:`~lightning_dist.checkpoint.lazy_tensors.in_layout_of` for tensors that are read now.

    Args:
        module: the bare LightningModule, its parameters plain tensors or DTensors.
        state: by the plain model's names; full tensors (of one mapped from a file each rank reads its part only), lazy
            ones, read one at a time, or DTensors in the layout of the module.
        strict: every name must be in both.
        source: the path it came from, for messages.

    Returns:
        Names that the state lacks, and names that only the state has; empty if ``strict``.

    Raises:
        DoesNotFit: names or shapes, with both shapes.
    """
    current = module.state_dict()
    real_name = {_plain(name): name for name in current}
    placed = type(current)()
    versions = versions_of(state)
    state = in_layout_of(dict(state), lambda path: current.get(real_name.get(_plain(str(path[0])), "")))
    for name, value in state.items():
        name = real_name.get(_plain(name), _plain(name))
        like = current.get(name)
        value = value.read() if isinstance(value, LazyTensor) else value
        placed[name] = place_like(value, like) if isinstance(value, Tensor) and isinstance(like, Tensor) else value
    if versions is not None and not any(_COMPILED in name for name in current):
        set_versions(placed, versions)
    try:
        result = module.load_state_dict(placed, strict=strict)
    except RuntimeError as error:
        # torch's first line names the class that fully_shard made of the user's
        problems = "\n".join(str(error).splitlines()[1:]) or str(error)
        kind = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
        raise DoesNotFit(
            f"{origin(source)} does not fit {kind.__name__}:\n{problems}\n"
            "Build the module with the architecture of the checkpoint; `strict_loading = False` of the "
            "LightningModule allows missing and unexpected names, not other shapes."
        ) from error
    if result is None:  # a user's override of load_state_dict need not return anything
        return [], []
    return list(result.missing_keys), list(result.unexpected_keys)


def parameter_names(module: Module) -> dict[Tensor, str]:
    """The plain model's name of each of the module's parameters, of a tied one the first."""
    # without torch's sets of modules: one of torchmetrics takes long to be hashed
    for _, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, FSDPModule):  # which may still hold, after a forward, gathered parameters for its own
            part.reshard()
    names: dict[Tensor, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, _plain(name))
    return names


def origin(source: object) -> str:
    """What a message calls the checkpoint at this path, or at none."""
    return f"checkpoint {source}" if source is not None else "the checkpoint"


def _tie(module: Module, state: dict[str, Any]) -> None:
    """Gives all names of one parameter the same object."""
    first: dict[int, str] = {}
    for raw_name, parameter in module.named_parameters(remove_duplicate=False):
        name = _plain(raw_name)
        original = first.setdefault(id(parameter), name)
        if original != name and _is_alias(state.get(original), parameter) and _is_alias(state.get(name), parameter):
            state[name] = state[original]


def _is_alias(value: Any, parameter: Tensor) -> bool:
    if is_placeholder(value) or is_placeholder(parameter):
        return is_placeholder(value) and is_placeholder(parameter)
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return False
    return local_part(value).data_ptr() == local_part(parameter).data_ptr()


def _rename_in_order(state: dict[str, Any]) -> None:
    for name in list(state):  # each is taken out and put back, renamed or not, so that the order stays
        state[_plain(name)] = state.pop(name)
    versions = versions_of(state)
    if versions is not None:
        for name in list(versions):
            versions[_plain(f"{name}.")[:-1]] = versions.pop(name)


def _plain(name: str) -> str:
    return name.replace(_COMPILED, "")


class LateLoads:
    """Wraps ``load_state_dict`` of modules on the meta device, which would copy nothing, without an error.

    A checkpoint is restored before the strategy has set the module up, as in one process, so that hooks may change the
    module (another embedding, say) before optimizers are made for it; and hooks and callbacks may load other weights
    after those, into parts of the module too. What they write to its parameters in place is refused.

    Args:
        module: some of whose parameters are on the meta device.
        source: the path of what is loaded, for messages.
    """

    def __init__(self, module: Module, source: object) -> None:
        self._source = source
        self._loads: list[tuple[Module, Mapping[str, Any], bool]] = []
        self._patches = Patches()
        for part in module.modules():
            if part is module or any(parameter.is_meta for parameter in part.parameters()):
                self._patches.set(part, "load_state_dict", partial(self._note, part))
        writes = _RefusedWrites(module)
        writes.__enter__()
        self._patches.also(partial(writes.__exit__, None, None, None))

    def _note(self, part: Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self._loads.append((part, dict(state_dict) if type(state_dict) is dict else state_dict, strict))
        here = part.state_dict().keys()
        return IncompatibleKeys([n for n in here if n not in state_dict], [n for n in state_dict if n not in here])

    def leave(self) -> None:
        """Gives the modules their method back; nothing if they have it."""
        self._patches.undo()

    def apply(self) -> None:
        """Loads in order, after :meth:`leave`, now that the parameters are there; see :func:`load_model_state`."""
        for part, state, strict in self._loads:
            own = part.state_dict()
            # what a hook has put there to keep it as it is: one of the module's own, deferred
            deferred = [name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta]
            kept = {name: own[name] for name in deferred if name in own}
            load_model_state(part, {**state, **kept} if kept else state, strict, self._source)
        self._loads.clear()


class _RefusedWrites(TorchDispatchMode):
    """Refuses writes to deferred parameters, which would be lost."""

    def __init__(self, module: Module) -> None:
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
