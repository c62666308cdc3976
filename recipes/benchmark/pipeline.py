"""The pipeline axis: step time, balance of the stages and time that ranks wait, of transformers' Llama, unmodified."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
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
from recipes.benchmark.device import add_device_argument, device_type, join_process_group, rank_device
from recipes.benchmark.interleaving import Pace, Weights, no_pace
from recipes.benchmark.llama import Llama, Module, Ours, add_llama_arguments
from recipes.benchmark.results import Line, Record, counted, timed
from recipes.benchmark.turns import add_timing_arguments, alike, progress_bar, take_turns

STEP_MUST, BALANCE_MUST = 1.02, 1.1
QUICK = {"rounds": 10, "steps": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_llama_arguments(parser)
    add_device_argument(parser)
    add_timing_arguments(parser)
    parser.add_argument("--microbatches", type=int, default=4, help="of a batch (default: 4)")
    parser.add_argument("--schedule", choices=("GPipe", "1F1B"), default="1F1B", help="(default: 1F1B)")


def measure(options: argparse.Namespace, record: Record) -> None:
    """Step time beside a hand-written pipeline; balance beside equal layers; waiting beside the formula."""
    launch(_measure_on_rank, options, record, num_processes=options.ranks)


def _measure_on_rank(options: argparse.Namespace, record: Record) -> None:
    free_of_noise()
    join_process_group(device_type(options.device, options.ranks))
    llama = Llama(options.width, options.depth, options.vocabulary, options.batch, options.length)
    bounds = [options.depth * (stage + 1) // options.ranks for stage in range(options.ranks)]
    settings = {"pipeline_schedule": options.schedule, "num_microbatches": options.microbatches}
    cuts = [f"network.model.layers.{end - 1}" for end in bounds[:-1]]
    competitors: dict[str, Any] = {
        "ours": Ours(llama, axis="pp", pipeline_cuts=cuts, **settings),
        "by hand": ByHand(llama, bounds, options.schedule, options.microbatches),
    }
    record.extend(_step(competitors, options))
    record.extend(_balance(llama, options, settings))
    record.extend(_waiting(llama, options, settings))


def _step(competitors: dict[str, Any], options: argparse.Namespace) -> Iterator[Line]:
    with progress_bar(dist.get_rank() == 0) as progress:
        yield from alike(f"pp={options.ranks}, llama", competitors, progress)
        seconds = take_turns(f"pp={options.ranks}", competitors, options, progress)
    group = f"step, pp={options.ranks}, {options.schedule}, {options.microbatches} microbatches"
    group += f" ({options.clock} clock, minimum / median)"
    yield timed(group, "against torch's schedule by hand", seconds["ours"], seconds["by hand"], STEP_MUST)


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
        Ours(llama, (timeline,), axis="pp", **settings)(no_pace, 8)
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


def _weights_of_stages(stage: HandStage, begin: int) -> dict[str, Tensor]:
    """By the names that the whole network has. Communication: one gather of all weights."""

    def name_in_network(name: str) -> str:
        part, _, rest = name.partition(".")
        if part == "layers":
            number, _, rest = rest.partition(".")
            return f"model.layers.{begin + int(number)}.{rest}"
        return f"{WHOLE_NAMES[part]}.{rest}"

    weights = {name_in_network(name): weight.detach().cpu() for name, weight in stage.named_parameters()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, weights)
    return {name: weight for of_stage in everyone for name, weight in of_stage.items()}


WHOLE_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
"""Of the network, by those of a stage."""


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

    def __call__(self, pace: Pace, num_steps: int) -> Weights:
        """Trains for so many steps."""
        device = rank_device()
        rank, ranks, llama = dist.get_rank(), dist.get_world_size(), self.llama
        begin = self.bounds[rank - 1] if rank else 0
        module = HandStage(llama, begin, self.bounds[rank]).to(device)
        module.train()
        rows = llama.batch // self.num_microbatches
        activation = torch.empty(rows, llama.length, llama.width, requires_grad=True, device=device)
        logits = torch.empty(rows, llama.length, llama.vocabulary, requires_grad=True, device=device)
        is_last = rank == ranks - 1
        stage = PipelineStage(
            module,
            rank,
            ranks,
            device,
            input_args=torch.zeros(rows, llama.length, dtype=torch.int64, device=device) if rank == 0 else activation,
            output_args=logits if is_last else activation,
        )
        kind: Any = get_schedule_class(self.schedule)
        schedule = kind(stage, self.num_microbatches, loss_fn=self._loss)
        optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
        for batch in llama.loader(num_steps):
            ids = batch.to(device)
            optimizer.zero_grad()
            losses: list[Tensor] = []
            if rank == 0:
                schedule.step(ids, return_outputs=False)
            elif is_last:
                schedule.step(target=ids, losses=losses, return_outputs=False)
            else:
                schedule.step(return_outputs=False)
            optimizer.step()
            loss = torch.stack(losses).mean().detach() if is_last else torch.zeros((), device=device)
            dist.broadcast(loss, ranks - 1)  # as a trainer shows it
            pace(loss)
        return lambda: _weights_of_stages(module, begin)

    def _loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].reshape(-1, self.llama.vocabulary), ids[:, 1:].reshape(-1))
