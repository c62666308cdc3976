"""What only a GPU can show: ``pytest --device cuda tests/test_on_gpus.py``, with ``--share-devices`` on one GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import HybridStrategy, Throughput, checkpoint
from lightning_dist.explain.dry_run import Place, peaks_of_rank
from recipes.language_model import CausalLM
from recipes.language_model.decoder import Decoder
from tests.support.device import device_type
from tests.support.models import BLOCK_PLAN, Block, Classifier, samples, wide_samples
from tests.support.parity import QUIET
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.skipif(device_type() == "cpu", reason="needs a GPU: pytest --device cuda")


def _batch_size(layout: str | None, of_all: int) -> int:
    return of_all // (2 if layout and ("dp_shard=2" in layout or "dp_replicate=2" in layout) else 1)


LAYOUTS = [
    ("dp_replicate=1", 1),
    ("dp_replicate=2", 2),
    ("dp_shard=2", 2),
    ("tp=2", 2),
    ("pp=2", 2),
    ("dp_shard=2,tp=2", 4),
    ("pp=2,dp_shard=2", 4),
]


def _strategy(layout: str, **options: Any) -> HybridStrategy:
    return HybridStrategy(layout, tensor_plan=BLOCK_PLAN if "tp" in layout else None, **options)


# ---------------------------------------------------------------- the numbers of a CPU


class Losses(Callback):
    """Of every step, read after the fit."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach())


def _losses(accelerator: str, layout: str | None, precision: Any) -> tuple[list[float], str]:
    L.seed_everything(1, verbose=False)
    seen = Losses()
    strategy: Any = "auto" if layout is None else _strategy(layout)
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    arguments = {**QUIET, "accelerator": accelerator, "strategy": strategy, "precision": precision, "devices": devices}
    module = Classifier()
    data = wide_samples() if precision == "64-true" else samples()
    L.Trainer(**arguments, max_epochs=3, callbacks=[seen], gradient_clip_val=0.5).fit(
        module, DataLoader(data, batch_size=_batch_size(layout, 8))
    )
    return [float(loss) for loss in seen.losses], seen.losses[0].device.type


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-9), ("32-true", 1e-5)])
def test_a_fit_has_the_losses_of_a_cpu(precision: str, tolerance: float, layout: str, num_ranks: int) -> None:
    expected, where = _losses("cpu", None, precision)
    assert where == "cpu"
    ranks = run_on_ranks(num_ranks, _losses, "cuda", layout, precision)
    assert {kind for _, kind in ranks} == {"cuda"}
    by_sample = [losses for losses, _ in ranks]
    mean = [sum(step) / len(step) for step in zip(*by_sample, strict=True)]  # ranks with other samples: their mean
    torch.testing.assert_close(mean, expected, rtol=tolerance, atol=tolerance / 10)


# ---------------------------------------------------------------- waits of the host


