"""Whether a block hands what one dense layer gives to another, element by element, as its source reads.

A block can't be traced as :mod:`~lightning_dist.plans.tensor.gated` traces a feed-forward module: it holds attention,
caches and branches. So the one function that calls both layers is read, in the order of its lines. What can't be read,
or does anything else with what lies between, is no chain.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_dist.plans.tensor.gated import ELEMENTWISE

_NAMES = {
    *("silu", "gelu", "relu", "relu6", "sigmoid", "tanh", "leaky_relu", "elu", "selu", "celu", "mish", "softplus"),
    *("hardswish", "hardtanh", "hardsigmoid", "square", "pow", "exp", "abs", "clamp", "dropout"),
    *("to", "float", "half", "type_as", "contiguous", "chunk"),
}
"""Functions and methods that work on one element at a time, by the last part of their name."""

_SHAPELESS = {"dtype", "device", "requires_grad", "is_cuda", "ndim"}
"""What a tensor tells that is the same of a part."""


def is_chain(module: nn.Module, columns: Iterable[str], row: str, draws: bool = True) -> bool:
    """Whether what some layers of a module give goes nowhere but through functions of one element to another layer.

    Args:
        module: whose class's source is read; no number is computed.
        columns: names of the layers that begin, children of the module.
        row: that of the one that ends.
        draws: dropout is one of these functions; not where ranks would draw alike for other columns.
    """
    names = {*columns, row}
    calling = [tree for tree in map(_tree, _functions(type(module))) if tree is not None and _calls_of(tree, names)]
    if len(calling) != 1 or sorted(_calls_of(calling[0], names)) != sorted(names):
        return False
    return _Reader(module, frozenset(names) - {row}, row, draws=draws).reads(calling[0])


def hands_on(module: nn.Module, column: str) -> bool:
    """Whether what one of a module's layers gives is what it returns, through functions of one element that draw
    nothing: ranks would draw alike for other columns.
    """
    forward = _tree(type(module).forward)
    if forward is None or _calls_of(forward, {column}) != [column] or not isinstance(forward.body[-1], ast.Return):
        return False
    return _Reader(module, frozenset({column}), "", returns=True, draws=False).reads(forward)


def takes_up(module: nn.Module, row: str) -> bool:
    """Whether a module gives its first argument, through functions of one element that draw nothing, to one of its
    layers alone.
    """
    forward = _tree(type(module).forward)
    if forward is None or _calls_of(forward, {row}) != [row] or len(forward.args.args) < 2:
        return False
    return _Reader(module, frozenset(), row, between={forward.args.args[1].arg}, draws=False).reads(forward)


def passes_on(module: nn.Module, inner: str, outer: str) -> bool:
    """Whether the first that one of a module's children gives goes nowhere but through functions of one element that
    draw nothing to another child, as its first argument. What else the inner one gives is not looked at.
    """
    forward = _tree(type(module).forward)
    if forward is None or sorted(_calls_of(forward, {inner, outer})) != sorted((inner, outer)):
        return False
    return _Reader(module, frozenset({inner}), outer, gives_tuple=True, draws=False).reads(forward)


def _functions(kind: type) -> list[Any]:
    """The methods of a module's class, those of its bases that it has not replaced included."""
    found: dict[str, Any] = {}
    for owner in kind.__mro__:
        if owner is nn.Module:
            break
        for name, value in vars(owner).items():
            found.setdefault(name, value)
    return [value for value in found.values() if inspect.isfunction(value)]


def _tree(function: Any) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None  # written where there is no file
    return tree if isinstance(tree, ast.FunctionDef) else None


