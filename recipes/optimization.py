"""What the recipes share of optimisation: which parameters decay, and the learning rate by step."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerFactory = Callable[[Any], Optimizer]
"""Makes an optimizer of parameter groups; ``functools.partial(torch.optim.AdamW, lr=1e-3)`` for example."""

SchedulerFactory = Callable[..., LambdaLR]
"""Makes a schedule of an optimizer and ``total_steps``; see :func:`warmup_cosine`."""

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def parameters_without_decay(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that weight decay must not touch: it would pull scales and offsets towards zero.

    These are biases, everything of fewer than two dims, every parameter of a normalisation layer, and what the
    network itself names in a ``no_weight_decay()`` method (as timm's do, for position embeddings).

    Args:
        module: with the shapes that it was built with. Ask before the module is wrapped: fully sharded wrappers
            may flatten a matrix to one dim.

    Returns:
        Names without the prefixes of wrappers. A tied parameter is known by its first name.
    """
    exempt = set()
    for prefix, child in module.named_modules():
        own_rule = getattr(child, "no_weight_decay", None)
        if callable(own_rule):
            exempt |= {_plain_name(f"{prefix}.{name}" if prefix else name) for name in own_rule()}
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim < 2 or name.endswith("bias") or _is_normalization(child):
                exempt.add(_plain_name(f"{prefix}.{name}" if prefix else name))
    return frozenset(_plain_name(name) for name, _ in module.named_parameters()) & exempt


def freeze_parameters(network: nn.Module, patterns: Sequence[str]) -> None:
    """Leaves parameters as they are, those whose name fits a pattern (``*`` for any characters).

    Raises:
        ValueError: a pattern fits none.
    """
    parameters = {_plain_name(name): p for name, p in network.named_parameters(remove_duplicate=False)}
    for pattern in patterns:
        for name in _fitting(pattern, parameters, "freeze"):
            parameters[name].requires_grad_(False)


def parameter_groups(
    module: nn.Module, without_decay: Set[str] | None = None, learning_rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimizer: parameters with the optimizer's weight decay, then those without any; and the same two
    for each learning rate of its own.

    Every trainable parameter is in exactly one group, a tied parameter once, frozen ones nowhere, in the order of
    ``module.named_parameters()``. A group that would be empty is left out.

    Args:
        module: the module to train; wrapped is fine if ``without_decay`` is given.
        without_decay: what :func:`parameters_without_decay` said, by default asked now.
        learning_rates: by patterns of names, for a tied parameter of any of its names; of several that fit, the last
            counts.

    Raises:
        ValueError: no parameter of the module requires a gradient, or a pattern fits none.
    """
    if without_decay is None:
        without_decay = parameters_without_decay(module)
    trainable = [(_plain_name(name), p) for name, p in module.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(module).__name__} has no parameter that requires a gradient, so there is nothing to optimise; "
            "unfreeze a part of it, or call validate, test or predict"
        )
    # By all names: a head that is tied to an embedding is known to named_parameters() by the first alone.
    named = {_plain_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
    rates = {
        named[name]: rate
        for pattern, rate in (learning_rates or {}).items()
        for name in _fitting(pattern, named, "learning_rates")
    }
    groups: list[dict[str, Any]] = []
    for rate in dict.fromkeys([None, *rates.values()]):
        own: dict[str, Any] = {} if rate is None else {"lr": rate}
        chosen = [(name, p) for name, p in trainable if rates.get(p) == rate]
        groups.append(own | {"params": [p for name, p in chosen if name not in without_decay]})
        groups.append(own | {"params": [p for name, p in chosen if name in without_decay], "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _fitting(pattern: str, names: Iterable[str], option: str) -> list[str]:
    names = list(names)
    fitting = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not fitting:
        shown = f"{', '.join(names[:3])}, ..., {names[-1]}"
        raise ValueError(f"recipe.{option}: no parameter fits {pattern!r}; their names are {shown}")
    return fitting


def warmup_cosine(
    optimizer: Optimizer, total_steps: float, warmup: float = 0.05, final_factor: float = 0.0
) -> LambdaLR:
    """Learning rate that rises linearly and then falls along half a cosine, by optimizer step.

    Args:
        optimizer: its learning rates are the peak.
        total_steps: optimizer steps of the whole run; the last of them has (nearly) ``final_factor`` of the peak.
        warmup: number of steps to the peak if at least 1, else their fraction of ``total_steps``.
        final_factor: fraction of the peak at the end.

    Raises:
        ValueError: ``total_steps`` is not known, or ``warmup`` is negative or longer than the run.
    """
    if not math.isfinite(total_steps) or total_steps < 1:
        raise ValueError(
            f"a cosine schedule needs to know the number of optimizer steps, got {total_steps}; set "
            "trainer.max_steps or trainer.max_epochs, or take scheduler=constant"
        )
    warmup_steps = _warmup_steps(total_steps, warmup)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def warmup_constant(optimizer: Optimizer, total_steps: float = math.inf, warmup: float = 0.0) -> LambdaLR:
    """Learning rate that rises linearly and then stays.

    Args:
        optimizer: its learning rates are those of the plateau.
        total_steps: optimizer steps of the whole run; needed only if ``warmup`` is a fraction of it.
        warmup: number of steps to the plateau if at least 1, else their fraction of ``total_steps``.

    Raises:
        ValueError: ``warmup`` is negative, longer than the run, or a fraction of a length that is not known.
    """
    warmup_steps = _warmup_steps(total_steps, warmup)
    return LambdaLR(optimizer, lambda step: min((step + 1) / max(warmup_steps, 1), 1.0))


def configure_optimization(
    module: L.LightningModule,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None,
    without_decay: Set[str] | None = None,
    learning_rates: Mapping[str, float] | None = None,
) -> Optimizer | OptimizerLRSchedulerConfig:
    """What ``configure_optimizers`` of a recipe returns: parameter groups, and a schedule by optimizer step.

    Args:
        module: attached to a trainer, which knows the number of steps.
        optimizer: factory of an optimizer over parameter groups.
        scheduler: factory called as ``scheduler(optimizer, total_steps=...)``, or ``None`` for a fixed rate.
        without_decay: see :func:`parameter_groups`.
        learning_rates: see :func:`parameter_groups`.
    """
    built = optimizer(parameter_groups(module, without_decay, learning_rates))
    if scheduler is None:
        return built
    schedule = scheduler(built, total_steps=module.trainer.estimated_stepping_batches)
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _warmup_steps(total_steps: float, warmup: float) -> int:
    if warmup < 0 or warmup > total_steps:
        raise ValueError(
            f"warmup={warmup} does not fit a run of {total_steps} optimizer steps; pass a number of steps within "
            "the run, or a fraction below 1"
        )
    if warmup >= 1 or warmup == 0:
        return round(warmup)
    if not math.isfinite(total_steps):
        raise ValueError(
            f"warmup={warmup} is a fraction of a run whose number of steps is not known; pass a number of steps"
        )
    return round(warmup * total_steps)


def _is_normalization(module: nn.Module) -> bool:
    # By name: torch, timm and transformers have dozens of norms without a common class.
    return "norm" in type(module).__name__.lower()


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
