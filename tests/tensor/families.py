"""Tiny networks of the families that have a tensor plan, each with inputs and a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers as hf
from torch import Tensor, nn

from recipes.image_classification.models import vision_transformer
from recipes.language_model.decoder import Decoder

WORDS, LENGTH = 48, 10


class Family:
    """A network and how it is trained.

    Args:
        network: makes it.
        inputs: makes keyword arguments of its forward.
        parts: attention and feed-forward modules: each costs an all-reduce forward, and one backward.
        crossing: how many of them read a second activation, which costs one more backward.
        lookups: of tokens in the divided embedding, each an all-reduce forward.
        first: parts that read the network's input itself, which needs no gradient.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        inputs: Callable[[], Any],
        parts: int,
        crossing: int = 0,
        lookups: int = 0,
        first: int = 0,
    ) -> None:
        self.network, self.inputs, self.parts, self.crossing, self.lookups = network, inputs, parts, crossing, lookups
        self.first = first

    def loss(self, network: nn.Module) -> Tensor:
        """A number that depends on all outputs."""
        torch.manual_seed(1)
        inputs = self.inputs()
        output = network(**inputs) if isinstance(inputs, dict) else network(*inputs)
        if isinstance(output, hf.utils.ModelOutput):
            return output.loss if "loss" in output else _spread(next(iter(output.values())))
        return _spread(output)


def _spread(output: Tensor) -> Tensor:
    return F.mse_loss(output, torch.randn_like(output))


def _images(size: int = 16) -> Any:
    return (torch.randn(2, 3, size, size),)


def _ids() -> Tensor:
    return torch.randint(0, WORDS, (2, LENGTH))


def _causal() -> dict[str, Any]:
    ids = _ids()
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def _masked() -> dict[str, Any]:
    ids = _ids()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}


def _llama(kind: str, **arguments: Any) -> Callable[[], nn.Module]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(hf, f"{kind}Config")(
        **{
            "vocab_size": WORDS,
            **sizes,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "tie_word_embeddings": False,
            **arguments,
        }
    )
    return lambda: getattr(hf, f"{kind}ForCausalLM")(config)


def _heads_together(kind: str, **arguments: Any) -> Callable[[], nn.Module]:
    """A model whose q, k and v are packed head by head."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    config = getattr(hf, f"{kind}Config")(vocab_size=WORDS, **sizes, **dropout, **arguments)
    return lambda: getattr(hf, f"{kind}ForCausalLM")(config)


def _codegen() -> nn.Module:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "rotary_dim": 4}
    return hf.CodeGenForCausalLM(hf.CodeGenConfig(vocab_size=WORDS, **sizes, **dropout))


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **arguments)


VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **NO_DROPOUT}
LAYER = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "dropout": 0.0, "batch_first": True}


def _mixer() -> nn.Module:
    return timm.models.MlpMixer(num_classes=5, img_size=16, patch_size=4, embed_dim=32, num_blocks=2)


def _gpt2() -> nn.Module:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=16, **dropout)
    )


def _t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=WORDS, **sizes, dropout_rate=0.0, decoder_start_token_id=0, feed_forward_proj="gated-gelu"
        )
    )


def _opt() -> nn.Module:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    others = {"word_embed_proj_dim": 32, "max_position_embeddings": 16, "eos_token_id": 2, "dropout": 0.0}
    return hf.OPTForCausalLM(hf.OPTConfig(vocab_size=WORDS, **sizes, **others))


def _bart() -> nn.Module:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 16}
    feed_forward = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return hf.BartModel(hf.BartConfig(vocab_size=WORDS, **sizes, **feed_forward, **heads, dropout=0.0))


def _mpt() -> nn.Module:
    return hf.MptForCausalLM(hf.MptConfig(vocab_size=WORDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=16))


class _Biased(nn.Module):
    """Attention that is told what to add to the scores of each head, and adds what it was given."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, residual: Tensor, attn_bias: Any = 0, position_bias: Any = 0) -> Tensor:
        batch, positions, _ = x.shape
        q, k, v = (
            layer(x).view(batch, positions, self.num_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + attn_bias + position_bias
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)) + residual


