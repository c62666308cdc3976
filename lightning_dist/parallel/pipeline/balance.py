"""Which cut points: those that leave the dearest stage as cheap as can be."""

from __future__ import annotations

from itertools import accumulate, pairwise

from lightning_dist.parallel.pipeline.split_points import SplitPoint


def balanced(points: list[SplitPoint], costs: list[float], num_stages: int) -> list[SplitPoint]:
    """The cut points that make the largest cost of a stage smallest, and among those send the fewest bytes.

    By dynamic programming over stages and points: O(stages x points^2).

    Args:
        points: in the order of the step, at least ``num_stages - 1``.
        costs: of each op.
        num_stages: of the pipeline.
    """
    until = [0.0, *accumulate(costs)]
    ends = [point.after + 1 for point in points] + [len(costs)]
    best: list[dict[int, tuple[tuple[float, int], int]]] = [{-1: ((0.0, 0), -1)}]
    for stage in range(num_stages):
        row: dict[int, tuple[tuple[float, int], int]] = {}
        # each later stage needs a point of its own
        last = len(points) - (num_stages - 1 - stage) if stage < num_stages - 1 else len(points)
        for index in [len(points)] if stage == num_stages - 1 else range(stage, last + 1):
            for before, ((cost, sent), _) in best[-1].items():
                if before >= index:
                    continue
                begin = ends[before] if before >= 0 else 0
                this = until[ends[index]] - until[begin]
                bytes_sent = sent + (points[index].num_bytes if index < len(points) else 0)
                total = (max(cost, this), bytes_sent)
                if index not in row or total < row[index][0]:
                    row[index] = (total, before)
        best.append(row)
    chosen: list[SplitPoint] = []
    index = len(points)
    for row in reversed(best[1:]):
        index = row[index][1]
        if index >= 0:
            chosen.append(points[index])
    return chosen[::-1]


def stage_costs(points: list[SplitPoint], costs: list[float]) -> list[float]:
    """Cost of each stage between chosen cut points."""
    bounds = [0, *(point.after + 1 for point in points), len(costs)]
    return [sum(costs[begin:end]) for begin, end in pairwise(bounds)]
