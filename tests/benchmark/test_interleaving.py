"""Competitors take turns; what they raise arrives."""

import pytest
import torch

from recipes.benchmark.interleaving import Pace, interleave

LOSS = torch.zeros(())


def test_bursts_alternate_and_each_competitor_runs_all_its_steps() -> None:
    order: list[str] = []

    def competitor(name: str):
        def run(pace: Pace, num_steps: int) -> None:
            for _ in range(num_steps):
                order.append(name)
                pace(LOSS)
            order.append(f"{name} ends")

        return run

    seconds = interleave({"a": competitor("a"), "b": competitor("b")}, rounds=2, steps=2, warmup=1)

    assert order == ["a", "b", *"aabb", *"bbaa", "a ends", "b ends"]
    assert {name: [len(burst) for burst in bursts] for name, bursts in seconds.items()} == {"a": [2, 2], "b": [2, 2]}


def test_a_step_is_charged_to_the_competitor_that_took_it() -> None:
    spent = {"fast": 1, "slow": 5}
    now = 0

    def clock() -> float:
        return float(now)

    def competitor(name: str):
        def run(pace: Pace, num_steps: int) -> None:
            nonlocal now
            for _ in range(num_steps):
                now += spent[name]
                pace(LOSS)

        return run

    seconds = interleave({name: competitor(name) for name in spent}, rounds=3, steps=2, warmup=2, clock=clock)

    assert seconds == {"fast": [[1, 1]] * 3, "slow": [[5, 5]] * 3}


def test_what_a_competitor_raises_is_raised() -> None:
    def failing(pace: Pace, num_steps: int) -> None:
        pace(LOSS)
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        interleave({"a": failing}, rounds=2, steps=1, warmup=1)


def test_a_competitor_that_ends_early_is_an_error() -> None:
    def short(pace: Pace, num_steps: int) -> None:
        for _ in range(num_steps - 2):
            pace(LOSS)

    with pytest.raises(ValueError, match=r"ended after 1 of the 3 steps"):
        interleave({"a": short}, rounds=1, steps=3, warmup=1)


@pytest.mark.parametrize("number", ["rounds", "steps", "warmup"])
def test_no_rounds_or_steps_is_refused(number: str) -> None:
    with pytest.raises(ValueError, match=f"{number}=0"):
        interleave({}, **{**dict(rounds=1, steps=1, warmup=1), number: 0})
