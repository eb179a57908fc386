"""What a picture's header says, and for a few what decoding says, under the names that `encode` uses."""

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from preprocessing.filters import Failure, Rejection, Rules
from preprocessing.image_header import cost_problem, image_format
from preprocessing.images import DECODE_ERRORS, ORIENTATION_TAG, Picture, prepare_image

BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}
LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green, blue in a pixel's lightness (ITU-R BT.601)."""
THUMBNAIL = 32
SEEN_ALPHA = 32
"""Of 255: what is more transparent shows nothing of itself."""
ANY = Rules(
    image_size=64,
    background=(255, 255, 255),
    min_side=1,
    max_aspect=1e9,
    max_pixels=64_000_000,
    max_captions=5,
)
"""Rules that refuse no size and no shape: those are what the proposal decides."""


@dataclass(frozen=True)
class Header:
    """A picture by its header: sides in pixels as it is shown, Pillow's mode, and a digest of its file."""

    height: int
    width: int
    mode: str
    kind: str
    """PNG, JPEG or WEBP."""
    transparent: bool
    animated: bool
    file_bytes: int
    digest: str

    @property
    def short(self) -> int:
        """The shorter side in pixels."""
        return min(self.height, self.width)

    @property
    def aspect(self) -> float:
        """The longer side over the shorter one."""
        return max(self.height, self.width) / max(1, self.short)


def read_header(payload: bytes) -> Header | Rejection:
    """Return what the first bytes say without decoding a pixel, or why `encode` would not open the picture."""
    kind = image_format(payload)
    if isinstance(kind, Rejection):
        return kind
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(payload), formats=[kind]) as image:
                return _header(image, kind, payload)
    except Image.DecompressionBombError:
        return Rejection("too_many_pixels")
    except (UnidentifiedImageError, *DECODE_ERRORS):
        return Rejection("corrupt")


def _header(image: Image.Image, kind: str, payload: bytes) -> Header | Rejection:
    width, height = image.size
    problem = "too_many_pixels" if height * width > ANY.max_pixels else cost_problem(payload, height, width)
    if problem is not None:
        return Rejection(problem)
    if kind == "JPEG" and _orientation(image) >= 5:
        height, width = width, height
    return Header(
        height,
        width,
        image.mode,
        kind,
        transparent=image.has_transparency_data,
        animated=kind != "JPEG" and bool(getattr(image, "is_animated", False)),
        file_bytes=len(payload),
        digest=hashlib.sha256(payload).hexdigest(),
    )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except (*DECODE_ERRORS, TypeError, KeyError):
        return 1


def decode_problem(payload: bytes) -> str | None:
    """Return why `encode` could not decode the picture whatever its rules on sizes, or None."""
    try:
        outcome: Picture | Rejection | Failure = prepare_image(payload, ANY)
    except MemoryError:
        raise
    except Exception as error:
        return type(error).__name__
    return outcome.reason if isinstance(outcome, Rejection) else None


def lightness(payload: bytes) -> float | None:
    """Return the mean lightness, 0 to 1, of what is not transparent in a decodable picture; None if nothing is."""
    with Image.open(io.BytesIO(payload)) as image:
        small = image.convert("RGBA").resize((THUMBNAIL, THUMBNAIL))
    pixels_HWC = np.asarray(small, np.float64)
    alpha_HW = pixels_HWC[..., 3]
    if alpha_HW.max() < SEEN_ALPHA or alpha_HW.min() == 255:
        return None
    luma_HW = pixels_HWC[..., :3] @ LUMA
    return float((luma_HW * alpha_HW).sum() / alpha_HW.sum() / 255)


def best_background(lights: list[float]) -> tuple[str, float]:
    """Return the background that pictures of these lightnesses stand out from best, and how far the 10th percentile does."""

    def contrast(name: str) -> float:
        ground = float(np.asarray(BACKGROUNDS[name]) @ LUMA) / 255
        return float(np.quantile([abs(light - ground) for light in lights], 0.1))

    # White, the usual page, unless another is clearly better.
    best = max(BACKGROUNDS, key=lambda name: contrast(name) + 0.1 * (name == "white"))
    return best, contrast(best)
