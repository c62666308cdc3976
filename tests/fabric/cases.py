"""What a user's loop does beside training: each runs on a rank, and in one process with plain Fabric."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torchmetrics
from lightning import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_dist import Layout
from tests.fabric.loop import Loop, Net, Training, fabric_for, momentum
from tests.support.collectives import Collectives
from tests.support.models import CLASSES, WIDTH, samples
from tests.support.parity import whole_weights


def num_data_ranks(layout: str | None) -> int:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return 1 if layout is None else Layout.parse(layout).resolve(world).num_data_ranks


def batches(fabric: Fabric, layout: str | None, count: int = 32, size: int = 8, **options: Any) -> Any:
    loader = DataLoader(samples(count), batch_size=size // num_data_ranks(layout), **options)
    return fabric.setup_dataloaders(loader)


def adversaries(layout: str | None) -> dict[str, Tensor]:
    """Two networks, two optimizers, three forwards and two backward passes a step; a gradient penalty."""
    fabric = fabric_for(layout)
    fabric.seed_everything(3, verbose=False)
    generator, critic = (nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, n)) for n in (WIDTH, 1))
    first = torch.optim.SGD(generator.parameters(), 0.05, momentum=0.5)
    second = torch.optim.SGD(critic.parameters(), 0.05, momentum=0.5)
    generator, first = fabric.setup(generator, first)
    critic, second = fabric.setup(critic, second)
    for x, _ in batches(fabric, layout):
        fake = generator(x)
        second.zero_grad()
        mixed = ((x + fake.detach()) / 2).requires_grad_()
        (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        loss = F.softplus(critic(fake.detach()) - critic(x)).mean() + 0.1 * slope.square().mean()
        fabric.backward(loss)
        fabric.clip_gradients(critic, second, max_norm=0.5)
        second.step()
        first.zero_grad()
        fabric.backward(F.softplus(-critic(fake)).mean())
        first.step()
    networks = {"generator": generator, "critic": critic}
    return {f"{key}.{n}": w for key, net in networks.items() for n, w in whole_weights(net.module).items()}


class Lightning(L.LightningModule):
    """Its steps are called by the loop; a method of it is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y) + 0.1 * self.other(x).mean()

    def other(self, x: Tensor) -> Tensor:
        return self.net.features(x).square()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def lightning_module(layout: str | None) -> dict[str, Tensor]:
    """Training steps, and a marked method, of a LightningModule."""
    fabric = fabric_for(layout)
    fabric.seed_everything(3, verbose=False)
    module = Lightning()
    model, optimizer = fabric.setup(module, module.configure_optimizers())
    model.mark_forward_method("other")
    for index, (x, y) in enumerate(batches(fabric, layout)):
        optimizer.zero_grad()
        loss = model.training_step((x, y), index) + model.other(x).mean()
        fabric.backward(loss)
        optimizer.step()
    return whole_weights(module)


class Normed(nn.Module):
    """A BatchNorm, and a buffer that training writes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(WIDTH, 32), nn.BatchNorm1d(32, affine=False), nn.Linear(32, CLASSES)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return self.down(torch.relu(self.norm(self.up(x))))


def evaluation(layout: str | None) -> tuple[list[float], dict[str, Tensor], float]:
    """Evaluates between epochs, in inference mode, with a metric of the loop's own; ends with whole weights."""
    training = Training(Loop(count=32), layout)
    fabric, model = training.fabric, training.model
    metric = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
    metric.process_group = getattr(fabric.strategy, "data_group", None)
    losses = []
    for _ in range(2):
        training.epoch()
        model.eval()
        total = torch.zeros(2)
        with torch.inference_mode():
            for x, y in batches(fabric, layout):
                logits = model(x)
                metric.update(logits, y)
                total += torch.stack([F.cross_entropy(logits, y, reduction="sum"), torch.tensor(float(len(y)))])
        total = fabric.all_reduce(total.clone(), reduce_op="sum")
        losses.append(float(total[0] / total[1]))
    return losses, whole_weights(model.module), float(metric.compute())


