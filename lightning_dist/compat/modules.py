"""Private names of torch about modules: their hooks, what they were compiled into."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule as OptimizedModule

from lightning_dist.compat.names import hands_on, uses
from lightning_dist.compat.torch import FORWARD_HOOKS, FORWARD_PRE_HOOKS

hands_on("torch._dynamo.eval_frame.OptimizedModule", "the class of what torch.compile makes of a module")


HOOKS_OF_MODULES = (
    *(FORWARD_PRE_HOOKS, FORWARD_HOOKS),
    *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


"""The attributes in which a module keeps the hooks of its forward and of its state dict."""


for _name in HOOKS_OF_MODULES[2:]:
    hands_on(f"torch.nn.Module.{_name}", "hooks of a module, of which a copy of a sharded one leaves some out")


@uses("torch.autograd._unsafe_preserve_version_counter")
def preserve_versions(tensors: tuple[Tensor, ...]) -> AbstractContextManager[None]:
    """Lets writes to the tensors meanwhile not count as writes."""
    return torch.autograd._unsafe_preserve_version_counter(tensors)


@uses("torch.nn.Module._compiled_call_impl")
def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What ``module.compile()`` made of a module's call; None where it is not compiled."""
    return module._compiled_call_impl
