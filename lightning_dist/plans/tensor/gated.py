"""Gated feed-forward modules of any names (SwiGLU, GEGLU, ReGLU), recognised by what their forward does.

As in https://arxiv.org/abs/2002.05202: ``w2(f(w1(x)) * w3(x))``, with ``f`` of one element. The forward is traced by
torch.fx, which computes no number: two dense layers read the module's one input, nothing else does, what they give is
worked on element by element and multiplied, and one dense layer reads that. A forward that can't be traced, or that
does anything else between the layers, is none.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_dist.plans.tensor import layers

ELEMENTWISE = (nn.Dropout, nn.Identity, nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Mish)
"""Layers that work on one element at a time, and have no parameters."""

_FUNCTIONS: set[Any] = {
    *(F.silu, F.gelu, F.relu, F.sigmoid, F.tanh, F.leaky_relu, F.elu, F.mish, F.softplus, F.hardswish, F.dropout),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.square),
}
_METHODS = {"relu", "sigmoid", "tanh", "square"}
_PRODUCTS: set[Any] = {operator.mul, torch.mul}


def gated_layers(module: nn.Module) -> tuple[tuple[str, str], str] | None:
    """The names of the two layers that read a gated module's input and of the one that writes back; None for others."""
    dense = {name: child for name, child in module.named_modules() if name and layers.is_dense(child)}
    owned = {id(p) for child in dense.values() for p in child.parameters()}
    if len(dense) != 3 or isinstance(module, pl.LightningModule) or next(module.buffers(), None) is not None:
        return None
    num_parameters = sum(len(list(child.parameters())) for child in dense.values())
    if any(id(p) not in owned for p in module.parameters()) or len(owned) != num_parameters:
        return None  # holds more than the layers, or layers that share parameters
    try:
        graph = _Tracer().trace(copy.copy(module))  # which a forward may set attributes of
    except Exception:
        return None  # a forward that looks at values, or at sizes
    return _read(graph, module, set(dense))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return layers.is_dense(m) or isinstance(m, ELEMENTWISE)


def _read(graph: fx.Graph, module: nn.Module, dense: set[str]) -> tuple[tuple[str, str], str] | None:
    """Follows the input through the layers; each value is of one column layer, of their product, or behind the row."""
    columns: list[str] = []
    row: str | None = None
    where: dict[fx.Node, frozenset[str]] = {}
    """Whose outputs the values between the layers are made of."""
    behind: set[fx.Node] = set()
    source: fx.Node | None = None
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "placeholder":
            if node.users and source is not None:
                return None
            source = node if node.users else source
        elif node.op == "call_module" and node.target in dense:
            if node.target in columns or node.target == row or len(inputs) != 1:
                return None
            if inputs[0] is source:
                columns.append(node.target)
                where[node] = frozenset({node.target})
            elif row is None and len(columns) == 2 and where.get(inputs[0]) == frozenset(columns):
                row = node.target
                behind.add(node)
            else:
                return None
        elif node.op == "output":
            if row is None or node.args[0] not in behind:
                return None
        elif _is_of_one_element(node, module) and len(inputs) == 1 and node.args[0] is inputs[0]:
            if inputs[0] in where:
                where[node] = where[inputs[0]]
            elif inputs[0] in behind:
                behind.add(node)
            else:
                return None
        elif _calls(node, _PRODUCTS, {"mul"}) and all(i in where for i in inputs):
            where[node] = frozenset().union(*(where[i] for i in inputs))
        else:
            return None
    hidden = None if row is None else layers.inputs(module.get_submodule(row))
    if row is None or any(layers.outputs(module.get_submodule(name)) != hidden for name in columns):
        return None  # nothing writes back, or a layer gives one feature that is broadcast over the other's
    return (columns[0], columns[1]), row


def _is_of_one_element(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), ELEMENTWISE)
    return _calls(node, _FUNCTIONS, _METHODS)


def _calls(node: fx.Node, functions: set[Any], methods: set[str]) -> bool:
    known: set[Any] = {"call_function": functions, "call_method": methods}.get(node.op, set())
    return node.target in known
