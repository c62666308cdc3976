"""Parameters that are not all of one floating dtype, parametrised, pruned, or not there yet: exact, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils import _pytree as pytree

from tests.support.models import CLASSES, WIDTH, Classifier, Momentum, samples
from tests.support.parity import Record, Run, assert_equal, once, one_process, train
from tests.support.ranks import RankError, run_on_ranks

pytestmark = pytest.mark.sampled

PLAN = {"net.blocks.*.up": "colwise", "net.blocks.*.down": "rowwise"}


class Complex(Momentum):
    """Of complex parameters in the root and in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH, dtype=torch.complex64))
        for block in self.net.blocks:  # type: ignore[union-attr]
            block.turn = nn.Parameter(0.3 * torch.randn(WIDTH, dtype=torch.complex64))
            block.register_forward_hook(lambda block, args, out: out + (args[0] * block.turn).real)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x.to(torch.complex64) @ self.turn).abs())


class Grows(Momentum):
    """Gets a parameter, and its optimizer too, once it trains."""

    def on_train_batch_start(self, *_: Any) -> None:
        if not hasattr(self, "late"):
            self.late = nn.Parameter(torch.zeros(WIDTH))
            self.optimizers().add_param_group({"params": [self.late]})  # type: ignore[union-attr]


class Wide(Momentum):
    """With float64 parameters among others."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
        for block in self.net.blocks:  # type: ignore[union-attr]
            block.scale = nn.Parameter(0.3 * torch.randn(WIDTH, dtype=torch.float64))
            block.register_forward_hook(lambda block, args, out: (out + args[0] * block.scale).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * self.scale).float())


class Fixed(Momentum):
    """Integers, booleans and nothing at all, as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net.order = nn.Parameter(torch.arange(WIDTH).flip(0), requires_grad=False)
        self.net.mask = nn.Parameter(torch.arange(WIDTH) % 3 > 0, requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        block = self.net.blocks[0]  # type: ignore[index,union-attr]
        block.empty = nn.Parameter(torch.zeros(0))
        block.register_forward_hook(lambda block, args, out: out + block.empty.sum())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, self.net.order] * self.net.mask)  # type: ignore[index]


class Pruned(Momentum):
    """Before the fit."""

    def __init__(self) -> None:
        super().__init__()
        prune.l1_unstructured(self.net.head, "weight", 0.3)  # type: ignore[arg-type]
        prune.l1_unstructured(self.net.blocks[0].norm, "weight", 0.3)  # type: ignore[index,union-attr]


class PrunedBlocks(Pruned):
    """Also in what a tensor plan divides."""

    def __init__(self) -> None:
        super().__init__()
        prune.l1_unstructured(self.net.blocks[1].up, "weight", 0.3)  # type: ignore[index,union-attr]


class Parametrised(Momentum):
    """By a function of torch, in the root and in blocks."""

    def __init__(self, parametrise: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        for layer in (self.net.stem, self.net.blocks[0].up, self.net.blocks[1].down):  # type: ignore[index,union-attr]
            parametrise(layer)


def weight_norm() -> L.LightningModule:
    return Parametrised(parametrizations.weight_norm)


def spectral_norm() -> L.LightningModule:
    return Parametrised(parametrizations.spectral_norm)


def orthogonal() -> L.LightningModule:
    return Parametrised(parametrizations.orthogonal)


class NewtonLike(Classifier):
    """LBFGS, which runs a step several times before it moves."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Lazy(Momentum):
    def __init__(self) -> None:
        super().__init__()
        self.net.head = nn.LazyLinear(CLASSES)


class SetUp(Lazy):
    """Lazy until its setup has run it once."""

    def setup(self, stage: str) -> None:
        with torch.no_grad():
            self(torch.zeros(1, WIDTH))


class Half(torch.Tensor):
    """Stands for a float32 tensor that it holds in 16 bits, as those of quantisation do."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Half:
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, held: Tensor) -> None:
        self.held = held.bfloat16()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].held)
        args, kwargs = pytree.tree_map_only(cls, lambda t: t.held.float(), (args, kwargs or {}))
        return func(*args, **kwargs)


class Quantised(Momentum):
    """With a layer that does not train."""

    def __init__(self) -> None:
        super().__init__()
        layer = self.net.blocks[0].up  # type: ignore[index,union-attr]
        layer.weight = nn.Parameter(Half(layer.weight.detach()), requires_grad=False)


def pruning() -> list[Callback]:
    return [ModelPruning("l1_unstructured", amount=0.3, verbose=0)]


