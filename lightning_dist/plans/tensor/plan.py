"""The words of a tensor plan: what is divided among the ranks of the tensor axis, and what they see of the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


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
        stays: names of arguments that are this rank's own already.
        width: features of all heads together, where the module reshapes to them; 0 where it doesn't.
        applied_row: a layer that writes back and is not called but applied, as in torchvision's shifted windows.
        multihead: it calls ``F.multi_head_attention_forward``, which reduces by itself.
        vocabulary: its size, for an embedding or a head that are divided by it; 0 for others.
        copies_inputs: its activations are whole, and each rank's part uses them; False for a module inside another's
            part, or with rows only.
        split: in words, for the report.
    """

    parameters: dict[str, Split] = field(default_factory=dict)
    rows: dict[str, Split] = field(default_factory=dict)
    partial: tuple[str, ...] = ()
    buffers: dict[str, Split] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()
    divides: dict[str, int] = field(default_factory=dict)
    stays: frozenset[str] = frozenset()
    width: int = 0
    applied_row: str = ""
    multihead: bool = False
    vocabulary: int = 0
    copies_inputs: bool = True
    split: str = ""


def join_names(*names: str) -> str:
    """A dotted name; the empty name is the module itself."""
    return ".".join(name for name in names if name)


OWN_ARGUMENTS = frozenset({"position_bias", "encoder_decoder_position_bias"})
"""Names of arguments that another part made, so that they are of this rank's heads."""

TensorPlan = dict[str, ModulePlan]
"""By name of the module, in the order of the model."""
