"""TokenSampler: the order in which the blocks of token stores are read, of several by weights."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dist.data.mixtures import MixtureSampler
from lightning_dist.data.permutation import WindowShuffle
from lightning_dist.data.tokens.dataset import TokenDataset


class TokenSampler(MixtureSampler):
    """The order of an epoch's blocks, computed by index from seed and epoch: no permutation is held.

    It is one order of all data ranks, of which each rank's loader takes its part under the strategy, and in one process
    the whole. The order is mixed in windows, see :class:`~lightning_dist.data.permutation.WindowShuffle`.

    With ``weights`` the stores are interleaved evenly. A store that comes to its end begins again in another order; one
    that an epoch does not come to the end of goes on in the next, so that none of its blocks comes a second time
    before each has come once.

    Args:
        dataset: whose blocks.
        seed: of the order; by default that of ``seed_everything``, or 0.
        shuffle: whether blocks are mixed; else they come as they lie in the stores.
        window: blocks that are mixed with each other; one window is read at a time.
        weights: share of each store in the blocks of an epoch, in any unit; by default all blocks come once.
        num_samples: blocks of an epoch; by default as many as there are.

    Raises:
        ValueError: weights of another number of stores, or that are not positive or too small; no blocks.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seed: int | None = None,
        shuffle: bool = True,
        window: int = 1 << 16,
        weights: Sequence[float] | None = None,
        num_samples: int | None = None,
    ) -> None:
        if window < 1:
            raise ValueError(f"window={window} must be at least 1")
        self.shuffle, self.window = shuffle, window
        sizes = dataset.blocks_of_stores if weights is not None else [len(dataset)]
        sources = [WindowShuffle(size, window, shuffle) for size in sizes]
        super().__init__(sources, seed=seed, weights=weights, num_samples=num_samples)
