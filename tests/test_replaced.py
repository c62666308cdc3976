"""Who holds a parameter from before the fit is found; who looks on for a moment is not taken for one."""

from __future__ import annotations

import sys
import threading
from types import FrameType

import pytest
from torch import nn

from lightning_dist.parallel.replaced import Replaced


def _with_parameters_in_frame(module: nn.Module, frames: list[FrameType]) -> None:
    parameters = list(module.parameters())
    frames.append(sys._getframe())
    assert len(parameters) == 2


@pytest.mark.parametrize("is_let_go", [True, False])
def test_a_frame_that_another_thread_looks_at_for_a_moment_holds_nothing(is_let_go: bool) -> None:
    module, frames = nn.Linear(2, 2), list[FrameType]()
    replaced = Replaced(module)
    _with_parameters_in_frame(module, frames)
    module.weight = nn.Parameter(module.weight.detach().clone())
    if is_let_go:
        threading.Timer(0.03, frames.clear).start()
        replaced.exchange(module, [])
        assert replaced.originals["weight"].shape == (0,)
    else:
        with pytest.raises(ValueError, match="a list holds the parameter weight from before the fit"):
            replaced.exchange(module, [])
