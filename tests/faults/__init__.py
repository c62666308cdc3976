"""Faults for tests of what survives them: kinds that strike a process, at a given moment or at a random one.

- ``fault.py``: :class:`Fault`, what happens to which rank and when, and :class:`Faults`, the callback by which a
  training strikes itself at a named moment (inside a collective, a save, the set-up).
- ``strikes.py``: striking from outside, at moments that a seed draws, and what may be left behind.
- ``numbers.py``: a bit that flips in a gradient, a loss that is not a number, an infinite gradient.
- ``storage.py``: :class:`Store`, a folder that can be full, read-only or away for a while.
"""
