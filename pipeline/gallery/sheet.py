"""Sheets of pictures in strips, each picture with a word below it, and the page that shows them all."""

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.page import picture, render_page, sections
from pipeline.sample import BACKGROUND, FONT_SIZE, INK, LINE_HEIGHT, MARGIN, Cell, wrapped

LABEL_LINES = 2


@dataclass(frozen=True)
class Tile:
    """One picture, uint8 [height, width, 3], and what stands below it."""

    picture_HWC: np.ndarray
    label: str


@dataclass(frozen=True)
class Strip:
    """Pictures of one prompt, side by side."""

    prompt: str
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Sheet:
    """A strip for each prompt; all pictures of a sheet have one size."""

    name: str
    title: str
    about: str
    strips: Sequence[Strip]


def draw_sheet(sheet: Sheet) -> Image.Image:
    """Return the sheet as an image: each prompt above its strip, each label under its picture."""
    height, width, _ = sheet.strips[0].tiles[0].picture_HWC.shape
    cell, columns = Cell(width, height), max(len(strip.tiles) for strip in sheet.strips)
    strip_height = height * cell.zoom + (1 + LABEL_LINES) * LINE_HEIGHT + MARGIN
    size = (columns * cell.step_x + MARGIN, len(sheet.strips) * strip_height + MARGIN)
    image = Image.new("RGB", size, BACKGROUND)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE)
    for row, strip in enumerate(sheet.strips):
        top = MARGIN + row * strip_height
        pen.text((MARGIN, top), wrapped(strip.prompt, size[0] - 2 * MARGIN, font)[0], INK, font)
        for column, tile in enumerate(strip.tiles):
            _draw_tile(image, tile, cell, MARGIN + column * cell.step_x, top + LINE_HEIGHT)
    return image


def _draw_tile(image: Image.Image, tile: Tile, cell: Cell, left: int, top: int) -> None:
    width, height = cell.width * cell.zoom, cell.height * cell.zoom
    image.paste(
        Image.fromarray(tile.picture_HWC).resize((width, height), Image.Resampling.NEAREST), (left, top)
    )
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE)
    for number, line in enumerate(wrapped(tile.label, width, font)[:LABEL_LINES]):
        pen.text((left, top + height + 2 + number * LINE_HEIGHT), line, INK, font)


def gallery_page(run: str, about: str, sheets: Sequence[Sheet]) -> str:
    """Return one static HTML page with every sheet; `about` says of what weights and settings they are."""
    parts = []
    for sheet in sheets:
        stream = io.BytesIO()
        draw_sheet(sheet).save(stream, format="PNG")
        shown = picture(stream.getvalue(), sheet.title)
        parts.append((sheet.title, f"<p>{html.escape(sheet.about)}</p>{shown}"))
    return render_page(run, sections(parts), about="gallery", lead=f"<p>{html.escape(about)}</p>")
