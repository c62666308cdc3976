"""The spine of the tests: a layout against one process on the same global batches."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_dist import HybridStrategy, Layout
from lightning_dist.checkpoint import full
from lightning_dist.placeholder import is_placeholder
from tests.support.device import device_type
from tests.support.ranks import run_on_ranks

QUIET: dict[str, Any] = {
    "accelerator": device_type(),
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def slow(*values: Any) -> Any:
    """Arguments of a test that is run on demand."""
    return pytest.param(*values, marks=pytest.mark.slow)


def in_turn(one: Iterable[Any], other: Iterable[Any]) -> list[Any]:
    """Arguments of a test: each of one with each of the other; every second pair is run on demand, so all are shown.

    Args:
        one: strings, or values as ``pytest.param`` has them, with an id.
        other: likewise.
    """
    axes = [[x if hasattr(x, "marks") else pytest.param(x, id=x) for x in axis] for axis in (one, other)]
    return [
        pytest.param(
            *(*a.values, *b.values),
            id=f"{a.id}-{b.id}",
            marks=[*a.marks, *b.marks, *[pytest.mark.slow] * ((i + j) % 2)],
        )
        for (i, a), (j, b) in itertools.product(*map(enumerate, axes))
    ]


def trainer(layout: str, **arguments: Any) -> L.Trainer:
    """A quiet Trainer of one epoch under a layout, on the ranks that are there."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    strategy = HybridStrategy(layout, **arguments.pop("strategy", {}))
    return L.Trainer(**{**QUIET, "devices": world, "strategy": strategy, "max_epochs": 1, **arguments})


DATA_AND_TENSOR = [
    pytest.param("dp_replicate=2", 2, id="replicate2"),
    pytest.param("dp_shard=2", 2, id="shard2"),
    pytest.param("tp=2", 2, id="tp2"),
    pytest.param("dp_replicate=2,dp_shard=2", 4, id="replicate2-shard2", marks=pytest.mark.slow),
    pytest.param("dp_shard=2,tp=2", 4, id="shard2-tp2", marks=pytest.mark.slow),
]

TOLERANCE = 1e-5
"""Relative, of float32 rounding over tens of steps."""


@dataclass
class Run:
    """A training to compare: what is built, on what data, how.

    Args:
        module: makes the LightningModule; at the top of a file, so that ranks can import it.
        data: makes the training data set.
        val_data: makes the validation data set, or None.
        batch_size: of one process: the global batch.
        seed: before the module is made.
        trainer: arguments of the Trainer.
        strategy: arguments of HybridStrategy beside the layout.
        shuffle: of the training loader.
    """

    module: Callable[[], L.LightningModule]
    data: Callable[[], Dataset]
    val_data: Callable[[], Dataset] | None = None
    batch_size: int = 8
    seed: int = 1
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    shuffle: bool = False
    callbacks: Callable[[], list[Callback]] = list


@dataclass
class Record:
    """What a training left behind."""

    losses: list[float]
    norms: list[float]
    logged: dict[str, float]
    weights: dict[str, Tensor]


class Losses(Callback):
    """Notes every step's loss, averaged over the ranks with different samples."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.losses.append(float(trainer.strategy.reduce(loss.detach().float().clone())))


class Watch(Losses):
    """Notes also the norm of every step's gradients."""

    def __init__(self) -> None:
        super().__init__()
        self._squares: list[Squares] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self._squares.append(squares_of_gradients(p for group in optimizer.param_groups for p in group["params"]))

    def norms(self) -> list[float]:
        """Of every step. One gather for all of them, which every rank calls after the fit."""
        return [norm_of_pieces(by_rank) for by_rank in zip(*_of_all_ranks(self._squares), strict=True)]


@contextmanager
def as_they_are() -> Iterator[None]:
    """Tensors of a pipeline's stage are this rank's, not the whole network's, which they are to a user's code."""
    with torch._C.DisableTorchFunctionSubclass():
        yield


Squares = dict[tuple[int, tuple[int, ...]], float]
"""The sum of squares of each piece of a gradient, by the parameter's place in the optimizer and the piece's in it."""


@as_they_are()
def squares_of_gradients(parameters: Iterable[Tensor]) -> Squares:
    """Of what this rank holds. Without the product's code: this is what its norms are compared with."""
    held: Squares = {}
    for index, parameter in enumerate(parameters):
        gradient = None if is_placeholder(parameter) else parameter.grad
        if gradient is None:
            continue
        piece: tuple[int, ...] = ()
        if isinstance(gradient, DTensor):
            coordinates = gradient.device_mesh.get_coordinate()
            assert coordinates is not None
            assert not any(placement.is_partial() for placement in gradient.placements)
            divided = [not placement.is_replicate() for placement in gradient.placements]
            piece = tuple(c for c, divides in zip(coordinates, divided, strict=True) if divides)
            gradient = gradient.to_local()
        held[index, piece] = float(gradient.detach().double().square().sum())
    return held


