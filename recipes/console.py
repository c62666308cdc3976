"""What a job's console leaves out: messages that the user of a recipe can do nothing about."""

from __future__ import annotations

import logging
import re
import warnings

LEFT_OUT = re.compile(
    r"Tip: For seamless cloud"
    r"|(GPU|TPU|HPU) available: False"
    r"|^Loading `train_dataloader` to estimate"
    r"|^-{10,}\ndistributed_backend="
    r"|^LOCAL_RANK: "
)
"""Log messages of Lightning (seen in 2.6.6): advertisements, what is not there, what is not news."""

WARNINGS_LEFT_OUT = (
    # Lightning's own use of torch.
    r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    # The recipes' data sets are small tensors: a worker would only cost.
    r".*does not have many workers",
    # A job that is cut short on purpose.
    r".*number of training batches .* is smaller than the logging interval",
)


def quiet_lightning() -> None:
    """Sends Lightning's messages through Hydra's log only, without those in the lists above."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        # Its own handlers print beside Hydra's, which would show every line twice.
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_news)
    for message in WARNINGS_LEFT_OUT:
        warnings.filterwarnings("ignore", message)


def _is_news(record: logging.LogRecord) -> bool:
    return not LEFT_OUT.search(record.getMessage())
