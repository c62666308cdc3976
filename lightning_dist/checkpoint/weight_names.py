"""Bare weights, which hold no run, as transformers, timm and torchvision save them: under the names of a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module

from lightning_dist.checkpoint.lazy_tensors import LazyTensor
from lightning_dist.plans.pretrained import in_module_names, pretrained_models

_NESTED = ("state_dict", "model", "module")
"""Where timm and torchvision's reference scripts keep the weights of a training."""


def bare(stored: Any) -> Mapping[str, Any] | None:
    """The weights in what ``torch.load`` gave; None if it holds none."""
    if not isinstance(stored, Mapping):
        return None
    for name in _NESTED:
        if isinstance(stored.get(name), Mapping):
            stored = stored[name]
            break
    values = list(stored.values())
    is_bare = values and all(isinstance(name, str) for name in stored) and any(isinstance(v, Tensor) for v in values)
    return stored if is_bare and not any(isinstance(value, Mapping) for value in values) else None


def for_module(weights: Mapping[str, Any], module: Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under a module's names, whose network is often one of its attributes: ``fc.weight`` as ``net.fc.weight``.

    Models of transformers have tables of their own for what a file calls things.

    Args:
        weights: by a file's names.
        module: the LightningModule.
        state: its state, by the names of the plain model.
    """
    models = pretrained_models(module)
    for name, model in models.items():
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        named, merged = in_module_names(weights, model, own, _read)
        named |= {key: LazyTensor(own[key].shape, own[key].dtype, read) for key, read in merged.items()}
        if 2 * len(named.keys() & own.keys()) > len(own):
            return _with_tied({prefix + key: value for key, value in named.items()}, state)
    return _with_tied(fitted(weights, state), state)


def fitted(weights: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Weights with a prefix taken off their names, another put before them, or both, so that most fit; unchanged where
    they fit as they are.

    Args:
        weights: by a file's names.
        names: of the module.
    """
    known = set(names)
    best, most = dict(weights), len(known & weights.keys())
    taken_off = ["", *sorted({name[: name.index(".") + 1] for name in weights if "." in name})]
    for off in taken_off:
        short = {name.removeprefix(off): value for name, value in weights.items() if name.startswith(off)}
        put_before = {""} | {
            name[: -len(sample)] for sample in list(short)[:8] for name in known if name.endswith(f".{sample}")
        }
        for before in sorted(put_before, key=lambda prefix: (len(prefix), prefix)):
            hits = sum(before + name in known for name in short)
            if hits > most:
                rest = {name: value for name, value in weights.items() if not name.startswith(off)}
                best, most = rest | {before + name: value for name, value in short.items()}, hits
    return best


def _with_tied(weights: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Files hold a tied parameter once: the module's other names for it get the same."""
    known = {id(value): name for name, value in state.items() if name in weights}
    tied = {name: known[id(value)] for name, value in state.items() if name not in weights and id(value) in known}
    return weights | {name: weights[other] for name, other in tied.items()}


def _read(weight: Any) -> Tensor:
    return weight.read() if isinstance(weight, LazyTensor) else weight
