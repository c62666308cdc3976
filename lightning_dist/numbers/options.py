"""What a user asks for where numbers are bad, and what is told of a step that had them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.optim import LBFGS, Optimizer

OnNonfinite = Literal["train", "skip", "raise"]


@dataclass(frozen=True)
class Spikes:
    """When a step's loss, or the norm of its gradients, is a spike, and what follows.

    It is one where it is above the median of the steps before by more than ``threshold`` times their spread: 1.4826
    times the median distance from the median (the standard deviation, of normal numbers), or 2 % of the median if that
    is more. So with the defaults nothing less than 1.2 times the median is one.

    Args:
        then: ``"report"``, or ``"rewind"``: go back to the last good state, and leave out the batches since.
        window: of how many steps the median is.
        warmup: steps before the first that may be a spike.
        threshold: see above.
        norms: whether to look at norms of gradients too, before clipping by norm.
        every_n_steps: how often a state to go back to is copied.
    """

    then: Literal["report", "rewind"] = "report"
    window: int = 64
    warmup: int = 10
    threshold: float = 10.0
    norms: bool = True
    every_n_steps: int = 20

    def __post_init__(self) -> None:
        if self.then not in ("report", "rewind"):
            raise ValueError(f"Spikes(then={self.then!r}) is none of 'report', 'rewind'")
        for name in ("window", "warmup", "every_n_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Spikes({name}={getattr(self, name)!r}) must be a number of steps, at least 1")
        if not self.threshold > 0 or math.isinf(self.threshold):
            raise ValueError(f"Spikes(threshold={self.threshold!r}) must be a positive number of spreads")


OnSpike = Literal["ignore", "report", "rewind"] | Spikes


@dataclass(frozen=True)
class NumberChecks:
    """The options of ``HybridStrategy`` about bad numbers, see there."""

    on_nonfinite: OnNonfinite = "train"
    spikes: Spikes | None = None
    replay_every_n_steps: int | None = None

    @classmethod
    def of(cls, on_nonfinite: OnNonfinite, on_spike: OnSpike, replay_every_n_steps: int | None) -> NumberChecks:
        """Raises a ValueError for what is no value of an option."""
        if on_nonfinite not in ("train", "skip", "raise"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r} is none of 'train', 'skip', 'raise'")
        if not isinstance(on_spike, Spikes) and on_spike not in ("ignore", "report", "rewind"):
            raise ValueError(f"on_spike={on_spike!r} is none of 'ignore', 'report', 'rewind', and no Spikes(...)")
        every = replay_every_n_steps
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"replay_every_n_steps={every!r} must be a number of steps, at least 1, or None")
        if on_spike == "ignore":
            return cls(on_nonfinite, None, every)
        return cls(on_nonfinite, on_spike if isinstance(on_spike, Spikes) else Spikes(then=on_spike), every)

    @property
    def look_at_steps(self) -> bool:
        """Whether each step's numbers are looked at."""
        return self.on_nonfinite != "train" or self.spikes is not None

    @property
    def rewinds(self) -> bool:
        """Whether a spike takes the training back."""
        return self.spikes is not None and self.spikes.then == "rewind"

    def validate(self, module: pl.LightningModule) -> None:
        """Raises a ValueError for a module whose steps can't be taken back, or computed again."""
        if not module.automatic_optimization and (self.rewinds or self.replay_every_n_steps):
            option = "on_spike='rewind'" if self.rewinds else "replay_every_n_steps"
            raise ValueError(
                f"{option} under manual optimization: only the module knows what makes one step of it; leave the "
                "option out, or use automatic optimization"
            )
        if self.replay_every_n_steps and is_param_in_hook_signature(
            module.training_step, "dataloader_iter", explicit=True
        ):
            raise ValueError(
                "replay_every_n_steps with training_step(dataloader_iter): a step takes its batches from the loader "
                "itself, so it can't be computed again; take a batch in its place"
            )
        if self.replay_every_n_steps and is_overridden("optimizer_zero_grad", module):
            raise ValueError(
                "replay_every_n_steps with optimizer_zero_grad overridden: what gradients a step begins from is not "
                "known, so it can't be computed again; leave one of them out"
            )

    def validate_optimizer(self, optimizer: Optimizer) -> None:
        """Raises a ValueError for an optimizer that evaluates its closure several times in a step."""
        if isinstance(optimizer, LBFGS) and (self.look_at_steps or self.replay_every_n_steps):
            raise ValueError(
                "on_nonfinite, on_spike and replay_every_n_steps look at a step once its closure has run, and LBFGS "
                "evaluates it several times in a step; leave them out, or use another optimizer"
            )


@dataclass(frozen=True)
class BadStep:
    """A step whose numbers were bad.

    Args:
        what: ``"nonfinite"`` or ``"spike"``.
        step: ``trainer.global_step`` as it was.
        epoch: counted from 0.
        batches: of the epoch, the first and the last whose gradients the step had.
        loss, norm: over all samples; of the gradients, before clipping by norm. The loss is None where the strategy is
            told of none.
        samples: indices in the data set of each data rank's, by its number; None where the strategy does not shard it.
        did: what was done: ``"trained"``, ``"skipped"``, or ``"rewound"``.
        back_to: the step to which the training was taken back.
    """

    what: Literal["nonfinite", "spike"]
    step: int
    epoch: int
    batches: tuple[int, int]
    loss: float | None
    norm: float
    samples: dict[int, list[Any] | None]
    did: Literal["trained", "skipped", "rewound"]
    back_to: int | None = None

    def __str__(self) -> str:
        first, last = self.batches
        batches = f"batch {last}" if first == last else f"batches {first} to {last}"
        loss = "" if self.loss is None else f"loss {self.loss:.6g}, "
        numbers = f"step {self.step} ({batches} of epoch {self.epoch}): {loss}gradient norm {self.norm:.6g}"
        known = [f"{rank}: {_shown(samples)}" for rank, samples in self.samples.items() if samples is not None]
        return f"{numbers}; samples by data rank: {', '.join(known)}" if known else numbers


def _shown(samples: list[Any], most: int = 16) -> str:
    shown = ", ".join(map(str, samples[:most]))
    return f"[{shown}]" if len(samples) <= most else f"[{shown}, and {len(samples) - most} more]"
