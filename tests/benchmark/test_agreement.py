"""What competitors train is compared in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from recipes.benchmark.agreement import AGREEMENT, CHECK_STEPS, Trained, agreements, difference, train_alike
from recipes.benchmark.competitors import HandWritten, lightning_ddp, lightning_model_parallel, ours
from recipes.benchmark.interleaving import Competitor, Pace, Weights
from recipes.benchmark.llama import Llama, Ours
from recipes.benchmark.pipeline import ByHand as StagesByHand
from recipes.benchmark.results import Line
from recipes.benchmark.tensor_parallel import ByHand, own_plan, tutorial_plan
from recipes.benchmark.workloads import WORKLOADS
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

LLAMA = Llama(width=128, depth=2, vocabulary=48, batch=4, length=8)


def trained(loss: float = 2.0, weight: float = 1.0) -> Trained:
    return Trained([loss, 1.0], {"w": torch.tensor([weight], dtype=torch.float64)})


def test_the_larger_difference_of_losses_and_weights_counts() -> None:
    assert difference(trained(), trained()) == 0
    assert difference(trained(), trained(loss=2.0 + 2e-6)) == pytest.approx(1e-6)
    assert difference(trained(), trained(weight=1.0 + 3e-6)) == pytest.approx(3e-6)


@pytest.mark.parametrize(
    "other",
    [
        trained(loss=float("nan")),
        trained(weight=float("nan")),
        Trained([2.0, 1.0], {}),
        Trained([2.0], trained().weights),
        Trained([2.0, 1.0], {"w": torch.ones(2)}),
    ],
)
def test_what_can_not_be_compared_differs(other: Trained) -> None:
    assert difference(trained(), other) == float("inf")


def test_every_other_competitor_is_compared_with_the_first() -> None:
    lines = list(agreements({"a": trained(), "b": trained(weight=1 + 1e-7), "c": trained()}, "net"))
    assert [(line.what, line.verdict) for line in lines] == [("net: a and b", "missed"), ("net: a and c", "reached")]


def _by_kind(kind: str) -> dict[str, Competitor]:
    workload = WORKLOADS["decoder_tiny"]
    return {
        "dp_replicate": {"ours": ours(workload, "dp_replicate=2"), "ddp": lightning_ddp(workload)},
        "dp_shard": {
            "ours": ours(workload, "dp_shard=2"),
            "by hand": HandWritten(workload),
            "model parallel": lightning_model_parallel(workload),
        },
        "tp": {"ours": Ours(LLAMA), "tutorial": ByHand(LLAMA, tutorial_plan), "transformers": ByHand(LLAMA, own_plan)},
        "pp": {
            "ours": Ours(LLAMA, axis="pp", num_microbatches=2),
            "by hand": StagesByHand(LLAMA, [1, 2], "1F1B", 2),
        },
    }[kind]


def _alike(kind: str) -> list[Line]:
    return list(train_alike(_by_kind(kind), kind))


@pytest.mark.parametrize("kind", ["dp_replicate", "dp_shard", "tp", "pp"])
@pytest.mark.slow
def test_competitors_train_the_same(kind: str) -> None:
    lines = run_on_ranks(2, _alike, kind)[0]
    assert lines
    for line in lines:
        assert line.data["difference"] <= AGREEMENT, line
        assert all(len(losses) == CHECK_STEPS for losses in line.data["losses"].values())


def _one_that_drifts() -> list[Line]:
    def drifting(after: int) -> Callable[[Pace, int], Weights]:
        def train(pace: Pace, num_steps: int) -> Weights:
            layer = nn.Linear(2, 1, bias=False)
            nn.init.ones_(layer.weight)
            for _ in range(num_steps):
                pace(layer(torch.ones(2)).sum())
            with torch.no_grad():
                layer.weight += 1e-8 * after
            return lambda: dict(layer.named_parameters())

        return train

    # what float32 would round away, on the last rank alone
    competitors = {"ours": drifting(0), "drifts": drifting(torch.distributed.get_rank())}
    return list(train_alike(competitors, "layer"))


def test_a_difference_on_one_rank_that_float32_would_hide_is_missed() -> None:
    for lines in run_on_ranks(2, _one_that_drifts):
        assert [line.verdict for line in lines] == ["missed"]
        assert lines[0].data["difference"] == pytest.approx(1e-8, rel=1e-3)
    assert torch.get_default_dtype() == torch.float32
