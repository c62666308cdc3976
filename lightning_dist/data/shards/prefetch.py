"""Shards that are brought into the cache before they are read, by a thread."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)


class Prefetcher:
    """Fetches shards one after the other in the background; a failure is left to who reads the shard.

    Args:
        fetch: of a shard by its number; at once where it is there.
    """

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self._fetch = fetch
        self._waiting: deque[int] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def ask(self, shards: Iterable[int]) -> None:
        """The next that are read, in their order."""
        with self._changed:
            new = [shard for shard in shards if shard not in self._waiting]
            self._waiting.extend(new)
            if new and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="shards", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Until all that was asked for is there."""
        while (thread := self._thread) is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    return
                shard = self._waiting.popleft()
            try:
                self._fetch(shard)
            except Exception as error:
                log.debug("shard %d could not be fetched ahead: %r", shard, error)
