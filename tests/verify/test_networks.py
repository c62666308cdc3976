"""Networks of torchvision, timm, transformers and torch.nn under layouts, by ``verify``: the same, or refused."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest

from lightning_dist.verify import verify
from tests.support.parity import slow
from tests.support.ranks import run_on_ranks
from tests.verify.networks import NETWORKS, Trained

LAYOUTS = ["tp=2", "dp_shard=2", "pp=2"]
CASES = [(name, layout) for name in NETWORKS for layout in LAYOUTS]
GATE = ("transformers llama", "tp=2")

RESNET = "torchvision resnet18"
BATCH_NORM = {(RESNET, "dp_shard=2"): "network.bn1"}
"""Where a module takes statistics of a rank's own samples, as under ddp."""
REFUSED = {(RESNET, "tp=2"): "no attention and no feed-forward pair"}
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {(RESNET, "pp=2"): {"num_microbatches": 1}}


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    """The ranks are forked from the server that the pool has started, which has imported everything."""
    run_on_ranks(1, os.getpid)


@pytest.mark.parametrize(("name", "layout"), [case if case == GATE else slow(*case) for case in CASES])
def test_a_network_is_the_same_under_every_axis_or_refused(name: str, layout: str) -> None:
    strategy = OPTIONS.get((name, layout))
    result = verify(partial(Trained, name), None, [layout], steps=3, accelerator="cpu", timeout=120, strategy=strategy)[
        layout
    ]
    if (module := BATCH_NORM.get((name, layout))) is not None:
        assert result.departure is not None
        assert (result.status, result.departure.name) == ("differs", module)
    elif (name, layout) in REFUSED:
        assert result.status == "refused"
        assert REFUSED[name, layout] in result.sentence
    else:
        assert result.status == "same", result.sentence
