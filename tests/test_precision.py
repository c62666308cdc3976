"""Every precision plugin on every axis; what is gathered and reduced in which dtype; ranks skip a step together."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import (
    BitsandbytesPrecision,
    DeepSpeedPrecision,
    DoublePrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_dist import HybridStrategy
from lightning_dist.precision import cast_by_autocast, validate_precision
from tests.support import models
from tests.support.models import samples
from tests.support.parity import QUIET, in_turn, once, slow, whole_weights
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

LAYOUTS = ["dp_replicate=2", "dp_shard=2"]


class Overflowing(models.Momentum):
    """The gradient of one element is infinite, in one step and on the data that one rank sees."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1 and self.trainer.global_rank == self.trainer.world_size - 1:
            loss = loss + self.net.head.bias[-1].float() * float("inf")
        return loss


class OwnScaler(torch.amp.GradScaler):
    """A user's, of which the strategy knows nothing."""


@pytest.mark.parametrize(
    ("layout", "num_ranks", "scaler"),
    in_turn(
        [pytest.param(x, int(x[-1]), id=f"{x}-{x[-1]}") for x in (*LAYOUTS, "pp=2", "pp=4")],
        [pytest.param(None, id="torch's"), pytest.param(OwnScaler, id="own")],
    ),
)
def test_an_overflow_on_one_rank_skips_the_step_on_all(layout: str, num_ranks: int, scaler: Any) -> None:
    one = once(_scaled, "dp_shard=1", scaler)
    for scale, weights in run_on_ranks(num_ranks, _scaled, layout, scaler):
        assert scale == one[0] == 2.0**15  # halved once
        for name, weight in one[1].items():
            assert weights[name].isfinite().all()
            torch.testing.assert_close(weights[name], weight, rtol=2e-2, atol=2e-3, msg=name)


