"""The set-up of a module that a user hands to Fabric."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from lightning.fabric.plugins import Precision
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_dist.auto_layout import choose_layout
from lightning_dist.collectives import broadcast_tensors
from lightning_dist.compat.torch import has_gradient_hooks
from lightning_dist.divided import divide
from lightning_dist.divided.compiled import show_parts_to_compiled
from lightning_dist.fabric.module import InLayout, users_compile_options
from lightning_dist.layout import Layout
from lightning_dist.logs import attach_metrics
from lightning_dist.module_options import ModuleOptions
from lightning_dist.parallel import parallelize, validate_blocks
from lightning_dist.parallel.replaced import Replaced
from lightning_dist.patches import Patches
from lightning_dist.plans.tensor import parameter_splits
from lightning_dist.precision import shard_policy
from lightning_dist.random_states import share_random_state
from lightning_dist.ranks import LayoutRanks
from lightning_dist.validation import validate_kept_hooks, validate_no_lazy, validate_parameter_kinds


class FabricModuleSetup:
    """Divides, or replicates, modules in place.

    Args:
        ranks: of the run.
        options: the user's.
        patches: what is put onto modules; what Fabric set up stays so.
        takes_part: called before each forward with gradients.
    """

    def __init__(
        self, ranks: LayoutRanks, options: ModuleOptions, patches: Patches, takes_part: Callable[[InLayout], None]
    ) -> None:
        self.options = options
        self._ranks, self._patches, self._takes_part = ranks, patches, takes_part

    def build(self, module: nn.Module, precision: Precision, made_before: list[Optimizer]) -> nn.Module:
        """All ranks call it, and go on with rank 0's values.

        Args:
            module: on this rank's device.
            precision: Fabric's.
            made_before: optimizers that were made for it, which get the divided parameters.

        Returns:
            What Fabric calls: the module itself in one process.
        """
        ranks, options = self._ranks, self.options
        layout = self._decide_layout(module)
        blocks = options.blocks(module)
        validate_blocks(module, blocks, options.activation_checkpointing)
        plan = options.tensor.sharding_plan(module, layout.tp, blocks)
        if ranks.mesh is not None:
            validate_no_lazy(module)
            _validate_new(module)
            validate_parameter_kinds(module, layout, parameter_splits(plan.tensor_plan) if plan else ())
            share_random_state(ranks.device)
            if layout.holds_shards:
                broadcast_tensors([tensor.detach() for _, tensor in named_tensors(module)], None)
            InLayout.prepare(module)
        hooked = {name: p for name, p in module.named_parameters() if has_gradient_hooks(p)}
        replaced = Replaced(module, in_lists=True)
        runner = parallelize(
            module,
            layout,
            ranks.mesh,
            sharding_plan=plan,
            blocks=blocks,
            policy=shard_policy(precision, ranks.device),
            device=ranks.device,
            activation_checkpointing=options.activation_checkpointing,
            compile_options=self._compile_options(),
            training=True,
            patches=self._patches,
        )
        if ranks.mesh is None:
            return module
        validate_kept_hooks(module, hooked)
        hooked.clear()
        runner.reshard()
        replaced.exchange(module, [SimpleNamespace(optimizers=made_before)])
        divide(module)
        runner.show()
        show_parts_to_compiled(module, self._patches)
        attach_metrics(module, ranks.mesh.data.get_group(), self._patches)
        for parameter in module.parameters():
            vars(parameter)[_MARK] = True
        ranks.part_random_streams()
        return InLayout(module, runner, ranks.mesh, self._takes_part)

    def _compile_options(self) -> dict[str, Any] | None:
        """What is asked of ``torch.compile``; in one process, Fabric compiles what the user compiled as it was."""
        if self.options.compile is not None or self._ranks.mesh is None:
            return self.options.compile
        return users_compile_options()

    def _decide_layout(self, module: nn.Module) -> Layout:
        ranks = self._ranks
        if ranks.layout is None:
            ranks.layout, reason = choose_layout(module, ranks.world_size, ranks.device, ranks.num_processes)
            ranks.form_mesh()
            rank_zero_info(f"layout {ranks.layout}: {reason}")
        return ranks.layout


def _validate_new(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor) or vars(parameter).get(_MARK, False):
            raise ValueError(
                f"{name} of {type(module).__name__} was set up before, in this module or in another that shares it: "
                "set up one module that contains all that share parameters, once"
            )


_MARK = "is_set_up_in_layout"


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers."""
    return [*module.named_parameters(), *module.named_buffers()]
