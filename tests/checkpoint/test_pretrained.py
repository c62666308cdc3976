"""Weights of torchvision, timm and transformers, as their own files and directories, into layouts and back."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import timm
import torch
import torchvision
import transformers
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dist import HybridStrategy, checkpoint
from lightning_dist.plans.pretrained import pretrained_models
from tests.checkpoint.training import build
from tests.support.parity import QUIET, slow
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

SMALL: Any = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96,
}  # fmt: skip

MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: torchvision.models.resnet18(num_classes=10),
    "timm": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=64, num_heads=4, num_classes=10
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**SMALL, "vocab_size": None}, image_size=32, patch_size=8, num_labels=10)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    ),
}


class Wrapped(L.LightningModule):
    """A user's module around a network of others."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = family
        self.network: Any = None

    def configure_model(self) -> None:
        if self.network is None:
            self.network = MODELS[self.family]()

    def loss(self, batch: list[Tensor]) -> Tensor:
        if self.family in ("llama", "mixtral"):
            return self.network(input_ids=batch[0], labels=batch[0]).loss
        answer = self.network(batch[0])
        return nn.functional.cross_entropy(getattr(answer, "logits", answer), batch[1])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def batches(family: str) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    if family in ("llama", "mixtral"):
        tokens = torch.randint(96, (8, 12), generator=generator)
        return DataLoader(TensorDataset(tokens, tokens), batch_size=4)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(8)), batch_size=4)


def write(family: str, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The network's file or directory as its library writes it, and its weights."""
    torch.manual_seed(5)
    network: Any = MODELS[family]()
    weights = network.state_dict()
    if family == "torchvision":
        torch.save(weights, folder / "resnet18.pth")
        return folder / "resnet18.pth", weights
    if family == "timm":
        save_file(weights, folder / "model.safetensors")
        return folder / "model.safetensors", weights
    network.save_pretrained(folder / "directory", max_shard_size="60KB")
    assert len(list((folder / "directory").glob("*.safetensors"))) > 1
    return folder / "directory", weights


class SavesAtStart(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            trainer.save_checkpoint(self.path)


def _begin(family: str, layout: str, source: Path, target: Path) -> None:
    torch.manual_seed(1)
    whole = family == "torchvision"  # for BatchNorm
    strategy: Any = HybridStrategy(layout, pretrained=source, num_microbatches=1 if whole else 2)
    world = torch.distributed.get_world_size()
    trainer = L.Trainer(**QUIET, devices=world, strategy=strategy, max_steps=1, callbacks=[SavesAtStart(target)])
    module = Wrapped(family)
    trainer.fit(module, batches(family))
    trained = {name: checkpoint.full(value) for name, value in checkpoint.model_state(module).items()}
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(module, batches(family))  # goes on, and does not begin from the file again
    if "pp" not in layout:
        later = {name: checkpoint.full(value) for name, value in checkpoint.model_state(module).items()}
        assert any(not torch.equal(later[name], trained[name]) for name in trained)


LAYOUTS = [(family, layout) for family in MODELS for layout in ("dp_shard=2", "tp=2", "pp=2")]
CASES = [case for case in LAYOUTS if case not in (("torchvision", "tp=2"), ("mixtral", "pp=2"))]


@pytest.mark.parametrize(("family", "layout"), [slow(*case) if i % 2 else case for i, case in enumerate(CASES)])
def test_training_begins_from_what_others_published(family: str, layout: str, tmp_path: Path) -> None:
    source, weights = write(family, tmp_path)
    run_on_ranks(2, _begin, family, layout, source, tmp_path / "start.ckpt")
    found = checkpoint.load(tmp_path / "start.ckpt")["state_dict"]
    assert found.keys() == {f"network.{name}" for name in weights}
    for name, value in weights.items():
        assert torch.equal(found[f"network.{name}"], value), name


def _evaluate(family: str, source: Path) -> float:
    torch.manual_seed(1)
    trainer = L.Trainer(**QUIET, devices=2, strategy=HybridStrategy("dp_shard=2"))
    return trainer.validate(Wrapped(family), batches(family), ckpt_path=source, verbose=False)[0]["loss"]


@pytest.mark.parametrize("family", ["torchvision", "vit"])
def test_what_others_published_is_evaluated_by_its_path(family: str, tmp_path: Path) -> None:
    source, weights = write(family, tmp_path)
    module = Wrapped(family)
    module.configure_model()
    module.network.load_state_dict(weights)
    module.eval()
    with torch.no_grad():
        expected = torch.stack([module.loss(batch) for batch in batches(family)]).mean().item()
    assert run_on_ranks(2, _evaluate, family, source) == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama", "dp_shard=2"), ("llama", "pp=2"), ("vit", "dp_shard=2"), ("vit", "pp=2"), ("mixtral", "dp_shard=2")],
)
def test_from_pretrained_opens_what_a_layout_saved(family: str, layout: str, tmp_path: Path) -> None:
    source, weights = write(family, tmp_path)
    run_on_ranks(2, _begin, family, layout, source, tmp_path / "start.ckpt")
    checkpoint.convert(tmp_path / "start.ckpt", tmp_path / "out", to="transformers", largest_file=60_000)
    kind: Any = type(MODELS[family]())
    network, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert network.state_dict().keys() == weights.keys()
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert _config(network) == _config(kind.from_pretrained(source))


def _config(network: Any) -> dict[str, Any]:
    config: dict[str, Any] = network.config.to_dict()
    return {name: value for name, value in config.items() if name != "_name_or_path"}


def test_a_directory_of_transformers_is_copied_whole(tmp_path: Path) -> None:
    source, weights = write("vit", tmp_path)
    checkpoint.convert(source, tmp_path / "copy", to="transformers")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "copy")
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())