def _calls_of(tree: ast.AST, names: set[str]) -> list[str]:
    """The layers that are called in it, as often as they are."""
    called = (_layer(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [name for name in called if name in names]


def _layer(node: ast.AST) -> str | None:
    """The name of ``self.name``."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if is_own and isinstance(node, ast.Attribute) else None


class _UsedOtherwiseError(Exception):
    """Something else is done with what lies between."""


class _Reader:
    """Visits statements in order, and knows which variables lie between the layers.

    Args:
        module: whose function is read.
        columns, row: names of the layers.
        between: variables that lie there from the beginning.
        returns: what lies between, and nothing else, is returned.
        gives_tuple: what ``columns`` give may be a tuple, of which the first lies between.
        draws: dropout may lie between.
    """

    def __init__(
        self,
        module: nn.Module,
        columns: frozenset[str],
        row: str,
        between: set[str] | None = None,
        returns: bool = False,
        gives_tuple: bool = False,
        draws: bool = True,
    ) -> None:
        self._module, self._columns, self._row, self._returns, self._draws = module, columns, row, returns, draws
        self._between, self._gives_tuple = set(between or ()), gives_tuple
        self._tuples = set[str]()
        """Variables that lie between, and may be tuples of which the first does."""

    def reads(self, function: ast.FunctionDef) -> bool:
        """Whether the function does nothing else with what lies between."""
        try:
            for statement in function.body:
                self.visit(statement)
        except _UsedOtherwiseError:
            return False
        return True

    def visit(self, node: ast.AST) -> bool:
        """Whether an expression lies between; of other nodes, visits what is in them."""
        match node:
            case ast.Assign(targets=[ast.Name(id=name)]):
                self._assign([name], self.visit(node.value))
                if self._is_tuple(node.value):
                    self._tuples.add(name)
                return False
            case ast.Assign(targets=[ast.Tuple(elts=[ast.Name(id=name), *others])]) if self._is_tuple(node.value):
                self._assign([other.id for other in others if isinstance(other, ast.Name)], False)
                self._assign([name], self.visit(node.value))
                return False
            case ast.Subscript(value=ast.Name(id=name), slice=index) if name in self._tuples:
                return self._is_first(index)
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Call(func=ast.Attribute(attr="chunk")) as cut):
                # of a gate and a value in one layer
                self._assign([target.id for target in targets if isinstance(target, ast.Name)], self._call(cut))
                return False
            case ast.AugAssign(target=ast.Name(id=name)) if name in self._between:
                raise _UsedOtherwiseError
            case ast.Subscript(value=ast.Call() as call, slice=index) if self._is_tuple(call):
                return self.visit(call) and self._is_first(index)
            case ast.Name(ctx=ast.Load()):
                return node.id in self._between
            case ast.Call():
                return self._call(node)
            case ast.Return(value=ast.expr() as value) if self._returns:
                if not self.visit(value):
                    raise _UsedOtherwiseError
                return False
            case ast.BinOp(op=ast.Mult()):
                return self._product(node)
            case ast.Attribute() if node.attr in _SHAPELESS:
                self.visit(node.value)
                return False
            case ast.FunctionDef() | ast.Lambda() if _calls_of(node, {*self._columns, self._row}):
                raise _UsedOtherwiseError  # when it runs is not told by its place
        if any([self.visit(child) for child in ast.iter_child_nodes(node)]):
            raise _UsedOtherwiseError
        return False

    def _assign(self, names: Iterable[str], is_between: bool) -> None:
        self._tuples.difference_update(names)
        (self._between.update if is_between else self._between.difference_update)(names)

    def _is_tuple(self, value: ast.AST) -> bool:
        return self._gives_tuple and isinstance(value, ast.Call) and _layer(value.func) in self._columns

    def _is_first(self, index: ast.AST) -> bool:
        """Whether the first of a tuple is meant, not others."""
        match index:
            case ast.Constant(value=int(place)) if place >= 0:
                return place == 0
            case ast.Slice(lower=ast.Constant(value=int(place)), upper=None, step=None) if place > 0:
                return False
        raise _UsedOtherwiseError

    def _product(self, node: ast.BinOp) -> bool:
        sides = self.visit(node.left), self.visit(node.right)
        constant = isinstance(node.left, ast.Constant) or isinstance(node.right, ast.Constant)
        if any(sides) and not (all(sides) or constant):
            raise _UsedOtherwiseError
        return any(sides)

    def _call(self, node: ast.Call) -> bool:
        layer = _layer(node.func)
        given = [self.visit(argument) for argument in (*node.args, *(keyword.value for keyword in node.keywords))]
        if isinstance(node.func, ast.Attribute):
            owner = self.visit(node.func.value)
            given = [owner, *given] if owner else given
        first, others = any(given[:1]), any(given[1:])
        fits = {self._row: first, **dict.fromkeys(self._columns, not first)}.get(str(layer))
        if others or not (first <= self._is_of_one_element(node.func) if fits is None else fits):
            raise _UsedOtherwiseError
        return first if fits is None else layer in self._columns

    def _is_of_one_element(self, function: ast.AST) -> bool:
        layer = _layer(function)
        if layer is None:
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
            return name in _NAMES and (self._draws or name != "dropout")
        found = getattr(self._module, layer, None)
        if isinstance(found, nn.Module):
            is_activation = type(found).__module__ == "transformers.activations"
            if isinstance(found, nn.Dropout) and not self._draws:
                return found.p == 0
            return isinstance(found, ELEMENTWISE) or (is_activation and not [*found.parameters()])
        return getattr(found, "__name__", None) in _NAMES
