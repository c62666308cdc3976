"""Which blocks follow each other so that positions stay divided between them."""

from __future__ import annotations

from torch import nn

from lightning_dist.compat.torch import NormBase
from lightning_dist.plans.blocks import CONTAINERS, class_name
from lightning_dist.plans.tensor import layers
from lightning_dist.plans.tensor.plan import TensorPlan, join_names

SequenceBlocks = list[list[str]]
"""Names of sequence-parallel blocks, in the order in which they run, stack by stack: an encoder's and a decoder's."""


def find_sequence_blocks(module: nn.Module, plan: TensorPlan, blocks: dict[str, nn.Module]) -> SequenceBlocks:
    """The stacks of a network: neighbours in one container, each with layers that the plan divides.

    Args:
        module: the whole module.
        plan: what the tensor axis divides in it.
        blocks: its repeated parts, by name.

    Raises:
        ValueError: there is none, or one that works across positions, as far as its layers tell.
    """
    by_container: dict[str, list[str]] = {}
    for name in blocks:
        by_container.setdefault(name.rpartition(".")[0], []).append(name)
    stacks: SequenceBlocks = []
    for container, names in by_container.items():
        held = [join_names(container, leaf) for leaf, _ in module.get_submodule(container).named_children()]
        is_stack = isinstance(module.get_submodule(container), CONTAINERS) and held == names
        if is_stack and all(_has_parts(name, plan) for name in names):
            stacks.append(names)
    for name in (name for names in stacks for name in names):
        _validate_dims(module, name, plan)
    if not stacks:
        raise ValueError(
            "sequence_parallel divides positions between blocks that follow each other in one list, each with layers "
            f"that tp divides; {type(module).__name__} has none. Leave it off, or name the blocks in shard_units="
        )
    return stacks


def sequence_parameters(module: nn.Module, divided: set[str], blocks: SequenceBlocks) -> list[str]:
    """Names of the parameters of blocks that are not ``divided``: each rank uses them on its positions."""
    in_blocks = tuple(f"{name}." for names in blocks for name in names)
    return [
        name
        for name, _ in module.named_parameters(remove_duplicate=False)
        if name.startswith(in_blocks) and name not in divided
    ]


def _has_parts(block: str, plan: TensorPlan) -> bool:
    return block not in plan and any(name.startswith(f"{block}.") and part.copies_inputs for name, part in plan.items())


def _validate_dims(module: nn.Module, block: str, plan: TensorPlan) -> None:
    """Divided layers that read something else than the features of a position, and norms over positions."""
    norm = next((n for n, child in module.get_submodule(block).named_modules() if isinstance(child, NormBase)), None)
    if norm is not None:
        _refuse(f"{block}.{norm}", "takes statistics over the positions that would be divided")
    widths = set()
    for name, part in plan.items():
        if not name.startswith(f"{block}."):
            continue
        if part.applied_row or "Window" in class_name(module.get_submodule(name)):
            _refuse(name, "attends within windows of an image, across what would be divided")
        if part.copies_inputs and not part.multihead:
            first = next(iter(part.parameters)).rpartition(".")[0]
            widths.add(layers.inputs(module.get_submodule(f"{name}.{first}".strip("."))))
    if len(widths) > 1:
        _refuse(block, f"has layers over inputs of {' and '.join(map(str, sorted(widths)))}: not all are features")


def _refuse(name: str, why: str) -> None:
    raise ValueError(f"sequence_parallel: {name} {why}; leave it off for this network")
