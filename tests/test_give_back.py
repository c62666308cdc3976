"""A divided, or replicated, module is as its user built it when patches are undone and it is given back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import nn

from lightning_dist.compat.torch import HOOKS_OF_MODULES
from lightning_dist.divided import divide
from lightning_dist.divided.compiled import show_parts_to_compiled
from lightning_dist.layout import Layout
from lightning_dist.parallel import parallelize
from lightning_dist.parallel.replaced import Replaced, give_back, whole_tensors
from lightning_dist.patches import Patches
from lightning_dist.plans import find_blocks
from lightning_dist.precision import shard_policy
from tests.support import models
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dp_shard": ("dp_shard=2", {}),
    "dp_shard, recomputed": ("dp_shard=2", {"activation_checkpointing": "full"}),
    "dp_shard, compiled": ("dp_shard=2", {"compile_options": {"backend": "eager"}}),
    "dp_replicate": (
        "dp_replicate=2",
        {"activation_checkpointing": "selective", "compile_options": {"backend": "eager"}},
    ),
}


class Watcher:
    """A callback that keeps an optimizer of its own, and a copy of a network."""

    def __init__(self, module: Any) -> None:
        self.optimizer = torch.optim.Adam(module.net.head.parameters())
        self.copied: nn.Module | None = None


def _traces(module: nn.Module) -> list[Any]:
    """What one can see of each module beside values: class, attributes, hooks."""
    return [
        (type(m), sorted(vars(m)), [len(vars(m).get(name, ())) for name in HOOKS_OF_MODULES], vars(m).get("forward"))
        for m in module.modules()
    ]


def _train(module: Any, run: Any = None, rank: int = 0, ranks: int = 1) -> list[torch.Tensor]:
    x, y = models.samples().tensors  # type: ignore[attr-defined]
    batch = x[rank:8:ranks], y[rank:8:ranks]
    step = module.training_step if run is None else lambda *args: run.run("training_step", *args)
    loss = step(batch, 0)
    if run is not None:
        loss = run.before_backward(loss)
    loss.backward()
    if run is not None:
        run.after_backward()
    return [p.grad for p in module.parameters()]


def _round_trip(layout: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module: Any = models.Classifier()
    module.log = lambda *args, **kwargs: None
    plain = copy.deepcopy(module)
    before, objects = _traces(module), dict(module.named_parameters())
    watcher, patches, resolved = Watcher(module), Patches(), Layout.parse(layout)
    identities = {name: id(p) for name, p in objects.items()}
    objects.clear()
    mesh, device = resolved.build_mesh("cpu"), torch.device("cpu")
    replaced = Replaced(module)
    runner = parallelize(
        module,
        resolved,
        mesh,
        sharding_plan=None,
        blocks=find_blocks(module),
        policy=shard_policy(Precision(), device),
        device=device,
        activation_checkpointing=options.get("activation_checkpointing", "none"),
        compile_options=options.get("compile_options"),
        training=True,
        patches=patches,
    )
    replaced.exchange(module, [watcher])
    divide(module)
    show_parts_to_compiled(module, patches)
    watcher.copied = copy.deepcopy(module.net)
    _train(module, runner, mesh.data.get_local_rank(), mesh.data.size())
    optimizer = watcher.optimizer
    optimizer.step()
    reference = torch.optim.Adam(plain.net.head.parameters())
    _train(plain)
    reference.step()
    runner.reshard()

    whole = whole_tensors(module)
    patches.undo()
    give_back(module, whole, replaced.originals, [watcher])

    assert _traces(module) == before
    assert {name: id(p) for name, p in module.named_parameters()} == identities
    assert all(type(p) is nn.Parameter for p in (*module.parameters(), *watcher.copied.parameters()))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in module.net.head.parameters()]
    assert all(type(value) is torch.Tensor for state in optimizer.state.values() for value in state.values())
    torch.testing.assert_close(module.state_dict(), plain.state_dict())
    del module.log, plain.log
    for made in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(made) is models.Classifier
        made.log = plain.log = lambda *args, **kwargs: None
        made.zero_grad()
        plain.zero_grad()
        torch.testing.assert_close(_train(made), _train(plain))
        del made.log


@pytest.mark.parametrize("case", CASES)
def test_the_module_is_as_one_never_touched(case: str) -> None:
    run_on_ranks(2, _round_trip, *CASES[case])
