"""Applies a sharding plan to a module, in place, until it is undone."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.compat.torch import FORWARD_PRE_HOOKS, DropoutNd
from lightning_dist.parallel.tensor.attention import LocalHeads
from lightning_dist.parallel.tensor.equivalence import EquivalenceCheck
from lightning_dist.parallel.tensor.functional import AppliedWindows, LocalWidth
from lightning_dist.parallel.tensor.hooks import HooksInside
from lightning_dist.parallel.tensor.mappings import reduce_from_tensor_region
from lightning_dist.parallel.tensor.positions import Positions
from lightning_dist.parallel.tensor.region import Region
from lightning_dist.parallel.tensor.sequence_block import SequenceBlock
from lightning_dist.parallel.tensor.shards import shard_placement, split_parameter
from lightning_dist.parallel.tensor.vocab_parallel.embedding import LocalRows
from lightning_dist.parallel.tensor.vocab_parallel.logits import VocabLogits
from lightning_dist.parallel.tensor.vocab_parallel.vocabulary import Vocabulary
from lightning_dist.patches import Patches
from lightning_dist.plans.tensor import OWN_ARGUMENTS, ModulePlan, ShardingPlan, TensorPlan
from lightning_dist.plans.tensor.layers import inputs
from lightning_dist.random_states import shared_again


def split(module: nn.Module, plan: ShardingPlan, mesh: DeviceMesh, *, patches: Patches) -> None:
    """Divides a module over the tensor axis; what is divided already stays. Communication: none.

    Undoing the patches takes the regions off; parameters stay divided, and are the caller's to replace by whole ones.

    Args:
        module: whole and equal on every rank, or on meta.
        plan: of the module, which the axis divides (see :func:`~lightning_dist.plans.tensor.check`).
        mesh: of the tensor axis.
        patches: note what is put onto the module.

    Raises:
        ValueError: a forward that was replaced on the object; other sequence-parallel blocks than in an earlier run.
    """
    _Splitting(module, plan, mesh, patches).run()


def unsplit_copy(copied: nn.Module) -> None:
    """Takes off what a deep copy of a divided module has from it, of which no patches know; not its parameters."""
    for child in copied.modules():
        Region.detach(child)
        hooks = vars(child)[FORWARD_PRE_HOOKS]
        for key in [key for key, hook in hooks.items() if hook is _no_fast_path]:
            del hooks[key]


class _Splitting:
    """One call of :func:`split`."""

    def __init__(self, root: nn.Module, plan: ShardingPlan, mesh: DeviceMesh, patches: Patches) -> None:
        self.root, self.plan, self.mesh, self.patches = root, plan, mesh, patches
        self.check = EquivalenceCheck(mesh)

    def run(self) -> None:
        for name, part in self.plan.tensor_plan.items():
            module = self.root.get_submodule(name)
            if Region.of(module) is None:
                self._split_module(module, part)
        self._attach_around(self.plan.tensor_plan)
        for child in self.root.modules():
            if isinstance(child, nn.TransformerEncoder):  # it would read the layers' parameters itself
                self.patches.set(child, "use_nested_tensor", False)
        if not self._has_blocks():
            for names in self.plan.sequence_blocks:
                self._stack(names)

    def _split_module(self, module: nn.Module, part: ModulePlan) -> None:
        for layer in (module, *(module.get_submodule(name) for name in part.rows)):
            _refuse_replaced_forward(layer)
        for name, how in part.parameters.items():
            owner, _, leaf = name.rpartition(".")
            split_parameter(self.root, module.get_submodule(owner), leaf, shard_placement(*how), self.mesh)
        for name, how in part.rows.items():
            layer = module.get_submodule(name)
            split_parameter(self.root, layer, "weight", shard_placement(*how), self.mesh)
            row = Region(self.mesh, local=["weight"], after="bias", reduces_output=True, width=inputs(layer))
            row.attach(layer, self.patches)
        if not part.parameters:
            return
        self._region(module, part).attach(module, self.patches)
        if part.multihead:
            # torch's transformer layers go past a layer without hooks
            self.patches.also(module.register_forward_pre_hook(_no_fast_path).remove)

    def _region(self, module: nn.Module, part: ModulePlan) -> Region:
        mesh = self.mesh
        logits = partial(_logits, Vocabulary(mesh, part.vocabulary), self.plan.loss_parallel)
        return Region(
            mesh,
            local=list(part.parameters),
            attributes={name: _divided(module, name, mesh.size()) for name in part.attributes},
            buffers={name: shard_placement(*how) for name, how in part.buffers.items()},
            copies_inputs=part.copies_inputs,
            stays=part.stays,
            mode=_mode(part, mesh),
            draws=_draws(module),
            finish=logits if _is_head(part) else None,
            hooks=HooksInside(mesh) if part.rows else None,
            check=None if part.vocabulary else self.check,
        )

    def _attach_around(self, plan: TensorPlan) -> None:
        """Regions that do nothing but show hooks whole activations, around layers whose outputs go on divided."""
        row_wise = [name for name, part in plan.items() if part.rows and not part.copies_inputs]
        for name, part in plan.items():
            if not part.copies_inputs or part.rows or part.vocabulary or part.multihead or part.applied_row:
                continue
            parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
            outer = next((p for p in parents if any(row.startswith(f"{p}.") for row in row_wise)), None)
            if outer is None or "forward" in vars(around := self.root.get_submodule(outer)):
                continue
            Region(self.mesh, hooks=HooksInside(self.mesh)).attach(around, self.patches)

    def _has_blocks(self) -> bool:
        """Whether an earlier run made the module's blocks hand on their part of the positions."""
        there = {name for name, child in self.root.named_modules() if isinstance(Region.of(child), SequenceBlock)}
        if there and there != {name for names in self.plan.sequence_blocks for name in names}:
            raise ValueError(
                "this module was set up with other blocks for sequence_parallel in an earlier run; build the module "
                "anew and pass ckpt_path= to go on from its checkpoint"
            )
        return bool(there)

    def _stack(self, names: list[str]) -> None:
        """Makes the blocks of one stack hand on their part of the positions."""
        positions = Positions(self.mesh)
        for name in names:
            block = self.root.get_submodule(name)
            _refuse_replaced_forward(block)
            for child in block.modules():
                if (region := Region.of(child)) is not None:
                    region.positions, region.check = positions, None
            SequenceBlock(
                self.mesh,
                stays=OWN_ARGUMENTS,
                draws=_draws(block),
                hooks=HooksInside(self.mesh),
                check=self.check,
                positions=positions,
                name=name,
                is_first=name == names[0],
                is_last=name == names[-1],
            ).attach(block, self.patches)


