"""Divided tensors: what user code sees of parameters, gradients and optimizer states of which a rank holds a part.

[Note: a divided tensor stands for the whole]
Code around a network reads and writes parameters in steps, hooks, callbacks and optimizers. On a DTensor much of that
is silently about this rank's part: ``float(p.norm())``, ``p.data = x``. A :class:`Divided` is a DTensor that answers
such code as the whole tensor would. ``tensor.py`` tells which way a function of torch goes: element by element on this
rank's part (what optimizers do; nothing is communicated), or on the whole, gathered (``whole.py``), whose gradient is
averaged over the data ranks as any other; writes to a view of a whole reach the part. ``gathered.py``: writes to what
fully_shard gathered reach it too. ``copies.py``: copies of modules. ``compiled.py``: what torch.compile sees.
"""

from lightning_dist.divided.tensor import Divided, as_divided, divide
from lightning_dist.divided.whole import whole

__all__ = ["Divided", "as_divided", "divide", "whole"]
