"""The words of a plan: what the tensor axis divides in a module, what ranks see of the rest, and what follows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn


class Split(NamedTuple):
    """A parameter divided along a dim; of ``packed`` equal pieces along it (q, k, v in one matrix) a rank has its part
    of each."""

    dim: int = 0
    packed: int = 1


@dataclass(frozen=True)
class ModulePlan:
    """How one module is divided, which every rank runs on its heads or its columns.

    Args:
        parameters: what is divided, by name below the module (``"q_proj.weight"``).
        rows: layers below it whose output is a partial sum, reduced over the axis, by name, with their weight's split.
        partial: replicated parameters below it that each rank uses on its part, so that their gradients are partial.
        buffers: buffers of which a rank sees its part.
        attributes: integers that a rank sees divided by the axis, by name below the module.
        divides: what the axis has to divide, by what to call it: ``{"heads": 12}``.
        stays: names of arguments that may be of this rank's heads already.
        beside: names of arguments that the module uses once its output is whole: it adds a residual itself.
        width: features of all heads together, where the module reshapes to them; 0 where it doesn't.
        applied_row: a layer that writes back and is not called but applied, as in torchvision's shifted windows.
        multihead: it calls ``F.multi_head_attention_forward``, which reduces by itself.
        vocabulary: its size, for an embedding or a head that are divided by it; 0 for others.
        copies_inputs: its activations are whole, and each rank's part uses them; False for a module inside another's
            part, a block, or with rows only.
        columns: layers below it by which whole activations enter, where the module is a block that holds a part beside
            other things.
        split: in words, for the report.
    """

    parameters: dict[str, Split] = field(default_factory=dict)
    rows: dict[str, Split] = field(default_factory=dict)
    partial: tuple[str, ...] = ()
    buffers: dict[str, Split] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()
    divides: dict[str, int] = field(default_factory=dict)
    stays: frozenset[str] = frozenset()
    beside: frozenset[str] = frozenset()
    width: int = 0
    applied_row: str = ""
    multihead: bool = False
    vocabulary: int = 0
    copies_inputs: bool = True
    columns: tuple[str, ...] = ()
    split: str = ""


def join_names(*names: str) -> str:
    """A dotted name; the empty name is the module itself."""
    return ".".join(name for name in names if name)


OWN_ARGUMENTS = frozenset({"position_bias", "encoder_decoder_position_bias"})
"""Names of arguments that another part may have made, so that they are of this rank's heads."""

BESIDE_ARGUMENTS = frozenset({"residual"})
"""Names of arguments that a module adds to its output, as the families of Bloom and MPT do."""

TensorPlan = dict[str, ModulePlan]
"""By name of the module, in the order of the model."""

SequenceBlocks = list[list[str]]
"""Names of sequence-parallel blocks, in the order in which they run, stack by stack: an encoder's and a decoder's."""


@dataclass(frozen=True)
class ShardingPlan:
    """What the tensor axis does to a module.

    Args:
        tensor_plan: the modules that it divides.
        sequence_blocks: blocks between which positions stay divided: sequence parallel.
        loss_parallel: logits stay divided by vocabulary.
    """

    tensor_plan: TensorPlan
    sequence_blocks: SequenceBlocks = field(default_factory=list)
    loss_parallel: bool = False


def parameter_splits(plan: TensorPlan) -> dict[str, Split]:
    """How each divided parameter is split, by its name (or names, where it is tied)."""
    splits = {join_names(name, below): how for name, part in plan.items() for below, how in part.parameters.items()}
    rows = {join_names(name, row, "weight"): how for name, part in plan.items() for row, how in part.rows.items()}
    return splits | rows


def partial_parameters(module: nn.Module, plan: ShardingPlan) -> list[str]:
    """Names of the replicated parameters whose gradient each rank has only its part of: those used on its heads, and
    those of sequence-parallel blocks, used on its positions."""
    of_heads = [join_names(name, below) for name, part in plan.tensor_plan.items() for below in part.partial]
    blocks = tuple(f"{name}." for names in plan.sequence_blocks for name in names)
    names = (name for name, _ in module.named_parameters(remove_duplicate=False) if name.startswith(blocks))
    divided = parameter_splits(plan.tensor_plan)
    return list(dict.fromkeys([*of_heads, *(name for name in names if name not in divided)]))
