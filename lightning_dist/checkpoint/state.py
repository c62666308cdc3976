"""The state of a module and its optimizers, under the plain model's names, and back into any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from lightning_dist.checkpoint.lazy import LazyTensor
from lightning_dist.checkpoint.on_disk import in_layout_of
from lightning_dist.dtensors import is_split, local_part, place_like, replicate_like
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import Path, map_leaves

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


def optimizer_state_by_name(module: Module, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with the names of parameters in place of their indices.

    Args:
        module: the module the optimizer trains.
        optimizer: any torch optimizer; its ``state_dict`` hooks and overrides are respected.

    Returns:
        ``{"state": {name: {key: value}}, "param_groups": [{..., "params": [name, ...]}], ...}``. Tensors are
        kept as they are, DTensor or plain; parameters without state are not in ``state``.

    Raises:
        ValueError: an optimizer that keeps a plain tensor for a parameter of which the ranks hold different
            parts: nothing tells what of the parameter it belongs to, so it could not be loaded under another
                layout.
    """
    optimizer = _unwrap(optimizer)
    packed = optimizer.state_dict()
    if "param_groups" not in packed:  # that of a module without optimizers: Lightning's stand-in has no state
        return packed
    groups = parameter_names(module, optimizer)
    saved_ids = [index for group in packed["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    name_of = dict(zip(saved_ids, (name for group in groups for name in group), strict=True))
    for index, parameter in zip(saved_ids, parameters, strict=True):
        _check_parts(name_of[index], parameter, packed["state"].get(index, {}), optimizer)
    return {
        **packed,
        "state": {name_of.get(index, index): value for index, value in packed["state"].items()},
        "param_groups": [
            {**group, "params": names} for group, names in zip(packed["param_groups"], groups, strict=True)
        ],
    }


def load_model_state(
    module: Module, state: Mapping[str, Any], strict: bool = True, source: object = None
) -> tuple[list[str], list[str]]:
    """Puts the plain model's state into a module of any layout. Nothing is communicated, but see
    :func:`~lightning_dist.checkpoint.on_disk.in_layout_of` for tensors that are read now.

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
    versions = getattr(state, "_metadata", None)
    state = in_layout_of(dict(state), lambda path: current.get(real_name.get(_plain(str(path[0])), "")))
    for name, value in state.items():
        name = _plain(name)
        like = current.get(real_name.get(name, name))
        value = value.read() if isinstance(value, LazyTensor) else value
        both = isinstance(value, Tensor) and isinstance(like, Tensor)
        placed[real_name.get(name, name)] = place_like(value, like) if both else value  # type: ignore[arg-type]
    if versions is not None and not any(_COMPILED in name for name in current):
        placed._metadata = versions  # type: ignore[attr-defined]
    try:
        result = module.load_state_dict(placed, strict=strict)
    except RuntimeError as error:
        # torch's first line names the class that fully_shard made of the user's
        problems = "\n".join(str(error).splitlines()[1:]) or str(error)
        raise DoesNotFit(
            f"{_origin(source)} does not fit {_class_name(module)}:\n{problems}\n"
            "Build the module with the architecture of the checkpoint; `strict_loading = False` of the "
            "LightningModule allows missing and unexpected names, not other shapes."
        ) from error
    if result is None:  # a user's override of load_state_dict need not return anything
        return [], []
    return list(result.missing_keys), list(result.unexpected_keys)


def load_optimizer_state(
    module: Module, optimizer: Optimizer | LightningOptimizer, state: Mapping[str, Any], source: object = None
) -> None:
    """Puts an optimizer's saved state onto parameters of any layout. Nothing is communicated.

    What is read now is communicated about, see :func:`~lightning_dist.checkpoint.on_disk.in_layout_of`.
    ``optimizer.load_state_dict`` has the last word, so dtypes and devices are torch's: states of floating
    parameters get the parameter's, ``step`` stays on the CPU unless the optimizer is fused or capturable.

    Args:
        module: the module the optimizer trains.
        optimizer: with the parameter groups of the saved one, whatever their state.
        state: from :func:`optimizer_state_by_name`, or an optimizer's own ``state_dict`` with indices, as
            plain Lightning saves it. Tensors are full, or DTensors in the layout of the parameters.
        source: the path it came from, for messages.

    Raises:
        ValueError: other groups or parameters than the saved ones, named.
    """
    optimizer = _unwrap(optimizer)
    if "param_groups" not in state:
        optimizer.load_state_dict(dict(state))
        return
    names = parameter_names(module, optimizer)
    index_of = _match(state["param_groups"], names, optimizer, source)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {}
    likes = {saved: parameters[index] for saved, index in index_of.items()}
    saved_states = in_layout_of(dict(state["state"]), lambda path: likes.get(path[0]))
    for saved, value in saved_states.items():
        index = index_of.get(saved)
        if index is not None and is_placeholder(parameters[index]):
            continue  # another stage's
        if index is None:  # not of a parameter: an optimizer's own entry
            states[saved] = map_leaves(value, _copy_of)
        else:
            states[index] = map_leaves(value, _onto(parameters[index]))
    numbered = iter(range(len(parameters)))
    groups = [{**group, "params": [next(numbered) for _ in group["params"]]} for group in state["param_groups"]]
    groups = map_leaves(groups, _copy_of)
    try:
        optimizer.load_state_dict({**state, "state": states, "param_groups": groups})
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"the {type(optimizer).__name__} state of {_origin(source)} can't be loaded: {error}"
        ) from error


def with_indices(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state by name as torch's ``optimizer.state_dict()`` writes it; one with indices, or without, as it is."""
    if "param_groups" not in state:
        return dict(state)
    names = [name for group in state["param_groups"] for name in group["params"]]
    index_of = {name: index for index, name in enumerate(names)}
    numbered = iter(range(len(names)))
    return {
        **state,
        "state": {index_of.get(name, name): value for name, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [next(numbered) for _ in group["params"]]} for group in state["param_groups"]
        ],
    }


def named_parameters(module: Module) -> dict[str, Parameter]:
    """The module's parameters under the plain model's names, a tied one under its first."""
    for part in module.modules():
        # After a forward a sharding unit may still hold the gathered parameters in place of its own.
        if isinstance(part, FSDPModule):
            part.reshard()
    return {_plain(name): parameter for name, parameter in module.named_parameters()}


def parameter_names(module: Module, optimizer: Optimizer) -> list[list[str]]:
    """Names of the optimizer's parameters, group by group; one that the module lacks goes by its position."""
    name_of = {id(parameter): name for name, parameter in named_parameters(module).items()}
    groups: list[list[str]] = []
    position = 0
    for group in optimizer.param_groups:
        groups.append([])
        for parameter in group["params"]:
            groups[-1].append(name_of.get(id(parameter), f"optimizer parameter {position}"))
            position += 1
    return groups


def _match(
    saved_groups: Sequence[Mapping[str, Any]], names: list[list[str]], optimizer: Optimizer, source: object
) -> dict[Any, int]:
    """The position in the optimizer of every saved parameter, by name where names were saved."""
    what = f"the {type(optimizer).__name__} state of {_origin(source)}"
    if len(saved_groups) != len(names):
        raise ValueError(
            f"{what} has {len(saved_groups)} parameter groups, the optimizer {len(names)}; "
            "return from configure_optimizers what the saved run had"
        )
    positions: dict[Any, int] = {}
    start = 0
    for number, (saved, current) in enumerate(zip(saved_groups, names, strict=True)):
        saved_names = list(saved["params"])
        by_name = all(isinstance(name, str) for name in saved_names)
        if by_name and set(saved_names) != set(current):
            surplus = [name for name in saved_names if name not in set(current)]
            missing = [name for name in current if name not in set(saved_names)]
            raise ValueError(
                f"{what} has other parameters in group {number} than the optimizer: "
                f"only saved: {_listed(surplus)}; only in the optimizer: {_listed(missing)}"
            )
        if len(saved_names) != len(current):
            raise ValueError(
                f"{what} has {len(saved_names)} parameters in group {number}, the optimizer {len(current)}; "
                "the saved run trained, or froze, others"
            )
        order = {name: index for index, name in enumerate(current)}
        for index, name in enumerate(saved_names):
            positions[name] = start + (order[name] if by_name else index)
        start += len(current)
    return positions


def _onto(parameter: Tensor) -> Any:
    """Lays one state of ``parameter`` out: as the parameter where it has its shape, whole on every rank
    otherwise.

    A scalar stays a plain tensor on the device it is on: torch's ``step``.
    """

    def place(_: Path, value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, DTensor):
            return value
        if value.ndim == 0:
            return value.detach().clone()
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            return place_like(value, parameter)
        return replicate_like(value, parameter)

    return place


def _copy_of(_: Path, value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _check_parts(name: str, parameter: Tensor, state: Any, optimizer: Optimizer) -> None:
    if not is_split(parameter):
        return

    def check(path: Path, value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.numel() > 1:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {path[-1] if path else 'a state'!r} of the sharded parameter "
                f"{name!r} as a plain tensor of shape {tuple(value.shape)}. It may differ by rank, so a checkpoint "
                "could not be loaded under another layout; use an optimizer that keeps DTensors, or a layout with "
                "dp_shard=1"
            )
        return value

    map_leaves(state, check)


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
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        for name in list(versions):
            versions[_plain(f"{name}.")[:-1]] = versions.pop(name)


def _plain(name: str) -> str:
    return name.replace(_COMPILED, "")


def _unwrap(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _class_name(module: Module) -> str:
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule)).__name__


def _origin(source: object) -> str:
    return f"checkpoint {source}" if source is not None else "the checkpoint"


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(map(repr, names[:limit])) or "none"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


__all__ = [
    "load_model_state",
    "load_optimizer_state",
    "model_state",
    "named_parameters",
    "optimizer_state_by_name",
    "parameter_names",
    "with_indices",
]