class Relative(nn.Module):
    """A learned bias of positions that each layer is given, and a norm before it.

    Args:
        name: of the argument.
        heads: of the layers.
        biases: of all heads, or one for all.
    """

    def __init__(self, name: str, heads: int, biases: int) -> None:
        super().__init__()
        self.name = name
        self.bias = nn.Parameter(torch.randn(1, biases, LENGTH, LENGTH))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.layers = nn.ModuleList(_Biased(heads) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = layer(norm(x), residual=x, **{self.name: self.bias})
        return x


class _ByWidth(nn.Module):
    """Attention as it is often written: what a head is wide is told by the input's width.

    Args:
        split: in three, by the width of the input.
    """

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.num_heads, self.width, self.split = 4, 32, split
        self.qkv, self.proj = nn.Linear(32, 96, bias=False), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, positions, width = x.shape
        if self.split:
            q, k, v = (
                part.view(batch, positions, self.num_heads, width // self.num_heads).transpose(1, 2)
                for part in self.qkv(x).split(self.width, dim=2)
            )
        else:
            packed = self.qkv(x).reshape(batch, positions, 3, self.num_heads, width // self.num_heads)
            q, k, v = packed.permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (width / self.num_heads) ** -0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(batch, positions, width))


class _Separate(nn.Module):
    """The same with a layer for each, and the width of what it attends with."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.W_query, self.W_key, self.W_value, self.out_proj = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in (self.W_query, self.W_key, self.W_value))
        q, k, v = (y.unflatten(-1, (self.num_heads, y.shape[-1] // self.num_heads)).transpose(1, 2) for y in (q, k, v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class _Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class _PairInBlock(nn.Module):
    """A block that holds its feed-forward layers itself, with a gate in the first, and a norm after."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = _ByWidth(False)
        self.linear1, self.linear2 = nn.Linear(32, 2 * 40), nn.Linear(40, 32)
        self.activation_dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        gate, value = self.linear1(x).chunk(2, -1)
        hidden = F.dropout(F.silu(gate) * value, self.activation_dropout, self.training)
        return self.norm2(x + self.linear2(hidden))


def _written(attention: Callable[[], nn.Module]) -> Family:
    def blocks() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 32), nn.Sequential(*(_Block(attention()) for _ in range(2))))

    return Family(blocks, lambda: (torch.randn(2, LENGTH, 32),), 2)


def _relative(name: str, heads: int, biases: int) -> Family:
    return Family(lambda: Relative(name, heads, biases), lambda: (torch.randn(2, LENGTH, 32),), 2, crossing=2)


def _swin(network: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    sizes = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [4, 4], "window_size": [4, 4]}
    return lambda: network(**sizes, num_classes=5, stochastic_depth_prob=0.0)


class Translator(nn.Module):
    """torch's own encoder and decoder, with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**LAYER), 2)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        memory = self.encoder(source, src_key_padding_mask=padding)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.decoder(target, memory, tgt_mask=mask, memory_key_padding_mask=padding)


class Weighing(nn.Module):
    """Attention whose weights count, over keys and values of their own widths, without a batch dim first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, kdim=16, vdim=24)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, weights = self.attention(query, key, value)
        return torch.cat([output.flatten(), weights.flatten()])


def _translation() -> Any:
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[1, 7:] = True
    return torch.randn(2, LENGTH, 32), torch.randn(2, 6, 32), padding


