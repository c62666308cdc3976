"""What transformers knows of its models' files: names in them, and what ``from_pretrained`` needs beside weights."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

DESCRIPTIONS = "lightning_dist_pretrained"
"""The entry of a checkpoint that holds :func:`descriptions` of its module."""


def pretrained_models(module: Module) -> dict[str, Any]:
    """The outermost models of transformers in a module, by their name in it; none where transformers is not in use."""
    # not transformers itself, which reads its files when it is asked for what is in them: half a second of a first save
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return {}
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        is_inside = any(outer == "" or f"{name}.".startswith(f"{outer}.") for outer in found)
        if isinstance(part, transformers.PreTrainedModel) and not is_inside:
            found[name] = part
    return found


def descriptions(module: Module) -> dict[str, dict[str, str]]:
    """What to write beside the weights of each such model: the text of each file, by its name, by the model's name."""
    described: dict[str, dict[str, str]] = {}
    for name, model in pretrained_models(module).items():
        config = copy.deepcopy(model.config)
        config.architectures = [_class_of(model).__name__]
        if model.dtype is not None:
            config.dtype = model.dtype
        described[name] = {"config.json": config.to_json_string()}
        if model.can_generate() and getattr(model, "generation_config", None) is not None:
            described[name]["generation_config.json"] = model.generation_config.to_json_string()
    return described


def in_module_names(
    weights: Mapping[str, Any], model: Any, names: Iterable[str], read: Callable[[Any], Tensor]
) -> tuple[dict[str, Any], dict[str, Callable[[], Tensor]]]:
    """Weights from a file of transformers under the names that the model has for them.

    transformers renames, merges and splits on the way, by tables of its own for each family
    (``transformers.conversion_mapping``, of version 5): the experts of a mixture lie one by one in a file and as one
    tensor in the model.

    Args:
        weights: by the file's names.
        model: of transformers, in any layout.
        names: of the plain model's state.
        read: makes a tensor of a weight that has to be merged.

    Returns:
        The weights that are renamed at most, and what makes each of the others.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    with torch.device("meta"):  # without parameters, its classes those of transformers: fully_shard makes others
        plain = _class_of(model)(copy.deepcopy(model.config))
    transforms = get_model_conversion_mapping(plain)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    own = dict.fromkeys(names, True)
    named: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for name in sorted(weights, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target not in own and name in own:
            target, pattern = name, None
        if pattern is None:
            named[target] = weights[name]
            continue
        converter = merged.setdefault(target, copy.deepcopy(by_pattern[pattern]))
        converter.add_tensor(target, name, pattern, partial(read, weights[name]))
    made: dict[str, Callable[[], Tensor]] = {}
    for target, converter in merged.items():
        convert = _Once(partial(converter.convert, target, model=model, config=model.config))
        made |= {name: partial(convert, name) for name in _targets(target, converter, own)}
    return named, made


class _Once:
    """A conversion that may make several tensors, run when the first is asked for."""

    def __init__(self, convert: Callable[[], dict[str, Any]]) -> None:
        self._convert = convert
        self._made: dict[str, Any] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self._made:
            self._made = self._convert()
        value = self._made.pop(name)
        return value[0] if isinstance(value, list) else value


def _targets(target: str, converter: Any, names: Iterable[str]) -> list[str]:
    """All names that a conversion fills: it goes by its first pattern's."""
    first, *others = converter.target_patterns
    every = [target, *(target.replace(first, other) for other in others)]
    return [name for name in dict.fromkeys(every) if name in names]


def _class_of(model: Any) -> Any:
    return next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers."))


def model_type(config: str) -> str | None:
    """What family of transformers a ``config.json`` is of; None where it is of something else."""
    try:
        found = json.loads(config).get("model_type")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None
