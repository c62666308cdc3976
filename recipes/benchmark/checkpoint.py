"""Checkpoints: bytes written, time beside torch.distributed.checkpoint alone, how long a save in the background stops
the training, and the memory of an export."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import Callback
from rich.progress import Progress
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten_with_path
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy
from lightning_dist.elastic import launch
from recipes.benchmark import export
from recipes.benchmark.competitors import free_of_noise
from recipes.benchmark.device import add_device_argument, device_type, join_process_group, rank_device, synchronize
from recipes.benchmark.results import Line, Record, counted, timed
from recipes.benchmark.turns import progress_bar

BYTES_MUST, SAVE_MUST, STOP_MUST, COPY_MUST = 1.02, 1 / 0.9, 0.1, 1.5

EXPORT_MUST = 300e6
"""Bytes that an export may take beside its largest tensor and a process that imported torch."""

LARGEST = 200_000_000
QUICK = {"megabytes": 50, "rounds": 5, "export": 400}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--ranks", type=int, default=2, help="that share the states (default: 2)")
    parser.add_argument("--megabytes", type=int, default=200, help="of parameters; AdamW's states are twice as many")
    parser.add_argument("--rounds", type=int, default=15, help="saves of each kind (default: 15)")
    parser.add_argument("--export", type=int, default=1000, help="megabytes of the checkpoint that is exported")
    add_device_argument(parser)
    parser.add_argument("--folder", type=Path, help="where to save (default: the system's temporary one)")


def measure(options: argparse.Namespace, record: Record) -> None:
    """Bytes, time of a save, time that one in the background takes from the training, and memory of an export."""
    launch(_measure_on_rank, options, record, num_processes=options.ranks)
    record.extend(_measure_export(options))


def _measure_export(options: argparse.Namespace) -> Iterator[Line]:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, progress_bar(True) as progress:
        source = Path(folder) / "source.ckpt"
        export.write_source(source, options.export * 1_000_000, LARGEST)
        for form, name in progress.track(export.FORMS.items(), description="exports"):
            found = export.memory_of_conversion(source, Path(folder) / name, form)
            took, allowed = found["peak"] - found["idle"], EXPORT_MUST + LARGEST
            what = f"to {form}, in {found['seconds']:.1f} s, above a process with torch"
            group = f"memory of an export of {options.export:,} MB"
            yield counted(group, what, took / 1e6, allowed / 1e6, 1.0, " MB")


def _measure_on_rank(options: argparse.Namespace, record: Record) -> None:
    free_of_noise()
    join_process_group(device_type(options.device, options.ranks))
    folder = [tempfile.mkdtemp(dir=options.folder)]
    dist.broadcast_object_list(folder)
    try:
        with progress_bar(dist.get_rank() == 0) as progress:
            saves = Saves(Path(folder[0]), options.rounds, progress)
            trainer = pl.Trainer(
                accelerator=rank_device().type,
                devices=options.ranks,
                strategy=HybridStrategy({"dp_shard": options.ranks}),
                max_steps=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[saves],
            )
            trainer.fit(Layers(options.megabytes), DataLoader(torch.randn(options.ranks, WIDTH)))  # type: ignore[arg-type]
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, saves.seconds)
    seconds = {name: [[max(one[name][i] for one in every)] for i in range(options.rounds)] for name in saves.seconds}
    record.extend(_lines(saves, seconds, options.ranks))


def _lines(saves: Saves, seconds: dict[str, Any], ranks: int) -> list[Line]:
    size = f"{saves.state_bytes / 1e6:,.0f} MB over dp_shard={ranks}"
    stop = f"stop of the training, {size}"
    return [
        counted("bytes of a checkpoint", "written, against the state", saves.written, saves.state_bytes, BYTES_MUST),
        timed(f"save of {size}", "against torch's alone", seconds["save"], seconds["torch"], SAVE_MUST),
        timed(stop, "in the background", seconds["background"], seconds["save"], STOP_MUST),
        # what no disk changes: a fast one makes the ratio above large, and the stop is no longer
        timed(stop, "against a copy alone", seconds["background"], seconds["copy"], COPY_MUST),
    ]


WIDTH = 1024


class Layers(pl.LightningModule):
    """Linear layers of so many megabytes."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        number = max(2, round(megabytes * 1e6 / (4 * WIDTH * WIDTH)))
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(number)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Any loss."""
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Two states a parameter."""
        return torch.optim.AdamW(self.parameters())


class Saves(Callback):
    """Saves the same state in turns of every kind, once it has optimizer states.

    Args:
        folder: that every rank sees.
        rounds: of saves.
        progress: shows them.
    """

    def __init__(self, folder: Path, rounds: int, progress: Progress) -> None:
        self._folder, self._rounds, self._progress = folder, rounds, progress
        self.seconds: dict[str, list[float]] = {}
        self.written = self.state_bytes = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Runs all saves."""
        strategy: Any = trainer.strategy
        checkpoint = trainer._checkpoint_connector.dump_checkpoint()
        leaves, _structure = tree_flatten_with_path([checkpoint["state_dict"], checkpoint["optimizer_states"]])
        tensors = {str(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
        self.state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
        memory = [torch.empty_like(part, device="cpu", pin_memory=part.device.type != "cpu") for part in parts]

        def save(path: Path, in_background: bool = False) -> None:
            strategy.checkpoint_options.in_background = in_background
            trainer.save_checkpoint(path)

        kinds: dict[str, Callable[[Path], None]] = {
            "save": save,
            "torch": lambda path: _torch_alone(tensors, path),
            "background": lambda path: save(path, True),
            "copy": lambda path: _copy_alone(parts, memory),
        }
        task = self._progress.add_task("saves", total=self._rounds * len(kinds))
        for number in range(-1, self._rounds):
            for name in list(kinds) if number % 2 == 0 else reversed(kinds):
                path = self._folder / name
                dist.barrier()
                synchronize()
                begin = time.perf_counter()
                kinds[name](path)
                synchronize()
                took = time.perf_counter() - begin
                strategy.parts.checkpoints.saves.wait()
                dist.barrier()
                if name == "save":
                    self.written = sum(file.stat().st_size for file in path.iterdir())
                if number >= 0:  # the first of each warms up
                    self.seconds.setdefault(name, []).append(took)
                    self._progress.advance(task)
                dist.barrier()
                if dist.get_rank() == 0:
                    shutil.rmtree(path, ignore_errors=True)  # a first save: to replace one takes the time to remove it
                dist.barrier()


def _copy_alone(parts: list[Tensor], memory: list[Tensor]) -> None:
    for part, place in zip(parts, memory, strict=True):
        place.copy_(part)


def _torch_alone(tensors: dict[str, Tensor], path: Path) -> None:
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path))
