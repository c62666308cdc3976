"""What can't work is said here, before any process group forms."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from lightning_dist.compat.lightning import detects_anomaly, layer_sync
from lightning_dist.compat.torch import FakeTensor, hooks_after_accumulation
from lightning_dist.layout import Layout
from lightning_dist.placeholder import is_placeholder
from lightning_dist.precision import validate_precision


def validate_trainer(trainer: pl.Trainer, layout: Layout | None, device: torch.device) -> None:
    """Raises a ValueError for a Trainer whose parts don't work together under the layout.

    That is resolved, or None while ``"auto"`` is undecided; then this is asked again when it is.
    """
    validate_precision(trainer.strategy.precision_plugin, trainer.world_size)
    if layout is not None:
        _validate_callbacks(trainer.callbacks, layout)  # type: ignore[attr-defined]
    if isinstance(layer_sync(trainer.strategy), TorchSyncBatchNorm) and device.type == "cpu":
        raise ValueError(
            "Trainer(sync_batchnorm=True) needs a GPU: torch's SyncBatchNorm does not run on the CPU; leave it out "
            "(each rank then normalises its own samples, as in ddp) or use accelerator='gpu'"
        )
    if layout is not None and layout.tp > 1 and detects_anomaly(trainer):
        raise ValueError(
            f"Trainer(detect_anomaly=True) under layout {layout}: torch looks for nan in gradients by an operator that "
            "divided ones don't have; use it with data axes alone"
        )


def validate_kept_hooks(module: nn.Module, hooked: dict[str, nn.Parameter]) -> None:
    """Raises a ValueError where a parameter that had hooks on its gradient is another object by now, without them."""
    for name, parameter in hooked.items():
        if module.get_parameter(name) is not parameter:
            raise ValueError(
                f"the parameter {name} has hooks on its gradient from before the fit, and the layout divides it, which "
                "makes it another object: register them in on_fit_start with register_post_accumulate_grad_hook, or "
                "change gradients in on_before_optimizer_step"
            )


def validate_gradient_hooks(module: pl.LightningModule, layout: Layout) -> None:
    """Raises a ValueError where a hook on a plain parameter's gradient would run before it has been averaged."""
    if layout.num_data_ranks == 1 and layout.pp == 1:
        return
    whose = "each microbatch, which are added" if layout.pp > 1 else "this rank's samples, which is averaged"
    for name, parameter in module.named_parameters():
        hooks = hooks_after_accumulation(parameter)
        own = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("lightning_dist")]
        if own and (layout.pp > 1 or not isinstance(parameter, DTensor)):
            raise ValueError(
                f"register_post_accumulate_grad_hook on {name}: under layout {layout} it would see the gradient of "
                f"{whose} later; use on_after_backward or on_before_optimizer_step"
            )


def _validate_callbacks(callbacks: list[Callback], layout: Layout) -> None:
    averaging = next((type(c).__name__ for c in callbacks if _averages_weights(c)), None)
    if averaging is not None and layout.pp > 1:
        raise ValueError(
            f"{averaging} pairs its copy of the weights with the module's own, and under pp (layout {layout}) a rank "
            "holds those of its stages only; use another axis, or leave the callback out"
        )
    if layout.holds_shards and any(isinstance(c, ModelPruning) for c in callbacks):
        raise ValueError(
            f"ModelPruning compares the elements of whole weights, and replaces parameters, which layout {layout} "
            "divides; use dp_replicate alone, or prune the module before the fit, with torch.nn.utils.prune"
        )


def _averages_weights(callback: Callback) -> bool:
    names = {cls.__name__ for cls in type(callback).__mro__}
    return isinstance(callback, StochasticWeightAveraging) or "WeightAveraging" in names


def has_lazy_parameters(module: nn.Module) -> bool:
    """Whether the module has parameters or buffers that its first forward makes."""
    return any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers()))


def validate_no_lazy(module: nn.Module) -> None:
    """Raises a ValueError for parameters without a shape, which ranks can neither divide nor send to each other."""
    lazy = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if is_lazy(t)]
    if lazy:
        raise ValueError(
            f"{', '.join(lazy)} of a lazy module: no shape is known before the first forward, so that several ranks "
            "can't share or divide it; run one forward before the fit, in the module's setup() or configure_model(), "
            "or give the layer its number of inputs"
        )


def validate_parameter_kinds(module: nn.Module, layout: Layout, split: Collection[str]) -> None:
    """Raises a ValueError for parameters of another kind, quantised ones say, of which a part is a plain tensor.

    The module is not divided yet; ``split`` are the names of the parameters that the tensor axis will divide.
    """
    every = layout.dp_shard > 1 or layout.pp > 1
    wrapped = [(n, type(p)) for n, p in module.named_parameters() if _is_wrapper(p) and (every or n in split)]
    if wrapped:
        (name, kind), *others = wrapped
        raise ValueError(
            f"{name}{f' and {len(others)} more parameters' if others else ''}: a {kind.__name__}, which layout "
            f"{layout} would divide as the plain tensor that it stands for; use dp_replicate alone"
        )


def _is_wrapper(parameter: nn.Parameter) -> bool:
    """Whether its class does what operations do to it itself."""
    is_plain = type(parameter).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return not (is_plain or isinstance(parameter, (DTensor, FakeTensor)))


def validate_no_new_parameters(module: nn.Module, known: Mapping[int, nn.Parameter]) -> None:
    """Raises a ValueError where a hook has put whole parameters into a module since an earlier run divided it.

    ``known`` are its parameters of that run, by id; empty if that was another strategy's.
    """
    new = [name for name, p in module.named_parameters() if id(p) not in known and not is_placeholder(p)]
    if known and new and len(new) < sum(1 for _ in module.parameters()):
        raise ValueError(
            f"{new[0]} came to the module after an earlier run had divided it over the ranks, so it would stay whole "
            "and out of their reach; build the module anew, with that parameter, and pass ckpt_path= to go on from its "
            "checkpoint"
        )


def validate_built(module: nn.Module) -> None:
    """Raises a ValueError where ``configure_model`` left on meta what a run deferred that ended before its set-up."""
    meta = next((name for name, parameter in module.named_parameters() if parameter.is_meta), None)
    if meta is not None:
        raise ValueError(
            f"{meta} was deferred by a run that ended before it was there, and configure_model does not build it "
            "again; build the module anew"
        )


def validate_lbfgs(optimizer: Optimizer) -> None:
    """Raises a ValueError for LBFGS over parameters of which only some are divided."""
    if not isinstance(optimizer, LBFGS):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(is_placeholder(p) for p in parameters):
        raise ValueError(
            "LBFGS works on all parameters as one vector, and under pp a rank has those of its stages only; use "
            "another axis, or another optimizer"
        )
    if len({p.device_mesh if isinstance(p, DTensor) else None for p in parameters}) > 1:
        raise ValueError(
            "LBFGS works on all parameters as one vector, and this layout divides only some of them; use dp_shard or "
            "dp_replicate without tp, with no scalar among the parameters under dp_shard, or another optimizer"
        )


def warn_of_axes_across_nodes(layout: Layout, ranks_per_node: int, num_nodes: int) -> None:
    """Warns where the ranks of a tp group are on several nodes: each layer waits for them."""
    if num_nodes > 1 and ranks_per_node % layout.tp:
        fitting = [degree for degree in range(1, ranks_per_node + 1) if ranks_per_node % degree == 0]
        rank_zero_warn(
            f"tp={layout.tp} on nodes of {ranks_per_node} ranks: every layer's collectives go between nodes, which is "
            f"slow. Degrees that stay inside a node: {', '.join(map(str, fitting))}"
        )
