"""Plans by layer: patterns of names with a style each, as users, torch and transformers write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from lightning_dist.compat.torch import own_parameters
from lightning_dist.compat.transformers import declared_tensor_plan
from lightning_dist.plans.blocks import closest
from lightning_dist.plans.tensor import layers
from lightning_dist.plans.tensor.general import attention_plan, column_alone, feed_forward_plan, row_alone
from lightning_dist.plans.tensor.plan import ModulePlan, TensorPlan

COLWISE, ROWWISE, REPLICATE = "colwise", "rowwise", "replicate"
STYLES = (COLWISE, ROWWISE, REPLICATE)
"""``colwise`` divides a layer's outputs, ``rowwise`` its inputs; ``replicate`` leaves a module whole."""

Styles = Mapping[str, str] | Callable[[str, nn.Module], str | None]


def styled_plan(module: nn.Module, styles: Styles) -> TensorPlan:
    """The plan of a whole module that a user wrote.

    ``styles`` gives a style of :data:`STYLES` by name of layer, in which ``*`` matches anything; or is a function of
    name and module that returns one, or None.

    Raises:
        ValueError: a style that is none, a pattern that matches nothing, a layer that is not dense, an attention
            module that does not tell how many heads it has.
    """
    chosen: dict[str, str] = {}
    modules = {name: child for name, child in module.named_modules() if name}
    if callable(styles):
        chosen = {name: style for name, child in modules.items() if (style := styles(name, child)) is not None}
    else:
        for pattern, style in styles.items():
            found = [name for name in modules if fnmatchcase(name, pattern)]
            if not found:
                hint = closest(pattern, modules)
                raise ValueError(f"tensor_plan names {pattern!r}, and no module has such a name{hint}")
            chosen |= dict.fromkeys(found, style)
    for name, style in chosen.items():
        if style not in STYLES:
            raise ValueError(f"tensor_plan gives {name!r} the style {style!r}; the styles are {', '.join(STYLES)}")
        if style != REPLICATE and not layers.is_dense(modules[name]):
            kind = type(modules[name]).__name__
            computed = isinstance(modules[name], nn.Linear) and "weight" not in own_parameters(modules[name])
            why = " whose weight is computed from other parameters (pruned or parametrised)" if computed else ""
            raise ValueError(f"tensor_plan divides {name!r}, a {kind}{why}; it can divide nn.Linear and Conv1D")
    plan: TensorPlan = {}
    for name, part in _assemble(module, {n: s for n, s in chosen.items() if s != REPLICATE}).items():
        if part is None:
            raise ValueError(
                f"tensor_plan divides layers of {name!r}, which does not tell how many heads it has, whose sizes "
                "don't fit each other, or which has more parameters than those; divide all of them, or leave it whole"
            )
        plan[name] = part
    if not plan:
        raise ValueError("tensor_plan divides nothing; give some layers the style 'colwise' and those after 'rowwise'")
    return plan


def declared_plan(module: nn.Module) -> TensorPlan:
    """What transformers models declare themselves; layers with styles other than those here stay whole."""
    plan: TensorPlan = {}
    for prefix, child in module.named_modules():
        declared = declared_tensor_plan(child)
        if not declared:
            continue
        names = [f"{prefix}.{name}".strip(".") for name, below in child.named_modules() if layers.is_dense(below)]
        start = f"{prefix}." if prefix else ""
        chosen = {
            name: style
            for pattern, style in declared.items()
            if style in (COLWISE, ROWWISE)
            for name in names
            if fnmatchcase(name, start + pattern)
        }
        plan |= {name: part for name, part in _assemble(module, chosen).items() if part is not None}
    return plan


def _assemble(module: nn.Module, chosen: Mapping[str, str]) -> dict[str, ModulePlan | None]:
    """Parts made of styled layers that have the same parent; None for one whose sizes don't tell how to divide it."""
    by_parent: dict[str, dict[str, str]] = {}
    for name, style in chosen.items():
        parent, _, leaf = name.rpartition(".")
        by_parent.setdefault(parent, {})[leaf] = style
    parts: dict[str, ModulePlan | None] = {}
    for parent, styled in by_parent.items():
        columns = tuple(leaf for leaf, style in styled.items() if style == COLWISE)
        rows = [leaf for leaf, style in styled.items() if style == ROWWISE]
        owner = module.get_submodule(parent)
        if len(columns) in (1, 3) and (layers.count_heads(owner) or layers.head_width(owner)):
            packed, row = 3 if len(columns) == 1 else 1, rows[0] if rows else None
            # with several that write back, one reads what the heads are masked by (transformers' Doge)
            parts[parent] = attention_plan(owner, columns, row, packed) if len(rows) < 2 else None
        elif columns and len(rows) == 1 and all(layers.is_dense(c) for c in owner.children() if [*c.parameters()]):
            parts[parent] = feed_forward_plan(owner, columns, rows[0])
        else:
            for leaf in styled:
                layer = owner.get_submodule(leaf)
                alone = column_alone(layer) if styled[leaf] == COLWISE else row_alone(layer)
                parts[f"{parent}.{leaf}".strip(".")] = alone
    return parts
