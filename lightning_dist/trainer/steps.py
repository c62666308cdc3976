"""The steps of a run: from Lightning's call to the runner of the layout, which runs the user's own step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lightning_dist.data import validate_same_batches
from lightning_dist.logs import RepeatedBatch
from lightning_dist.parallel import SingleProcessRunner
from lightning_dist.ranks import LayoutRanks
from lightning_dist.trainer.coordination import Coordination
from lightning_dist.trainer.loaders import Loaders
from lightning_dist.trainer.module_setup import ModuleSetup
from lightning_dist.tuning import Tuning


class Steps:
    """Runs the module's steps over the layout.

    [Note: the way of a batch]
    ``HybridStrategy.training_step`` -> :meth:`run` -> ``runner.run``, which each layout has in one file of
    ``parallel/`` -> the user's ``training_step``.

    Args:
        ranks: of the run.
        setup: of the module, with the runner.
        loaders: of the run.
        coordination: of the ranks.
        tuning: a finder's search, while there is one.
    """

    def __init__(
        self, ranks: LayoutRanks, setup: ModuleSetup, loaders: Loaders, coordination: Coordination, tuning: Tuning
    ) -> None:
        self._ranks, self._setup, self._loaders = ranks, setup, loaders
        self._coordination, self._tuning = coordination, tuning
        self._compared: set[str] = set()
        """Steps whose first batch was seen to be the same on the ranks that share samples."""

    @property
    def runner(self) -> SingleProcessRunner:
        """Runs steps; there once the module has been set up."""
        assert self._setup.runner is not None
        return self._setup.runner

    def attach(self) -> None:
        """The module has been set up for a run."""
        self._compared.clear()

    def run(self, step: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a step of the module.

        Communication: the first time that a kind of step runs, a comparison of its batch over ``pp`` and ``tp``; and
        see the runner's class.
        """
        if self._ranks.mesh is not None and step not in self._compared:
            self._compared.add(step)
            for axis in ("pp", "tp"):
                validate_same_batches(step, args, self._ranks.mesh.root[axis].get_group())
        with self.trial(), self._coordination.of_step():
            return self.runner.run(step, *args, **kwargs)

    def predict(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Each rank predicts its own batches, in order: batch i of data rank r is the loader's batch i * n + r."""
        module: Any = self.runner.module
        index = self._loaders.index_of_batch(args)
        repeated = None if self._loaders.counts(*index) else RepeatedBatch(module.trainer)
        prediction = self.run("predict_step", args, kwargs)
        if repeated is None:
            return prediction
        repeated.undo()
        return self._loaders.drop_prediction(*index)

    def trial(self) -> AbstractContextManager[None]:
        """Around what a step computes: while a batch size is looked for, ranks agree on whether it fitted."""
        return self._tuning.agreed(self.forget)

    def forget(self) -> None:
        """Drops what is left of a step that an exception ended on all ranks alike."""
        if self._setup.runner is not None:
            self._setup.runner.forget_step()
