"""One step of a pipeline as it went: a Chrome trace, and a picture that shows where ranks wait."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_dist.collectives import gather_objects
from lightning_dist.parallel.pipeline import PipelineRunner
from lightning_dist.parallel.pipeline.schedule_runs import Event

COLORS = {"forward": (86, 137, 196), "backward": (222, 148, 76), "weights": (98, 163, 104)}
WAIT, INK = (232, 232, 232), (40, 40, 40)
WIDTH, LANE, LEFT, TOP = 1400, 46, 80, 60


class PipelineTimeline(Callback):
    """Records one training step under ``pp``, and writes ``timeline.json`` and ``timeline.png``.

    The first opens in ``chrome://tracing`` or Perfetto: a process a rank, a row a stage. The second has a row a rank:
    forward and backward of each microbatch with its number, and grey where the rank waits for another. The steps before
    and after it are as fast as without the callback; the one that is recorded waits for the device at each part.

    Args:
        step: number of the batch of the first epoch, counted from 0; later than the first ones, which warm up.
        directory: where to write; default: the logger's, or the Trainer's ``default_root_dir``.

    Communication: for that step, one barrier before it and one all-gather of its events, as an object, over ``pp``.
    """

    def __init__(self, step: int = 5, directory: str | Path | None = None) -> None:
        self.step, self.directory = step, directory
        self.bubble: float | None = None
        """Measured share of the step in which a rank waited, once it was recorded."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts to record."""
        pipelined = _pipelined(trainer)
        if pipelined is not None and self.bubble is None and batch_idx == self.step:
            pipelined.timeline.start(pipelined.group)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes what was recorded."""
        pipelined = _pipelined(trainer)
        if pipelined is None or not pipelined.timeline.records:
            return
        events = pipelined.timeline.stop()
        everyone = gather_objects(events, pipelined.group)
        self.bubble = waiting(everyone)
        if trainer.is_global_zero:
            directory = Path(self.directory or trainer.log_dir or trainer.default_root_dir)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "timeline.json").write_text(json.dumps({"traceEvents": list(_chrome_events(everyone))}))
            schedule, num_microbatches = pipelined.stages.schedule, 1 + max(event.microbatch for event in events)
            expected = schedule.bubble(num_microbatches, pipelined.stages.num_ranks)
            title = (
                f"{schedule.name}: ranks wait for {self.bubble:.0%} of the step; "
                f"{expected:.0%} if stages were equal and sending took no time"
            )
            draw(everyone, title, directory / "timeline.png")


def _pipelined(trainer: pl.Trainer) -> PipelineRunner | None:
    parts: Any = getattr(trainer.strategy, "parts", None)  # another strategy has none
    return parts.module_setup.runner if parts and isinstance(parts.module_setup.runner, PipelineRunner) else None


def waiting(by_rank: list[list[Event]]) -> float:
    """Share of the time from the first event to the last in which a rank does nothing, over the ranks."""
    begin, end = _span(by_rank)
    busy = sum(event.end - event.begin for events in by_rank for event in events)
    return 1 - busy / ((end - begin) * len(by_rank))


def _chrome_events(by_rank: list[list[Event]]) -> Iterable[dict[str, Any]]:
    """Complete events of the Chrome trace format, in microseconds."""
    for rank, events in enumerate(by_rank):
        yield {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"pipeline rank {rank}"}}
        for event in events:
            what = {"name": f"{event.kind} {event.microbatch}", "cat": event.kind, "ph": "X"}
            times = {"ts": event.begin * 1e6, "dur": (event.end - event.begin) * 1e6}
            about = {"stage": event.stage, "microbatch": event.microbatch}
            yield {**what, "pid": rank, "tid": event.stage, **times, "args": about}


def draw(by_rank: list[list[Event]], title: str, path: Path) -> None:
    """Draws a row a rank, time from left to right; an ImportError where Pillow is not installed."""
    from PIL import Image, ImageDraw, ImageFont  # torchvision brings it; nothing else here needs it

    begin, end = _span(by_rank)
    scale = (WIDTH - LEFT - 20) / max(end - begin, 1e-9)
    image = Image.new("RGB", (WIDTH, TOP + LANE * len(by_rank) + 44), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    pen.text((LEFT, 16), title, INK, font)
    for rank, events in enumerate(by_rank):
        top = TOP + rank * LANE
        pen.text((12, top + 12), f"rank {rank}", INK, font)
        pen.rectangle((LEFT, top, WIDTH - 20, top + LANE - 8), WAIT)
        for event in events:
            left, right = (LEFT + (at - begin) * scale for at in (event.begin, event.end))
            # of two stages on a rank, the later one is darker
            shade = 1 - 0.25 * (event.stage >= len(by_rank))
            color = tuple(int(channel * shade) for channel in COLORS[event.kind])
            pen.rectangle((left, top, max(right, left + 1), top + LANE - 8), color, "white")
            if right - left > 12:
                pen.text((left + 3, top + 11), str(event.microbatch), "white", font)
    left, bottom = LEFT, TOP + LANE * len(by_rank) + 10
    for name, color in {**COLORS, "wait": WAIT}.items():
        pen.rectangle((left, bottom, left + 16, bottom + 16), color)
        pen.text((left + 22, bottom), name, INK, font)
        left += 110
    pen.text((WIDTH - 220, bottom), f"{(end - begin) * 1e3:.1f} ms in all", INK, font)
    image.save(path)


def _span(by_rank: list[list[Event]]) -> tuple[float, float]:
    every = [event for events in by_rank for event in events]
    return min(event.begin for event in every), max(event.end for event in every)
