"""The tensor axis: step time, bytes per rank and collectives per step of transformers' Llama, unmodified."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from lightning_dist.elastic import launch
from recipes.benchmark.agreement import whole_weights
from recipes.benchmark.collectives import Collectives
from recipes.benchmark.competitors import free_of_noise
from recipes.benchmark.device import add_device_argument, device_type, join_process_group, rank_device
from recipes.benchmark.interleaving import Pace, Weights, no_pace
from recipes.benchmark.llama import Llama, Ours, add_llama_arguments
from recipes.benchmark.memory import HeldBytes, most
from recipes.benchmark.results import Line, Record, counted, timed
from recipes.benchmark.turns import add_timing_arguments, alike, progress_bar, take_turns

STEP_MUST, BYTES_MUST = 0.85, 1.02
QUICK = {"depth": 2, "rounds": 8, "steps": 4}
PARTS = ("step", "bytes", "collectives")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_llama_arguments(parser)
    add_device_argument(parser)
    add_timing_arguments(parser)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}"
    )


def measure(options: argparse.Namespace, record: Record) -> None:
    """Every line that the options ask for."""
    launch(_measure_on_rank, options, record, num_processes=options.ranks)


def _measure_on_rank(options: argparse.Namespace, record: Record) -> None:
    free_of_noise()
    join_process_group(device_type(options.device, options.ranks))
    llama = Llama(options.width, options.depth, options.vocabulary, options.batch, options.length)
    if "step" in options.parts:
        with progress_bar(dist.get_rank() == 0) as progress:
            record.extend(_step(llama, options, progress))
    if "bytes" in options.parts:
        record.extend(_bytes(llama, options.ranks))
    if "collectives" in options.parts:
        record.extend(_collectives(llama))


class ByHand:
    """The loop that a user writes without Lightning, around a network that ``divide`` made parallel.

    Args:
        llama: what is trained.
        divide: makes the network, over a mesh with the axis ``tp``.
        loss: of the network and a batch.
        around_loss: makes a context manager for the loss and its backward pass.
        around_step: is called with the step, to count say.
    """

    def __init__(
        self,
        llama: Llama,
        divide: Callable[[Llama, Any], nn.Module],
        loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
        around_loss: Callable[[], Any] = nullcontext,
        around_step: Callable[[Callable[[], Tensor]], Tensor] = lambda step: step(),
    ) -> None:
        self.llama, self.divide, self.around_step = llama, divide, around_step
        self.loss, self.around_loss = loss or llama.loss, around_loss

    def __call__(self, pace: Pace, num_steps: int) -> Weights:
        """Trains for so many steps."""
        mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),), mesh_dim_names=("tp",))
        network = self.divide(self.llama, mesh)
        parameters = list(network.parameters())
        mixed = len({isinstance(p, DTensor) for p in parameters}) > 1
        # foreach, the default, does not take plain and divided parameters together
        optimizer = torch.optim.AdamW(parameters, 1e-3, foreach=False if mixed else None)
        network.train()
        for batch in self.llama.loader(num_steps):
            ids = batch.to(rank_device())
            pace(self.around_step(partial(self._step, network, optimizer, ids)).detach())
        return lambda: whole_weights(network)

    def _step(self, network: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> Tensor:
        with self.around_loss():  # torch's loss_parallel wants backward inside too
            loss = self.loss(network, batch)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        loss = loss.detach()
        return loss.full_tensor() if isinstance(loss, DTensor) else loss


def tutorial_plan(llama: Llama, mesh: Any) -> nn.Module:
    """Layer by layer, as torch's tutorial begins: pytorch.org/tutorials/intermediate/TP_tutorial.html."""
    network = llama.network().to(rank_device())
    blocks = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for block in network.model.layers:
        parallelize_module(block, mesh, blocks)
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(network, mesh, ends)