FAMILIES: dict[str, Family] = {
    "recipe decoder": Family(lambda: Decoder(WORDS, 32, 2, 4, 2), lambda: (_ids(),), 4, lookups=1),
    "recipe vit": Family(lambda: vision_transformer(8, 3, 5, width=32, depth=2), lambda: _images(8), 4),
    "llama": Family(_llama("Llama"), _causal, 4, lookups=1),
    "qwen3": Family(_llama("Qwen3"), _causal, 4, lookups=1),
    "mistral": Family(_llama("Mistral"), _causal, 4, lookups=1),
    "gemma": Family(_llama("Gemma", tie_word_embeddings=True), _causal, 4, lookups=1),
    "gpt2": Family(_gpt2, _causal, 4, lookups=1),
    "bert": Family(lambda: hf.BertForMaskedLM(hf.BertConfig(vocab_size=WORDS, **BERT)), _masked, 4, lookups=1),
    "hf vit": Family(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=4, **BERT)),
        lambda: {"pixel_values": _images()[0], "labels": torch.tensor([0, 1])},
        4,
    ),
    "t5": Family(_t5, lambda: {"input_ids": _ids(), "labels": _ids()}, 10, crossing=2, lookups=2),
    "phi3": Family(_llama("Phi3", pad_token_id=0), _causal, 2, lookups=1),
    "bloom": Family(
        lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=WORDS, hidden_size=32, n_layer=2, n_head=4)),
        _causal,
        2,
        lookups=1,
    ),
    "gpt neox": Family(_heads_together("GPTNeoX"), _causal, 4, lookups=1),
    "persimmon": Family(_heads_together("Persimmon", qk_layernorm=True), _masked, 4, lookups=1),
    "codegen": Family(_codegen, _causal, 4, lookups=1),
    "distilbert": Family(
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(
                vocab_size=WORDS, dim=32, hidden_dim=48, n_layers=2, n_heads=4, dropout=0.0, attention_dropout=0.0
            )
        ),
        _masked,
        4,
        lookups=1,
    ),
    "opt": Family(_opt, _masked, 4, lookups=1),
    "bart": Family(_bart, lambda: {"input_ids": _ids(), "decoder_input_ids": _ids()[:, :6]}, 10, crossing=2),
    "pair in a block": Family(
        lambda: nn.Sequential(nn.Linear(32, 32), nn.Sequential(*(_PairInBlock() for _ in range(2)))),
        lambda: (torch.randn(2, LENGTH, 32),),
        4,
    ),
    "mpt": Family(_mpt, _causal, 4, lookups=1),
    "bias of heads": _relative("attn_bias", 4, 4),
    "position bias of heads": _relative("position_bias", 4, 4),
    "position bias of all heads": _relative("position_bias", 2, 1),
    "written packed": _written(lambda: _ByWidth(False)),
    "written split": _written(lambda: _ByWidth(True)),
    "written separate": _written(_Separate),
    "timm vit": Family(_timm("vit_tiny_patch16_224", **VIT), _images, 4),
    "timm vit norms": Family(_timm("vit_tiny_patch16_224", **VIT, qk_norm=True, init_values=0.1), _images, 4),
    "deit": Family(_timm("deit_tiny_distilled_patch16_224", **VIT), _images, 4),
    "beit": Family(_timm("beit_base_patch16_224", **VIT), _images, 4),
    "eva": Family(_timm("eva02_tiny_patch14_224", **VIT), _images, 4),
    "mixer": Family(_mixer, _images, 4),
    "timm swin": Family(
        _timm(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            patch_size=2,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(4, 4),
            window_size=4,
            drop_path_rate=0.0,
        ),
        lambda: _images(32),
        8,
    ),
    "torchvision vit": Family(
        lambda: torchvision.models.VisionTransformer(16, 4, 2, 4, 32, 48, num_classes=5), _images, 4
    ),
    "torchvision swin": Family(_swin(torchvision.models.SwinTransformer), lambda: _images(32), 8),
    "torch transformer": Family(Translator, _translation, 10, crossing=2, first=2),
    "torch attention": Family(
        Weighing, lambda: (torch.randn(5, 2, 32), torch.randn(7, 2, 16), torch.randn(7, 2, 24)), 1, first=1
    ),
}

IMAGES_IN_WINDOWS = ("timm swin", "torchvision swin")
BIASED = ("bias of heads", "position bias of heads", "position bias of all heads")
WITH_WHOLE_ATTENTION = ("phi3", "bloom")
"""Which sees all positions: under sequence parallel the first run of such a block is refused."""
WITHOUT_CHAIN = (*IMAGES_IN_WINDOWS, *BIASED, "mixer", "torch attention")
