"""The pipeline axis: step time, balance of the stages and time that ranks wait, of transformers' Llama, unmodified."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from lightning_dist import HybridStrategy, PipelineTimeline
from lightning_dist.elastic import launch
from recipes.benchmark.competitors import free_of_noise
from recipes.benchmark.interleaving import Pace
from recipes.benchmark.llama import Llama, Module, Ours, add_llama_arguments
from recipes.benchmark.results import Line, counted, timed
from recipes.benchmark.turns import add_timing_arguments, progress_bar, take_turns

STEP_MUST, BALANCE_MUST = 1.05, 1.1
SAME_LOSS = 1e-4
"""Relative difference of the last losses of two competitors that is rounding."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_llama_arguments(parser)
    add_timing_arguments(parser)
    parser.add_argument("--microbatches", type=int, default=4, help="of a batch (default: 4)")
    parser.add_argument("--schedule", choices=("GPipe", "1F1B"), default="1F1B", help="(default: 1F1B)")


def measure(options: argparse.Namespace) -> list[Line]:
    """Step time beside a hand-written pipeline; balance beside equal layers; waiting beside the formula."""
    return launch(_measure_on_rank, options, num_processes=options.ranks)[0]


def _measure_on_rank(options: argparse.Namespace) -> list[Line]:
    free_of_noise()
    dist.init_process_group("gloo")
    llama = Llama(options.width, options.depth, options.vocabulary, options.batch, options.length)
    bounds = [options.depth * (stage + 1) // options.ranks for stage in range(options.ranks)]
    settings = {"pipeline_schedule": options.schedule, "num_microbatches": options.microbatches}
    cuts = [f"network.model.layers.{end - 1}" for end in bounds[:-1]]
    competitors: dict[str, Any] = {
        "ours": Ours(llama, axis="pp", pipeline_cuts=cuts, **settings),
        "by hand": ByHand(llama, bounds, options.schedule, options.microbatches),
    }
    with progress_bar(dist.get_rank() == 0) as progress:
        seconds = take_turns(f"pp={options.ranks}", competitors, options, progress)
    ours, by_hand = (competitor.last_loss for competitor in competitors.values())
    if not abs(ours - by_hand) <= SAME_LOSS * by_hand:
        raise ValueError(f"by hand ended with a loss of {by_hand}, ours with {ours}: they do not train the same")
    group = f"step, pp={options.ranks}, {options.schedule}, {options.microbatches} microbatches"
    group += f" ({options.clock} clock, minimum / median)"
    lines = [timed(group, "against torch's schedule by hand", seconds["ours"], seconds["by hand"], STEP_MUST)]
    return lines + _balance(llama, options, settings) + _waiting(llama, options, settings)


def _balance(llama: Llama, options: argparse.Namespace, settings: dict[str, Any]) -> list[Line]:
    """Cost of the dearest stage over the mean, in thousandths."""
    report = HybridStrategy({"pp": options.ranks}, **settings).explain(
        Module(llama), options.ranks, next(iter(llama.loader(1)))
    )
    assert report.pipeline is not None
    group = "cost of the dearest stage over the mean, in thousandths"
    found = 1000 * report.pipeline.balance
    equal = 1000 * report.pipeline.equal_balance
    cuts = ", ".join(row.begins for row in report.pipeline.rows if row.begins)
    return [
        counted(group, f"cut after {cuts}, against 1", found, 1000, BALANCE_MUST),
        counted(group, "against equal layers", found, equal, None),
    ]


def _waiting(llama: Llama, options: argparse.Namespace, settings: dict[str, Any]) -> list[Line]:
    """Share of a step in which a rank waits, in thousandths, beside (p - 1) / (v m + p - 1)."""
    with tempfile.TemporaryDirectory() as folder:
        timeline = PipelineTimeline(step=6, directory=folder)
        Ours(llama, (timeline,), axis="pp", **settings)(lambda: None, 8)
        if dist.get_rank() == 0:
            options.output.mkdir(parents=True, exist_ok=True)
            for file in ("timeline.png", "timeline.json"):
                (options.output / f"pipeline-{file}").write_bytes((Path(folder) / file).read_bytes())
    ranks, number = options.ranks, options.microbatches
    assert timeline.bubble is not None
    expected = (ranks - 1) / (number + ranks - 1)
    group = "share of a step that ranks wait, in thousandths"
    return [counted(group, "measured, against the formula", 1000 * timeline.bubble, 1000 * expected, None)]


class HandStage(nn.Module):
    """What a user writes for torch's pipelines: the parts of the network that a stage has, called one by one."""

    def __init__(self, llama: Llama, begin: int, end: int) -> None:
        super().__init__()
        network = llama.network()
        self.embedding = network.model.embed_tokens if begin == 0 else None
        self.rotary = network.model.rotary_emb
        self.layers = nn.ModuleList(network.model.layers[begin:end])
        is_last = end == llama.depth
        self.norm = network.model.norm if is_last else None
        self.head = network.lm_head if is_last else None

    def forward(self, x: Tensor) -> Tensor:
        """From token ids or the activation of the stage before to the next activation or logits."""
        if self.embedding is not None:
            x = self.embedding(x)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


class ByHand:
    """The loop that a user writes around torch's stages and schedules, without Lightning.

    Args:
        llama: what is trained.
        bounds: the layer before which each stage ends.
        schedule: of torch.
        num_microbatches: of a batch.
    """

    def __init__(self, llama: Llama, bounds: list[int], schedule: str, num_microbatches: int) -> None:
        self.llama, self.bounds, self.schedule, self.num_microbatches = llama, bounds, schedule, num_microbatches
        self.last_loss = float("nan")

    def __call__(self, pace: Pace, num_steps: int) -> None:
        """Trains for so many steps."""
        rank, ranks, llama = dist.get_rank(), dist.get_world_size(), self.llama
        module = HandStage(llama, self.bounds[rank - 1] if rank else 0, self.bounds[rank])
        module.train()
        rows = llama.batch // self.num_microbatches
        activation = torch.empty(rows, llama.length, llama.width, requires_grad=True)
        logits = torch.empty(rows, llama.length, llama.vocabulary, requires_grad=True)
        is_last = rank == ranks - 1
        stage = PipelineStage(
            module,
            rank,
            ranks,
            torch.device("cpu"),
            input_args=torch.zeros(rows, llama.length, dtype=torch.int64) if rank == 0 else activation,
            output_args=logits if is_last else activation,
        )
        kind: Any = get_schedule_class(self.schedule)
        schedule = kind(stage, self.num_microbatches, loss_fn=self._loss)
        optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
        for ids in llama.loader(num_steps):
            optimizer.zero_grad()
            losses: list[Tensor] = []
            if rank == 0:
                schedule.step(ids, return_outputs=False)
            elif is_last:
                schedule.step(target=ids, losses=losses, return_outputs=False)
            else:
                schedule.step(return_outputs=False)
            optimizer.step()
            loss = torch.stack(losses).mean().detach() if is_last else torch.zeros(())
            dist.broadcast(loss, ranks - 1)  # as a trainer shows it
            self.last_loss = float(loss)
            pace()

    def _loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].reshape(-1, self.llama.vocabulary), ids[:, 1:].reshape(-1))
