"""What a dry run tells of a rank's memory is what ranks hold that run."""

from __future__ import annotations

import ctypes
import gc
import re
import subprocess
import sys
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy, Layout
from lightning_dist.cli import main
from lightning_dist.explain.dry_run import PeakMemory, Place, dry_run, fit_steps, peaks_of_rank
from lightning_dist.explain.live_bytes import PARTS, LiveBytes
from recipes.language_model import CausalLM
from recipes.language_model.decoder import Decoder
from tests.recipes.runs import Blocks, decoder, digits, vit
from tests.support.models import Block, Classifier, Momentum, samples
from tests.support.parity import slow
from tests.support.ranks import POOL, run_on_ranks

pytestmark = pytest.mark.sampled

DATA: dict[Any, Any] = {decoder: partial(Blocks, 16), vit: digits}


def _batch(make: Any) -> Any:
    return next(iter(DataLoader(DATA.get(make, samples)(), batch_size=8)))


def _counted(make: Any, layout: str, options: dict[str, Any], trainer: dict[str, Any]) -> Any:
    """The least of three runs: threads of Gloo's let go of what they sent at some moment after it was waited for."""
    runs = [_counted_once(make, layout, options, trainer) for _ in range(3)]
    return {when: min((peaks[when] for peaks in runs), key=lambda peak: peak.total) for when in runs[0]}


def _counted_once(make: Any, layout: str, options: dict[str, Any], trainer: dict[str, Any]) -> Any:
    count = LiveBytes()
    peaks = PeakMemory(count)
    arguments = {**trainer, "devices": dist.get_world_size(), "strategy": HybridStrategy(layout, **options)}
    with count:
        fit_steps(make(), _batch(make), [peaks], accelerator="cpu", **arguments)
    return peaks.peaks


@pytest.mark.parametrize(
    ("make", "layout", "options", "trainer"),
    [
        (decoder, "dp_shard=2", {}, {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}),
        slow(decoder, "tp=2", {"sequence_parallel": True}, {}),
        slow(vit, "pp=2", {}, {}),
        slow(decoder, "dp_replicate=2", {}, {}),
        slow(decoder, "dp_shard=2", {"activation_checkpointing": "full"}, {"precision": "bf16-mixed"}),
        slow(decoder, "pp=2", {}, {}),
        slow(decoder, "dp_shard=2,tp=2", {}, {}),
        slow(decoder, "pp=2,dp_replicate=2", {}, {}),
        slow(vit, "dp_replicate=2", {}, {"precision": "bf16-true"}),
        slow(vit, "dp_shard=2", {}, {}),
        slow(vit, "tp=2", {}, {}),
        slow(vit, "pp=2,tp=2", {}, {}),
        slow(vit, "pp=2,dp_shard=2", {}, {}),
        slow(Classifier, "dp_replicate=2", {}, {}),
        slow(Momentum, "dp_shard=2", {}, {}),
        slow(Classifier, "pp=2", {}, {}),
    ],
)
def test_a_dry_run_counts_what_a_run_holds(make: Any, layout: str, options: Any, trainer: Any) -> None:
    """The set-up aside, which is a trial of the optimizer where nets are small."""
    num_ranks = Layout.parse(layout).world_size  # type: ignore[union-attr]
    for rank, held in enumerate(run_on_ranks(num_ranks, _counted, make, layout, options, trainer)):
        dry = peaks_of_rank(make, HybridStrategy(layout, **options), Place(rank, num_ranks), _batch(make), trainer)
        for when in ("first step", "later steps"):
            assert dry[when].total == pytest.approx(held[when].total, rel=0.03)
            assert dry[when].parts["optimizer states"] == pytest.approx(held[when].parts["optimizer states"], rel=0.03)


def test_memory_counts_until_it_is_freed() -> None:
    """Once for all views of it, and no more than a storage is resized to."""
    count = LiveBytes()
    with count:
        one = torch.ones(1000)
        two = (one * 2).view(10, 100)[0]
        count.label("parameters", [two])
        assert count.now == count.peak == 8000
        assert count.parts == {**dict.fromkeys(PARTS, 0), "parameters": 4000, "other": 4000}
        del one
        assert count.now == 4000
        two.untyped_storage().resize_(0)
        assert count.now == 0
        count.forget_peak()
        two.untyped_storage().resize_(400)
        assert count.now == count.peak == 400


