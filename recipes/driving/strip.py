"""A strip of pictures of an episode."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from PIL import Image, ImageDraw, ImageFont

from recipes.driving.highway import ACTIONS, LANE_WIDTH, Episode
from recipes.driving.module import ImitationModule, driven_by

if TYPE_CHECKING:
    from highway_env.envs.common.abstract import AbstractEnv

WIDTH, LANE, BORDER = 600, 22, 12
"""Of a picture, of a lane in it, and beside the road, in pixels."""
CAPTION, GAP, TITLE = 24, 10, 34
"""Heights of the text below a picture, of what is between two, and of the text above all, in pixels."""


class EpisodeStrip(Callback):
    """Writes ``episode_SEED.png`` of the first episode of a test: every few seconds a picture of the road before the
    driver acts, with the second, its speed and its action below, and one of the collision if there is one.

    Args:
        dirpath: where to.
        every: seconds from one picture to the next.
        columns: pictures side by side.
    """

    def __init__(self, dirpath: str | Path, every: int = 3, columns: int = 2) -> None:
        self.dirpath, self.every, self.columns = Path(dirpath), every, columns
        self._pictures: list[Image.Image] = []
        self._seed: int | None = None
        self._has_ended = False

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins anew."""
        self._pictures, self._seed, self._has_ended = [], None, False

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes a picture on the first rank, before the module drives on."""
        if not trainer.is_global_zero or not isinstance(pl_module, ImitationModule):
            return
        seeds = batch["seed"].tolist()
        if self._seed is None:
            self._seed = seeds[0]
        if self._seed not in seeds or self._has_ended:
            return
        episode = driven_by(trainer).episodes[self._seed]
        self._has_ended = episode.ended
        if episode.ended:
            self._pictures.append(picture(episode, "collision"))
        elif episode.second % self.every == 0:
            self._pictures.append(picture(episode, ACTIONS[outputs["action"][seeds.index(self._seed)]]))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes them."""
        if self._pictures:
            self.dirpath.mkdir(parents=True, exist_ok=True)
            title = f"Episode {self._seed}: the driver that was trained is green"
            strip(self._pictures, title, self.columns).save(self.dirpath / f"episode_{self._seed}.png")


def picture(episode: Episode, action: str) -> Image.Image:
    """The road around the driver, as highway-env draws it, above a line of text."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # what is drawn is read, and shown nowhere
    from highway_env.envs.common.graphics import EnvViewer

    environment = episode.environment
    width, height = WIDTH, 2 * BORDER + LANE * len(environment.road.network.lanes_list())
    shape = {
        "screen_width": width,
        "screen_height": height,
        "offscreen_rendering": True,
        "scaling": LANE / LANE_WIDTH,
        "centering_position": [0.35, 0.5],
    }
    viewer = EnvViewer(environment, environment.config | shape)
    viewer.enabled = True  # it takes a dummy for a wish not to draw
    viewer.observer_vehicle = SimpleNamespace(position=[environment.vehicle.position[0], _middle(environment)])
    viewer.display()
    drawn = Image.new("RGB", (width, height + CAPTION), "white")
    drawn.paste(Image.fromarray(viewer.get_image()))
    text = f"{episode.second} s      {environment.vehicle.speed:.1f} m/s      {action}"
    ImageDraw.Draw(drawn).text((8, height + 4), text, "black", ImageFont.load_default(15))
    return drawn


def _middle(environment: AbstractEnv) -> float:
    """Of the road, across it."""
    lanes = environment.road.network.lanes_list()
    return sum(lane.position(0, 0)[1] for lane in lanes) / len(lanes)


def strip(pictures: list[Image.Image], title: str, columns: int) -> Image.Image:
    """Pictures in rows, one after the other, below a title."""
    width, height = pictures[0].width + GAP, pictures[0].height + GAP
    rows = -(-len(pictures) // columns)
    drawn = Image.new("RGB", (columns * width + GAP, TITLE + rows * height), "white")
    ImageDraw.Draw(drawn).text((GAP, 8), title, "black", ImageFont.load_default(17))
    for index, one in enumerate(pictures):
        row, column = divmod(index, columns)
        drawn.paste(one, (GAP + column * width, TITLE + row * height))
    return drawn
