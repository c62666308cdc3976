"""SavePretrained: the trained model as a directory that ``from_pretrained`` opens, with its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_dist.checkpoint import convert
from recipes.language_model.tokenizers_of_models import CONFIG, TOKENIZER


class SavePretrained(Callback):
    """Writes the model when a fit has ended: ``config.json``, safetensors, and the tokenizer of the data.

    Communication: that of a checkpoint, and a barrier. The first rank writes, one tensor of a checkpoint at a time.

    Args:
        directory: what to write; a model that is there is replaced.
        weights: ``"best"``, by the monitor of the run's checkpoints, or ``"last"``.

    Raises:
        ValueError: when the fit begins, where the run keeps no best checkpoint, the model is none of transformers, or
            the directory has something else.
    """

    def __init__(self, directory: str | Path, weights: Literal["best", "last"] = "best") -> None:
        if weights not in ("best", "last"):
            raise ValueError(f"weights={weights!r}; choose best or last")
        self.directory, self.weights = Path(directory).expanduser(), weights

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks whether it can be done at the end."""
        from transformers import PreTrainedModel

        if self.weights == "best" and not isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            raise ValueError(
                "the best weights are those of a ModelCheckpoint, and this run has none; save the last ones"
            )
        if not any(isinstance(part, PreTrainedModel) for part in pl_module.modules()):
            raise ValueError("only a model of transformers can be saved for from_pretrained; choose model=transformers")
        if self.directory.exists() and not (self.directory / "config.json").is_file():
            raise ValueError(f"{self.directory} is there and no model of transformers; name another directory")

    @property
    def _last(self) -> Path:
        """A checkpoint of the weights at the end, for as long as they are written."""
        return self.directory.parent / f".{self.directory.name}.ckpt"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the last weights: the run's own last checkpoint may be some steps older."""
        if self.weights == "last":
            trainer.save_checkpoint(self._last, weights_only=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes it: checkpoints that are saved in the background are whole by now."""
        checkpoint: Any = trainer.checkpoint_callback
        if trainer.is_global_zero:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            path = self._last if self.weights == "last" else checkpoint.best_model_path
            convert(path, self.directory, to="transformers", overwrite=True, weights_only=False)
            _save_tokenizer(getattr(trainer, "datamodule", None), self.directory)
            rank_zero_info(f"the {self.weights} weights, for from_pretrained: {self.directory}")
        trainer.strategy.barrier("save_pretrained")
        if self.weights == "last":
            trainer.strategy.remove_checkpoint(self._last)


def _save_tokenizer(data: Any, directory: Path) -> None:
    """All files of a tokenizer that was given, else the one that the data has."""
    given = getattr(data, "tokenizer_directory", None)
    if given is not None:
        weights = {".safetensors", ".bin", ".pt", ".pth"}
        for file in Path(given).expanduser().iterdir():
            is_other = file.suffix in weights or file.name.endswith(".index.json") or (directory / file.name).exists()
            if file.is_file() and not is_other:
                shutil.copyfile(file, directory / file.name)
        return
    corpus = getattr(data, "corpus", None)
    if corpus is not None:
        from transformers import PreTrainedTokenizerFast

        end = corpus.end_of_text
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=corpus.tokenizer, eos_token=end, bos_token=end)
        tokenizer.save_pretrained(directory)
        assert (directory / TOKENIZER).is_file()
        assert (directory / CONFIG).is_file()
