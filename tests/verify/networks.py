"""Networks that others publish, small and with random weights, each trained on data of its own kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import timm
import torch
import torchvision
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

WORDS, LENGTH, CLASSES, SIZE = 48, 10, 5, 32


class Encoder(nn.Module):
    """``torch.nn.TransformerEncoder`` between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True), 2)
        self.head = nn.Linear(32, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)))


def _vit() -> nn.Module:
    sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=CLASSES, **sizes)


def _llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, use_cache=False, **sizes))


def _gpt2() -> nn.Module:
    config = hf.GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=32, n_layer=2, n_head=4, use_cache=False)
    return hf.GPT2LMHeadModel(config)


def _resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=CLASSES)


def _tokens() -> Dataset:
    return TensorDataset(torch.randint(WORDS, (32, LENGTH), generator=torch.Generator().manual_seed(1)))


def _images() -> Dataset:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(32, 3, SIZE, SIZE, generator=generator)
    return TensorDataset(images, torch.randint(CLASSES, (32,), generator=generator))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Dataset]]] = {
    "torchvision resnet18": (_resnet18, _images),
    "timm vit": (_vit, _images),
    "transformers gpt2": (_gpt2, _tokens),
    "transformers llama": (_llama, _tokens),
    "torch.nn.TransformerEncoder": (Encoder, _tokens),
}


class Trained(L.LightningModule):
    """Trains one of :data:`NETWORKS` as its users do."""

    def __init__(self, name: str) -> None:
        super().__init__()
        make, self.data = NETWORKS[name]
        self.network = make()

    def training_step(self, batch: Any) -> Tensor:
        if len(batch) == 2:
            return F.cross_entropy(self.network(batch[0]), batch[1])
        (tokens,) = batch
        if isinstance(self.network, hf.PreTrainedModel):
            return self.network(input_ids=tokens, labels=tokens).loss
        return F.cross_entropy(self.network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data(), batch_size=4)
