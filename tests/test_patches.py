"""Patches: what is put onto objects of others is taken off again."""

import pytest
from torch import nn

from lightning_dist.patches import Patches


def test_what_was_there_comes_back_newest_first() -> None:
    module, patches = nn.Linear(2, 2), Patches()
    before = dict(vars(module))
    patches.wrap(module, "forward", lambda original, x: original(x))
    patches.set(module, "forward", None)
    patches.set(module, "in_features", 5)
    patches.undo()
    assert vars(module) == before


def test_all_are_undone_where_one_fails() -> None:
    module, patches = nn.Linear(2, 2), Patches()
    patches.set(module, "in_features", 5)
    patches.also(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patches.undo()
    assert module.in_features == 2
