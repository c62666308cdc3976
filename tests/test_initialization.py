"""Deferred initialisation gives the values, and leaves the generators, of plain construction."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lightning_dist.initialization import CannotDefer, record_initialization
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.sampled

SEED = 3


def defer(build: Callable[[], nn.Module], **options: Any) -> nn.Module:
    with record_initialization() as recorded:
        module = build()
    recorded.bind(module)
    recorded.materialize(module, **options)
    return module


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def assert_equals_plain(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(SEED)
    plain = build()
    state_after_plain = torch.get_rng_state()
    torch.manual_seed(SEED)
    deferred = defer(build)

    assert torch.equal(torch.get_rng_state(), state_after_plain)
    assert list(deferred.state_dict()) == list(plain.state_dict())
    got, expected = tensors_of(deferred), tensors_of(plain)
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
        assert got[name].dtype == tensor.dtype, name
        assert got[name].stride() == tensor.stride(), name
        assert got[name].requires_grad == tensor.requires_grad, name
        assert type(got[name]) is type(tensor), name
    assert len(list(deferred.parameters())) == len(list(plain.parameters()))


def tv_model(name: str, **options: Any) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **options)


def tv_vit() -> nn.Module:
    import torchvision

    return torchvision.models.VisionTransformer(
        image_size=8, patch_size=2, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64
    )


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def hf_model(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options))


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SMALL_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
SMALL_T5 = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "d_kv": 8}
SMALL_BEIT = {"depth": 2, "embed_dim": 32, "num_heads": 4}
SMALL_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}
SMALL_SWIN = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}


def tied_llama() -> nn.Module:
    return hf_model("LlamaForCausalLM", "LlamaConfig", **SMALL, tie_word_embeddings=True)


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=2)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("row_norms", self.body.weight.detach().norm(dim=1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)) * self.row_norms)


class TokenEncoder(nn.Module):
    """Its sizes are odd, its last parameter has one element, and its layers are deep copies."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        layer = nn.TransformerEncoderLayer(6, 2, 13, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.score = nn.Linear(6, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.score(self.encoder(self.embedding(tokens)))


class HandWritten(nn.Module):
    """What models in the wild do to their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.layer.weight.data.normal_(0, 0.3)
        self.layer.bias.data = torch.randn(5)
        self.orthogonal = nn.Parameter(torch.randn(4, 7))
        nn.init.orthogonal_(self.orthogonal, gain=2)
        self.tall = nn.Parameter(nn.init.orthogonal_(torch.empty(9, 3)))
        self.truncated = nn.Parameter(torch.empty(3, 9).uniform_(-1, 2))
        nn.init.trunc_normal_(self.truncated, std=2.0)
        self.far_truncated = nn.Parameter(nn.init.trunc_normal_(torch.empty(5, 5), mean=3, a=0, b=1))
        self.sparse = nn.Parameter(nn.init.sparse_(torch.empty(10, 6), 0.3))
        self.identity = nn.Parameter(nn.init.eye_(torch.empty(4, 4)))
        self.conv = nn.Conv2d(4, 4, 3)
        nn.init.dirac_(self.conv.weight)
        self.frozen_scale = nn.Parameter(torch.ones([]) * 2.6, requires_grad=False)
        self.chosen = nn.Parameter(torch.where(torch.arange(6) > 2, 1.0, torch.rand(6)))
        self.low_precision = nn.Parameter(torch.randn(20).to(torch.bfloat16))
        self.low_precision.data.mul_(2).add_(self.frozen_scale.data)
        self.same_memory = nn.Parameter(self.orthogonal.data)
        masked = torch.zeros(4, 4)
        masked[torch.eye(4).bool()] = 3.0
        self.register_buffer("masked", masked)
        self.register_buffer("causal", torch.ones(4, 4).tril() > 0, persistent=False)
        self.register_buffer("order", torch.randperm(8))


class OwnSeeds(nn.Module):
    """Python code that sets and puts back the states of generators between draws."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(17))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            self.forked = nn.Parameter(torch.randn(17))
        self.after = nn.Parameter(torch.randn(17))
        own = torch.Generator().manual_seed(5)
        self.own = nn.Parameter(torch.randn(5, generator=own))
        nn.init.orthogonal_(self.own.data.new_empty(3, 3), generator=own)
        own.manual_seed(5)
        self.own_again = nn.Parameter(torch.randn(5, generator=own))
        saved = torch.get_rng_state()
        self.twice = nn.Parameter(torch.randn(5))
        torch.set_rng_state(saved)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "nn.TransformerEncoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
    "nn.LSTM": lambda: nn.LSTM(16, 16, 2, bidirectional=True),
    "nn.MultiheadAttention": lambda: nn.MultiheadAttention(16, 4, kdim=8, vdim=8, add_bias_kv=True),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 4)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 4)),
    "to_bfloat16": lambda: nn.Linear(3, 40).to(torch.bfloat16),
    "torchvision_vit": tv_vit,
    "torchvision_resnet18": lambda: tv_model("resnet18"),
    "torchvision_swin_t": lambda: tv_model("swin_t", num_classes=10),
    "timm_vit_tiny": lambda: timm_model("vit_tiny_patch16_224", depth=2),
    "timm_convnext": lambda: timm_model("convnext_atto", **SMALL_CONVNEXT),
    "timm_beit": lambda: timm_model("beit_base_patch16_224", **SMALL_BEIT),
    "timm_swin": lambda: timm_model("swin_tiny_patch4_window7_224", **SMALL_SWIN),
    "timm_swinv2": lambda: timm_model("swinv2_tiny_window8_256", **SMALL_SWIN),
    "hf_llama": lambda: hf_model("LlamaForCausalLM", "LlamaConfig", **SMALL, num_key_value_heads=2),
    "hf_llama_tied": tied_llama,
    "hf_bert": lambda: hf_model("BertForMaskedLM", "BertConfig", **SMALL),
    "hf_gpt2": lambda: hf_model("GPT2LMHeadModel", "GPT2Config", **SMALL_GPT2),
    "hf_t5": lambda: hf_model("T5ForConditionalGeneration", "T5Config", **SMALL_T5),
    "hf_mamba": lambda: hf_model("MambaForCausalLM", "MambaConfig", hidden_size=32, num_hidden_layers=2, vocab_size=64),
    "tied_embedding": TiedEmbedding,
    "hand_written": HandWritten,
    "own_seeds": OwnSeeds,
}


