"""The state of a module under the plain model's names, and back into any layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import Module, Parameter

from lightning_dist.checkpoint.lazy_tensors import LazyTensor, in_layout_of
from lightning_dist.compat.torch import set_versions, versions_of
from lightning_dist.dtensors import local_part, place_like
from lightning_dist.placeholder import is_placeholder

_COMPILED = "_orig_mod."
"""What ``torch.compile`` puts into the names of a module it wraps."""


class DoesNotFit(ValueError, RuntimeError):
    """Weights of another architecture; a ``RuntimeError``, as torch's own, for code that expects one."""


def model_state(module: Module) -> dict[str, Any]:
    """``module.state_dict()`` under the names of the plain model; the user's own hooks and overrides are
    respected.

    Args:
        module: the bare LightningModule, its parameters plain tensors or DTensors.

    Returns:
        Tensors that share memory with the module's, so nothing is copied. Names of one tied parameter have
        the same object as their value, so that whoever writes them can write it once.
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
        state: by the plain model's names; full tensors (mapped from a file, say: each rank reads its part
            only), lazy ones, read one at a time, or DTensors in the layout of the module.
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
        name = _plain(name)
        like = current.get(real_name.get(name, name))
        value = value.read() if isinstance(value, LazyTensor) else value
        both = isinstance(value, Tensor) and isinstance(like, Tensor)
        placed[real_name.get(name, name)] = place_like(value, like) if both else value  # type: ignore[arg-type]
    if versions is not None and not any(_COMPILED in name for name in current):
        set_versions(placed, versions)
    try:
        result = module.load_state_dict(placed, strict=strict)
    except RuntimeError as error:
        # torch's first line names the class that fully_shard made of the user's
        problems = "\n".join(str(error).splitlines()[1:]) or str(error)
        raise DoesNotFit(
            f"{origin(source)} does not fit {_class_name(module)}:\n{problems}\n"
            "Build the module with the architecture of the checkpoint; `strict_loading = False` of the "
            "LightningModule allows missing and unexpected names, not other shapes."
        ) from error
    if result is None:  # a user's override of load_state_dict need not return anything
        return [], []
    return list(result.missing_keys), list(result.unexpected_keys)


def named_parameters(module: Module) -> dict[str, Parameter]:
    """The module's parameters under the plain model's names, a tied one under its first."""
    for part in module.modules():
        # After a forward a sharding unit may still hold the gathered parameters in place of its own.
        if isinstance(part, FSDPModule):
            part.reshard()
    return {_plain(name): parameter for name, parameter in module.named_parameters()}


def parameter_names(module: Module) -> dict[Tensor, str]:
    """The plain model's name of each of the module's parameters."""
    return {parameter: name for name, parameter in named_parameters(module).items()}


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
    # Every key is taken out and put back, renamed or not, so that the order stays.
    for name in list(state):
        state[_plain(name)] = state.pop(name)
    versions = versions_of(state)
    if versions is not None:
        for name in list(versions):
            versions[_plain(f"{name}.")[:-1]] = versions.pop(name)


def _plain(name: str) -> str:
    return name.replace(_COMPILED, "")


def _class_name(module: Module) -> str:
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule)).__name__
