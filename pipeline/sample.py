"""A grid of pictures from prompts, with each caption under its picture and a record of how they were made.

Equal weights, prompts and settings give equal bytes on one machine: nothing in the files varies between runs.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline import publish
from pipeline.config import RunConfig
from pipeline.data.held_out import known_captions
from pipeline.errors import ConfigError
from pipeline.generate import Generator
from pipeline.paths import RunPaths, dataset_places
from pipeline.progress import progress_bar
from pipeline.tracking import open_records

NARROWEST_CELL = 128
MARGIN = 8
FONT_SIZE = 12
LINE_HEIGHT = 15
LINES = 3
BACKGROUND, INK = (255, 255, 255), (30, 30, 30)


def sample_grid(paths: RunPaths, config: RunConfig) -> Path:
    """Paint `config.sample` with the newest checkpoint; return the grid `samples/step-XXXXXXXX.png`.

    Beside it lie `step-XXXXXXXX.json` (prompts, seed, scale, checkpoint, digests) and the single pictures in the
    folder `step-XXXXXXXX/`. Each appears whole or not at all, the grid last.

    Raises:
        CheckpointError: when there is no valid checkpoint.
        ConfigError: when there are no prompts and no validation captions to take instead.
        DataError: when the encoders do not belong to the training's data.
    """
    sample = config.sample
    generator = Generator.load(paths, sample.weights)
    prompts = chosen_prompts(generator.trained.config, paths, config)
    pictures = []
    with progress_bar(len(prompts), "sample", unit="picture") as progress:
        for part in generator.paint_in_parts(prompts, seed=sample.seed, sample=sample):
            pictures.append(part)
            progress.advance(len(part))
    grid = publish_grid(
        paths, generator.trained.step, np.concatenate(pictures), grid_record(generator, config, prompts)
    )
    with open_records(paths, config, kind="sample", attempt="sample") as records:
        records.log(generator.trained.step, {"pictures": len(prompts)}, samples=generator.trained.samples)
        records.image(grid, generator.trained.step, "grid")
    return grid


def publish_grid(paths: RunPaths, step: int, pictures_NHWC: np.ndarray, record: dict[str, Any]) -> Path:
    """Write the single pictures, the record and last the grid of `record["prompts"]`; return the grid."""
    grid = paths.samples / f"step-{step:08d}.png"
    _write_pictures(grid.with_suffix(""), pictures_NHWC)
    publish.write_json(grid.with_suffix(".json"), record)
    with publish.whole_file(grid) as beside:
        draw_grid(pictures_NHWC, record["prompts"]).save(beside, format="PNG")
    return grid


def chosen_prompts(trained: RunConfig, paths: RunPaths, config: RunConfig) -> list[str]:
    """Return the prompts of `config`, or else captions from all over the validation splits that `trained` names.

    Raises:
        ConfigError: when there are neither.
    """
    if config.sample.prompts:
        return list(config.sample.prompts)
    captions = known_captions(trained.data, paths.latents, config.sample.num_prompts)
    if not captions:
        raise ConfigError(
            f"sample.prompts: empty, and {', '.join(dataset_places(trained, paths))} has no validation captions to take instead; "
            'give prompts, for instance sample.prompts=["a red house"]'
        )
    return captions


def grid_record(generator: Generator, config: RunConfig, prompts: Sequence[str]) -> dict[str, Any]:
    """Return what is needed to paint the grid again, as plain JSON data."""
    trained, sample = generator.trained, json.loads(config.sample.model_dump_json())
    _, truncated_N = generator.text_encoder.tokenize(prompts)
    return {
        **{name: sample[name] for name in ("seed", "sampler", "steps", "guidance_scale", "weights")},
        "prompts": list(prompts),
        "truncated": truncated_N.tolist(),
        "checkpoint": trained.checkpoint.name,
        "step": trained.step,
        "samples": trained.samples,
        "data_digest": trained.data_digest,
        "autoencoder": generator.autoencoder.digest,
        "text_encoder": generator.text_encoder.digest,
        "tokenizer": generator.text_encoder.tokenizer_digest,
    }


@dataclass(frozen=True)
class Cell:
    """The part of a grid that holds one picture of `width` x `height` pixels and its caption."""

    width: int
    height: int

    @property
    def zoom(self) -> int:
        """Whole factor by which small pictures are enlarged, so that a caption fits under them."""
        return math.ceil(NARROWEST_CELL / self.width)

    @property
    def step_x(self) -> int:
        """Pixels from one picture's left edge to the next one's."""
        return self.width * self.zoom + MARGIN

    @property
    def step_y(self) -> int:
        """Pixels from one picture's top edge to the next one's."""
        return self.height * self.zoom + LINES * LINE_HEIGHT + MARGIN


def draw_grid(pictures_NHWC: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """Return uint8 pictures [N, H, W, 3] as an image of about equally many rows and columns, captions below."""
    count, height, width, _ = pictures_NHWC.shape
    cell, columns = Cell(width, height), math.ceil(math.sqrt(count))
    size = (
        columns * cell.step_x + MARGIN,
        math.ceil(count / columns) * cell.step_y + MARGIN,
    )
    grid = Image.new("RGB", size, BACKGROUND)
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(FONT_SIZE)
    for place, (picture, caption) in enumerate(zip(pictures_NHWC, captions, strict=True)):
        left = MARGIN + place % columns * cell.step_x
        top = MARGIN + place // columns * cell.step_y
        enlarged = Image.fromarray(picture).resize(
            (width * cell.zoom, height * cell.zoom), Image.Resampling.NEAREST
        )
        grid.paste(enlarged, (left, top))
        for number, line in enumerate(wrapped(caption, width * cell.zoom, font)):
            pen.text((left, top + enlarged.height + 2 + number * LINE_HEIGHT), line, INK, font)
    return grid


def wrapped(caption: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Return the caption as at most three lines of at most `width` pixels; what does not fit ends in "..."."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    shown = [_cut(line, width, font) for line in lines[:LINES]]
    if len(lines) > LINES:
        shown[-1] = _cut(f"{lines[LINES - 1]} {lines[LINES]}...", width, font)
    return shown


def _cut(line: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.rstrip(".")
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1].rstrip()
    return f"{line}..."


def _write_pictures(folder: Path, pictures_NHWC: np.ndarray) -> None:
    with publish.whole_folder(folder) as beside:
        for number, picture in enumerate(pictures_NHWC):
            Image.fromarray(picture).save(beside / f"{number:03d}.png")