@pytest.mark.parametrize("name", MODELS)
def test_values_and_generator_state_equal_plain_construction(name: str) -> None:
    assert_equals_plain(MODELS[name])


def test_values_equal_plain_construction_under_another_default_dtype() -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_equals_plain(MODELS["nn.TransformerEncoder"])
        assert_equals_plain(HandWrittenWithoutQr)
        with record_initialization() as recorded:
            module = nn.Linear(4, 4)
        recorded.bind(module)
    finally:
        torch.set_default_dtype(default)
    recorded.materialize(module)
    assert module.weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == default


class HandWrittenWithoutQr(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.truncated = nn.Parameter(nn.init.trunc_normal_(torch.empty(7, 5), std=2.0))
        self.drawn = nn.Parameter(torch.randn(33) * 0.5)


def test_recording_draws_nothing_and_makes_no_values() -> None:
    state = torch.get_rng_state()
    with record_initialization():
        module = tv_vit()
    assert all(tensor.is_meta for tensor in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_values_do_not_depend_on_draws_between_recording_and_materialize() -> None:
    torch.manual_seed(SEED)
    plain = nn.Linear(8, 8)
    torch.manual_seed(SEED)
    with record_initialization() as recorded:
        module = nn.Linear(8, 8)
    recorded.bind(module)
    torch.randn(100)
    recorded.materialize(module)
    assert torch.equal(module.weight, plain.weight)


def test_tied_parameters_stay_one_parameter_and_shared_memory_stays_shared() -> None:
    tied = defer(TiedEmbedding)
    assert tied.head.weight is tied.embedding.weight
    hand_written = defer(HandWritten)
    assert hand_written.same_memory.data_ptr() == hand_written.orthogonal.data_ptr()


def test_lstm_computes_with_its_materialized_weights() -> None:
    torch.manual_seed(SEED)
    plain = nn.LSTM(4, 4)
    torch.manual_seed(SEED)
    deferred = defer(lambda: nn.LSTM(4, 4))
    inputs = torch.ones(3, 1, 4)
    assert torch.equal(deferred(inputs)[0], plain(inputs)[0])


def test_tensors_in_attributes_lists_and_dicts_and_marks_on_parameters_survive() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            self.weight.no_weight_decay = True  # type: ignore[attr-defined]
            self.table = torch.zeros(3, 2)
            self.table[:, 1] = torch.arange(3.0)
            self.weights = [self.weight, torch.ones(2)]
            self.defaults = {"total": torch.ones(2)}

    module = defer(Module)
    assert module.weights[0] is module.weight
    assert module.weights[1].tolist() == module.defaults["total"].tolist() == [1, 1]
    assert module.weight.no_weight_decay
    assert module.table.tolist() == [[0, 0], [0, 1], [0, 2]]


def test_a_part_of_the_model_gets_the_values_that_it_has_in_the_whole() -> None:
    torch.manual_seed(SEED)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    state_after_plain = torch.get_rng_state()
    torch.manual_seed(SEED)
    with record_initialization() as recorded:
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    recorded.bind(module)
    del module[0]  # a Sequential renumbers; a stage of a pipeline keeps its names
    stage = nn.ModuleDict({"1": module[0], "2": module[1]})
    recorded.materialize(stage)
    assert torch.equal(stage["1"].weight, plain[1].weight)
    assert torch.equal(stage["2"].bias, plain[2].bias)
    assert torch.equal(torch.get_rng_state(), state_after_plain)


class ReadsItem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        random.random()
        np.random.rand()
        self.weight = nn.Parameter(torch.randn(3))
        self.scale = self.weight.sum().item()


class ReadsList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.scale = self.weight.tolist()


class ReadsNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.scale = self.weight.detach().numpy().sum()


class KeepsTuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = (torch.randn(3), 1)


class BranchesOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        if (self.weight > 0).all():
            self.weight.data.neg_()


class MadeOnMeta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, device="meta"))


