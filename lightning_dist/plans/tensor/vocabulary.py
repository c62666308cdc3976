"""The token embedding and the output head, which are divided by vocabulary."""

from __future__ import annotations

from torch import nn

from lightning_dist.plans.tensor import layers
from lightning_dist.plans.tensor.plan import ModulePlan, Split, TensorPlan


def vocabulary_plan(module: nn.Module, plan: TensorPlan) -> TensorPlan:
    """Embeddings and heads of one vocabulary: a dense layer with as many outputs as an embedding has rows, as wide.

    They may be tied. An embedding without such a head is no vocabulary (positions, segments) and stays whole.

    Args:
        module: the whole module.
        plan: of what is in blocks; what it divides is left alone.
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
        for below in tied or own:
            found[below] = ModulePlan(
                {"weight": Split(0)}, vocabulary=sizes[0], copies_inputs=False, split="by vocabulary"
            )
        parameters = {leaf: Split(0) for leaf in ("weight", "bias") if getattr(head, leaf) is not None}
        found[name] = ModulePlan(parameters, vocabulary=sizes[0], split="by vocabulary")
    return found


def _is_plain_embedding(module: nn.Module) -> bool:
    is_plain = isinstance(module, nn.Embedding) and module.max_norm is None
    return is_plain and not (module.sparse or module.scale_grad_by_freq)