def tutorial_sequence_plan(llama: Llama, mesh: Any) -> nn.Module:
    """As the same tutorial goes on: norms on a shard of the positions, and the logits left divided for the loss."""
    network = llama.network().to(rank_device())
    blocks = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    # transformers takes the positions from the embeddings it sees, which are a part: give it all of them
    positions = torch.arange(llama.length, device=rank_device())[None]
    network.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0], positions), {}), with_kwargs=True
    )
    for block in network.model.layers:
        parallelize_module(block, mesh, blocks)
    return parallelize_module(network, mesh, ends)


def own_plan(llama: Llama, mesh: Any) -> nn.Module:
    """transformers' own, by what ``from_pretrained(distributed_config=...)`` calls, which wants ``accelerate`` too."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.utils import initialize_distributed_mesh

    config = DistributedConfig(tp_size=mesh.size())
    network = llama.network().to(rank_device())
    return network.maybe_distribute_model(network, config, initialize_distributed_mesh(config)[1])


def _loss_of_divided_logits(llama: Llama, network: nn.Module, ids: Tensor) -> Tensor:
    """The last logit of a sample has no target: dropped by its label, as a slice of a DTensor costs more."""
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    logits = network(input_ids=ids).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _step(llama: Llama, options: argparse.Namespace, progress: Any) -> Iterator[Line]:
    competitors: dict[str, Any] = {
        "ours": Ours(llama),
        "ours, loss_parallel": Ours(llama, loss_parallel=True),
        "ours, sequence_parallel": Ours(llama, sequence_parallel=True, loss_parallel=True),
        "torch's tutorial": ByHand(llama, tutorial_plan),
        "torch's tutorial, sequence": ByHand(
            llama, tutorial_sequence_plan, partial(_loss_of_divided_logits, llama), loss_parallel
        ),
        "transformers": ByHand(llama, own_plan),
    }
    yield from alike(f"tp={options.ranks}, llama", competitors, progress)
    seconds = take_turns(f"tp={options.ranks}", competitors, options, progress)
    group = f"step, tp={options.ranks} ({options.clock} clock, minimum / median)"
    peers = ("torch's tutorial", "torch's tutorial, sequence", "transformers")
    mine = ("ours", "ours, loss_parallel", "ours, sequence_parallel")
    for name, peer in product(mine, peers):
        must = STEP_MUST if name == mine[0] else None
        yield timed(group, f"{name} against {peer}", seconds[name], seconds[peer], must)


def _bytes(llama: Llama, ranks: int) -> list[Line]:
    """Of what the plan divides, on the rank that holds most."""
    held = HeldBytes(divided=True)
    Ours(llama, (held,))(no_pace, 3)
    return [
        counted(
            "bytes per rank of what is divided, against whole / tp",
            f"llama: {what}",
            most(held.held[what]),
            whole / ranks,
            BYTES_MUST,
        )
        for what, whole in held.whole.items()
    ]


class _Counted(Callback):
    def __init__(self) -> None:
        self.last = Collectives()

    def on_train_batch_start(self, *_: Any) -> None:
        self.last = Collectives()
        self.last.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.last.__exit__(None, None, None)


def _collectives(llama: Llama) -> list[Line]:
    """Of one step. What is asked: two all-reduces each way and block, one each for embedding and head."""
    counts: dict[str, Collectives] = {}

    def counting(step: Callable[[], Tensor]) -> Tensor:
        with Collectives() as seen:
            result = step()
        counts["torch's tutorial"] = seen
        return result

    seen = _Counted()
    Ours(llama, (seen,), loss_parallel=True)(no_pace, 3)
    ByHand(llama, tutorial_plan, around_step=counting)(no_pace, 2)
    peer = counts["torch's tutorial"]
    group = f"collectives of a step, {llama.depth} blocks"
    return [
        counted(
            group,
            f"llama, loss_parallel, against torch's tutorial: {what}",
            getattr(seen.last, attribute).total(),
            getattr(peer, attribute).total(),
            None,
        )
        for what, attribute in (("collectives", "count"), ("bytes", "num_bytes"))
    ]
