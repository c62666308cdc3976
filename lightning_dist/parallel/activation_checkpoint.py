"""Activation checkpointing: a block's backward computes again what its forward did not keep."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_dist.compat import operators
from lightning_dist.compat.torch import own_buffers, version_of
from lightning_dist.parallel.tensor.region import Region
from lightning_dist.patches import Patches

Checkpointing = Literal["none", "full", "selective"]


def checkpoint_activations(
    module: nn.Module, blocks: dict[str, nn.Module], mode: Checkpointing, patches: Patches
) -> None:
    """Makes the blocks, and no other part of the module, compute their forward again in backward. In place.

    ``"full"`` keeps a block's inputs and outputs. ``"selective"`` also keeps the results of costly operators (matrix
    products, convolutions, attention) and of collectives, and computes again what is cheap beside them: norms,
    activations, dropout, sums.

    Random numbers are drawn as in the forward, and buffers (the running statistics of a BatchNorm) change once. Without
    gradients, in validation say, a block runs as it is.

    [Note: where a block is recomputed]
    The ``forward`` in the block's own ``__dict__`` is replaced, which leaves the names in the state dict, pickling and
    ``deepcopy`` as they were. Hooks stay outside of what is recomputed: fully_shard's hook on the backward has gathered
    the block by then. All blocks of a class share one function, since torch.compile compiles anew for each function.
    Compiled, a block is one graph with its recomputation; torch keeps its buffers right if nothing breaks the graph.

    Args:
        module: the whole module; blocks of an earlier call that are not in ``blocks``, or had another mode, are put
            back.
        blocks: to recompute, by name.
        mode: ``"none"`` puts the plain forwards back.
        patches: that the forwards go through.

    Raises:
        ValueError: there are no blocks to recompute.

    Communication: none under ``"none"`` and ``"selective"``; under ``"full"``, the collectives that a block's forward
    runs (those of tensor parallelism, not the gathering of shards) run once more in its backward.
    """
    chosen = set(blocks.values()) if mode != "none" else set()
    for child in module.modules():
        if _mode(child) not in (None, mode) or child not in chosen:
            _put_back(child)
    if mode == "none":
        return
    validate_blocks(module, blocks, mode)
    for block in blocks.values():
        if _mode(block) is None:
            there: Any = vars(block).get("forward", MethodType(type(block).forward, block))
            is_method = isinstance(there, MethodType) and there.__self__ is block
            recomputing = _recomputing(there.__func__ if is_method else there, is_method, mode)
            patches.set(block, "forward", MethodType(recomputing, block))


def validate_blocks(module: nn.Module, blocks: dict[str, nn.Module], mode: Checkpointing) -> None:
    """Raises a ValueError where there is nothing to recompute."""
    if not blocks and mode != "none":
        raise ValueError(
            f"activation_checkpointing={mode!r} recomputes the repeated blocks of a network, and "
            f"{type(module).__name__} has none; name the modules with shard_units=, or leave it at 'none'"
        )


def _mode(block: nn.Module) -> Checkpointing | None:
    function: Any = getattr(vars(block).get("forward"), "__func__", None)
    is_ours = function is not None and getattr(function, "recomputing", None) is function  # a wrapper copies attributes
    return function.mode if is_ours else None


def _put_back(block: nn.Module) -> None:
    if _mode(block) is None:
        return
    recomputing: Any = vars(block).pop("forward")
    plain, is_method = recomputing.replaced
    if not any(vars(cls).get("forward") is plain for cls in type(block).__mro__):
        vars(block)["forward"] = MethodType(plain, block) if is_method else plain


@functools.lru_cache
def _recomputing(forward: Callable[..., Any], is_method: bool, mode: Checkpointing) -> Callable[..., Any]:
    """A method that recomputes ``forward``, which takes the block first if it ``is_method``."""

    @functools.wraps(forward)
    def recomputing(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(forward, block) if is_method else forward
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        num_args, names = len(args), tuple(kwargs)

        def call(*values: Any) -> Any:
            return plain(*values[:num_args], **dict(zip(names, values[num_args:], strict=True)))

        # torch notes the devices whose random state it restores from positional arguments alone
        values = [_without_cache(value) for value in (*args, *kwargs.values())]
        if torch.compiler.is_compiling():
            if mode == "full":
                return checkpoint(call, *values, use_reentrant=False)
            return checkpoint(call, *values, use_reentrant=False, context_fn=_selective_contexts)
        buffers, region = _Buffers(block), Region.of(block)
        contexts = functools.partial(_contexts, buffers, nullcontext() if region is None else region.again(), mode)
        output = checkpoint(call, *values, use_reentrant=False, context_fn=contexts, respect_saved_tensors_hooks=True)
        buffers.end_forward()
        return output

    vars(recomputing).update(recomputing=recomputing, mode=mode, replaced=(forward, is_method))
    return recomputing


def _without_cache(value: Any) -> Any:
    """None for an empty cache of keys and values, which transformers makes by default: a block would write to it twice.

    Raises:
        ValueError: the cache is not empty, so the block reads it.
    """
    length = getattr(value, "get_seq_length", None)
    if length is None:
        return value
    if length():
        raise ValueError(
            f"activation_checkpointing can't run a block again that writes to a cache, and {type(value).__name__} came "
            "with keys and values in it; train without past_key_values, or with activation_checkpointing='none'"
        )
    return None


def _contexts(buffers: _Buffers, again: AbstractContextManager[Any], mode: Checkpointing) -> tuple[Any, Any]:
    """Around the forward, and around its recomputation."""
    if mode == "full":
        return nullcontext(), _Recomputing(buffers, again)
    forward, recomputation = _selective_contexts()
    return forward, _Recomputing(buffers, again, forward, recomputation)


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator is torch.ops.higher_order.flex_attention:
        return CheckpointPolicy.MUST_SAVE
    if not isinstance(operator, operators.OpOverload):
        return CheckpointPolicy.PREFER_RECOMPUTE
    is_costly = operator.namespace == "aten" and operator.overloadpacket.__name__ in operators.COSTLY_OPERATORS
    keeps = (is_costly or operators.is_collective(operator)) and not operators.writes_in_place(operator)
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


class _Recomputing(AbstractContextManager[None]):
    """Around each recomputation of a block. Kept results that were changed in place since, by an in-place activation
    say, are computed again.
    """

    def __init__(self, buffers: _Buffers, region: AbstractContextManager[Any], *selective: Any) -> None:
        self._buffers, self._region, self._selective = buffers, region, selective

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._buffers)
            stack.enter_context(self._region)
            if self._selective:
                forward, recomputation = self._selective
                operators.recompute_changed(forward)
                stack.enter_context(recomputation)
            self._entered = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)


class _Buffers(AbstractContextManager[None]):
    """Gives a recomputation the buffers that the forward began with; what it does to them is dropped."""

    def __init__(self, block: nn.Module) -> None:
        self._before = [
            (own_buffers(module), name, buffer, version_of(buffer), buffer.detach().clone())
            for module in block.modules()
            for name, buffer in own_buffers(module).items()
            if buffer is not None and not buffer.is_inference()
        ]

    def end_forward(self) -> None:
        """Lets copies go of what the forward left; torch's batch_norm writes its statistics without a new version."""
        self._before = [
            (buffers, name, buffer, version, copy)
            for buffers, name, buffer, version, copy in self._before
            if buffer.ndim < 2 or version_of(buffer) != version or buffers.get(name) is not buffer
        ]

    def __enter__(self) -> None:
        self._now = [(buffers, name, buffers.get(name)) for buffers, name, *_ in self._before]
        for buffers, name, *_, copy in self._before:
            buffers[name] = copy.clone()

    def __exit__(self, *error: Any) -> None:
        for buffers, name, buffer in self._now:
            buffers[name] = buffer
