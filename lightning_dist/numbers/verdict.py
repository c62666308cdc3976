"""Which rank computed wrong numbers: from what all ranks saw of a step that was computed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_dist.numbers.digests import COMPARED_AXES


@dataclass(frozen=True)
class Row:
    """What one rank saw.

    Args:
        loss, local, final: whether its loss, its gradients before they were reduced, and its finished ones were others
            the second time.
        parameters, gradients: digests of what the ranks along each of ``COMPARED_AXES`` hold alike.
    """

    loss: bool
    local: bool
    final: bool
    parameters: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether it computed the step differently twice."""
        return self.loss or self.local or self.final


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a step.

    Args:
        ranks: whose numbers are wrong; or those of which some are, if nothing tells which.
        what: in words: what they did.
    """

    ranks: list[int]
    what: str


def judge(rows: Sequence[Row], groups: Sequence[tuple[str, Sequence[Sequence[int]]]]) -> Verdict | None:
    """Whose numbers are wrong; None where nothing is.

    A rank whose own gradients were others the second time is at fault. If there is none, then it happened while they
    were reduced, or in the forward: those whose finished gradients, or whose loss, were others. A fault that went
    through the collectives of ``tp`` or ``pp`` before is seen by all ranks of the group, and all of them are named.

    Ranks that hold the same parts and differ: those that are not with the majority; without one, all of the group.

    Args:
        rows: by rank.
        groups: for each axis of ``COMPARED_AXES`` that is compared, by name, the ranks along it.
    """
    if twice := _computed_differently(rows):
        return twice
    for what in ("parameters", "gradients"):
        for axis, along in groups:
            index = COMPARED_AXES.index(axis)
            for ranks in along:
                values = {rank: getattr(rows[rank], what)[index] for rank in ranks}
                if len(set(values.values())) > 1:
                    return _odd_ones(values, what, axis)
    return None


def _computed_differently(rows: Sequence[Row]) -> Verdict | None:
    for kind, words in (
        ("local", "its gradients before they are reduced over the ranks"),
        ("final", "its finished gradients"),
        ("loss", "its loss"),
    ):
        if ranks := [rank for rank, row in enumerate(rows) if getattr(row, kind)]:
            several = words.replace("its", "their") if len(ranks) > 1 else words
            return Verdict(ranks, f"computed {{step}} differently twice: {several}")
    return None


def _odd_ones(values: dict[int, int], what: str, axis: str) -> Verdict:
    (most, number), *_ = Counter(values.values()).most_common(1)
    ranks = list(values)
    if 2 * number > len(values):
        others = [rank for rank, value in values.items() if value == most]
        odd = [rank for rank in ranks if rank not in others]
        holds = "hold" if len(odd) > 1 else "holds"
        return Verdict(odd, f"{holds} other {what} in {{step}} than ranks {_listed(others)}, along {axis}")
    return Verdict(ranks, f"should hold the same {what} in {{step}}, along {axis}, and do not; none is in the majority")


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def told(verdict: Verdict, step: int, hosts: Sequence[str]) -> str:
    """The sentence for the user; ``hosts`` by rank."""
    named = [f"{rank} (host {hosts[rank]})" for rank in verdict.ranks]
    ranks = f"rank {named[0]}" if len(named) == 1 else f"ranks {', '.join(named[:-1])} and {named[-1]}"
    return f"{ranks} {verdict.what.format(step=f'step {step}')}"
