"""A step over microbatches is what it is over the whole batch: seen once, before anything is trained on it.

[Note: microbatches are compared]
A batch is split along what its tensors seem to have their samples in, the step runs on each part, and the parts' losses
are averaged. Steps whose result is no mean over samples (a contrastive loss, a sum, a mean over the tokens that have a
label, a batch that is flipped) would give other numbers, and no error would tell. So the first time that a kind of step
runs in microbatches, it runs twice more without gradients, over the microbatches and over the whole batch at once, and
what it returned and logged is compared. While it is, random operations give fixed numbers, which don't depend on how
many are drawn; BatchNorm uses its running statistics; and what the step changes (buffers, metrics, attributes of
modules, parameters) is put back.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dist.logs.metrics import metrics_in
from lightning_dist.placeholder import is_placeholder

ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Relative difference that is taken for rounding; where something is computed in 16 bits, ``COARSE_ROUNDING``."""

COARSE_ROUNDING = 0.05


def compare(step: str, whole: tuple[Any, dict[str, Any]], parts: tuple[Any, dict[str, Any]], num_parts: int) -> str:
    """What differs, in a sentence; empty if nothing does.

    Args:
        step: its name.
        whole: what the step returned (None on ranks that have not the last stage) and logged, of the whole batch.
        parts: the same of the microbatches, put together.
        num_parts: how many those are.
    """
    found = _difference("what it returns", whole[0], parts[0])
    for name, value in whole[1].items():
        found = found or _difference(f"the logged {name!r}", value, parts[1].get(name))
    if not found:
        return ""
    return (
        f"pp: {step} over {num_parts} microbatches gives other numbers than over the whole batch at once: {found}. "
        "It is no mean over samples, or its batch is not split along its samples. Say with batch_split= how a batch is "
        "split, or with microbatch_weight= what a microbatch counts; or use num_microbatches=1, or another axis. "
        "pipeline_check=False trains on the mean of microbatches all the same"
    )


def agree(difference: str, compared: bool, device: torch.device) -> bool:
    """Raises on every rank of the world where one has found something.

    Args:
        difference: that this rank found; empty for none.
        compared: whether this rank's batch had several microbatches to compare.
        device: of this rank.

    Returns:
        Whether all ranks have compared.

    Raises:
        ValueError: with the first rank's sentence.

    Communication: an all-reduce of 16 bytes; the sentence if there is one.
    """
    world = dist.get_world_size()
    verdict = torch.tensor([dist.get_rank() if difference else world, int(compared)], device=device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN)
    first, all_compared = verdict.tolist()
    if first < world:
        box = [difference]
        dist.broadcast_object_list(box, first, device=device)
        raise ValueError(box[0])
    return bool(all_compared)


def _difference(what: str, whole: Any, parts: Any) -> str:
    if isinstance(whole, Tensor) and isinstance(parts, Tensor):
        if is_placeholder(whole) or is_placeholder(parts):
            return ""
        if whole.shape != parts.shape:
            return f"{what} is of shape {list(parts.shape)} / {list(whole.shape)}"
        return "" if _is_close(parts, whole) else f"{what} is {_shown(parts, whole)} / {_shown(whole, parts)}"
    if isinstance(whole, (bool, int, float, Tensor)) and isinstance(parts, (bool, int, float, Tensor)):
        return _difference(what, torch.as_tensor(whole), torch.as_tensor(parts).to(torch.as_tensor(whole).dtype))
    if isinstance(whole, dict) and isinstance(parts, dict):
        pairs = [(f"{what}, {key!r},", value, parts.get(key)) for key, value in whole.items()]
    elif isinstance(whole, (list, tuple)) and isinstance(parts, (list, tuple)):
        if len(whole) != len(parts):
            return f"{what} has {len(parts)} / {len(whole)} items"
        pairs = [(f"{what}, [{i}],", *both) for i, both in enumerate(zip(whole, parts, strict=True))]
    else:
        return "" if type(whole) is type(parts) else f"{what} is a {type(parts).__name__} / {type(whole).__name__}"
    return next((found for pair in pairs if (found := _difference(*pair))), "")


def _is_close(parts: Tensor, whole: Tensor) -> bool:
    if not whole.is_floating_point():
        return bool(torch.isclose(parts.double(), whole.double(), rtol=1e-6).all())
    rounding = ROUNDING.get(whole.dtype, COARSE_ROUNDING)
    if torch.is_autocast_enabled(whole.device.type) or torch.get_float32_matmul_precision() != "highest":
        rounding = COARSE_ROUNDING
    one, other = parts.detach().double().flatten(), whole.detach().double().flatten()
    if not bool((one.isnan() == other.isnan()).all()):
        return False
    one, other = one.nan_to_num(), other.nan_to_num()
    return float((one - other).norm()) <= rounding * max(float(other.norm()), 1e-3 * math.sqrt(max(1, one.numel())))