@pytest.mark.parametrize(
    "build", [ReadsItem, ReadsList, ReadsNumpy, KeepsTuple, BranchesOnValues, MadeOnMeta], ids=lambda b: b.__name__
)
def test_what_needs_values_while_building_cannot_be_deferred(build: Callable[[], nn.Module]) -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(CannotDefer, match="Build the model in __init__"):
        defer(build)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert nn.init.trunc_normal_(torch.zeros(4)).abs().sum() > 0


def test_orthogonal_parametrization_cannot_be_deferred() -> None:
    with pytest.raises(CannotDefer, match="geqrf"):
        defer(lambda: parametrizations.orthogonal(nn.Linear(8, 4)))


def test_leftover_meta_tensors_are_named() -> None:
    with record_initialization() as recorded:
        module = nn.Linear(4, 4)
    recorded.bind(module)
    module.register_buffer("late", torch.empty(3, device="meta"))
    with pytest.raises(RuntimeError, match="late"):
        recorded.materialize(module)


class LiveBytes(TorchDispatchMode):
    """The most memory that storages made inside held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = weakref.ref(storage)
        held = [storage for reference in self._live.values() if (storage := reference()) is not None]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in held))
        return result


class InitializedTwice(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(nn.Linear(128, 128, bias=False) for _ in range(8)))
        for layer in self:
            nn.init.normal_(layer.weight, std=0.02)


@pytest.mark.parametrize(
    ("build", "most"),
    [
        (lambda: nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(8))), 1),
        (InitializedTwice, 1),
        (lambda: nn.Sequential(*(nn.Linear(128, 128) for _ in range(8))), 1.02),
    ],
    ids=["once", "twice", "with_biases"],
)
def test_materialize_holds_one_full_tensor_at_a_time(build: Callable[[], nn.Module], most: float) -> None:
    with record_initialization() as recorded:
        module = build()
    recorded.bind(module)
    seen: list[str] = []

    def take(full: Tensor, name: str, current: Tensor) -> Tensor:
        seen.append(name)
        return full[:0].clone()

    with LiveBytes() as memory:
        recorded.materialize(module, take)
    assert sorted(seen) == sorted(recorded.names)
    largest = 128 * 128 * 4
    assert largest <= memory.peak <= most * largest


def test_copies_keep_only_the_tensors_that_later_copies_read() -> None:
    with record_initialization() as recorded:
        module = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 64, batch_first=True), 6)
    recorded.bind(module)
    one_layer = sum(parameter.numel() * 4 for parameter in module.layers[0].parameters())
    with LiveBytes() as memory:
        recorded.materialize(module, lambda full, name, current: full[:0].clone())
    assert memory.peak < 1.5 * one_layer


def compare_sharded(mesh_shape: tuple[int, ...]) -> list[str]:
    """Names of tensors whose shard or gathered value differs from plain construction."""
    names = ("dp_replicate", "dp_shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    differing = []
    for build in (TiedEmbedding, TokenEncoder):
        torch.manual_seed(SEED)
        plain = build()
        state = torch.get_rng_state()
        torch.manual_seed(SEED)
        with record_initialization() as recorded:
            module = build()
        recorded.bind(module)
        for unit in [module.body] if isinstance(module, TiedEmbedding) else module.encoder.layers:
            fully_shard(unit, mesh=mesh)
        fully_shard(module, mesh=mesh)
        recorded.materialize(module)
        if not torch.equal(torch.get_rng_state(), state):
            differing.append("generator state")
        tokens = torch.tensor([[1, 3, 5]])
        logits = [model(tokens) for model in (module, plain)]
        if not torch.equal(*logits):
            differing.append("output")
        logits[0].sum().backward()
        got = tensors_of(module)
        for name, expected in tensors_of(plain).items():
            value = got[name]
            if isinstance(value, DTensor):
                local = value.to_local()
                rank, size = mesh["dp_shard"].get_local_rank(), mesh["dp_shard"].size()
                chunks = list(expected.chunk(size))
                slice_ = chunks[rank] if rank < len(chunks) else expected[:0]
                if not torch.equal(local, slice_):
                    differing.append(f"shard of {name}")
                value = value.full_tensor()
            elif isinstance(value, nn.Parameter):
                differing.append(f"{name} is not sharded")
            if not torch.equal(value, expected):
                differing.append(name)
        ties = [len({id(p) for _, p in m.named_parameters(remove_duplicate=False)}) for m in (module, plain)]
        if ties[0] != ties[1]:
            differing.append("ties")
    return differing


@pytest.mark.parametrize("mesh_shape", [(2,), (1, 2), (2, 1)], ids=["shard2", "replicate1-shard2", "replicate2"])
def test_fully_sharded_on_meta_holds_the_slices_of_plain_construction(mesh_shape: tuple[int, ...]) -> None:
    assert run_on_ranks(2, compare_sharded, mesh_shape) == [[], []]
