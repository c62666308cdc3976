"""An embedding of which each rank holds some rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_dist.parallel.tensor.mappings import reduce_from_tensor_region
from lightning_dist.parallel.tensor.vocab_parallel.vocabulary import Vocabulary


class LocalRows(TorchFunctionMode):
    """While it lasts, ``F.embedding`` looks up this rank's rows and sums the ranks' outputs.

    Args:
        vocabulary: which rows are whose.
        weight: this rank's, (own rows, width), as the forward sees it.

    Communication: forward one all-reduce of the output's bytes over the axis; backward none.
    """

    def __init__(self, vocabulary: Vocabulary, weight: Tensor) -> None:
        super().__init__()
        self.vocabulary, self.weight = vocabulary, weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding and args[1] is self.weight:
            return self._look_up(args[0], args[2] if len(args) > 2 else (kwargs or {}).get("padding_idx"))
        return func(*args, **(kwargs or {}))

    def _look_up(self, ids: Tensor, padding: int | None) -> Tensor:
        own = ids - self.vocabulary.start
        is_mine = (own >= 0) & (own < self.vocabulary.width)
        if padding is not None:  # its row has no gradient
            padding = padding - self.vocabulary.start
            padding = padding if 0 <= padding < self.vocabulary.width else None
        weight = self.weight
        if not len(weight):  # a rank that came too late for a row
            weight = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
        found = F.embedding(own.where(is_mine, 0), weight, padding)
        return reduce_from_tensor_region(found.masked_fill(~is_mine.unsqueeze(-1), 0.0), self.vocabulary.mesh)
