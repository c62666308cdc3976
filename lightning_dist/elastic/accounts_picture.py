"""A run's accounts as a line of text, and as a picture."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.text import Text

from lightning_dist.elastic.accounts import PARTS, TRAIN, Accounts, Span
from lightning_dist.elastic.attempt import Attempt

PICTURE = "run.svg"
"""The name of the picture, in the folder of the logs."""

COLORS = {
    "train": "#62a368",
    "lost": "#c8553d",
    "end": "#8a8a8a",
    "start": "#5689c4",
    "form": "#7fb2d9",
    "load": "#b9a44c",
    "first step": "#de944c",
}
WIDTH, LANE, LEFT, TOP = 1200, 28, 90, 50


def tell_accounts(attempt: Attempt) -> None:
    """The run is over, with this attempt: logs its accounts, shows them as a line on stderr, and draws them beside the
    logs of its last fit. Nothing where no rank has trained.
    """
    reached, events = attempt.progress(), attempt.events()
    last = {} if reached is None else {"fit": reached.fit, "step": reached.step, "last": reached.time}
    accounts = Accounts.of(events, time.time(), last)
    if accounts is None or not any(event["event"] == "first_step" for event in events):
        return
    rank_zero_info(str(accounts))
    Console(stderr=True).print(line(accounts))
    logs = [event["directory"] for event in events if event["event"] == "logs"]
    if logs and Path(logs[-1]).is_dir():
        draw(accounts, Path(logs[-1]) / PICTURE)


def line(accounts: Accounts, width: int = 80) -> Text:
    """The whole run from left to right, coloured by what takes most of each cell, with a legend below."""
    total, text = max(accounts.spans[-1].end, 1e-9), Text()
    for cell in range(width):
        begin, end = cell * total / width, (cell + 1) * total / width
        part = max(PARTS, key=lambda part: sum(_within(s, begin, end) for s in accounts.spans if s.part == part))
        text.append("█" if part == TRAIN else "▒", style=COLORS[part])
    text.append("\n")
    for part, seconds in accounts.seconds.items():
        text.append("█ " if part == TRAIN else "▒ ", style=COLORS[part])
        text.append(f"{part} {seconds:.1f} s  ")
    return text


def _within(span: Span, begin: float, end: float) -> float:
    return max(0.0, min(span.end, end) - max(span.begin, begin))


def draw(accounts: Accounts, path: Path) -> None:
    """Writes an SVG: a row an attempt, time from left to right."""
    numbers = sorted({span.attempt for span in accounts.spans})
    scale = (WIDTH - LEFT - 20) / max(accounts.spans[-1].end, 1e-9)
    height = TOP + LANE * len(numbers) + 60
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/><text x="{LEFT}" y="28">{accounts}</text>'
    ]
    for row, number in enumerate(numbers):
        drawn.append(f'<text x="12" y="{TOP + row * LANE + 17}">attempt {number}</text>')
    for span in accounts.spans:
        x, top = LEFT + span.begin * scale, TOP + numbers.index(span.attempt) * LANE
        width = max((span.end - span.begin) * scale, 0.5)
        told = f"<title>{span.part}: {span.end - span.begin:.1f} s, {PARTS[span.part]}</title>"
        size = f'x="{x:.1f}" y="{top}" width="{width:.1f}" height="{LANE - 6}"'
        drawn.append(f'<rect {size} fill="{COLORS[span.part]}">{told}</rect>')
    for column, (part, color) in enumerate(COLORS.items()):
        x, y = LEFT + column * 120, height - 30
        drawn.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{color}"/>')
        drawn.append(f'<text x="{x + 20}" y="{y + 12}">{part}</text>')
    path.write_text("\n".join([*drawn, "</svg>"]) + "\n")
