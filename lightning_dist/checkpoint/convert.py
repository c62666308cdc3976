"""From any format of a checkpoint to another, in the memory of its largest tensor."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_dist.checkpoint import locations
from lightning_dist.checkpoint.lazy_tensors import PIECE, LazyTensor, leaves
from lightning_dist.checkpoint.locations import CONFIG, SAFETENSORS
from lightning_dist.checkpoint.single_file import gather_state
from lightning_dist.checkpoint.streaming import open_checkpoint, write_streaming_directory, write_streaming_file
from lightning_dist.checkpoint.weights import write_file, write_folder
from lightning_dist.plans.pretrained import DESCRIPTIONS, model_type

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
    """Writes a checkpoint in another format, and returns its path; in one process, without a process group. Tensors are
    read and written one at a time, by rows where they lie in order: memory holds no more than the largest of them,
    beside what is no tensor.

    Args:
        source: a file or directory of ours, of plain Lightning or its strategies, of transformers, timm or torchvision;
            local or at a URL, where all but shards is copied to this machine first.
        target: what to write; it appears when it is complete. To a URL, all but shards is sent when it is written.
        to: ``"lightning"``, the single file that plain Lightning and ``load_from_checkpoint`` open; ``"sharded"``, a
            directory of shards, from which each rank reads its part; ``"safetensors"``, the weights alone, as a file if
            ``target`` ends so, else a directory; ``"transformers"``, a directory that ``from_pretrained`` opens.
        prefix: what the names of the weights have in the module and not in the published weights, as ``"model."``: it
            is taken off by the last two, with all weights that lack it left out, and put before bare weights by the
            first two. Default: nothing; for transformers, the name of its model in the module.
        config: of the model, for transformers: a ``config.json``, or a directory that has one. Default: that of the
            source, which checkpoints of a module with a model of transformers hold.
        largest_file: bytes after which safetensors begin another file.
        overwrite: replace what is there.
        weights_only: as in ``torch.load``.
        progress: told the bytes written and those to write.

    Raises:
        FileNotFoundError: there is no ``source``.
        ValueError: ``source`` is no checkpoint, or a damaged one; ``target`` is there; no configuration is known for
            transformers; no weight has the prefix; a type of values that safetensors does not have.
    """
    source, target = locations.as_path(source), locations.as_path(target)
    _validate(source, target, to, overwrite)
    source = locations.resolve_swap(source)
    local_source = nullcontext(source) if locations.format_of(source) == "sharded" else locations.local_copy(source)
    local_target = nullcontext(target) if to == "sharded" else locations.upload_on_exit(target)
    with local_target as place, local_source as opened:
        checkpoint = open_checkpoint(opened, weights_only)
        if to == "lightning":
            whole = gather_state(_as_run(checkpoint, source, prefix))
            write_streaming_file(whole, place, _Progress(whole, progress))
        elif to == "sharded":
            run = _as_run(checkpoint, source, prefix)
            write_streaming_directory(run, place, _Progress(run, progress))
        else:
            files: Mapping[str, str] = {}
            if to == "transformers":
                found, files = _described(checkpoint, source, config, prefix)
                prefix = found if prefix is None else prefix
            weights = _published(checkpoint["state_dict"], prefix or "", source)
            _write_weights(weights, files, place, to, _Progress(weights, progress), largest_file)
    return target


def _validate(source: Path, target: Path, to: str, overwrite: bool) -> None:
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
    locations.validate_target(target)


def _as_run(checkpoint: dict[str, Any], source: Path, prefix: str | None) -> dict[str, Any]:
    """The checkpoint; of bare weights, one of plain Lightning before its first step."""
    if checkpoint.keys() == {"state_dict"}:
        state = {(prefix or "") + name: value for name, value in checkpoint["state_dict"].items()}
        return {"epoch": 0, "global_step": 0, "pytorch-lightning_version": pl.__version__, "state_dict": state}
    if prefix:
        raise ValueError(f"{source} holds a run, whose names stay as they are: leave the prefix out")
    return checkpoint


def _write_weights(
    weights: dict[str, LazyTensor], files: Mapping[str, str], target: Path, to: str, advance: _Progress, largest: int
) -> None:
    if to == "safetensors" and target.suffix == SAFETENSORS:
        write_file(weights, target, advance)
        return
    with locations.written_beside(target) as temporary:
        temporary.mkdir()
        for name, text in files.items():
            (temporary / name).write_text(text)
        write_folder(weights, temporary, advance, largest)


class _Progress:
    """Adds up what has been written, and lets the system have the memory in which it was."""

    def __init__(self, tree: Any, told: Callable[[int, int], None]) -> None:
        sizes = {id(value): value.nbytes for _, value in leaves(dict(tree)) if isinstance(value, LazyTensor)}
        self._total, self._written, self._told, self._kept = sum(sizes.values()), 0, told, 0

    def __call__(self, count: int) -> None:
        self._written += count
        self._kept += count
        if self._kept >= PIECE:
            self._kept = 0
            with suppress(AttributeError, OSError):  # glibc keeps blocks of up to 32 MB, which fit no other
                ctypes.CDLL(None).malloc_trim(0)
        self._told(min(self._written, self._total), self._total)


def _published(state: Mapping[str, Any], prefix: str, source: Path) -> dict[str, LazyTensor]:
    lazy = {name: value for name, value in state.items() if isinstance(value, LazyTensor)}
    weights = {name.removeprefix(prefix): value for name, value in lazy.items() if name.startswith(prefix)}
    if not weights:
        known = ", ".join(list(state)[:3])
        raise ValueError(f"no weight of {source} has a name that begins with {prefix!r}; it has {known}, ...")
    return weights


def _described(
    checkpoint: Mapping[str, Any], source: Path, config: str | os.PathLike[str] | None, prefix: str | None
) -> tuple[str, dict[str, str]]:
    """The prefix of a model of transformers, and the files beside its weights."""
    if config is not None or (source.is_dir() and (source / CONFIG).is_file()):
        place = locations.as_path(config) if config is not None else source
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