def test_models_that_nobody_made_are_not_imported_for_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something imported transformers, which reads its files as it is asked for what is in them."""
    lazy = ModuleType("transformers")
    asked: list[str] = []
    lazy.__getattr__ = asked.append  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "transformers", lazy)
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    assert not pretrained_models(nn.Linear(2, 2))
    assert not asked


def test_weights_are_no_run_to_go_on_with(tmp_path: Path) -> None:
    source, _ = write("torchvision", tmp_path)
    trainer = L.Trainer(**QUIET, devices=1, strategy=HybridStrategy("dp_shard=1"), max_steps=1)
    with pytest.raises(ValueError, match=r"holds weights, but no run.*HybridStrategy\(pretrained="):
        trainer.fit(Wrapped("torchvision"), batches("torchvision"), ckpt_path=source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "gone", "not found: .*gone"),
        (lambda folder: folder, "is a directory, but no checkpoint"),
    ],
)
def test_pretrained_that_is_not_there_is_refused_before_anything_starts(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    trainer = L.Trainer(
        **QUIET, devices=1, strategy=HybridStrategy("dp_shard=1", pretrained=make(tmp_path)), max_steps=1
    )
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        trainer.fit(Wrapped("torchvision"), batches("torchvision"))
    assert not torch.distributed.is_initialized()


def test_a_rank_reads_what_it_owns(tmp_path: Path) -> None:
    weights = {f"{number}.weight": torch.randn(8192, 1024) for number in range(2)}
    save_file(weights, tmp_path / "model.safetensors")
    for mapped in run_on_ranks(2, _mapped_bytes, tmp_path / "model.safetensors"):
        assert 0.5 <= mapped / 67.1e6 < 0.6


def _mapped_bytes(path: Path) -> int:
    """Bytes of the file that were read into this process's mapping of it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = nn.Sequential(*(nn.Linear(1024, 8192, bias=False) for _ in range(2)))
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    state = checkpoint.load(path, module)["state_dict"]
    checkpoint.load_model_state(module, state)
    here = False
    total = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            here = line.endswith(path.name)
        elif here and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_weights_of_another_architecture_are_refused_with_both_shapes(tmp_path: Path) -> None:
    torch.save({"module": build("one", width=9).state_dict()}, tmp_path / "other.pth")
    module = build("one")
    state = checkpoint.load(tmp_path / "other.pth", module)["state_dict"]
    with pytest.raises(ValueError, match=r"(?s)other.pth does not fit Net.*hidden.weight.*\[9, 6\].*\[7, 6\]"):
        checkpoint.load_model_state(module, state, source=tmp_path / "other.pth")
