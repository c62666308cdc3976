"""The layout of a run that goes on with another number of ranks than it began with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_dist.layout import REST, Layout


def adapted_layout(requested: Layout, first: int, num_ranks: int, fallbacks: Sequence[Layout] = ()) -> Layout:
    """The layout for the ranks that are there now: the user's, where it fits, or the first of ``fallbacks`` that does.

    Without those, the data axes change and the model axes (``pp``, ``cp``, ``tp``) stay: ``dp_replicate`` first; where
    ``dp_shard`` has to, it becomes the next degree that fits and is no smaller, so that a rank holds no more than
    before, or all data ranks, where they are fewer.

    Args:
        requested: the user's.
        first: the number of ranks that the run began with, on which that was resolved.
        num_ranks: that are there now.
        fallbacks: the user's, in their order.

    Raises:
        ValueError: nothing fits; says which numbers of ranks would do.
    """
    for layout in (requested, *fallbacks):
        if _fits(layout, num_ranks):
            return layout.resolve(num_ranks)
    if fallbacks:
        known = " and ".join(f'"{layout}"' for layout in fallbacks)
        raise ValueError(
            f"the run began with {first} ranks under layout {requested}, and {_are(num_ranks)}: neither that nor "
            f"{known} fits; what does: {_listed([requested, *fallbacks])}"
        )
    model = replace(requested.resolve(first), dp_replicate=1, dp_shard=1)
    of_model = model.world_size
    if num_ranks % of_model:
        raise ValueError(
            f"the run began with {first} ranks under layout {requested}, and {_are(num_ranks)}: its model axes need a "
            f"multiple of {of_model} ranks; name layouts without them in fallback_layouts, or let nodes join and leave "
            "by such numbers"
        )
    return _with_data_ranks(requested.resolve(first), num_ranks // of_model)


def _with_data_ranks(layout: Layout, data_ranks: int) -> Layout:
    fitting = (degree for degree in range(layout.dp_shard, data_ranks + 1) if data_ranks % degree == 0)
    shards = next(fitting, data_ranks)
    return replace(layout, dp_shard=shards, dp_replicate=data_ranks // shards)


def _fits(layout: Layout, num_ranks: int) -> bool:
    try:
        layout.resolve(num_ranks)
    except ValueError:
        return False
    return True


def _listed(layouts: Sequence[Layout]) -> str:
    """The numbers of ranks that layouts take, in words."""
    numbers = []
    for layout in layouts:
        is_open = any(degree == REST for _, degree in layout.items())
        taken = replace(layout, **{axis: 1 for axis, degree in layout.items() if degree == REST}).world_size
        numbers.append(f"multiples of {taken}" if is_open else str(taken))
    return ", ".join(dict.fromkeys(numbers)) + " ranks"


def _are(number: int) -> str:
    return f"there {'is' if number == 1 else 'are'} {number} now"