def run_of(module: Any, layout: str = "", **arguments: Any) -> Run:
    strategy = {"tensor_plan": PLAN} if "tp" in layout else {}
    return Run(module, samples, trainer={"max_steps": 6, "gradient_clip_val": 0.5}, strategy=strategy, **arguments)


def record_of(run: Run, layout: str | None) -> Record:
    """With complex weights as pairs of numbers."""
    record = train(run, layout)
    record.weights = {n: torch.view_as_real(w) if w.is_complex() else w for n, w in record.weights.items()}
    return record


@pytest.mark.parametrize("module", [Complex, Wide, Fixed, Pruned, weight_norm, spectral_norm, orthogonal])
def test_is_as_in_one_process(module: Any) -> None:
    one = once(record_of, run_of(module), None)
    layouts = ["dp_replicate=2", "dp_shard=2"]
    if module not in (weight_norm, spectral_norm, orthogonal):
        layouts.append("tp=2")
    for layout in layouts:
        for record in run_on_ranks(2, record_of, run_of(module, layout), layout):
            assert_equal(one, record)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp_replicate=2,dp_shard=2", "dp_shard=2,tp=2"])
@pytest.mark.parametrize("module", [Complex, Wide])
def test_dtypes_are_as_in_one_process_on_two_axes(module: Any, layout: str) -> None:
    one = once(record_of, run_of(module), None)
    for record in run_on_ranks(4, record_of, run_of(module, layout), layout):
        assert_equal(one, record)


@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2"])
def test_lbfgs_is_as_in_one_process(layout: str) -> None:
    """It divides by differences of gradients, which enlarges rounding."""
    run = Run(NewtonLike, samples, trainer={"max_steps": 6})
    one = one_process(run)
    for record in run_on_ranks(2, train, run, layout):
        assert_equal(one, record, 1e-4)


def test_a_lazy_module_that_setup_ran_trains_as_in_one_process() -> None:
    run = run_of(SetUp)
    one = once(record_of, run, None)
    for record in run_on_ranks(2, record_of, run, "dp_shard=2"):
        assert_equal(one, record)


def refusal(run: Run, layout: str) -> str:
    try:
        train(run, layout)
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("run", "layouts", "told"),
    [
        (run_of(Lazy), ("dp_replicate=2", "dp_shard=2", "tp=2"), "net.head.weight, net.head.bias of a lazy module: "),
        (run_of(Quantised), ("dp_shard=2", "tp=2"), "net.blocks.0.up.weight: a Half, which layout "),
        (run_of(Momentum, callbacks=pruning), ("dp_shard=2", "tp=2"), "ModelPruning compares the elements of whole"),
        (run_of(PrunedBlocks), ("tp=2",), "a Linear whose weight is computed from other parameters (pruned or"),
        (Run(NewtonLike, samples), ("tp=2",), "LBFGS works on all parameters as one vector, and this layout divides"),
    ],
    ids=["lazy", "quantised", "pruning", "pruned", "lbfgs"],
)
def test_what_cannot_be_divided_is_refused_on_every_rank(run: Run, layouts: tuple[str, ...], told: str) -> None:
    for layout in layouts:
        run.strategy = {"tensor_plan": PLAN} if "tp" in layout else {}
        for sentence in run_on_ranks(2, refusal, run, layout):
            assert told in sentence


def test_a_parameter_that_comes_during_the_fit_is_refused() -> None:
    for layout in ("dp_replicate=2", "dp_shard=2"):
        with pytest.raises(RankError, match="late came to the module after the fit had begun"):
            run_on_ranks(2, train, run_of(Grows), layout)


def warned_of_whole(layout: str) -> bool:
    with pytest.warns(UserWarning, match="net.blocks.0.scale.*: of another dtype than most of the parameters"):
        train(run_of(Wide), layout)
    return True


def test_what_is_kept_whole_is_told() -> None:
    """By rank 0."""
    assert run_on_ranks(2, warned_of_whole_on_first, "dp_shard=2") == [True, True]


def warned_of_whole_on_first(layout: str) -> bool:
    if torch.distributed.get_rank():
        train(run_of(Wide), layout)
        return True
    return warned_of_whole(layout)


def test_model_pruning_on_copies_is_as_in_one_process() -> None:
    run = run_of(Momentum, callbacks=pruning)
    one = once(record_of, run, None)
    for record in run_on_ranks(2, record_of, run, "dp_replicate=2"):
        assert_equal(one, record)