def _refuse_replaced_forward(layer: nn.Module) -> None:
    if "forward" in vars(layer) and Region.of(layer) is None:
        raise ValueError(
            f"tp can't divide a {type(layer).__name__} whose forward was replaced on the object, which it would "
            "replace again; put the change into a class, or leave the module out of tensor_plan="
        )


def _divided(module: nn.Module, name: str, tp: int) -> int:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf) // tp


def _mode(part: ModulePlan, mesh: DeviceMesh) -> Any:
    if part.multihead:
        return partial(_local_heads, mesh)
    if part.vocabulary and not part.copies_inputs:
        return partial(_local_rows, Vocabulary(mesh, part.vocabulary))
    if part.applied_row:
        return partial(_applied_windows, part, mesh)
    return partial(_local_width, part.width, part.width // mesh.size()) if part.width else None


def _local_heads(mesh: DeviceMesh, module: nn.Module) -> LocalHeads:
    region = Region.of(module)
    assert region is not None
    return LocalHeads(mesh, region, 0 if getattr(module, "batch_first", False) else 1)  # which it turns around inside


def _is_head(part: ModulePlan) -> bool:
    return bool(part.vocabulary) and part.copies_inputs


def _logits(vocabulary: Vocabulary, stay_divided: bool, columns: Tensor) -> Tensor:
    logits = VocabLogits.from_local(columns, vocabulary.mesh, vocabulary.size)
    return logits if stay_divided else logits.full_tensor()


def _local_rows(vocabulary: Vocabulary, module: nn.Module) -> LocalRows:
    weight: Any = module.weight
    return LocalRows(vocabulary, weight)


def _applied_windows(part: ModulePlan, mesh: DeviceMesh, module: nn.Module) -> AppliedWindows:
    weight: Any = module.get_submodule(part.applied_row).weight

    def reduce(partial_sum: Tensor) -> Tensor:
        shared_again()
        return reduce_from_tensor_region(partial_sum, mesh)

    return AppliedWindows(part.width, part.width // mesh.size(), part.divides["heads"], weight, reduce)


def _local_width(width: int, local: int, module: nn.Module) -> LocalWidth:
    return LocalWidth(width, local)


def _draws(module: nn.Module) -> bool:
    """Whether the module has dropout: as layers, or as numbers that it passes on."""
    layers = any(isinstance(child, DropoutNd) and child.p > 0 for child in module.modules())
    numbers = (value for name, value in vars(module).items() if "drop" in name and isinstance(value, float))
    return layers or any(value > 0 for value in numbers)


def _no_fast_path(*_: Any) -> None:
    """A hook whose being there is enough."""
