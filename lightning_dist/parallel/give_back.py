"""A module as its user built it, after a run: whole parameters, the same objects as before, and nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from lightning_dist.compat.torch import own_buffers, own_parameters
from lightning_dist.dtensors import full
from lightning_dist.parallel.replaced import Exchange
from lightning_dist.parallel.tensor import unsplit_copy
from lightning_dist.placeholder import is_placeholder
from lightning_dist.pytree import map_leaves, tree_leaves


def whole_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of which this rank holds a part, whole and on the CPU, by name; a tied one under its
    first.

    What another stage of a pipeline holds is not in it.

    Communication: that of :func:`~lightning_dist.dtensors.full` for each; all ranks that hold a part call it.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: full(tensor.detach()).cpu() for name, tensor in named if isinstance(tensor, DTensor)}


@torch.no_grad()
def give_back(
    module: nn.Module,
    whole: Mapping[str, Tensor],
    originals: Mapping[str, nn.Parameter],
    owners: Iterable[object] = (),
    on_all_ranks: Callable[[dict[str, Any]], Iterable[str]] = list,
) -> None:
    """Puts whole, plain tensors where a module has parts or placeholders; called when its patches are undone.

    Parameters are the objects that they were before the run, where they were there; what ``configure_model`` built
    deferred gets new ones. ``requires_grad`` is that of now; gradients, which were parts, are gone. Who holds a part
    (lists and attributes of the module and of the owners, optimizers with their state) gets the whole.

    Args:
        module: divided, or cut.
        whole: of :func:`whole_tensors`, and what other stages hold.
        originals: see :class:`~lightning_dist.parallel.replaced.Replaced`.
        owners: callbacks, optimizers in a list or an attribute, and the like. Copies of modules that they keep are made
            whole too.
        on_all_ranks: given what owners keep parts of, by name, says which of it all ranks keep alike, in one order;
            called on all of them. What one rank alone keeps stays parts.

    Communication: none for the module; for each part in an optimizer's state or a copy that an owner keeps, that of
    :func:`~lightning_dist.dtensors.full`.
    """
    places: dict[int, tuple[Tensor, Tensor, str]] = {}
    for prefix, child in module.named_modules():
        for tensors in _registered(child):
            for name, tensor in tensors.items():
                if isinstance(tensor, DTensor) or is_placeholder(tensor):
                    full_name = f"{prefix}.{name}" if prefix else name
                    if id(tensor) not in places:  # tied ones stay one
                        if full_name not in whole:  # what a hook made of another stage's
                            continue
                        new = _whole(tensor, whole[full_name], originals.get(full_name))
                        places[id(tensor)] = tensor, new, full_name
                    tensors[name] = places[id(tensor)][1]
    owners, states = list(owners), list[dict[str, Any]]()

    def keep(state: dict[str, Any]) -> dict[str, Any]:
        states.append(state)
        return state

    Exchange(places, of_state=keep).run([*module.modules(), *owners])
    kept: dict[str, Any] = {
        **{f"state {index}": state for index, state in enumerate(states)},
        **_modules_of(owners, module),
    }
    for name in on_all_ranks({name: _parts_of(value) for name, value in kept.items()}):
        if isinstance(kept[name], nn.Module):
            _make_whole(kept[name])
        else:
            kept[name].update(map_leaves(kept[name], lambda _, v: full(v) if isinstance(v, DTensor) else v))


def _parts_of(kept: Any) -> list[tuple[int, ...]]:
    """The shapes of what it holds parts of."""
    values = kept.state_dict().values() if isinstance(kept, nn.Module) else tree_leaves(kept)
    return [tuple(value.shape) for value in values if isinstance(value, DTensor)]


def _registered(module: nn.Module) -> list[dict[str, Any]]:
    return [own_parameters(module), own_buffers(module)]


def _whole(now: Tensor, whole: Tensor, original: nn.Parameter | None) -> Tensor:
    if not isinstance(now, nn.Parameter):
        return whole
    if original is None:
        return nn.Parameter(whole, requires_grad=now.requires_grad)
    original.data, original.grad = whole, None
    return original.requires_grad_(now.requires_grad)


def _modules_of(owners: Iterable[object], module: nn.Module) -> dict[str, nn.Module]:
    """Copies and averages of modules that callbacks keep, by the callback and its attribute."""
    found: dict[str, nn.Module] = {}
    for index, owner in enumerate(owners):
        for name, value in getattr(owner, "__dict__", {}).items():
            value = value.module if isinstance(value, AveragedModel) else value
            if isinstance(value, nn.Module) and value is not module:
                found[f"{index}.{name}"] = value
    return found


def _make_whole(copied: nn.Module) -> None:
    unsplit_copy(copied)
    made: dict[Tensor, Tensor] = {}
    for child in copied.modules():
        for tensors in _registered(child):
            for name, tensor in tensors.items():
                if isinstance(tensor, DTensor):
                    if tensor not in made:
                        made[tensor] = _whole(tensor, full(tensor), None)
                    tensors[name] = made[tensor]
