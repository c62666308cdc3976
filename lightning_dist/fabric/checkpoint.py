"""What ``fabric.save`` and ``fabric.load`` write and read: the user's dictionary, in files that fit every layout.

[Note: the user's dictionary]
A single file is what plain Fabric writes in one process: each module's state dict and each optimizer's, under the
user's keys, and the rest as it is. A directory of shards has the format of this package's other ones, so that its tools
read it: ``state_dict`` with the user's key before each name, ``optimizer_states`` by the names of parameters, and
under ``fabric`` the keys and the rest. :func:`load` gives the user's dictionary back from both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dist import checkpoint as checkpoints
from lightning_dist.checkpoint.checksums import verify_file
from lightning_dist.checkpoint.lazy_tensors import LazyTensor
from lightning_dist.checkpoint.locations import as_path, format_of, local_copy, resolve_swap
from lightning_dist.checkpoint.optimizer_state import with_indices
from lightning_dist.checkpoint.sharded_load import read_sharded
from lightning_dist.checkpoint.single_file import check_sizes, load_pickled, save_single
from lightning_dist.collectives import broadcast_object, global_rank, num_ranks, raise_on_all_ranks
from lightning_dist.compat.fabric import Stateful, apply_filter, validate_keys
from lightning_dist.fabric.module import bare
from lightning_dist.pytree import map_leaves

Filter = Mapping[str, Callable[[str, Any], bool]]

_KEYS = "fabric"
"""The entry of a directory that says under which keys the user had what."""


def save(
    path: str | Path,
    state: Mapping[str, Any],
    selected: Filter,
    sharded: bool,
    write: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Writes the user's dictionary; every rank calls this, and the path is rank 0's. See [Note: the user's dictionary].

    Args:
        path: local, or the URL of a filesystem that fsspec knows.
        state: modules, optimizers, what has a ``state_dict``, and anything else.
        selected: by key, which entries of its state are kept.
        sharded: a directory to which every rank writes its part, else a single file.
        write: for the single file, what writes it on rank 0 (a ``CheckpointIO`` of the user's).

    Communication: see :func:`lightning_dist.checkpoint.save`.
    """
    converted: dict[str, Any] = {}
    names = _names(state)
    for key, value in state.items():
        apply_filter(key, dict(selected), _state_of(value, names), converted)
    modules = [key for key in converted if isinstance(state[key], nn.Module)]
    optimizers = [key for key in converted if isinstance(state[key], Optimizer)]
    if sharded:
        checkpoints.save(_as_directory(converted, modules, optimizers), path, sharded=True)
        return
    whole = checkpoints.gather_state({"": converted}).get("", {})
    whole |= {key: _by_index(whole[key]) for key in optimizers if key in whole}
    save_single(whole, as_path(broadcast_object(path)), write)


def load(path: str | Path, state: dict[str, Any], strict: bool, weights_only: bool | None) -> dict[str, Any]:
    """Puts what a checkpoint holds into the user's dictionary, in place; every rank calls this.

    Each rank reads its part: a single file is mapped, of a directory only what overlaps with the rank's shards is read.

    Args:
        path: rank 0's; what :func:`save` wrote under any layout, or a file of plain Fabric.
        state: as for :func:`save`; modules and optimizers in their layout.
        strict: the checkpoint has all of its keys, and the names of modules.
        weights_only: as in ``torch.load``; None and True execute nothing from the file.

    Returns:
        What of the checkpoint is under no key of ``state``, whole.

    Raises:
        KeyError: a key of ``state`` that the checkpoint lacks, if ``strict``.
        FileNotFoundError, ValueError: on every rank, see :func:`lightning_dist.checkpoint.load`.

    Communication: some verdicts, a short string a rank.
    """
    names = _names(state)
    checkpoint = _read(path, _modules(state), names, weights_only)
    validate_keys(state.keys(), checkpoint.keys(), strict)
    for key, value in list(state.items()):
        if key not in checkpoint:
            continue
        stored = checkpoint.pop(key)
        if isinstance(value, nn.Module):
            checkpoints.load_model_state(bare(value), stored, strict, path)
        elif isinstance(value, Optimizer):
            _load_optimizer(value, stored, names, path)
        elif isinstance(value, Stateful):
            value.load_state_dict(_in_memory(stored))
        else:
            state[key] = _in_memory(stored)
    return {key: _in_memory(_by_index(value)) for key, value in checkpoint.items()}


def load_raw(path: str | Path, target: nn.Module | Optimizer, strict: bool, weights_only: bool | None) -> None:
    """Puts bare weights, or the bare state of an optimizer, into a module or an optimizer in its layout.

    The path is a file of ``torch.save``; of weights any that :func:`lightning_dist.checkpoint.load` reads.
    """
    if isinstance(target, nn.Module):
        weights = checkpoints.load(path, bare(target), optimizers=False, weights_only=weights_only)["state_dict"]
        checkpoints.load_model_state(bare(target), weights, strict, path)
    else:
        _load_optimizer(target, _read(path, {}, {}, weights_only), {}, path)


