"""Applies a tensor plan to a module, in place."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.dropout import _DropoutNd

from lightning_dist.parallel.tensor.attention import LocalHeads
from lightning_dist.parallel.tensor.collectives import leave
from lightning_dist.parallel.tensor.embedding import LocalRows
from lightning_dist.parallel.tensor.functional import AppliedWindows, LocalWidth
from lightning_dist.parallel.tensor.hooks import HooksInside
from lightning_dist.parallel.tensor.logits import VocabLogits
from lightning_dist.parallel.tensor.positions import Positions, SequenceBlock
from lightning_dist.parallel.tensor.proof import Proof
from lightning_dist.parallel.tensor.region import Region
from lightning_dist.parallel.tensor.shards import placement, split_parameter
from lightning_dist.parallel.tensor.vocabulary import Vocabulary
from lightning_dist.plans.tensor import OWN_ARGUMENTS, Chains, Part, TensorPlan
from lightning_dist.plans.tensor.layers import inputs
from lightning_dist.random_states import shared_again


def split(
    module: nn.Module, plan: TensorPlan, mesh: DeviceMesh, loss_parallel: bool = False, chains: Chains | None = None
) -> None:
    """Divides a module over the tensor axis; what is divided already stays. Communication: none.

    Args:
        module: whole and equal on every rank, or on meta.
        plan: of the module, which the axis divides (see :func:`~lightning_dist.plans.tensor.check`).
        mesh: of the tensor axis.
        loss_parallel: the head's logits stay divided, see :class:`~lightning_dist.parallel.tensor.logits.VocabLogits`.
        chains: blocks between which positions stay divided, see [Note: sequence parallel]; None for no such.

    Raises:
        ValueError: a forward that was replaced on the object; other chains than in an earlier run.
    """
    proof = Proof(mesh)
    for name, part in plan.items():
        _apply(module, module.get_submodule(name), part, mesh, loss_parallel, proof)
    _attach_around(module, plan, mesh)
    for child in module.modules():
        if isinstance(child, nn.TransformerEncoder):
            child.use_nested_tensor = False  # it would read the layers' parameters itself
    _chain(module, chains or [], mesh, proof)


def _chain(module: nn.Module, chains: Chains, mesh: DeviceMesh, proof: Proof) -> None:
    """Makes blocks hand on their part of the positions."""
    there = {name for name, child in module.named_modules() if isinstance(Region.of(child), SequenceBlock)}
    if there:
        if there != {name for chain in chains for name in chain}:
            raise ValueError(
                "this module was set up with other blocks for sequence_parallel in an earlier run; build the module "
                "anew and pass ckpt_path= to go on from its checkpoint"
            )
        return
    for chain in chains:
        positions = Positions(mesh)
        for name in chain:
            block = module.get_submodule(name)
            _refuse_replaced_forward(block)
            for child in block.modules():
                if (region := Region.of(child)) is not None:
                    region.positions, region.proof = positions, None
            SequenceBlock(
                mesh,
                stays=OWN_ARGUMENTS,
                draws=_draws(block),
                hooks=HooksInside(mesh),
                proof=proof,
                positions=positions,
                name=name,
                is_first=name == chain[0],
                is_last=name == chain[-1],
            ).attach(block)


def _apply(root: nn.Module, module: nn.Module, part: Part, mesh: DeviceMesh, loss_parallel: bool, proof: Proof) -> None:
    if Region.of(module) is not None:
        return
    for layer in (module, *(module.get_submodule(name) for name in part.rows)):
        _refuse_replaced_forward(layer)
    for name, how in part.parameters.items():
        owner, _, leaf = name.rpartition(".")
        split_parameter(root, module.get_submodule(owner), leaf, placement(*how), mesh)
    for name, how in part.rows.items():
        layer = module.get_submodule(name)
        split_parameter(root, layer, "weight", placement(*how), mesh)
        Region(mesh, local=["weight"], after="bias", leaves=True, width=inputs(layer)).attach(layer)
    if not part.parameters:
        return
    Region(
        mesh,
        local=list(part.parameters),
        attributes={name: _divided(module, name, mesh.size()) for name in part.attributes},
        buffers={name: placement(*how) for name, how in part.buffers.items()},
        enters=part.enters,
        stays=part.stays,
        mode=_mode(part, mesh),
        draws=_draws(module),
        finish=partial(_logits, Vocabulary(mesh, part.vocabulary), loss_parallel) if _is_head(part) else None,
        hooks=HooksInside(mesh) if part.rows else None,
        proof=None if part.vocabulary else proof,
    ).attach(module)
    if part.multihead:
        # torch's transformer layers go past a layer without hooks
        module.register_forward_pre_hook(_no_fast_path)


def _attach_around(root: nn.Module, plan: TensorPlan, mesh: DeviceMesh) -> None:
    """Regions that do nothing but show hooks whole activations, around layers whose outputs go on divided."""
    leaving = [name for name, part in plan.items() if part.rows and not part.enters]
    for name, part in plan.items():
        if not part.enters or part.rows or part.vocabulary or part.multihead or part.applied_row:
            continue
        parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
        outer = next((p for p in parents if any(row.startswith(f"{p}.") for row in leaving)), None)
        if outer is None or Region.of(root.get_submodule(outer)) is not None:
            continue
        if "forward" not in vars(root.get_submodule(outer)):
            Region(mesh, hooks=HooksInside(mesh)).attach(root.get_submodule(outer))


def _refuse_replaced_forward(layer: nn.Module) -> None:
    if "forward" in vars(layer) and Region.of(layer) is None:
        raise ValueError(
            f"tp can't divide a {type(layer).__name__} whose forward was replaced on the object, which it would "
            "replace again; put the change into a class, or leave the module out of tensor_plan="
        )


def _divided(module: nn.Module, name: str, tp: int) -> int:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf) // tp


def _mode(part: Part, mesh: DeviceMesh) -> Any:
    if part.multihead:
        return partial(_local_heads, mesh)
    if part.vocabulary and not part.enters:
        return partial(_local_rows, Vocabulary(mesh, part.vocabulary))
    if part.applied_row:
        return partial(_applied_windows, part, mesh)
    return partial(_local_width, part.width, part.width // mesh.size()) if part.width else None


def _local_heads(mesh: DeviceMesh, module: nn.Module) -> LocalHeads:
    region = Region.of(module)
    assert region is not None
    return LocalHeads(mesh, region, 0 if getattr(module, "batch_first", False) else 1)  # which it turns around inside


def _is_head(part: Part) -> bool:
    return bool(part.vocabulary) and part.enters


def _logits(vocabulary: Vocabulary, stay_divided: bool, columns: Tensor) -> Tensor:
    logits = VocabLogits.from_local(columns, vocabulary.mesh, vocabulary.size)
    return logits if stay_divided else logits.full_tensor()


def _local_rows(vocabulary: Vocabulary, module: nn.Module) -> LocalRows:
    weight: Any = module.weight
    return LocalRows(vocabulary, weight)


def _applied_windows(part: Part, mesh: DeviceMesh, module: nn.Module) -> AppliedWindows:
    weight: Any = module.get_submodule(part.applied_row).weight

    def leaves(partial_sum: Tensor) -> Tensor:
        shared_again()
        return leave(partial_sum, mesh)

    return AppliedWindows(part.width, part.width // mesh.size(), part.divides["heads"], weight, leaves)


def _local_width(width: int, local: int, module: nn.Module) -> LocalWidth:
    return LocalWidth(width, local)


def _draws(module: nn.Module) -> bool:
    """Whether the module has dropout: as layers, or as numbers that it passes on."""
    layers = any(isinstance(child, _DropoutNd) and child.p > 0 for child in module.modules())
    numbers = (value for name, value in vars(module).items() if "drop" in name and isinstance(value, float))
    return layers or any(value > 0 for value in numbers)


def _no_fast_path(*_: Any) -> None:
    """A hook whose being there is enough."""
