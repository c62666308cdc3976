"""Networks of every kind, cut into stages that run one after the other here: outputs and gradients of the whole."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_dist.parallel.pipeline.fake_module import FakeModule
from lightning_dist.parallel.pipeline.p2p import P2PTensors, first_link
from lightning_dist.parallel.pipeline.schedule import PipelineOptions
from lightning_dist.parallel.pipeline.split_points import split_points
from lightning_dist.parallel.pipeline.stage_forward import StageForward
from lightning_dist.parallel.pipeline.stage_search import balanced, find_stages
from lightning_dist.parallel.pipeline.stages import hide_parameters
from lightning_dist.parallel.pipeline.tracing import trace_step
from lightning_dist.placeholder import is_placeholder
from tests.pipeline.families import FAMILIES
from tests.support.parity import slow

pytestmark = pytest.mark.sampled

CPU = torch.device("cpu")


class Training(L.LightningModule):
    """A loss of all that a network returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.network(**batch) if isinstance(batch, dict) else self.network(*batch)
        if isinstance(output, hf.utils.ModelOutput) and "loss" in output:
            return output.loss
        found = output if isinstance(output, Tensor) else next(iter(output.values()))
        return (found * torch.sin(torch.arange(found.numel())).view(found.shape)).mean()


def run_stages(module: L.LightningModule, batch: Any, num_stages: int) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """Loss, gradients, and how many parameters each stage holds, of stages in one process."""
    fake_module = FakeModule(module, CPU)
    trace = trace_step(fake_module, module, "training_step", batch, (0,))
    stages = find_stages(module, trace, PipelineOptions(), num_stages, [], keep_whole=False)
    points = balanced(split_points(trace), trace.costs, num_stages)
    assert [point.label for point in points] == list(stages.cuts)
    p2p = [P2PTensors.of([point]) for point in points]
    ends = [None, *points, None]
    runs: list[Any] = []
    sent: tuple[Tensor, ...] = ()
    loss = torch.zeros(())
    for number in range(num_stages):
        stage = copy.deepcopy(module)
        hide_parameters(stage, stages.placeholders(stage, number), CPU)
        received = tuple(t.detach().requires_grad_() for t in sent)
        link = first_link(CPU)
        found: list[Tensor] = []
        if number:
            found, link = p2p[number - 1].unpack(points[number - 1], received)
        forward = StageForward(trace, ends[number], ends[number + 1])
        torch.manual_seed(5)
        out, result = forward.run(stage, partial(stage.training_step, batch, 0), found, lambda: None)
        if forward.exit is None:
            assert not out
            loss, sent = result, (result,)
        else:
            sent = p2p[number].pack(link, out)
        runs.append((stage, received, sent))
    gradients: Any = None
    for _, received, sent in reversed(runs):
        torch.autograd.backward(sent, gradients)
        gradients = tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in received)
    summed: dict[str, Tensor] = {}
    for stage, *_ in runs:
        for name, parameter in stage.named_parameters():
            if parameter.grad is not None:
                assert not is_placeholder(parameter)
                summed[name] = summed.get(name, torch.zeros(())) + parameter.grad
    held = [sum(p.numel() for p in stage.parameters() if not is_placeholder(p)) for stage, *_ in runs]
    return loss.detach(), summed, held


BY_DEFAULT = {
    *("recipe decoder", "recipe vit", "resnet18", "torchvision swin", "sequencer2d"),
    *("mixtral", "gpt2", "bert", "t5", "u-net"),
}
"""One of each kind of structure."""


@pytest.mark.parametrize("name", [name if name in BY_DEFAULT else slow(name) for name in FAMILIES])
@pytest.mark.parametrize("num_stages", [slow(2), 4])
def test_stages_equal_the_whole(name: str, num_stages: int) -> None:
    torch.manual_seed(0)
    network, batch = FAMILIES[name]()
    module = Training(network.train())
    whole = copy.deepcopy(module)
    torch.manual_seed(5)
    expected = whole.training_step(batch, 0)
    expected.backward()
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    loss, gradients, held = run_stages(module, batch, num_stages)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-7)
    assert gradients.keys() == wanted.keys()
    largest = max(float(g.norm()) for g in wanted.values())
    for parameter, gradient in wanted.items():
        difference = float((gradients[parameter] - gradient).norm())
        assert difference <= 1e-6 * max(float(gradient.norm()), 1e-2 * largest), parameter
    assert max(held) < sum(p.numel() for p in module.parameters())