def _modules(state: Mapping[str, Any]) -> dict[str, nn.Module]:
    return {key: bare(value) for key, value in state.items() if isinstance(value, nn.Module)}


def _names(state: Mapping[str, Any]) -> dict[Tensor, str]:
    """Names of the parameters of all modules in the user's dictionary, under their keys; a shared one by its first."""
    names: dict[Tensor, str] = {}
    for key, module in _modules(state).items():
        for parameter, name in checkpoints.parameter_names(module).items():
            names.setdefault(parameter, f"{key}.{name}")
    return names


def _state_of(value: Any, names: Mapping[Tensor, str]) -> Any:
    if isinstance(value, nn.Module):
        return checkpoints.model_state(bare(value))
    if isinstance(value, Optimizer):
        return checkpoints.optimizer_state_by_name(value, names)
    return value.state_dict() if isinstance(value, Stateful) else value


def _as_directory(converted: Mapping[str, Any], modules: list[str], optimizers: list[str]) -> dict[str, Any]:
    rest = {key: value for key, value in converted.items() if key not in (*modules, *optimizers)}
    return {
        "state_dict": {f"{key}.{name}": value for key in modules for name, value in converted[key].items()},
        "optimizer_states": [converted[key] for key in optimizers],
        _KEYS: {"modules": modules, "optimizers": optimizers, "order": list(converted), "rest": rest},
    }


def _from_directory(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The user's dictionary; what is none of Fabric's as it is."""
    keys = checkpoint.get(_KEYS)
    if not isinstance(keys, dict) or "order" not in keys:
        return dict(checkpoint)
    found = dict(keys["rest"])
    for key in keys["modules"]:
        prefix = f"{key}."
        # of two keys of which one begins as the other
        longer = tuple(f"{other}." for other in keys["modules"] if other != key and other.startswith(prefix))
        names = [n for n in checkpoint["state_dict"] if n.startswith(prefix) and not (longer and n.startswith(longer))]
        found[key] = {name.removeprefix(prefix): checkpoint["state_dict"][name] for name in names}
    found |= zip(keys["optimizers"], checkpoint["optimizer_states"], strict=True)
    return {key: found[key] for key in keys["order"]}


def _read(
    path: str | Path, modules: Mapping[str, nn.Module], names: Mapping[Tensor, str], weights_only: bool | None
) -> dict[str, Any]:
    there = as_path(broadcast_object(path))
    with raise_on_all_ranks(f"read checkpoint {there}"):
        there = resolve_swap(there)
        format = format_of(there)
    if format == "sharded":
        states = {key: checkpoints.model_state(module) for key, module in modules.items()}
        weights = {f"{key}.{name}": value for key, state in states.items() for name, value in state.items()}
        parameters = {name: parameter for parameter, name in names.items()}
        return _from_directory(read_sharded(there, weights, parameters, True, weights_only))
    if format == "weights":
        raise ValueError(f"{there} holds weights alone; fabric.load_raw(path, model) reads them")
    with raise_on_all_ranks(f"read checkpoint {there}"), local_copy(there) as local:
        verify_file(local, global_rank(), num_ranks())
        stored = load_pickled(local, weights_only, mmap=True)
        check_sizes(stored, local)
        if not isinstance(stored, dict):
            kind = type(stored).__name__
            raise ValueError(f"checkpoint {there} holds a {kind}, where fabric.save writes a dictionary")
    return _from_directory(stored)


def _load_optimizer(
    optimizer: Optimizer, stored: Mapping[str, Any], names: Mapping[Tensor, str], path: str | Path
) -> None:
    if not all(parameter in names for group in optimizer.param_groups for parameter in group["params"]):
        stored = with_indices(stored)  # nothing says what the names of its parameters are here
    checkpoints.load_optimizer_state(optimizer, stored, names, path)


def _by_index(value: Any) -> Any:
    """An optimizer's state as torch writes it; anything else as it is."""
    return with_indices(value) if isinstance(value, dict) and value.keys() >= {"state", "param_groups"} else value


def _in_memory(value: Any) -> Any:
    """Free of the file, which may be written anew."""
    read: dict[int, Tensor] = {}

    def copied(_: Any, leaf: Any) -> Any:
        if not isinstance(leaf, (Tensor, LazyTensor)):
            return leaf
        if id(leaf) not in read:
            read[id(leaf)] = leaf.clone() if isinstance(leaf, Tensor) else leaf.read()
        return read[id(leaf)]

    return map_leaves(value, copied)
