"""A user's script that runs on several machines, and notes what it saw: ``on_machines.py FOLDER JSON-OF-OPTIONS``."""

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
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import HybridStrategy

WIDTH, CLASSES, SIZE = 16, 4, 56


class Network(L.LightningModule):
    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(self.pause)
        return F.cross_entropy(self.head(self.net(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), "interval": "step"}]


class Notes(Callback):
    """Appends each batch to a file of this process: to which optimizer step it belongs, the samples, the loss."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, 0

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.done = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        note = {"step": self.done + 1, "samples": batch[2].tolist(), "loss": float(outputs["loss"])}
        note |= {"time": time.time(), "world": trainer.world_size, "master": os.environ["MASTER_PORT"]}
        self.done = trainer.global_step
        with (self.folder / f"batches-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")


def main(folder: Path, options: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    L.seed_everything(1, verbose=False)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SIZE, WIDTH, generator=generator)
    data = TensorDataset(inputs, torch.arange(SIZE) % CLASSES, torch.arange(SIZE))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=options.get("devices", 2),
        strategy=HybridStrategy(options["layout"]),
        max_steps=options["steps"],
        logger=False,
        callbacks=[Notes(folder), ModelCheckpoint(folder / "saves", every_n_train_steps=2, save_top_k=1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Network(options["pause"]), DataLoader(data, batch_size=4, shuffle=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