class Steady(Classifier):
    """Logs, and has metrics that count, none of which anybody reads."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss


class NoWaits(Callback):
    """In the third step of two batches, torch raises where the host would wait for the device."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if 4 <= batch_idx < 6 else "default")

    def teardown(self, *_: Any, **__: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def _without_waits(layout: str, precision: Any) -> int:
    arguments: Any = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "log_every_n_steps": 1000}
    devices = torch.distributed.get_world_size()
    strategy = _strategy(layout, pipeline_reshard=True) if "pp=2,dp_shard" in layout else _strategy(layout)
    trainer = L.Trainer(
        **{**QUIET, "devices": devices},
        strategy=strategy,
        max_epochs=1,
        callbacks=[NoWaits()],
        precision=precision,
        **arguments,
    )
    try:
        trainer.fit(Steady(), DataLoader(samples(), batch_size=4, pin_memory=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return trainer.global_step


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_steady_step_waits_for_nothing(precision: str, layout: str, num_ranks: int) -> None:
    steps = run_on_ranks(num_ranks, _without_waits, layout, precision)
    assert min(steps) >= 4


# ---------------------------------------------------------------- saves beside the training


class Large(L.LightningModule):
    """Its weights take the device milliseconds to send to the host, and each step changes all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(1024) for _ in range(8)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.blocks(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class AtThird(Callback):
    """Keeps the state on the device when the third step has ended, and asks for a save in the background."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.weights = folder, dict[str, Tensor]()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 3:
            held = {name: p.to_local() if hasattr(p, "to_local") else p for name, p in pl_module.named_parameters()}
            self.weights = {name: p.detach().clone() for name, p in held.items() if p.is_cuda}
            trainer.save_checkpoint(self.folder / "third.ckpt")


def _save_and_go_on(layout: str, folder: Path) -> dict[str, Tensor]:
    L.seed_everything(2, verbose=False)
    at = AtThird(folder)
    devices = torch.distributed.get_world_size()
    strategy = HybridStrategy(layout, async_save=True)
    trainer = L.Trainer(**{**QUIET, "devices": devices}, strategy=strategy, max_steps=12, callbacks=[at])
    trainer.fit(Large(), DataLoader(TensorDataset(torch.randn(256, 1024)), batch_size=8))
    return {name: weight.cpu() for name, weight in at.weights.items()}


@pytest.mark.parametrize(("layout", "num_ranks"), [("dp_shard=1", 1), ("dp_replicate=2", 2), ("dp_shard=2", 2)])
def test_a_save_in_the_background_is_the_state_when_it_was_asked(layout: str, num_ranks: int, tmp_path: Path) -> None:
    ranks = run_on_ranks(num_ranks, _save_and_go_on, layout, tmp_path)
    saved = checkpoint.load(tmp_path / "third.ckpt")["state_dict"]
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        whole = parts[0] if parts[0].shape == saved[name].shape else torch.cat(parts)
        assert torch.equal(whole, saved[name]), name


# ---------------------------------------------------------------- memory

VOCABULARY, LENGTH = 8192, 256


def _decoder() -> L.LightningModule:
    """Large enough that what libraries take for themselves is little."""
    network = partial(Decoder, VOCABULARY, width=512, depth=4, num_heads=8)
    return CausalLM(network, partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05))


def _blocks(batch_size: int) -> DataLoader:
    tokens = torch.randint(VOCABULARY, (32, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    count = torch.tensor(3 * LENGTH)
    items: Any = [
        {"inputs": t[:-1], "targets": t[1:], "num_bytes": count, "unigram_micronats": count * 2_000_000} for t in tokens
    ]
    return DataLoader(items, batch_size=batch_size)


def _highest(layout: str, options: dict[str, Any], trainer: dict[str, Any], batch_size: int) -> int:
    one = torch.ones(64, 64, device="cuda", requires_grad=True)
    (one @ one).sum().backward()  # cuBLAS takes memory of its own when it is first asked
    del one
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    arguments = {**QUIET, "devices": torch.distributed.get_world_size(), "strategy": HybridStrategy(layout, **options)}
    L.Trainer(**{**arguments, "max_epochs": 1, **trainer}).fit(_decoder(), _blocks(batch_size))
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(
    ("layout", "num_ranks", "options", "trainer"),
    [
        ("dp_replicate=1", 1, {}, {}),
        ("dp_replicate=1", 1, {"activation_checkpointing": "full"}, {"precision": "bf16-mixed"}),
        ("dp_replicate=2", 2, {}, {}),
        ("dp_shard=2", 2, {}, {"gradient_clip_val": 1.0}),
        ("tp=2", 2, {}, {}),
        ("pp=2", 2, {}, {}),
        ("dp_shard=2,tp=2", 4, {}, {}),
    ],
)
def test_a_dry_run_tells_what_a_device_holds(layout: str, num_ranks: int, options: Any, trainer: Any) -> None:
    batch_size = _batch_size(layout, 8)
    held = run_on_ranks(num_ranks, _highest, layout, options, trainer, batch_size)
    batch = next(iter(_blocks(batch_size)))
    told = []
    for rank in range(num_ranks):
        strategy = HybridStrategy(layout, **options)
        peaks = peaks_of_rank(_decoder, strategy, Place(rank, num_ranks), batch, trainer)
        told.append(max(peak.total for peak in peaks.values()))
    assert held == pytest.approx(told, rel=0.1)


# ---------------------------------------------------------------- waiting for communication


class _Late(Classifier):
    """One rank computes longer than the other."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = torch.ones(2048, 2048, device=self.device)
        for _ in range(200 * self.trainer.global_rank):
            x = (x @ x).clamp(-1, 1)
        return super().training_step(batch, batch_idx)


def _communication_waits(layout: str, late: bool) -> list[float]:
    seen: list[float] = []

    class Noting(Throughput):
        def _values(self, *args: Any) -> dict[str, float]:
            values = super()._values(*args)
            seen.extend([values["communication_wait"]] if "communication_wait" in values else [])
            return values

    L.Trainer(
        **QUIET,
        devices=torch.distributed.get_world_size(),
        strategy=_strategy(layout),
        max_steps=9,
        log_every_n_steps=2,
        callbacks=[Noting(communication_every_n_steps=2)],
    ).fit(_Late() if late else Classifier(), DataLoader(samples(), batch_size=2))
    return seen


@pytest.mark.parametrize("layout", ["dp_replicate=2", "dp_shard=2", "tp=2"])
def test_a_rank_waits_on_its_device_for_one_that_computes_longer(layout: str) -> None:
    waits, late = run_on_ranks(2, _communication_waits, layout, True)
    assert len(waits) == len(late) > 0
    assert all(0 <= share <= 1 for share in [*waits, *late])
    assert sum(waits) / len(waits) > sum(late) / len(late)
