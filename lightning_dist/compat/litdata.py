"""Private names of LitData."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from lightning_dist.compat.names import getter, uses

datasets_of = getter(
    "litdata.utilities.base._BaseStreamingDatasetWrapper._datasets", "the data sets that one of LitData combines", ()
)


@uses("litdata.utilities.env._DistributedEnv", "litdata.utilities.env._DistributedEnv.detect")
def environment_class() -> Any:
    """Whose ``detect`` tells LitData its ranks; None where it is not imported."""
    return getattr(sys.modules.get("litdata.utilities.env"), "_DistributedEnv", None)


def streaming_datasets(dataset: Any) -> Iterator[Any]:
    """The data sets of LitData that one is, or combines."""
    kind = environment_class()
    if kind is None:
        return
    if isinstance(getattr(dataset, "distributed_env", None), kind):
        yield dataset
    for part in datasets_of(dataset):
        yield from streaming_datasets(part)