def _scaled(layout: str, scaler: Any) -> tuple[float, dict[str, torch.Tensor]]:
    L.seed_everything(1, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    own = None if scaler is None else scaler("cpu")
    plugin = MixedPrecision("16-mixed", "cpu", own)
    module, strategy = Overflowing(), HybridStrategy(layout)
    trainer = L.Trainer(
        **QUIET,
        devices=world,
        strategy=strategy,
        plugins=[plugin],
        max_steps=6,
        gradient_clip_val=0.5,
    )
    trainer.fit(module, DataLoader(samples(), batch_size=8 // strategy.num_data_ranks))
    assert plugin.scaler is not None
    assert own is None or (plugin.scaler is own and isinstance(own, scaler))
    return plugin.scaler.get_scale(), whole_weights(module)


class Measuring(models.Momentum):
    """Looks at all gradients when they are unscaled."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(norms).norm()))


def _norms(layout: str) -> list[float]:
    L.seed_everything(1, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    module, strategy = Measuring(), HybridStrategy(layout)
    plugins: Any = [MixedPrecision("16-mixed", "cpu")]
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, plugins=plugins, max_steps=4)
    trainer.fit(module, DataLoader(samples(), batch_size=8))
    return module.norms


def test_hooks_see_unscaled_gradients_of_all_stages() -> None:
    one = once(_norms, "dp_shard=1")
    for norms in run_on_ranks(2, _norms, "pp=2"):
        assert norms == pytest.approx(one, rel=2e-2)


@pytest.mark.parametrize(
    ("precision", "kept", "gathered", "seen"),
    [
        ("32-true", torch.float32, torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("64-true", torch.float64, torch.float64, torch.float64),
    ],
)
def test_dtypes_of_sharded_parameters(
    precision: str, kept: torch.dtype, gathered: torch.dtype, seen: torch.dtype
) -> None:
    assert run_on_ranks(2, _dtypes, precision)[0] == (kept, kept, gathered, seen)


class Looking(models.Momentum):
    """Notes what a layer inside a block sees in its forward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        layer = self.net.blocks[0].up

        def look(module: Any, args: Any, output: torch.Tensor) -> None:
            self.dtypes = module.weight.dtype, output.dtype

        handle = layer.register_forward_hook(look)
        dtype = next(iter(self.parameters())).dtype
        loss = super().training_step(
            [batch[0].to(torch.float64 if dtype == torch.float64 else batch[0].dtype), batch[1]], 0
        )
        handle.remove()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        weight = self.net.blocks[0].up.weight
        assert isinstance(weight, DTensor)
        assert weight.grad is not None
        self.kept = weight.dtype, weight.grad.dtype


def _dtypes(precision: Any) -> tuple[torch.dtype, ...]:
    module = Looking()
    trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy("dp_shard=2"), precision=precision, max_steps=1)
    trainer.fit(module, DataLoader(samples(), batch_size=4))
    return *module.kept, *module.dtypes


WIDTH, CLASSES = 16, 5


class OverTokens(nn.Module):
    """A norm over channels, for a batch of positions of features."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "GroupNorm": lambda: OverTokens(nn.GroupNorm(4, WIDTH)),
    "InstanceNorm": lambda: OverTokens(nn.InstanceNorm1d(WIDTH, affine=True)),
    "BatchNorm": lambda: OverTokens(nn.BatchNorm1d(WIDTH)),
    "Conv1d": lambda: OverTokens(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "LSTM": lambda: Recurrent(),
    "attention": lambda: Attending(),
}
"""What a block begins with: it is given what the embedding or the data has, float32."""


class Recurrent(nn.LSTM):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class Attending(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


class Begins(nn.Module):
    """A residual block that begins with a layer, and has a scale of its own."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first = NORMS[first]()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.gelu(self.up(self.first(x))))


class Tokens(L.LightningModule):
    """An embedding whose weights are the head's too, blocks, and a softmax in the step."""

    def __init__(self, first: str = "LayerNorm") -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(Begins(first) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embedding.weight
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = -self(x).softmax(-1).gather(-1, y[..., None]).clamp(min=1e-6).log().mean()
        self.losses.append(loss.detach().double())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def _tokens() -> Dataset:
    x = torch.randint(0, CLASSES, (32, 6), generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x + 1) % CLASSES)


PRECISIONS: dict[str, tuple[Any, float]] = {
    "32-true": (lambda: {"precision": "32-true"}, 1e-5),
    "64-true": (lambda: {"precision": "64-true"}, 1e-12),
    "16-true": (lambda: {"precision": "16-true"}, 1e-2),
    "bf16-true": (lambda: {"precision": "bf16-true"}, 6e-2),
    "bf16-mixed": (lambda: {"precision": "bf16-mixed"}, 2e-2),
    "16-mixed": (lambda: {"plugins": [MixedPrecision("16-mixed", "cpu")]}, 3e-3),
    "own scaler": (
        lambda: {"plugins": [MixedPrecision("16-mixed", "cpu", OwnScaler("cpu", 2.0**14))]},
        3e-3,
    ),
    "for a GPU": (lambda: {"plugins": [MixedPrecision("bf16-mixed", "cuda")]}, 1e-5),
    "DoublePrecision": (lambda: {"plugins": [DoublePrecision()]}, 1e-12),
    "HalfPrecision": (lambda: {"plugins": [HalfPrecision("16-true")]}, 1e-2),
}
"""Arguments of the Trainer, and what rounding in that precision comes to over 8 steps, of the weights."""


def _trained(precision: str, layout: str | None, first: str = "LayerNorm") -> tuple[Tensor, dict[str, Tensor]]:
    L.seed_everything(1, verbose=False)
    world = dist.get_world_size() if dist.is_initialized() else 1
    plan: Any = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"} if "tp" in str(layout) else None
    strategy: Any = "auto" if layout is None else HybridStrategy(layout, tensor_plan=plan)
    module = Tokens(first)
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, max_steps=8, **PRECISIONS[precision][0]())
    num_parts = 1 if layout is None else strategy.num_data_ranks
    trainer.fit(module, DataLoader(_tokens(), batch_size=8 // num_parts))
    losses = torch.stack(module.losses)
    return (trainer.strategy.reduce(losses) if num_parts > 1 else losses), whole_weights(module)


def _off(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(
        float((other[name].double() - weight.double()).norm() / weight.double().norm().clamp(min=1e-9))
        for name, weight in one.items()
        if weight.is_floating_point()
    )


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")
@pytest.mark.parametrize(("precision", "layout"), in_turn(PRECISIONS, ["dp_replicate=2", "dp_shard=2", "tp=2", "pp=2"]))
def test_every_precision_trains_as_in_one_process(precision: str, layout: str) -> None:
    losses, weights = once(_trained, precision, None)
    tolerance = PRECISIONS[precision][1]
    for rank_losses, rank_weights in run_on_ranks(2, _trained, precision, layout):
        torch.testing.assert_close(rank_losses, losses, rtol=tolerance, atol=tolerance)
        assert _off(weights, rank_weights) < tolerance
        assert {w.dtype for w in rank_weights.values()} == {w.dtype for w in weights.values()}


# torch runs no LSTM in float16 on the CPU, in one process either
CAST = [(p, first) for p in ("16-mixed", "bf16-mixed") for first in NORMS if (p, first) != ("16-mixed", "LSTM")]
QUICK = {
    *(("16-mixed", first) for first in ("LayerNorm", "Conv1d")),
    *(("bf16-mixed", first) for first in ("BatchNorm", "LSTM", "attention")),
}


@pytest.mark.parametrize(("precision", "first"), [case if case in QUICK else slow(*case) for case in CAST])
def test_sharding_rounds_only_what_autocast_rounds(precision: str, first: str) -> None:
    (losses, weights), *_ = run_on_ranks(2, _trained, precision, "dp_replicate=2", first)
    for rank_losses, rank_weights in run_on_ranks(2, _trained, precision, "dp_shard=2", first):
        torch.testing.assert_close(rank_losses, losses, rtol=1e-5, atol=1e-5)
        assert _off(weights, rank_weights) < 1e-4


class OverPoints(L.LightningModule):
    """Its first block gets the data, float32, and begins with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(models.Block(), models.Block(), nn.Linear(models.WIDTH, models.CLASSES))
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach().float())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _over_points(precision: str, layout: str) -> Tensor:
    L.seed_everything(1, verbose=False)
    module, strategy = OverPoints(), HybridStrategy(layout)
    plugins: Any = PRECISIONS[precision][0]()
    world = dist.get_world_size() if dist.is_initialized() else 1
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, max_steps=6, **plugins)
    trainer.fit(module, DataLoader(samples(), batch_size=8 // strategy.num_data_ranks))
    return trainer.strategy.reduce(torch.stack(module.losses))


# at 2 ** 16, where the scale begins by default, a gradient of a rank's mean over fewer samples overflows earlier
@pytest.mark.parametrize("precision", ["own scaler", "bf16-mixed"])
def test_a_block_may_begin_with_a_norm_of_float32_data(precision: str) -> None:
    one = once(_over_points, precision, "dp_shard=1")
    for losses in run_on_ranks(2, _over_points, precision, "dp_shard=2"):
        torch.testing.assert_close(losses, one, rtol=5e-3, atol=5e-3)


def test_a_pipeline_knows_which_activations_are_float32_beside_sharding() -> None:
    _, weights = _trained("bf16-mixed", None)
    for _, rank_weights in run_on_ranks(4, _trained, "bf16-mixed", "dp_shard=2,pp=2"):
        assert _off(weights, rank_weights) < 2e-2


def test_autocast_casts_dense_layers_that_share_nothing_with_an_embedding() -> None:
    module = Tokens("attention")
    cast = {name for name, p in module.named_parameters() if p in cast_by_autocast(module)}
    layers = {f"blocks.{i}.{layer}" for i in range(2) for layer in ("up", "down", "first.out_proj")}
    in_projections = {f"blocks.{i}.first.in_proj_{part}" for i in range(2) for part in ("weight", "bias")}
    assert cast == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")} | in_projections


class FP8(TransformerEnginePrecision):
    """Its package is not installed here."""

    def __init__(self) -> None:
        pass


class Quantised(BitsandbytesPrecision):
    """Its package is not installed here."""

    def __init__(self) -> None:
        pass


class Unscaled(MixedPrecision):
    """Its scaler has a GradScaler's methods and is none."""

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")
        self.scaler = LikeAScaler()  # type: ignore[assignment]


class LikeAScaler:
    def scale(self, loss: Tensor) -> Tensor:
        return loss


REFUSED = {
    "FSDPPrecision": (lambda: FSDPPrecision("16-mixed"), "works with Lightning's FSDPStrategy only.*'16-mixed'"),
    "DeepSpeedPrecision": (lambda: DeepSpeedPrecision("bf16-true"), "works with Lightning's DeepSpeedStrategy only"),
    "transformer-engine": (FP8, "FP8 puts layers with weights of its own kind.*or strategy='ddp'"),
    "scaler": (Unscaled, "the scaler of Unscaled is a LikeAScaler and no torch.amp.GradScaler"),
}


def _told(plugin: str, layout: str) -> tuple[str, bool]:
    module = Tokens()
    before = dict(module.named_parameters())
    trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy(layout), plugins=[REFUSED[plugin][0]()])
    with pytest.raises(ValueError) as error:  # noqa: PT011
        trainer.fit(module, DataLoader(_tokens(), batch_size=4))
    return str(error.value), all(p is before[name] for name, p in module.named_parameters())


@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2", "pp=2"])
@pytest.mark.parametrize("plugin", REFUSED)
def test_a_plugin_that_can_not_work_is_refused_on_all_ranks(plugin: str, layout: str) -> None:
    for told, is_unchanged in run_on_ranks(2, _told, plugin, layout):
        assert re.search(REFUSED[plugin][1], told)
        assert "\n" not in told
        assert is_unchanged


def test_quantised_layers_are_for_one_process() -> None:
    validate_precision(Quantised(), 1)
    with pytest.raises(ValueError, match="Quantised puts layers with weights of its own kind"):
        validate_precision(Quantised(), 2)
    validate_precision(Precision(), 2)
