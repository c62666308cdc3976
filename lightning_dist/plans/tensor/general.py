"""The general rule: attention, feed-forward pairs and vocabularies, recognised by what they are made of.

A pair is one or more dense layers that read the same activation, something that works element by element or head by
head, and one dense layer that writes back. The first are divided by outputs, the last by inputs. A module is taken as a
part only if every parameter in it is accounted for: a norm over all heads in the middle would be wrong without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_dist.compat.torch import is_plain_feed_forward
from lightning_dist.plans.blocks import class_name, find_blocks, is_of
from lightning_dist.plans.tensor import layers
from lightning_dist.plans.tensor.chain import hands_on, is_chain, passes_on, takes_up
from lightning_dist.plans.tensor.gated import ELEMENTWISE, gated_layers
from lightning_dist.plans.tensor.plan import BESIDE_ARGUMENTS, OWN_ARGUMENTS, ModulePlan, Split, TensorPlan

ATTENTION = (
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "proj")),
    (("query", "key", "value"), ("output", "proj", "out")),
    (("q", "k", "v"), ("o", "proj", "out")),
    (("to_q", "to_k", "to_v"), ("to_out",)),
    (("wq", "wk", "wv"), ("wo",)),
    (("W_query", "W_key", "W_value"), ("out_proj",)),
    (("queries", "keys", "values"), ("fc_out", "projection")),
    (("q_lin", "k_lin", "v_lin"), ("out_lin",)),
)
"""Names of the projections of q, k and v, and of the layers that may write back."""

PACKED_ATTENTION = (
    (("qkv", "in_proj", "c_attn", "Wqkv", "qkv_proj"), ("proj", "out_proj", "c_proj", "o_proj", "out")),
)
"""The same with q, k and v in one matrix."""

INTERLEAVED = {
    "GPTNeoXAttention": ("query_key_value", "dense"),
    "PersimmonAttention": ("query_key_value", "dense"),
    "CodeGenAttention": ("qkv_proj", "out_proj"),
}
"""Classes of transformers whose packed layer has q, k and v of one head after another's, or of some heads (``mp_num``
such groups), with the names of that layer and of the one that writes back."""

FEED_FORWARD = (
    (("gate_proj", "up_proj"), ("down_proj",)),
    (("gate", "up"), ("down",)),
    (("w1", "w3"), ("w2",)),
    (("wi_0", "wi_1"), ("wo",)),
    (("fc1_g", "fc1_x"), ("fc2",)),
    (("fc1",), ("fc2",)),
    (("c_fc",), ("c_proj",)),
    (("wi",), ("wo",)),
    (("linear1",), ("linear2",)),
    (("up_proj",), ("down_proj",)),
    (("gate_up_proj",), ("down_proj",)),
    (("lin1",), ("lin2",)),
    (("Wi",), ("Wo",)),
    (("dense_h_to_4h",), ("dense_4h_to_h",)),
    (("fc_in",), ("fc_out",)),
    (("pwconv1",), ("pwconv2",)),
)

GATES = ("gate", "g_proj")
"""Layers whose outputs multiply what the heads made."""

BIASES = ("q_bias", "k_bias", "v_bias")
"""Vectors of all heads that an attention module keeps itself."""

TABLES = ("relative_position_bias_table", "relative_attention_bias.weight", "relative_position_bias.weight")
"""Tables of positions, with a column for each head."""

NORMS = ("q_norm", "k_norm", "query_norm", "key_norm", "q_layernorm", "k_layernorm")
"""Norms of each head: every rank uses the same weights on its heads."""


def general_plan(module: nn.Module) -> TensorPlan:
    """The parts of a network, by name."""
    plan: TensorPlan = {}
    for name, child in module.named_modules():
        if name.startswith(tuple(f"{other}." for other, part in plan.items() if part.copies_inputs and part.rows)):
            continue
        for below, part in _module_plans(child):
            plan[f"{name}.{below}".strip(".")] = part
    return plan


def _module_plans(module: nn.Module) -> Iterator[tuple[str, ModulePlan]]:
    """The plans of one module, or of layers of it, by name below it."""
    if isinstance(module, nn.MultiheadAttention):
        part = _multihead(module)
    elif class_name(module) == "ShiftedWindowAttention":
        part = _shifted_windows(module)
    elif is_of(module, "transformers", INTERLEAVED):
        packed, row = INTERLEAVED[class_name(module)]
        part = attention_plan(module, (packed,), row, 3, interleaved=True)
    else:
        part = _attention(module) or _feed_forward(module) or _sequential(module) or _gated(module)
    if part is not None:
        yield "", part
    else:
        yield from _apart(module)


def _multihead(module: nn.MultiheadAttention) -> ModulePlan | None:
    if module.bias_k is not None or module.add_zero_attn:
        return None
    names = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    packed = {"in_proj_weight": 3, "in_proj_bias": 3}
    parameters = {name: Split(0, packed.get(name, 1)) for name in names if getattr(module, name) is not None}
    parameters["out_proj.weight"] = Split(1)
    return ModulePlan(parameters, divides={"heads": module.num_heads}, multihead=True, split="by heads")


def _shifted_windows(module: nn.Module) -> ModulePlan | None:
    """torchvision's: the function that it calls gets the layers' weights, and all ranks' number of heads."""
    part = attention_plan(module, ("qkv",), "proj", 3)
    if part is None:
        return None
    parameters = {**part.parameters, "proj.weight": part.rows["proj"]}
    return replace(part, parameters=parameters, rows={}, attributes=(), applied_row="proj")


