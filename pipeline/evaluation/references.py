"""Real pictures to compare with: a folder of image files, each cut to the shape that the network paints."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.errors import ConfigError, DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
VALIDATION = "decoded validation latents"


def reference_files(folder: Path) -> list[Path]:
    """Return the pictures in `folder` and below, in the order of their names.

    Raises:
        ConfigError: when there is no such folder, or it holds fewer than two pictures.
    """
    if not folder.is_dir():
        raise ConfigError(f"evaluate.reference: {folder} is not a folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(found) < 2:
        raise ConfigError(
            f"evaluate.reference: {folder} holds {len(found)} pictures ({', '.join(SUFFIXES)}); at least 2 are needed"
        )
    return found


def reference_pictures(files: list[Path], height: int, width: int) -> np.ndarray:
    """Return the pictures, uint8 [N, height, width, 3]: the centre of the right shape, resized; transparency on white.

    Raises:
        DataError: naming a file that is no readable picture.
    """
    return np.stack([_picture(path, height, width) for path in files])


def _picture(path: Path, height: int, width: int) -> np.ndarray:
    try:
        with Image.open(path, formats=FORMATS) as opened:
            image = opened.convert("RGBA") if opened.has_transparency_data else opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable picture ({error})") from None
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    if image.size == (width, height):
        return np.asarray(image)
    scale = min(image.width / width, image.height / height)
    wide, high = width * scale, height * scale
    left, top = (image.width - wide) / 2, (image.height - high) / 2
    box = (left, top, left + wide, top + high)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
