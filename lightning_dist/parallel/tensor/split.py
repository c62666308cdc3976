"""Applies a sharding plan to a module, in place, until it is undone; and sums its partial gradients in a step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_dist.collectives import all_reduce_tensors
from lightning_dist.compat.torch import FORWARD_PRE_HOOKS
from lightning_dist.dtensors import local_part
from lightning_dist.parallel.tensor.attention import AppliedWindows, LocalHeads, LocalWidth
from lightning_dist.parallel.tensor.block_pair import Block, BlockPair, ColumnWise, RowWise
from lightning_dist.parallel.tensor.draws import Draws
from lightning_dist.parallel.tensor.equivalence import EquivalenceCheck
from lightning_dist.parallel.tensor.head_count import HeadCount
from lightning_dist.parallel.tensor.hooks import HooksInside
from lightning_dist.parallel.tensor.positions import Positions
from lightning_dist.parallel.tensor.region import Region
from lightning_dist.parallel.tensor.sequence_block import SequenceBlock
from lightning_dist.parallel.tensor.shards import shard_placement, split_parameter
from lightning_dist.parallel.tensor.vocab_parallel.logits import VocabLogits
from lightning_dist.parallel.tensor.vocab_parallel.vocabulary import LocalRows, Vocabulary
from lightning_dist.patches import Patches
from lightning_dist.plans.tensor import OWN_ARGUMENTS, ModulePlan, ShardingPlan, TensorPlan
from lightning_dist.plans.tensor.layers import inputs


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
        for layer in (module, *(module.get_submodule(name) for name in (*part.columns, *part.rows))):
            _refuse_replaced_forward(layer)
        for name, how in part.parameters.items():
            owner, _, leaf = name.rpartition(".")
            split_parameter(self.root, module.get_submodule(owner), leaf, shard_placement(*how), self.mesh)
        pair = BlockPair(self.mesh, Draws(module)) if part.columns else None
        for name, how in part.rows.items():
            layer = module.get_submodule(name)
            split_parameter(self.root, layer, "weight", shard_placement(*how), self.mesh)
            arguments: Any = {"local": ["weight"], "after": "bias", "reduces_output": True, "width": inputs(layer)}
            row = Region(self.mesh, **arguments) if pair is None else RowWise(self.mesh, **arguments, pair=pair)
            row.attach(layer, self.patches)
        if pair is not None:
            self._attach_block(module, part, pair)
        elif part.parameters:
            self._region(module, part).attach(module, self.patches)
        if part.multihead:
            # torch's transformer layers go past a layer without hooks
            self.patches.also(module.register_forward_pre_hook(_no_fast_path).remove)

    def _attach_block(self, module: nn.Module, part: ModulePlan, pair: BlockPair) -> None:
        """See [Note: pairs in a block]."""
        for name in part.columns:
            layer, below = module.get_submodule(name), f"{name}."
            local, numbers = (
                [found.removeprefix(below) for found in names if found.startswith(below)]
                for names in (part.parameters, part.attributes)
            )
            attributes = {number: attrgetter(number)(layer) // self.mesh.size() for number in numbers}
            column = ColumnWise(self.mesh, local=local, attributes=attributes, copies_inputs=True, pair=pair)
            column.attach(layer, self.patches)
        Block(self.mesh, stays=OWN_ARGUMENTS, hooks=HooksInside(self.mesh), check=self.check, pair=pair).attach(
            module, self.patches
        )

    def _region(self, module: nn.Module, part: ModulePlan) -> Region:
        mesh, vocabulary = self.mesh, Vocabulary(self.mesh, part.vocabulary)
        is_embedding, is_head = (bool(part.vocabulary) and part.copies_inputs == copies for copies in (False, True))
        has_mode = part.multihead or is_embedding or part.applied_row or part.width
        return Region(
            mesh,
            local=list(part.parameters),
            attributes={name: _own_share(attrgetter(name)(module), part, mesh.size()) for name in part.attributes},
            buffers={name: shard_placement(*how) for name, how in part.buffers.items()},
            copies_inputs=part.copies_inputs,
            stays=part.stays,
            beside=part.beside,
            heads=0 if part.multihead else part.divides.get("heads", 0),
            mode=partial(_mode, part, vocabulary) if has_mode else None,
            draws=Draws(module),
            finish=partial(_logits, vocabulary, self.plan.loss_parallel) if is_head else None,
            hooks=HooksInside(mesh) if part.rows else None,
            check=None if part.vocabulary else self.check,
        )

    def _attach_around(self, plan: TensorPlan) -> None:
        """Regions that do nothing but show hooks whole activations, around layers whose outputs go on divided."""
        row_wise = [name for name, part in plan.items() if part.rows and not (part.copies_inputs or part.columns)]
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

    def _heads_in(self, name: str) -> int:
        """Of the first attention module in a block; 0 where there is none."""
        parts = (part for below, part in self.plan.tensor_plan.items() if below.startswith(f"{name}."))
        return next((part.divides["heads"] for part in parts if "heads" in part.divides), 0)

    def _stack(self, names: list[str]) -> None:
        """Makes the blocks of one stack hand on their part of the positions."""
        positions = Positions(self.mesh)
        for name in names:
            block = self.root.get_submodule(name)
            _refuse_replaced_forward(block)
            around = Region.of(block)
            for child in block.modules():
                if (region := Region.of(child)) is not None:
                    region.positions, region.check = positions, None
            SequenceBlock(
                self.mesh,
                stays=OWN_ARGUMENTS,
                heads=self._heads_in(name),
                draws=Draws(block),
                hooks=HooksInside(self.mesh),
                check=self.check,
                positions=positions,
                pair=around.pair if isinstance(around, Block) else None,
                name=name,
                is_first=name == names[0],
                is_last=name == names[-1],
            ).attach(block, self.patches)


class TensorAxis:
    """Sums the gradients of replicated parameters that each rank used on its part only: norms of heads, and under
    sequence parallel all that is not divided in the blocks. See [Note: gradients of a part].

    Communication: one all-reduce of their gradients, flat, over ``mesh`` per backward pass that reduces; none while
    accumulating, none if there are no such parameters.
    """

    def __init__(self, module: nn.Module, partial: Iterable[str], mesh: DeviceMesh) -> None:
        self.module, self.partial, self.mesh = module, list(partial), mesh
        blocks = [region for m in module.modules() if isinstance(region := Region.of(m), SequenceBlock)]
        self._positions = {id(block.positions): block.positions for block in blocks if block.positions is not None}
        for name in self.partial:
            _see_in_part(module, name)

    def after_step(self) -> None:
        """Called after the network ran. ValueError where a sequence-parallel stack did not run to its last block."""
        for positions in self._positions.values():
            positions.refuse_open()

    @torch.no_grad()
    def after_backward(self) -> None:
        """Sums; called after backward passes that reduce."""
        parameters = dict.fromkeys(self.module.get_parameter(name) for name in self.partial)  # tied ones once
        gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
        all_reduce_tensors(gradients, self.mesh.get_group(), mean=True)


def _see_in_part(module: nn.Module, name: str) -> None:
    """Tells the outermost region around a parameter that it uses it in part."""
    *owners, _ = name.split(".")
    around = [".".join(owners[:depth]) for depth in range(len(owners) + 1)]
    regions = [(outer, region) for outer in around if (region := Region.of(module.get_submodule(outer))) is not None]
    outer, region = next((found for found in regions if isinstance(found[1], SequenceBlock)), regions[-1])
    below = name.removeprefix(f"{outer}.")
    if below not in region.partial:
        region.partial.append(below)


def _refuse_replaced_forward(layer: nn.Module) -> None:
    if "forward" in vars(layer) and Region.of(layer) is None:
        raise ValueError(
            f"tp can't divide a {type(layer).__name__} whose forward was replaced on the object, which it would "
            "replace again; put the change into a class, or leave the module out of tensor_plan="
        )


def _own_share(number: int, part: ModulePlan, size: int) -> int:
    """Of a number that a module has, as many as it sees on a rank."""
    heads = part.divides.get("heads")
    return HeadCount(number // size, number, part.width) if number == heads and part.width else number // size


def _mode(part: ModulePlan, vocabulary: Vocabulary, module: Any) -> AbstractContextManager[Any]:
    """What the module's forward runs in, where functions that it calls have to be told of this rank's part."""
    mesh = vocabulary.mesh
    if part.multihead:
        region = Region.of(module)
        assert region is not None
        return LocalHeads(region, 0 if module.batch_first else 1)  # which it turns around inside
    if part.vocabulary:
        return LocalRows(vocabulary, module.weight)
    local = part.width // mesh.size()
    if part.applied_row:
        weight: Any = module.get_submodule(part.applied_row).weight
        return AppliedWindows(part.width, local, part.divides["heads"], weight, mesh)
    return LocalWidth(part.width, local)


def _logits(vocabulary: Vocabulary, stay_divided: bool, columns: Tensor) -> Tensor:
    logits = VocabLogits.from_local(columns, vocabulary.mesh, vocabulary.size)
    return logits if stay_divided else logits.full_tensor()


def _no_fast_path(*_: Any) -> None:
    """A hook whose being there is enough."""