def forgotten_sync(layout: str | None) -> dict[str, Tensor]:
    """All of an epoch's backward passes under no_backward_sync, then a clipped step."""
    fabric = fabric_for(layout)
    fabric.seed_everything(3, verbose=False)
    model = Net()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    for _ in range(2):
        for x, y in batches(fabric, layout):
            with fabric.no_backward_sync(model):
                fabric.backward(F.cross_entropy(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()
    return whole_weights(model.module)


def one_loss_optimizer(layout: str | None) -> dict[str, Tensor]:
    """LBFGS calls its closure, and reads the loss."""
    fabric = fabric_for(layout)
    fabric.seed_everything(3, verbose=False)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    model, optimizer = fabric.setup(model, torch.optim.LBFGS(model.parameters(), 0.3, max_iter=3))
    for x, y in batches(fabric, layout, size=16):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            fabric.backward(loss)
            return loss

        optimizer.step(closure)
    return whole_weights(model.module)


def orders(layout: str | None) -> list[list[int]]:
    """What each epoch of some loaders takes, in its order, of all ranks together."""
    fabric = fabric_for(layout)
    fabric.seed_everything(5 + fabric.global_rank, verbose=False)  # as users of ddp do
    data = TensorDataset(torch.arange(12))
    weights = torch.arange(1.0, 13.0)
    seeded = torch.Generator().manual_seed(3)
    size = 4 // num_data_ranks(layout)
    loaders = [
        DataLoader(data, size),
        DataLoader(data, size, shuffle=True, generator=torch.Generator().manual_seed(2)),
        DataLoader(data, size, sampler=WeightedRandomSampler(weights, 12, generator=seeded)),
    ]
    found = []
    for loader in loaders:
        dealt = fabric.setup_dataloaders(loader)
        for _ in range(2):
            order: list[int] = []
            for (batch,) in dealt:
                gathered = fabric.all_gather(batch)
                order += gathered.T.flatten().tolist() if gathered.ndim > 1 else gathered.tolist()
            found.append(order)
    return found


def without_generator(layout: str | None) -> list[list[int]]:
    """The order of a loader that only shuffles."""
    fabric = fabric_for(layout)
    fabric.seed_everything(5 + fabric.global_rank, verbose=False)
    loader = DataLoader(TensorDataset(torch.arange(12)), 2, sampler=RandomSampler(range(12)))
    dealt = fabric.setup_dataloaders(loader)
    found = []
    for _ in range(2):
        parts = fabric.all_gather(torch.cat([batch for (batch,) in dealt]))
        found.append(sorted(parts.flatten().tolist()))
    return found


def buffers(layout: str) -> dict[str, Tensor]:
    """What training left in buffers, once evaluation has begun."""
    fabric = fabric_for(layout)
    model = Normed()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    for x, y in batches(fabric, layout):
        fabric.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        model(x)
    return {name: buffer.clone() for name, buffer in model.module.named_buffers()}


def initial_and_later(layout: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights that ranks began with, which were seeded apart, and what they draw after that."""
    fabric = fabric_for(layout)
    fabric.seed_everything(5 + fabric.global_rank, verbose=False)
    model = fabric.setup(Net())
    first = torch.rand(3)
    weights = whole_weights(model.module)
    nn.init.normal_(model.head.bias)  # by a data rank's own numbers: its first forward makes copies equal
    model(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0)))
    return weights, first, whole_weights(model.module)["head.bias"]


def reductions(layout: str) -> tuple[float, float, list[float], float, bool, bool, str]:
    """Of numbers that differ from rank to rank."""
    fabric = fabric_for(layout)
    data_rank = fabric.strategy.data_rank
    total = torch.tensor(float(data_rank))
    assert fabric.all_reduce(total, reduce_op="sum") is total
    mean = fabric.all_reduce(torch.tensor(data_rank))
    gathered = fabric.all_gather(torch.tensor(float(data_rank)))
    maximum = fabric.all_reduce({"a": torch.tensor(float(data_rank))}, reduce_op="max")["a"]
    decide = fabric.strategy.reduce_boolean_decision
    any_of, all_of = (decide(fabric.global_rank == 0, all=every) for every in (False, True))
    fabric.barrier()
    said = fabric.broadcast(f"rank {fabric.global_rank}", src=1)
    return float(total), float(mean), gathered.tolist(), float(maximum), any_of, all_of, said


def mixed(layout: str | None, precision: Any) -> list[float]:
    """Losses in 16 bits, of an epoch."""
    training = Training(Loop(count=32, precision=precision, clip={"max_norm": 0.3}), layout)
    training.epoch()
    assert all(torch.isfinite(p).all() for p in whole_weights(training.model.module).values())
    return training.losses


def scaled(layout: str | None) -> tuple[list[float], float, dict[str, Tensor]]:
    """In half precision with a scaler, whose first gradients are too large on one rank."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    training = Training(Loop(count=32, precision=MixedPrecision("16-mixed", "cpu", scaler), optimizer=momentum), layout)
    fabric, model, optimizer = training.fabric, training.model, training.optimizer
    begun = whole_weights(model.module)
    own = getattr(fabric.strategy, "data_rank", 0)
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    fabric.backward(model(x).sum() * (float("inf") if own == 0 else 1.0))
    optimizer.step()
    optimizer.zero_grad()
    skipped = all(torch.equal(begun[name], weight) for name, weight in whole_weights(model.module).items())
    for x, y in training.loader:
        fabric.backward(F.cross_entropy(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=0.3)
        optimizer.step()
        optimizer.zero_grad()
    return [float(skipped)], fabric.strategy.precision.scaler.get_scale(), whole_weights(model.module)


def with_options(layout: str | None, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """An epoch under arguments of the strategy."""
    training = Training(Loop(count=32), layout, **options)
    training.epoch()
    return training.losses, whole_weights(training.model.module)


def language_model(layout: str | None) -> dict[str, Tensor]:
    """A model of transformers, with tied embeddings, built in init_module, called by keywords, that gives its loss."""
    fabric = fabric_for(layout)
    fabric.seed_everything(3, verbose=False)
    with fabric.init_module():
        sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    tokens = torch.randint(32, (16, 8), generator=torch.Generator().manual_seed(0))
    model.train()
    for batch in fabric.setup_dataloaders(DataLoader(tokens, 4 // num_data_ranks(layout))):
        fabric.backward(model(input_ids=batch, labels=batch).loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    return whole_weights(model.module)


class Heads(nn.Module):
    """Two outputs, of which the second does not train the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = Net(), nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk.features(x)
        return self.first(features), self.second(features.detach())


def two_optimizers(layout: str | None) -> dict[str, Tensor]:
    """One forward, then a backward pass and a step for each output."""
    fabric = fabric_for(layout)
    fabric.seed_everything(3, verbose=False)
    model = Heads()
    second = torch.optim.SGD(model.second.parameters(), 0.1, momentum=0.9)
    first = torch.optim.SGD([*model.trunk.parameters(), *model.first.parameters()], 0.1, momentum=0.9)
    model, first, second = fabric.setup(model, first, second)
    for x, y in batches(fabric, layout):
        outputs = model(x)
        for logits, optimizer in zip(outputs, (first, second), strict=True):
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(logits, y), retain_graph=True)
            fabric.clip_gradients(model, optimizer, max_norm=0.2)
            optimizer.step()
    return whole_weights(model.module)


def compiled(layout: str | None) -> tuple[int, dict[str, Tensor]]:
    """The user compiles the model before the setup."""
    torch.compiler.reset()  # what earlier jobs of this process compiled of the same code counts to a limit
    fabric = fabric_for(layout)
    fabric.seed_everything(3, verbose=False)
    net, graphs = Net(), []

    def noting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, optimizer = fabric.setup(torch.compile(net, backend=noting), torch.optim.SGD(net.parameters(), 0.1))
    for x, y in batches(fabric, layout, count=24):
        fabric.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    return len(graphs), whole_weights(net)


def communicated(layout: str) -> list[dict[str, int]]:
    """Collectives of a micro-step without and with reduction, from the forward to the end of the backward."""
    fabric = fabric_for(layout)
    model = Net()
    model, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    found = []
    for wait in (True, False) * 3:
        with fabric.no_backward_sync(model, enabled=wait), Collectives() as collectives:
            fabric.backward(model(torch.randn(4, WIDTH)).sum())
        found.append(dict(collectives.count))
    return found[-2:]


def augmented(layout: str) -> list[int]:
    """Seeds of a loader's workers."""
    fabric = fabric_for(layout)
    fabric.seed_everything(3, workers=True, verbose=False)
    fabric.setup(Net())
    loader = fabric.setup_dataloaders(DataLoader(Seeds(), 2, num_workers=1))
    return [int(seed) for batch in loader for seed in batch]


class Seeds(Dataset):
    """Numbers that workers draw."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return int(torch.randint(2**31, ()))


def by_loss_backward(layout: str) -> str:
    """A loop that does not call fabric.backward."""
    fabric = fabric_for(layout)
    model = Net()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    F.cross_entropy(model(torch.randn(4, WIDTH)), torch.zeros(4, dtype=torch.long)).backward()
    return _refused(optimizer.step)


def twice(layout: str) -> str:
    """Sets up a module again."""
    fabric = fabric_for(layout)
    model = Net()
    fabric.setup(model)
    return _refused(lambda: fabric.setup(model))


def different_batches(layout: str) -> str:
    """Each rank brings samples of its own."""
    fabric = fabric_for(layout)
    model = fabric.setup(Net())
    return _refused(lambda: model(torch.full((4, WIDTH), float(fabric.global_rank))))


def not_finite(layout: str) -> str:
    """A gradient of one rank is infinite."""
    fabric = fabric_for(layout)
    model = Net()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    fabric.backward(model(torch.randn(4, WIDTH)).sum() * (float("inf") if fabric.global_rank == 0 else 1.0))
    return _refused(lambda: fabric.clip_gradients(model, optimizer, max_norm=1.0))


def before_setup(layout: str) -> str:
    """An optimizer with a state, from before the setup."""
    fabric = fabric_for(layout)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(4, WIDTH)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return _refused(lambda: fabric.setup(model, optimizer))


def optimizer_first(layout: str | None) -> dict[str, Tensor]:
    """Made before the module is set up, and set up after it; with a list of parameters that the loop keeps."""
    fabric = fabric_for(layout)
    fabric.seed_everything(3, verbose=False)
    model = Net()
    parameters = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.SGD([{"params": parameters, "weight_decay": 0.1}], 0.1, momentum=0.9)
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(optimizer)
    for x, y in batches(fabric, layout):
        penalty = sum(p.square().sum() for p in parameters)
        fabric.backward(F.cross_entropy(model(x), y) + 0.01 * penalty)
        optimizer.step()
        optimizer.zero_grad()
    return whole_weights(model.module)


def _refused(action: Any) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was refused"
