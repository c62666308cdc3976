"""From any form of a checkpoint to another, in the memory of its largest tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from lightning_dist.checkpoint.files import put_in_place, remove_any, temporary_sibling
from lightning_dist.checkpoint.filled import write_filled
from lightning_dist.checkpoint.forms import form_of
from lightning_dist.checkpoint.lazy import LazyTensor, give_back_freed_memory, in_memory
from lightning_dist.checkpoint.locations import delivered, fetched, located, refuse_others, settled
from lightning_dist.checkpoint.opened import open_checkpoint
from lightning_dist.checkpoint.safetensors import write_file, write_folder
from lightning_dist.checkpoint.sharded import Shards, is_large, save_sharded
from lightning_dist.checkpoint.single import gather_state
from lightning_dist.checkpoint.weights import CONFIG, SAFETENSORS
from lightning_dist.plans.pretrained import DESCRIPTIONS, model_type
from lightning_dist.pytree import Path as TreePath
from lightning_dist.pytree import map_leaves

_PART = 1 << 25
"""Bytes of a part of a sharded checkpoint that is written by rows."""

Target = Literal["lightning", "sharded", "safetensors", "transformers"]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Target = "lightning",
    prefix: str | None = None,
    config: str | os.PathLike[str] | None = None,
    largest_file: int = 5_000_000_000,
    overwrite: bool = False,
    weights_only: bool | None = None,
    progress: Callable[[int, int], None] = lambda written, total: None,
) -> Path:
    """Writes a checkpoint in another form.

    Runs in one process, without a process group. Tensors are read and written one at a time, and where their rows
    lie in order, by rows: memory holds no more than the largest of them, beside what is no tensor.

    Args:
        source: a file or directory of ours, of plain Lightning or its strategies, of transformers, timm or
            torchvision; local or at a URL, where all but shards is copied to this machine first.
        target: what to write; it appears when it is complete. To a URL, all but shards is sent when it is written.
        to: ``"lightning"``, the single file that plain Lightning and ``load_from_checkpoint`` open; ``"sharded"``, a
            directory of shards, from which each rank reads its part; ``"safetensors"``, the weights alone, as a file
            if ``target`` ends so, else a directory; ``"transformers"``, a directory that ``from_pretrained`` opens.
        prefix: what the names of the weights have in the module and not in the published weights, as ``"model."``:
            it is taken off by the last two, with all weights that lack it left out, and put before bare weights by the
            first two. Default: nothing; for transformers, the name of its model in the module.
        config: of the model, for transformers: a ``config.json``, or a directory that has one. Default: that of the
            source, which checkpoints of a module with a model of transformers hold.
        largest_file: bytes after which safetensors begin another file.
        overwrite: replace what is there.
        weights_only: as in ``torch.load``.
        progress: told the bytes written and those to write.

    Returns:
        The path of what was written.

    Raises:
        FileNotFoundError: there is no ``source``.
        ValueError: ``source`` is no checkpoint, or a damaged one; ``target`` is there; no configuration is known for
            transformers; no weight has the prefix; a type of values that safetensors does not have.
    """
    source, target = located(source), located(target)
    if to not in ("lightning", "sharded", "safetensors", "transformers"):
        raise ValueError(
            f"a checkpoint can't be written as {to!r}; choose lightning, sharded, safetensors or transformers"
        )
    if target == source or (target.exists() and target.resolve() == source.resolve()):
        raise ValueError(f"{target} is the source; pass another name")
    if target.resolve() in source.resolve().parents:
        raise ValueError(f"{target} is a directory that the source lies in; pass another name")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists; pass another name, or overwrite it explicitly")
    if to == "lightning" and target.is_dir():
        raise ValueError(f"{target} is a directory; name the file to write")
    refuse_others(target)
    give_back_freed_memory()
    source = settled(source)
    local_source = nullcontext(source) if form_of(source) == "sharded" else fetched(source)
    local_target = nullcontext(target) if to == "sharded" else delivered(target)
    with local_target as place, local_source as opened:
        checkpoint = open_checkpoint(opened, weights_only)
        _write(checkpoint, place, to, source, prefix, config, largest_file, progress)
    return target


def _write(
    checkpoint: dict[str, Any],
    target: Path,
    to: Target,
    source: Path,
    prefix: str | None,
    config: str | os.PathLike[str] | None,
    largest_file: int,
    progress: Callable[[int, int], None],
) -> None:
    if to in ("lightning", "sharded"):
        if checkpoint.keys() == {"state_dict"}:
            checkpoint = _as_run(checkpoint["state_dict"], prefix or "")
        elif prefix:
            raise ValueError(f"{source} holds a run, whose names stay as they are: leave the prefix out")
        write: Any = write_filled if to == "lightning" else _write_sharded
        written: Any = gather_state(checkpoint) if to == "lightning" else checkpoint
        write(written, target, _Counted(written, progress))
        return
    files: Mapping[str, str] = {}
    if to == "transformers":
        found, files = _described(checkpoint, source, config, prefix)
        prefix = found if prefix is None else prefix
    weights = _published(checkpoint["state_dict"], prefix or "", source)
    advance = _Counted(weights, progress)
    if to == "safetensors" and target.suffix == SAFETENSORS:
        write_file(weights, target, advance)
    else:
        _write_folder(weights, files, target, advance, largest_file)


class _Counted:
    """Adds up what has been written."""

    def __init__(self, tree: Any, progress: Callable[[int, int], None]) -> None:
        sizes: dict[int, int] = {}

        def note(_: TreePath, value: Any) -> Any:
            if isinstance(value, LazyTensor):
                sizes[id(value)] = value.nbytes
            return value

        map_leaves(dict(tree), note)
        self._total, self._written, self._progress = sum(sizes.values()), 0, progress

    def __call__(self, count: int) -> None:
        self._written += count
        self._progress(min(self._written, self._total), self._total)


def _as_run(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A checkpoint of plain Lightning before its first step."""
    state = {prefix + name: value for name, value in weights.items()}
    return {"epoch": 0, "global_step": 0, "pytorch-lightning_version": pl.__version__, "state_dict": state}


