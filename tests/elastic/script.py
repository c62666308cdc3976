"""A user's script that trains, notes what it saw, and may be struck: ``script.py FOLDER JSON-OF-OPTIONS``."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_dist import HybridStrategy
from tests.faults.fault import Fault, Faults
from tests.faults.strikes import note_rank
from tests.support import device

WIDTH, CLASSES, SIZE = 16, 4, 56


class Samples(Dataset):
    """With a noise that is drawn when they are asked for, and their number."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(WIDTH, generator=generator) + 0.1 * torch.randn(WIDTH)
        return x, index % CLASSES, index


class Network(L.LightningModule):
    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause
        blocks = [nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(4)]
        self.net = nn.Sequential(*blocks, nn.Linear(WIDTH, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), "interval": "step"}]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        time.sleep(self.pause)


class Notes(Callback):
    """Appends each step to a file of this rank: the samples, the loss."""

    def __init__(self, folder: Path, fit: int) -> None:
        self.folder, self.fit = folder, fit

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        attempt = int(os.environ.get("LIGHTNING_DIST_ATTEMPT", "0"))
        note = {"fit": self.fit, "step": trainer.global_step, "attempt": attempt, "epoch": trainer.current_epoch}
        note |= {"samples": batch[2].tolist(), "loss": float(outputs["loss"]), "time": time.time()}
        note["data_rank"] = trainer.strategy.data_rank
        with (self.folder / f"steps-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")


def main(folder: Path, options: dict[str, Any]) -> None:
    note_rank(folder)
    warnings.simplefilter("ignore")
    L.seed_everything(1, verbose=False)
    module = Network(options.get("pause", 0.0))
    accelerator = options.get("device", "cpu")
    if accelerator != "cpu":
        device.choose(accelerator, shared=True)
        device.take(int(os.environ["LOCAL_RANK"]))
    for fit, steps in enumerate(options["steps"]):
        saves = ModelCheckpoint(folder / f"saves-{fit}", every_n_train_steps=options["every"], save_top_k=1)
        faults = [Fault(**fault) for of_fit, fault in options.get("faults", ()) if of_fit == fit]
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=options["ranks"],
            strategy=HybridStrategy(
                options["layout"],
                async_save=options.get("async_save", False),
                snapshot_every_n_steps=options.get("snapshots"),
            ),
            max_steps=steps,
            logger=False,
            callbacks=[Notes(folder, fit), Faults(*faults), *([saves] if options["every"] else [])],
            enable_checkpointing=bool(options["every"]),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(Samples(), batch_size=4, shuffle=True, num_workers=options.get("workers", 0)))
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "final.pt")


def main_apart(folder: Path, options: dict[str, Any]) -> None:
    """The same in a process whose output goes to the run's log."""
    with (folder / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    main(folder, options)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