def _attention(module: nn.Module) -> ModulePlan | None:
    children = dict(module.named_children())
    for kinds, packed in ((ATTENTION, 1), (PACKED_ATTENTION, 3)):
        for columns, rows in kinds:
            names = columns if packed == 1 else tuple(n for n in columns if n in children)[:1]
            row = next((n for n in rows if layers.is_dense(children.get(n))), None)
            if names and row and all(layers.is_dense(children.get(n)) for n in names):
                return attention_plan(module, names, row, packed)
    return None


def attention_plan(
    module: nn.Module, columns: tuple[str, ...], row: str | None, packed: int, interleaved: bool = False
) -> ModulePlan | None:
    """An attention module by the names of its layers; None if it does not tell its heads, or holds more.

    Args:
        module: that is divided.
        columns: of the layers that make q, k and v.
        row: of the one that writes back; None where it lies elsewhere.
        packed: how many of q, k and v one layer makes.
        interleaved: head by head, so that the features of some heads lie together.
    """
    children = dict(module.named_children())
    width, heads = layers.head_width(module), layers.count_heads(module)
    features = layers.outputs(children[columns[0]]) // packed
    if heads is None and width is not None:
        heads = features // width
    if heads is None or features % heads:
        return None
    if packed > 1 and not (interleaved or layers.counts_heads_itself(module)):
        return None  # it cuts q, k and v apart by numbers that are not its own (transformers' Phi3)
    if row is not None and layers.inputs(children[row]) != features:
        return None  # queries are not as wide as what is written back: it is packed in some way of its own
    divides = {"heads": heads}
    groups = getattr(module, "mp_num", None)
    if interleaved and isinstance(groups, int):
        divides["groups of heads"] = groups
    if packed == 1 and len(columns) == 3:
        key_value = layers.outputs(children[columns[1]]) // (features // heads)
        if key_value != heads:
            divides["key-value heads"] = key_value
    parameters: dict[str, Split] = {}
    attributes: tuple[str, ...] = layers.head_attributes(module)
    gates = [n for n in GATES if layers.is_dense(children.get(n)) and layers.outputs(children[n]) == features]
    for name in (*columns, *gates):
        parameters |= layers.column(name, children[name], packed if name in columns and not interleaved else 1)
        attributes += layers.column_attributes(name, children[name])
    own = dict(module.named_parameters())
    parameters |= {name: Split(0) for name in BIASES if name in own and own[name].shape == (features,)}
    parameters |= {name: Split(1) for name in TABLES if name in own and own[name].shape[1:] == (heads,)}
    buffers = {name: Split(0) for name, b in module.named_buffers() if name in BIASES and b.shape == (features,)}
    partial = tuple(f"{norm}.{n}" for norm in NORMS if norm in children for n, _ in children[norm].named_parameters())
    if not all(own[name].numel() == features // heads for name in partial):
        return None  # norms over all heads at once
    rows = {row: layers.row(children[row])} if row else {}
    arguments: Any = {"stays": OWN_ARGUMENTS, "beside": BESIDE_ARGUMENTS}
    part = ModulePlan(
        parameters, rows, partial, buffers, attributes, divides, **arguments, width=features, split="by heads"
    )
    return part if _accounts_for(module, part) else None


def _feed_forward(module: nn.Module) -> ModulePlan | None:
    children = dict(module.named_children())
    for columns, rows in FEED_FORWARD:
        row = next((n for n in rows if layers.is_dense(children.get(n))), None)
        if row and all(layers.is_dense(children.get(n)) for n in columns):
            part = feed_forward_plan(module, columns, row)
            if part is not None and _accounts_for(module, part):
                return part
    return None


def feed_forward_plan(module: nn.Module, columns: tuple[str, ...], row: str) -> ModulePlan | None:
    """A feed-forward module by the names of its layers; None if their sizes don't fit.

    One layer with twice the outputs holds a gate and what it multiplies, one after the other (timm's ``GluMlp``).
    """
    width = layers.inputs(module.get_submodule(row))
    parameters: dict[str, Split] = {}
    attributes: tuple[str, ...] = ()
    for name in columns:
        layer = module.get_submodule(name)
        packed = layers.outputs(layer) // width
        if packed * width != layers.outputs(layer) or packed > (2 if len(columns) == 1 else 1):
            return None
        parameters |= layers.column(name, layer, packed)
        attributes += layers.column_attributes(name, layer)
    rows = {row: layers.row(module.get_submodule(row))}
    return ModulePlan(parameters, rows, attributes=attributes, beside=BESIDE_ARGUMENTS, split="by columns")


def _gated(module: nn.Module) -> ModulePlan | None:
    found = gated_layers(module)
    return None if found is None else feed_forward_plan(module, *found)


def _sequential(module: nn.Module) -> ModulePlan | None:
    """Two dense layers with nothing between them but functions of one element (torchvision's ``MLPBlock``)."""
    if not isinstance(module, nn.Sequential):
        return None
    dense = [name for name, child in module.named_children() if layers.is_dense(child)]
    others = [child for child in module.children() if not layers.is_dense(child)]
    if len(dense) != 2 or not others or not all(isinstance(child, ELEMENTWISE) for child in others):
        return None
    names = [name for name, _ in module.named_children()]
    if names[0] != dense[0] or names[1] == dense[1]:
        return None  # what is before the first would see activations copied to the region; nothing between is no pair
    return feed_forward_plan(module, (dense[0],), dense[1])


def _apart(module: nn.Module) -> Iterator[tuple[str, ModulePlan]]:
    """Layers that lie beside other things: in blocks, torch's and others', and in those of the BERT family."""
    pair = _pair_in_block(module)
    if pair is not None:
        yield "", pair
        return
    children = dict(module.named_children())
    dense = dict(children["output"].named_children()).get("dense") if "output" in children else None
    if dense is None or not layers.is_dense(dense) or not takes_up(children["output"], "dense"):
        return
    name = "self" if "self" in children else "attention"
    inner = children.get(name)
    middle: Any = dict(children["intermediate"].named_children()).get("dense") if "intermediate" in children else None
    if inner is not None and {"query", "key", "value"} <= dict(inner.named_children()).keys():
        part = attention_plan(inner, ("query", "key", "value"), None, 1)
        if part is not None and passes_on(module, name, "output"):
            yield name, part
            yield "output.dense", row_alone(dense)
    elif layers.is_dense(middle) and _is_intermediate(module, middle, dense):
        yield "intermediate.dense", column_alone(middle)
        yield "output.dense", row_alone(dense)


def _is_intermediate(block: Any, dense: Any, after: Any) -> bool:
    """Whether a block's ``intermediate`` is a dense layer and functions of one element, and ``output`` takes what it
    gives.
    """
    is_alone = set(block.intermediate.parameters()) == set(dense.parameters())
    fits = is_alone and layers.outputs(dense) == layers.inputs(after)
    return fits and hands_on(block.intermediate, "dense") and is_chain(block, ("intermediate",), "output", draws=False)


def _pair_in_block(module: nn.Module) -> ModulePlan | None:
    """A block with one feed-forward pair; None where what lies between its layers may be used as a whole."""
    children = dict(module.named_children())
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        is_pair = is_plain_feed_forward(module) and all(map(layers.is_dense, (module.linear1, module.linear2)))
        return _pair_plan(module, ("linear1",), "linear2") if is_pair else None
    pairs = {
        row: columns
        for columns, rows in reversed(FEED_FORWARD)  # the first that fits is the one that counts
        for row in rows
        if all(layers.is_dense(children.get(name)) for name in (*columns, row))
    }
    if len(pairs) != 1:
        return None
    ((row, columns),) = pairs.items()
    part = _pair_plan(module, columns, row)
    return part if part is not None and is_chain(module, columns, row) else None


def _pair_plan(module: nn.Module, columns: tuple[str, ...], row: str) -> ModulePlan | None:
    """A block by the names of the feed-forward layers in it; None if their sizes don't fit, or if it is no block."""
    if isinstance(module, pl.LightningModule) or find_blocks(module):
        return None
    part = feed_forward_plan(module, columns, row)
    return None if part is None else replace(part, columns=columns, copies_inputs=False, beside=frozenset())


def column_alone(layer: nn.Module) -> ModulePlan:
    """A layer that is a part by itself, whose outputs go on divided."""
    attributes = layers.column_attributes("", layer)
    return ModulePlan(layers.column("", layer), attributes=attributes, split="by columns")


def row_alone(layer: nn.Module) -> ModulePlan:
    """A layer that writes back, and whose inputs come divided."""
    return ModulePlan(rows={"": layers.row(layer)}, copies_inputs=False, split="by rows")


def _accounts_for(module: nn.Module, part: ModulePlan) -> bool:
    """Whether every parameter of the module is divided, written back, or said to be used in part."""
    known = {*part.parameters, *part.partial, *(f"{row}.{leaf}" for row in part.rows for leaf in ("weight", "bias"))}
    return all(name in known for name, _ in module.named_parameters())


def vocabulary_plan(module: nn.Module, plan: TensorPlan) -> TensorPlan:
    """Embeddings and heads of one vocabulary: a dense layer with as many outputs as an embedding has rows, as wide.

    They may be tied. An embedding without such a head is no vocabulary (positions, segments) and stays whole, and what
    the ``plan`` of blocks divides is left alone.
    """
    taken = {f"{name}.{row}".strip(".") for name, part in plan.items() for row in ("", *part.rows)}
    taken |= {f"{name}.{below}".rpartition(".")[0] for name, part in plan.items() for below in part.parameters}
    embeddings = {name: m for name, m in module.named_modules(remove_duplicate=False) if _is_plain_embedding(m)}
    found: TensorPlan = {}
    for name, head in module.named_modules():
        if name in taken or not layers.is_dense(head):
            continue
        sizes = (layers.outputs(head), layers.inputs(head))
        own = {n: e for n, e in embeddings.items() if (e.num_embeddings, e.embedding_dim) == sizes}
        tied = {n: e for n, e in own.items() if e.weight is head.weight}
        if not own or not isinstance(head, nn.Linear):
            continue
        parameters = {leaf: Split(0) for leaf in ("weight", "bias") if getattr(head, leaf) is not None}
        divided = ModulePlan(parameters, vocabulary=sizes[0], split="by vocabulary")
        found |= dict.fromkeys(tied or own, replace(divided, parameters={"weight": Split(0)}, copies_inputs=False))
        found[name] = divided
    return found


def _is_plain_embedding(module: nn.Module) -> bool:
    is_plain = isinstance(module, nn.Embedding) and module.max_norm is None
    return is_plain and not (module.sparse or module.scale_grad_by_freq)
