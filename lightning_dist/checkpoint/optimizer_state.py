"""The state of an optimizer under the names of its parameters, and back onto parameters of any layout."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_dist.checkpoint.lazy_tensors import in_layout_of, leaves
from lightning_dist.checkpoint.module_state import origin
from lightning_dist.dtensors import is_split, place_like, replicate_like
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import PLAIN, Path, map_leaves


def optimizer_state_by_name(optimizer: Optimizer | LightningOptimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """``optimizer.state_dict()`` with the names of parameters in place of their indices.

    Args:
        optimizer: any torch optimizer; its ``state_dict`` hooks and overrides are respected.
        names: of the parameters that it holds, from :func:`~lightning_dist.checkpoint.parameter_names`; they need not
            be the module's any more. One that is not in it goes by its position.

    Returns:
        ``{"state": {name: {key: value}}, "param_groups": [{..., "params": [name, ...]}], ...}``. Tensors are
        kept as they are, DTensor or plain; parameters without state are not in ``state``.

    Raises:
        ValueError: an optimizer that keeps a plain tensor for a parameter of which the ranks hold different
            parts: nothing tells what of the parameter it belongs to, so it fits no other layout.
    """
    optimizer = _unwrap(optimizer)
    packed = optimizer.state_dict()
    if "param_groups" not in packed:  # that of a module without optimizers: Lightning's stand-in has no state
        return packed
    groups = _names_of_groups(optimizer, names)
    saved_ids = [index for group in packed["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    name_of = dict(zip(saved_ids, (name for group in groups for name in group), strict=True))
    for index, parameter in zip(saved_ids, parameters, strict=True):
        _check_parts(name_of[index], parameter, packed["state"].get(index, {}), optimizer)
    return _renamed(packed, name_of, groups)


def load_optimizer_state(
    optimizer: Optimizer | LightningOptimizer,
    state: Mapping[str, Any],
    names: Mapping[Tensor, str],
    source: object = None,
) -> None:
    """Puts an optimizer's saved state onto parameters of any layout. Nothing is communicated, but see
    :func:`~lightning_dist.checkpoint.lazy_tensors.in_layout_of` for what is read now.

    ``optimizer.load_state_dict`` has the last word, so dtypes and devices are torch's: states of floating
    parameters get the parameter's, ``step`` stays on the CPU unless the optimizer is fused or capturable.

    Args:
        optimizer: with the parameter groups of the saved one, whatever their state.
        state: from :func:`optimizer_state_by_name`, or an optimizer's own ``state_dict`` with indices, as
            plain Lightning saves it. Tensors are full, or DTensors in the layout of the parameters.
        names: of the optimizer's parameters, as for :func:`optimizer_state_by_name`.
        source: the path it came from, for messages.

    Raises:
        ValueError: other groups or parameters than the saved ones, named.
    """
    optimizer = _unwrap(optimizer)
    if "param_groups" not in state:
        optimizer.load_state_dict(dict(state))
        return
    index_of = _match(state["param_groups"], _names_of_groups(optimizer, names), optimizer, source)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {}
    likes = {saved: parameters[index] for saved, index in index_of.items()}
    for saved, value in in_layout_of(dict(state["state"]), lambda path: likes.get(path[0])).items():
        if saved not in likes:  # not of a parameter: an optimizer's own entry
            states[saved] = map_leaves(value, _copy_of)
        elif not is_placeholder(likes[saved]):  # one is another stage's
            states[index_of[saved]] = map_leaves(value, _onto(likes[saved]))
    packed = _renamed({**state, "state": states}, {}, _numbered(state["param_groups"]))
    try:
        optimizer.load_state_dict({**packed, "param_groups": map_leaves(packed["param_groups"], _copy_of)})
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"the {type(optimizer).__name__} state of {origin(source)} can't be loaded: {error}"
        ) from error


def with_indices(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state by name as torch's ``optimizer.state_dict()`` writes it; one with indices, or without, as it is."""
    if "param_groups" not in state:
        return dict(state)
    names = (name for group in state["param_groups"] for name in group["params"])
    index_of = {name: index for index, name in enumerate(names)}
    return _renamed(state, index_of, _numbered(state["param_groups"]))


def _numbered(groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Positions of the parameters of each group among all."""
    positions = itertools.count()
    return [[next(positions) for _ in group["params"]] for group in groups]


def _renamed(state: Mapping[str, Any], new: Mapping[Any, Any], groups: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The state under new names of parameters, those of the groups too."""
    states = {new.get(name, name): value for name, value in state["state"].items()}
    renamed = [{**group, "params": named} for group, named in zip(state["param_groups"], groups, strict=True)]
    return {**state, "state": states, "param_groups": renamed}


def _names_of_groups(optimizer: Optimizer, names: Mapping[Tensor, str]) -> list[list[str]]:
    """Names of the optimizer's parameters, group by group; one that has none goes by its position."""
    return [
        [names.get(p, f"optimizer parameter {i}") for p, i in zip(group["params"], positions, strict=True)]
        for group, positions in zip(optimizer.param_groups, _numbered(optimizer.param_groups), strict=True)
    ]


def _match(
    saved_groups: Sequence[Mapping[str, Any]], names: list[list[str]], optimizer: Optimizer, source: object
) -> dict[Any, int]:
    """The position in the optimizer of every saved parameter, by name where names were saved."""
    what = f"the {type(optimizer).__name__} state of {origin(source)}"
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
    """Lays a state out as the parameter where it has its shape, else whole; a scalar (``step``) stays where it is."""

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
    if isinstance(state, dict) and all(isinstance(value, DTensor) for value in state.values() if _has_elements(value)):
        return
    for path, value in leaves(state):
        if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.numel() > 1:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {path[-1] if path else 'a state'!r} of the sharded parameter "
                f"{name!r} as a plain tensor of shape {tuple(value.shape)}. It may differ by rank, so a checkpoint "
                "could not be loaded under another layout; use an optimizer that keeps DTensors, or a layout with "
                "dp_shard=1"
            )


def _has_elements(value: Any) -> bool:
    """Whether an entry of a state may differ by rank: not a number, also not one in a tensor."""
    return value.ndim > 0 if isinstance(value, Tensor) else type(value) not in PLAIN


def _unwrap(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(map(repr, names[:limit])) or "none"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
