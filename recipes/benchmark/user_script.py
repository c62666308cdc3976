"""A script as a user of Lightning has it: ``python user_script.py STRATEGY RANKS FILE`` trains two steps.

Lightning's launcher starts the other ranks. FILE gets the time at which rank 0 ended its first step.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.benchmark.first_step import FirstStep
from recipes.image_classification.data import Digits
from recipes.image_classification.models import vision_transformer
from recipes.image_classification.module import ImageClassifier

if __name__ == "__main__":
    strategy, ranks, file = sys.argv[1:]
    if strategy == "hybrid":
        import lightning_dist  # noqa: F401
    L.seed_everything(0)
    network = partial(vision_transformer, image_size=8, in_channels=1, num_classes=10)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(ranks),
        strategy=strategy,
        max_steps=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        callbacks=[FirstStep(file)],
    )
    trainer.fit(ImageClassifier(network, partial(torch.optim.AdamW, lr=1e-3), num_classes=10), Digits())