def _shown(value: Tensor, other: Tensor) -> str:
    if value.numel() == 1:
        return f"{float(value):.6g}"
    place = int((value.double() - other.double()).abs().nan_to_num(torch.inf).argmax())
    return f"{float(value.flatten()[place]):.6g} in place {place}"


# ------------------------------------------------------------------ while it runs


@contextmanager
def undone(module: pl.LightningModule, writes: list[nn.Parameter]) -> Iterator[None]:
    """Puts back what steps change meanwhile.

    Args:
        module: whose steps run.
        writes: parameters that they write to, of which a copy is kept.
    """
    kept = [_Attributes(child) for child in module.modules()]
    tensors = [b for b in module.buffers() if not is_placeholder(b)] + writes
    values = [tensor.detach().clone() for tensor in tensors]
    states = [(m, {k: copy.copy(v) for k, v in m._copy_state_dict().items()}) for m in metrics_in(module)]
    try:
        yield
    finally:
        for attributes in kept:
            attributes.restore()
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                if not torch.equal(tensor, value):
                    tensor.detach().copy_(value)
        for metric, state in states:
            for name, before in state.items():
                setattr(metric, name, before)


_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)


class _Attributes:
    """What a module has under its names, and what is in the containers there."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._before = module, dict(vars(module))
        self._contents = [(v, copy.copy(v)) for v in self._before.values() if type(v) in _CONTAINERS]

    def restore(self) -> None:
        own = vars(self._module)
        for container, before in self._contents:
            if isinstance(container, (list, deque)):
                if len(container) != len(before) or any(x is not y for x, y in zip(container, before, strict=True)):
                    container.clear()
                    container.extend(before)
            elif container != before if isinstance(container, set) else not _same_items(container, before):
                container.clear()
                container.update(before)
        for name in [name for name in own if name not in self._before]:
            del own[name]
        own.update(self._before)


def _same_items(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return list(one) == list(other) and all(one[key] is other[key] for key in one)


@contextmanager
def fixed(module: pl.LightningModule) -> Iterator[None]:
    """Random operations give fixed numbers, BatchNorm its running statistics, and nothing is compiled."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.training]
    for norm in norms:
        norm.training = False
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(FixedNumbers())
        try:
            yield
        finally:
            for norm in norms:
                norm.training = True


class FixedNumbers(TorchDispatchMode):
    """While it lasts, random operations give numbers that depend on their arguments only, alike for every sample."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        schema = func._schema
        given = {**dict(zip((argument.name for argument in schema.arguments), args, strict=False)), **kwargs}
        name = schema.name.partition("::")[2].rstrip("_").removesuffix("_like")
        if "dropout_p" in given:  # attention: the same without it
            return func(**{**given, "dropout_p": 0.0}) if given["dropout_p"] else func(*args, **kwargs)
        if name == "native_dropout":
            return given["input"].clone(), torch.ones_like(given["input"], dtype=torch.bool)
        generator = given.get("generator")
        state = None if generator is None else generator.get_state()
        output = func(*args, **kwargs)
        if generator is not None:
            generator.set_state(state)
        if isinstance(output, Tensor):
            _FILLS.get(name, _fill_half)(output, given)
        return output


def _fill_half(output: Tensor, given: dict[str, Any]) -> None:
    output.fill_(0.5) if output.is_floating_point() else output.fill_(1)


def _fill_uniform(output: Tensor, given: dict[str, Any]) -> None:
    output.fill_((float(given.get("from", 0.0)) + float(given.get("to", 1.0))) / 2)


def _fill_normal(output: Tensor, given: dict[str, Any]) -> None:
    mean, std = given.get("mean", 0.0), given.get("std", 1.0)
    output.copy_(torch.as_tensor(mean + 0.5 * std, dtype=output.dtype, device=output.device).expand_as(output))


def _fill_bernoulli(output: Tensor, given: dict[str, Any]) -> None:
    p = given.get("p", given["self"] if given.get("p") is None and output is not given.get("self") else 0.5)
    output.copy_(torch.as_tensor(p, device=output.device).ge(0.5).expand_as(output))


def _fill_integers(output: Tensor, given: dict[str, Any]) -> None:
    low, high = given.get("low", given.get("from", 0)), given.get("high", given.get("to"))
    output.fill_(0 if high is None else (int(low or 0) + int(high)) // 2)


def _fill_permutation(output: Tensor, given: dict[str, Any]) -> None:
    output.copy_(torch.arange(output.numel(), device=output.device))


def _fill_choice(output: Tensor, given: dict[str, Any]) -> None:
    best = given["self"].argsort(-1, descending=True, stable=True)
    count = output.shape[-1]
    output.copy_(best[..., :count] if not given.get("replacement") else best[..., :1].expand_as(output))


_FILLS: dict[str, Callable[[Tensor, dict[str, Any]], None]] = {
    "uniform": _fill_uniform,
    "normal": _fill_normal,
    "normal_functional": _fill_normal,
    "bernoulli": _fill_bernoulli,
    "randint": _fill_integers,
    "random": _fill_integers,
    "randperm": _fill_permutation,
    "multinomial": _fill_choice,
}