class _Deciding(Classifier):
    """Its step goes by a value that depends on parameters."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if loss.isfinite() else 0 * loss


def test_a_step_that_looks_at_values_can_not_be_told() -> None:
    layout = Layout(dp_shard=2)
    with pytest.raises(ValueError, match=r"can't be told: .*test_dry_run.py:\d+ \(return loss if loss.isfinite"):
        dry_run(_Deciding, HybridStrategy(layout), layout, _batch(_Deciding))
    assert not dist.is_initialized()


def test_the_command_shows_the_peak(capsys: pytest.CaptureFixture[str]) -> None:
    what = "tests.test_dry_run:WithData", "--layout", "dp_shard=8", "--memory"
    assert main(["explain", *what]) == 0
    shown = capsys.readouterr().out
    assert "peak memory: " in shown
    assert "optimizer states" in shown
    assert main(["explain", "tests.support.models:Huge", "width=64", *what[1:]]) == 2
    assert "give the module a train_dataloader" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_the_steps_too_and_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    """In ranks of its own, and in a process that has run no backward pass, so that it can fork them."""
    arguments = ["explain", "tests.test_dry_run:WithData", "--layout", "dp_shard=2", "--memory", "--run"]
    command = f"import sys; from lightning_dist.cli import main; sys.exit(main({arguments}))"
    told = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    (peak,), (measured,) = (
        re.findall(pattern, told) for pattern in (r"peak memory: ([\d.]+ \w+)", r"measured\W+([\d.]+ \w+)")
    )
    number, unit = measured.split()
    assert unit == peak.split()[1]
    assert 0.5 < float(number) / float(peak.split()[0]) < 2  # beside what the system keeps of freed memory


class WithData(Classifier):
    """Wide, with a loader of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 2**20), torch.nn.ReLU(), torch.nn.Linear(2**20, 4))

    def train_dataloader(self) -> Any:
        return DataLoader(samples(), batch_size=8)


WIDTH, LENGTH, VOCABULARY = 512, 128, 8192
M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""


def _large_decoder(small: bool = False) -> L.LightningModule:
    """29 million parameters; or few of the same kind."""
    width, depth = (16, 2) if small else (WIDTH, 8)
    network = partial(Decoder, VOCABULARY, width=width, depth=depth, num_heads=8, num_kv_heads=4, tie_embedding=False)
    return CausalLM(network, partial(torch.optim.AdamW, lr=1e-3))


class _Wide(L.LightningModule):
    """29 million parameters in equal layers, whose names tell no plan."""

    def __init__(self, small: bool = False) -> None:
        super().__init__()
        self._depth = 2 if small else 28

    def configure_model(self) -> None:
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024) for _ in range(self._depth))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for layer in self.layers:
            batch = layer(batch).relu()
        return batch.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def _large_batch(make: Any) -> Any:
    if make is _Wide:
        return torch.ones(1024, 1024)
    tokens = torch.randint(VOCABULARY, (4, LENGTH + 1))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def _resident(what: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(what))


def _measured(make: Any, layout: str) -> int:
    """Most resident memory of a rank of a real run, beside what it had before, when libraries had run once.

    Tensors that are freed go back to the system, as by themselves they would not all do.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    for small in (True, False):
        gc.collect()
        module, batch = make(small), _large_batch(make)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the highest is that from now on
        before = _resident("VmRSS")
        strategy = HybridStrategy(layout)
        fit_steps(module, batch, [], accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
    return _resident("VmHWM") - before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "layout"),
    [(_large_decoder, "dp_shard=2"), (_large_decoder, "tp=2"), (_large_decoder, "pp=2"), (_Wide, "dp_replicate=2")],
)
def test_resident_memory_is_what_a_dry_run_tells(make: Any, layout: str) -> None:
    POOL.close()  # processes keep what earlier jobs freed
    measured = run_on_ranks(2, _measured, make, layout)
    for rank, held in enumerate(measured):
        dry = peaks_of_rank(make, HybridStrategy(layout), Place(rank, 2), _large_batch(make), {})
        predicted = max(peak.total for peak in dry.values())
        assert predicted == pytest.approx(held, rel=0.1)


class Wide(Classifier):
    """Blocks of two large layers."""

    def __init__(self) -> None:
        super().__init__()
        net: Any = self.net
        net.blocks = torch.nn.Sequential(Widened(), Widened())


class Widened(Block):
    """Of three layers that matter."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = (torch.nn.Linear(*size) for size in ((16, 2048), (2048, 2048), (2048, 16)))
        self.more = torch.nn.Linear(2048, 2048)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.more(self.middle(self.up(self.norm(x)))))


@pytest.mark.slow
def test_a_limit_of_parameters_gathered_at_once_lowers_the_peak() -> None:
    layer = 4 * 2048**2  # bytes; a block holds two such, of which one at a time is whole with the limit
    peaks = [
        peaks_of_rank(Wide, HybridStrategy("dp_shard=2", max_unit_parameters=limit), Place(0, 2), _batch(Wide), {})
        for limit in (None, 2048**2)
    ]
    whole, parts = (peak["later steps"].total for peak in peaks)
    assert whole - parts > 0.9 * layer
