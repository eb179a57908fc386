"""How each prompt's picture came about: the same prompt and noise in the grids painted while training."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.gallery.sheet import Sheet, Strip, Tile
from pipeline.paths import RunPaths

MOST_STAGES = 8
SAME = ("seed", "sampler", "steps", "guidance_scale", "weights", "autoencoder", "text_encoder")
"""What two grids must share for their difference to be the training's."""


@dataclass(frozen=True)
class PaintedGrid:
    """One grid of `samples/`: its step, what stands in its record, and the folder of its single pictures."""

    step: int
    record: dict[str, Any]
    folder: Path

    def like(self, other: "PaintedGrid") -> bool:
        """Return whether both were painted alike, whatever their weights had learned by then."""
        return all(self.record.get(name) == other.record.get(name) for name in SAME)

    def picture(self, prompt: str, number: int) -> np.ndarray | None:
        """Return the picture of that number, uint8 [height, width, 3]; None if it is another prompt's or gone."""
        prompts, file = self.record["prompts"], self.folder / f"{number:03d}.png"
        if number >= len(prompts) or prompts[number] != prompt or not file.is_file():
            return None
        return np.asarray(Image.open(file).convert("RGB"))


def learning_sheet(paths: RunPaths, prompts_at_most: int) -> Sheet | None:
    """Return a strip for each of the newest grid's first prompts, at most eight steps; None for fewer than two grids.

    Only grids painted as the newest was (seed, sampler, scale, weights) stand beside it.
    """
    grids = sorted(_grids(paths.samples), key=lambda grid: grid.step)
    grids = [grid for grid in grids if grid.like(grids[-1])]
    if len(grids) < 2:
        return None
    strips = []
    for number, prompt in enumerate(grids[-1].record["prompts"][:prompts_at_most]):
        found = ((grid.step, grid.picture(prompt, number)) for grid in grids)
        tiles = [Tile(picture, f"step {step:,}") for step, picture in found if picture is not None]
        if len({tile.picture_HWC.shape for tile in tiles}) == 1:
            strips.append(Strip(prompt, list(spread(tiles, MOST_STAGES))))
    about = "The same prompt, noise and settings at the steps of the grids painted while training."
    return Sheet("learning", "How it learned", about, strips) if strips else None


def spread(things: Sequence[Any], most: int) -> Iterator[Any]:
    """Yield at most `most` of the things, first and last among them, evenly spaced."""
    count = min(len(things), most)
    for place in range(count):
        yield things[place * (len(things) - 1) // max(1, count - 1)]


def _grids(samples: Path) -> Iterator[PaintedGrid]:
    for grid in samples.glob("step-*.png"):
        try:
            record = json.loads(grid.with_suffix(".json").read_text())
        except (OSError, ValueError):
            continue  # A grid without its record cannot be put beside another.
        if isinstance(record, dict) and isinstance(record.get("prompts"), list):
            yield PaintedGrid(int(grid.stem.removeprefix("step-")), record, grid.with_suffix(""))