def _published(state: Mapping[str, Any], prefix: str, source: Path) -> dict[str, LazyTensor]:
    weights = {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and isinstance(value, LazyTensor)
    }
    if not weights:
        known = ", ".join(list(state)[:3])
        raise ValueError(f"no weight of {source} has a name that begins with {prefix!r}; it has {known}, ...")
    return weights


def _described(
    checkpoint: Mapping[str, Any], source: Path, config: str | os.PathLike[str] | None, prefix: str | None
) -> tuple[str, dict[str, str]]:
    """The prefix of a model of transformers, and the files beside its weights."""
    if config is not None or (source.is_dir() and (source / CONFIG).is_file()):
        place = located(config) if config is not None else source
        folder = place if place.is_dir() else place.parent
        texts = {file.name: file.read_text() for file in sorted(folder.glob("*.json")) if "index" not in file.name}
        if not place.is_dir():
            texts[CONFIG] = place.read_text()
        if model_type(texts.get(CONFIG, "")) is None:
            raise ValueError(f"{place} has no {CONFIG} with the model_type of transformers")
        return "", texts
    known: dict[str, dict[str, str]] = checkpoint.get(DESCRIPTIONS, {})
    asked = None if prefix is None else prefix.removesuffix(".")
    if asked is None and len(known) == 1:
        asked = next(iter(known))
    if asked not in known:
        there = f"it holds those of {', '.join(map(repr, known))}: choose by the prefix" if known else "it holds none"
        raise ValueError(
            f"{source}: what configuration of transformers to write is not known ({there}); pass config, a config.json "
            "or the directory of the model that training began from"
        )
    return f"{asked}." if asked else "", known[asked]


def _write_folder(
    weights: Mapping[str, LazyTensor],
    files: Mapping[str, str],
    target: Path,
    advance: Callable[[int], None],
    largest: int,
) -> None:
    temporary = temporary_sibling(target)
    remove_any(temporary)
    temporary.mkdir(parents=True)
    try:
        for name, text in files.items():
            (temporary / name).write_text(text)
        write_folder(weights, temporary, advance, largest)
        put_in_place(temporary, target)
    except BaseException:
        remove_any(temporary)
        raise


def _write_sharded(checkpoint: dict[str, Any], target: Path, advance: Callable[[int], None]) -> None:
    checkpoint = in_memory(checkpoint, unless=is_large)
    lazies: dict[int, LazyTensor] = {}
    stand_ins: dict[int, Tensor] = {}

    def stand_in(_: TreePath, value: Any) -> Any:
        if not isinstance(value, LazyTensor):
            return value
        if id(value) not in stand_ins:
            stand_ins[id(value)] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        lazies[id(stand_ins[id(value)])] = value
        return stand_ins[id(value)]

    tree = map_leaves(checkpoint, stand_in)
    shards = Shards.of(tree, writes_plain=True)
    sources = {}
    for key, place in shards.places:
        node = tree
        for step in place:
            node = node[step]
        sources[key] = lazies[id(node)]
    save_sharded(shards, target, planner=_LazyPlanner(sources, advance))


class _LazyPlanner(DefaultSavePlanner):
    """Reads a tensor when it is written, large ones by rows, and lets what was read before go.

    Args:
        sources: by the key of the tensor in the directory.
        advance: told how many bytes have been read since it was last told.
    """

    def __init__(self, sources: Mapping[str, LazyTensor], advance: Callable[[int], None]) -> None:
        super().__init__()
        self._sources, self._advance = sources, advance
        self._last: Tensor | None = None

    def create_local_plan(self) -> SavePlan:
        """Large tensors as several parts."""
        plan = super().create_local_plan()
        parts = [part for item in plan.items for part in _parts(item, self._sources.get(item.index.fqn))]
        self.plan = replace(plan, items=parts)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The values of one part."""
        source = self._sources.get(write_item.index.fqn)
        if source is None:
            return super().resolve_data(write_item)
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        if self._last is not None:
            # torch's writer keeps every tensor of a file until it is complete
            self._last.untyped_storage().resize_(0)
        begin = chunk.offsets[0] if chunk.offsets else 0
        self._last = source.read_some(begin, begin + chunk.sizes[0] if chunk.sizes else 1).contiguous()
        if self._last.untyped_storage().nbytes() != self._last.nbytes or not self._last.untyped_storage().resizable():
            self._last = self._last.clone()
        self._advance(self._last.nbytes)
        return self._last


def _parts(item: WriteItem, source: LazyTensor | None) -> list[WriteItem]:
    data = item.tensor_data
    if source is None:
        return [item]
    assert data is not None
    if source.nbytes <= _PART or not source.ndim:
        return [item]
    parts = []
    for begin, end in source.rows(_PART):
        offsets, sizes = torch.Size([begin, *[0] * (source.ndim - 1)]), torch.Size([end - begin, *source.shape[1:]])
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
        index = MetadataIndex(item.index.fqn, offsets)
        parts.append(replace(item, index=index, type=WriteItemType.SHARD, tensor_data=replace(data, chunk=chunk)))
    return parts
