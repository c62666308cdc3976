"""What a plan finds, and what it refuses before any process group forms."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torchvision
import transformers as hf
from torch import nn
from torch.utils.data import DataLoader

from lightning_dist import HybridStrategy, Layout
from lightning_dist.plans.tensor import ModulePlan, Split, check, find_tensor_plan
from lightning_dist.validation import warn_of_axes_across_nodes
from tests.support.models import samples
from tests.support.parity import QUIET
from tests.tensor.families import FAMILIES


class Attention(nn.Module):
    """With a norm over all heads at once, in the middle."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32) if norm else nn.Identity()


def test_packed_projections_are_divided_piece_by_piece() -> None:
    plan = find_tensor_plan(FAMILIES["timm vit"].network())
    assert plan["blocks.0.attn"].parameters["qkv.weight"] == Split(0, 3)
    assert plan["blocks.0.attn"].rows == {"proj": Split(1)}
    plan = find_tensor_plan(FAMILIES["gpt2"].network())
    assert plan["transformer.h.0.attn"].parameters["c_attn.weight"] == Split(1, 3)
    plan = find_tensor_plan(FAMILIES["eva"].network())
    assert plan["blocks.0.mlp"].parameters["fc1.weight"].packed == 2


def test_a_norm_over_all_heads_keeps_attention_whole() -> None:
    assert "" in find_tensor_plan(Attention(norm=False))
    with pytest.raises(ValueError, match="tp finds nothing to divide"):
        find_tensor_plan(Attention(norm=True))


def test_head_and_embedding_are_divided_by_vocabulary() -> None:
    plan = find_tensor_plan(FAMILIES["bert"].network())
    divided = {name for name, part in plan.items() if part.vocabulary}
    assert divided == {"bert.embeddings.word_embeddings", "cls.predictions.decoder"}


def test_attention_that_cuts_by_its_config_stays_whole() -> None:
    config = hf.Phi3Config(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    plan = find_tensor_plan(hf.Phi3ForCausalLM(config))
    assert not any("self_attn" in name for name in plan)


def test_attention_that_a_declared_plan_divides_in_part_stays_whole() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.DogeConfig(vocab_size=48, num_hidden_layers=1, pad_token_id=0, **sizes)
    plan = find_tensor_plan(hf.DogeForCausalLM(config))
    assert not any("self_attn" in name for name in plan)
    assert any("mlp" in name for name in plan)


def test_convolutional_networks_have_no_plan() -> None:
    with pytest.raises(ValueError, match="Convolutional networks have no tensor plan: use dp_shard"):
        find_tensor_plan(torchvision.models.resnet18())


@pytest.mark.parametrize(("tp", "degrees"), [(3, "1, 2"), (4, "1, 2")])
def test_heads_that_do_not_divide_are_refused_with_degrees_that_do(tp: int, degrees: str) -> None:
    plan = find_tensor_plan(FAMILIES["llama"].network())
    with pytest.raises(ValueError, match=rf"tp={tp} does not divide the \d+ (key-value )?heads of .*; .*: {degrees}$"):
        check(plan, tp)


def test_a_users_plan_is_the_whole_plan() -> None:
    network = FAMILIES["recipe decoder"].network()
    styles = {
        "blocks.*.feed_forward.gate": "colwise",
        "*.up": "colwise",
        "*.down": "rowwise",
        "*.attention": "replicate",
    }
    plan = find_tensor_plan(network, styles)
    assert list(plan) == ["blocks.0.feed_forward", "blocks.1.feed_forward"]
    assert find_tensor_plan(network, lambda name, _: styles.get(name.replace("0", "*").replace("1", "*")))
    attention = {f"*.attention.{leaf}": "colwise" for leaf in ("query", "key", "value")}
    plan = find_tensor_plan(network, {**attention, "*.attention.output": "rowwise"})
    assert plan["blocks.0.attention"].divides == {"heads": 4, "key-value heads": 2}


@pytest.mark.parametrize(
    ("styles", "message"),
    [
        ({"block.*.gate": "colwise"}, "no module has such a name"),
        ({"blocks.0.attention.query": "columns"}, "the styles are colwise, rowwise, replicate"),
        ({"blocks.0.attention_norm": "colwise"}, "a RMSNorm; it can divide nn.Linear and Conv1D"),
        ({"*.attention": "replicate"}, "divides nothing"),
        ({"*.feed_forward.gate": "colwise", "*.feed_forward.down": "rowwise"}, None),
    ],
)
def test_a_users_plan_that_does_not_fit_is_refused(styles: dict[str, str], message: str | None) -> None:
    network = FAMILIES["recipe decoder"].network()
    if message is None:
        assert all(isinstance(part, ModulePlan) for part in find_tensor_plan(network, styles).values())
        return
    with pytest.raises(ValueError, match=message):
        find_tensor_plan(network, styles)


class Wrapped(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.network(batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_trainer_refuses_before_a_process_group_forms() -> None:
    trainer = L.Trainer(**QUIET, devices=3, strategy=HybridStrategy("tp=3", start_method="spawn"), max_epochs=1)
    trainer.strategy._launcher = None  # this process alone: it would wait for the others if it got so far
    with pytest.raises(ValueError, match="tp=3 does not divide the 4 heads"):
        trainer.fit(Wrapped(FAMILIES["timm vit"].network()), DataLoader(samples(), batch_size=4))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("tp", "warns"), [(8, False), (4, False), (16, True), (3, True)])
def test_groups_across_nodes_are_warned_of(tp: int, warns: bool, recwarn: pytest.WarningsRecorder) -> None:
    warn_of_axes_across_nodes(Layout(tp=tp), ranks_per_node=8, num_nodes=6)
    told = [str(warning.message) for warning in recwarn]
    assert bool(told) == warns
    assert all("inside a node: 1, 2, 4, 8" in message for message in told)
