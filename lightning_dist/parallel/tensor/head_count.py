"""A rank's number of heads, for modules that tell a head's width by it."""

from __future__ import annotations

from typing import Any


class HeadCount(int):
    """A rank's number of heads, by which the features of all heads are divided into as many as all heads have.

    For modules that write ``C // self.num_heads`` with the width of their input.

    Args:
        mine: this rank's number of heads, which it is in all else.
        heads: of all ranks.
        width: features of all heads together.
    """

    heads: int
    width: int

    def __new__(cls, mine: int, heads: int = 1, width: int = 0) -> HeadCount:
        count = super().__new__(cls, mine)
        count.heads, count.width = heads, width
        return count

    def _divisor(self, features: Any) -> int:
        return self.heads if features == self.width else int(self)

    def __rfloordiv__(self, features: Any) -> Any:
        return features // self._divisor(features)

    def __rtruediv__(self, features: Any) -> Any:
        return features / self._divisor(features)
