"""What a comparison has to know of a training's random numbers and dtypes: what was switched off, drawn, rounded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_dist.compat.torch import DropoutNd
from lightning_dist.pytree import deep_tensors


def switch_off_dropout(module: nn.Module) -> set[str]:
    """Makes every probability of dropping zero, as layers have it, modules that call functions, and configs.

    Returns:
        names of what had another.
    """
    found = set()
    for name, holder in _holders(module):
        for key, value in vars(holder).items():
            if _is_dropping(holder, key) and isinstance(value, float) and 0 < value < 1:
                vars(holder)[key] = 0.0
                found.add(f"{name}.{key}".strip("."))
    return found


def _holders(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, child in module.named_modules():
        yield name, child
        config = vars(child).get("config")  # of transformers
        if hasattr(config, "__dict__") and not isinstance(config, type):
            yield f"{name}.config", config


def _is_dropping(holder: Any, key: str) -> bool:
    # torchvision's StochasticDepth, as dropout, calls it p
    is_layer = isinstance(holder, DropoutNd) or "stochastic" in type(holder).__name__.lower()
    return _OF_DROPPING.fullmatch(key.lower()) is not None or (is_layer and key == "p")


_PROBABILITY = r"_?(p|probs?|probability|rate|ratio)"
_DROPPED = "attn|attention|proj|mlp|ffn?|path|emb|embd|embed|embedding|pos|head|resid|residual|hidden|act|layer|token"
_OF_DROPPING = re.compile(
    rf"\w*(drop_?out|layer_?drop|drop_?path|drop_?connect)({_PROBABILITY})?|(\w+_)?p_?drop"
    rf"|(?!lr_|learning_)(\w+_)?drop{_PROBABILITY}|((\w+_)?({_DROPPED})_?)?drop"
)
"""Names of probabilities, as libraries have them; not of rates, weights and steps that drop."""


class DropoutOff(Callback):
    """Switches off dropout of what :meth:`configure_model` made."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found |= switch_off_dropout(pl_module)


class StepWatch(Callback):
    """Looks at the steps of one process: whether they draw random numbers, and in which dtypes they compute."""

    def __init__(self) -> None:
        self.draws = False
        """Whether a step drew numbers of torch's generators."""
        self._mode = _Dtypes()
        self._is_in_step = False
        self._state: list[Tensor] = []

    @property
    def coarsest(self) -> torch.dtype:
        """The floating dtype of fewest bits among what depends on parameters."""
        return min(self._mode.seen, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float64)

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self._state = _random_states()
        self._mode.__enter__()
        self._is_in_step = True

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self._leave_step()

    @override
    def on_train_epoch_end(self, *_: Any) -> None:
        self._leave_step()

    @override
    def on_exception(self, *_: Any) -> None:
        self._leave_step()

    def _leave_step(self) -> None:
        """Once: a batch that is None has an end without a start, one that the module skips a start without an end."""
        if self._is_in_step:
            self._is_in_step = False
            self._mode.__exit__(None, None, None)
            self._note_draws()

    @override
    def on_validation_batch_start(self, *_: Any) -> None:
        self._state = _random_states()

    @override
    def on_validation_batch_end(self, *_: Any) -> None:
        self._note_draws()

    def _note_draws(self) -> None:
        self.draws |= not all(map(torch.equal, self._state, _random_states()))


def _random_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


class _Dtypes(TorchFunctionMode):
    """Notes the dtypes of floating tensors that functions of torch give, and that need a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in deep_tensors(output):
            if tensor.is_floating_point() and tensor.requires_grad:
                self.seen.add(tensor.dtype)
        return output