def norm_of_pieces(by_rank: Iterable[Squares]) -> float:
    """The norm over all pieces, each once: as the mean of the ranks that hold it."""
    pieces: dict[Any, list[float]] = {}
    for held in by_rank:
        for piece, squares in held.items():
            pieces.setdefault(piece, []).append(squares)
    return math.sqrt(sum(sum(squares) / len(squares) for squares in pieces.values()))


def _of_all_ranks(value: Any) -> list[Any]:
    if not torch.distributed.is_initialized():
        return [value]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone


def train(run: Run, layout: str | None) -> Record:
    """Trains under a layout on the ranks that are there; None is Lightning's own strategy for one process."""
    L.seed_everything(run.seed, verbose=False)
    module = run.module()
    watch = Watch()
    strategy: Any = {None: "auto", "ddp": "ddp"}.get(layout) or HybridStrategy(layout, **run.strategy)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = L.Trainer(
        **{
            **QUIET,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "devices": world,
            **run.trainer,
            "callbacks": [watch, *run.callbacks()],
            "strategy": strategy,
        }
    )
    data = run.data()
    # Lightning's ddp would shuffle an unshuffled loader: bring its sampler
    sampler = DistributedSampler(data, shuffle=False) if layout == "ddp" else None
    parsed = None if layout in (None, "ddp") else Layout.parse(layout)
    ranks = world if parsed is None else parsed.resolve(world).num_data_ranks
    loader = DataLoader(data, batch_size=run.batch_size // ranks, shuffle=run.shuffle, sampler=sampler)
    val_loader = None if run.val_data is None else DataLoader(run.val_data(), batch_size=run.batch_size // 2)
    trainer.fit(module, loader, val_loader)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return Record(watch.losses, watch.norms(), logged, whole_weights(module))


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with every sharded tensor gathered. One all-gather a tensor."""
    held = {name: tensor for name, tensor in module.state_dict().items() if not is_placeholder(tensor)}
    with as_they_are():
        state = {name: _whole(tensor.detach()).cpu().clone() for name, tensor in held.items()}
    if any(is_placeholder(p) for p in module.parameters()):
        state = {name: tensor for part in _of_all_ranks(state) for name, tensor in part.items()}
    return state


def _whole(tensor: Tensor) -> Tensor:
    """By torch, but for packed layers on the tensor axis and those divided twice, which torch puts together wrongly."""
    if not isinstance(tensor, DTensor):
        return tensor
    if all(type(placement) in (Shard, Replicate) for placement in tensor.placements):
        return DTensor.full_tensor(tensor)
    return full(tensor)


_RESULTS: dict[bytes, bytes] = {}


def once(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, called the first time that this process asks; each answer is a copy of its own.

    Args:
        function: at the top of its module; it depends on its arguments alone.
        args: that can be pickled, which is what tells them apart.
    """
    key = pickle.dumps((function, args))
    if key not in _RESULTS:
        _RESULTS[key] = pickle.dumps(function(*args))
    return pickle.loads(_RESULTS[key])


def one_process(run: Run) -> Record:
    """What Lightning's own strategy for one process makes of a run; trained once for all layouts."""
    return once(train, replace(run, strategy={}), None)


def on_layout(run: Run, layout: str, num_ranks: int) -> list[Record]:
    """The records of all ranks."""
    return run_on_ranks(num_ranks, train, run, layout)


def assert_parity(run: Run, layout: str, num_ranks: int, tolerance: float = TOLERANCE) -> None:
    """The layout gives the losses, gradient norms, logged values and weights of one process, on every rank."""
    one = one_process(run)
    assert one.losses
    assert one.norms
    for record in on_layout(run, layout, num_ranks):
        assert_equal(one, record, tolerance)


def assert_equal(one: Record, other: Record, tolerance: float = TOLERANCE) -> None:
    """Two records agree within a relative tolerance."""
    torch.testing.assert_close(other.losses, one.losses, rtol=tolerance, atol=tolerance / 10)
    torch.testing.assert_close(other.norms, one.norms, rtol=tolerance, atol=tolerance / 10)
    assert other.logged.keys() == one.logged.keys()
    for name, value in one.logged.items():
        torch.testing.assert_close(other.logged[name], value, rtol=tolerance, atol=tolerance / 10, msg=name)
    assert other.weights.keys() == one.weights.keys()
    for name, weight in one.weights.items():
        if not weight.is_floating_point():
            assert torch.equal(other.weights[name], weight), name
            continue
        difference = (other.weights[name] - weight).norm() / weight.norm().clamp(min=1e-12)
        assert difference <= tolerance, f"{name}: {difference:.1e}"
