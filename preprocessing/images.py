"""From untrusted image bytes to a square of uint8 pixels. The only Pillow of this package.

PNG, JPEG and WebP are told by their content and nothing else is ever opened. The size in the header is judged
before a pixel is decoded. Then: first frame, transparency laid over the configured background, 16 bits scaled
to 8 (never clipped), CMYK and grey to RGB, EXIF orientation applied, the centre square of the short side resized
with an antialiasing filter.
"""

import hashlib
import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from preprocessing.filters import Captions, Failure, Rejection, Rules, captions_of, size_problem
from preprocessing.sources import RawSample

FORMATS = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}
OTHER_FORMATS = (
    *(b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"%PDF", b"%!PS", b"\xc5\xd0\xd3\xc6"),
    *(b"<svg", b"\0\0\1\0", b"8BPS", b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ", b"\x76\x2f\x31\x01"),
)
SUFFIXES = {"PNG": {"png"}, "JPEG": {"jpg", "jpeg"}, "WEBP": {"webp"}}
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, zlib.error)
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DIRECT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "La", "RGBa", "YCbCr"})


@dataclass(frozen=True)
class Square:
    """A picture ready for the encoder: `pixels` uint8 [S,S,3] and where they come from."""

    pixels: np.ndarray
    original_height: int
    original_width: int
    crop: tuple[int, int, int, int]
    """(top, left, height, width) in pixels of the picture as it is shown, before resizing."""
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class PreparedSample:
    """A sample that passed every filter, with all that the tables will say of it."""

    key: str
    source_key: str
    source: str
    source_sha256: str
    square: Square
    captions: tuple[str, ...]
    remarks: tuple[str, ...]
    """Things worth counting that did not reject it: animated, upscaled, cut_caption, renamed_key, ..."""


def prepare_sample(raw: RawSample, rules: Rules) -> PreparedSample | Rejection | Failure:
    """Return the sample with its captions cleaned and its picture decoded, or why there is none."""
    if raw.problem is not None:
        return Rejection(raw.problem)
    captions = captions_of(raw, rules.max_captions)
    if isinstance(captions, Rejection):
        return captions
    try:
        square = prepare_image(raw.image, rules)
    except MemoryError:  # the machine's trouble, not the sample's: stop and let it be tried again
        raise
    except Exception as error:  # a decoder's bug must cost one sample, and be counted
        return Failure(type(error).__name__)
    if isinstance(square, Rejection):
        return square
    digest = hashlib.sha256(raw.image).hexdigest()
    remarks = _remarks(raw, captions, square)
    return PreparedSample(raw.key, raw.source_key, raw.source, digest, square, captions.kept, remarks)


def _remarks(raw: RawSample, captions: Captions, square: Square) -> tuple[str, ...]:
    own = ["renamed_key"] * (raw.key != raw.source_key) + ["ignored_members"] * raw.ignored_members
    return (*own, *captions.remarks, *square.remarks)


def prepare_image(payload: bytes, rules: Rules) -> Square | Rejection:
    """Return the picture as a square of `rules.image_size` pixels, or the reason why it is not used."""
    kind = image_format(payload)
    if isinstance(kind, Rejection):
        return kind
    try:
        with warnings.catch_warnings():
            # Remarks on broken EXIF, and on large pictures: our own bound is checked below, before decoding.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(payload), formats=[kind]) as image:
                problem = size_problem(image.height, image.width, rules)
                return Rejection(problem) if problem else _square(image, rules)
    except Image.DecompressionBombError:
        return Rejection("too_many_pixels")
    except UnidentifiedImageError:
        return Rejection("corrupt")
    except DECODE_ERRORS as error:
        return Rejection(_decode_reason(error))


def image_format(payload: bytes) -> str | Rejection:
    """Return "PNG", "JPEG" or "WEBP" by the first bytes, or the rejection of anything else."""
    if not payload:
        return Rejection("empty")
    for magic, kind in FORMATS.items():
        if payload.startswith(magic):
            return kind
    if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
        return "WEBP"
    known = payload.lstrip().startswith(OTHER_FORMATS) or payload.startswith(OTHER_FORMATS)
    return Rejection("format" if known or payload[4:8] == b"ftyp" else "not_image")


def _decode_reason(error: Exception) -> str:
    said = str(error).lower()
    if "too large" in said or "too much memory" in said:  # Pillow's bounds on compressed text and profiles
        return "text_chunk_bomb"
    return "truncated" if "truncated" in said else "corrupt"


def _square(image: Image.Image, rules: Rules) -> Square | Rejection:
    remarks = ["animated"] * bool(getattr(image, "is_animated", False))
    image.load()
    if image.mode not in DIRECT_MODES and not image.mode.startswith("I;16"):
        return Rejection("pixel_format")
    turn = ORIENTATIONS.get(_orientation(image))
    flat = _flatten(_eight_bits(image), rules.background)
    if turn is not None:
        flat = flat.transpose(turn)
    width, height = flat.size
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    size = (rules.image_size, rules.image_size)
    box = (left, top, left + side, top + side)
    small = flat.resize(size, Image.Resampling.BICUBIC, box=box)
    remarks += ["upscaled"] * (side < rules.image_size)
    return Square(np.asarray(small), height, width, (top, left, side, side), tuple(remarks))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except (*DECODE_ERRORS, TypeError, KeyError):  # broken EXIF is common and says nothing about the pixels
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the picture with 16-bit grey scaled to 8 bits: Pillow's own conversion clips everything to white."""
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return Image.fromarray(grey)
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return RGB with transparency laid over `background`: dropping alpha shows whatever colour lies under it."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    below = Image.new("RGBA", image.size, (*background, 255))
    below.alpha_composite(image.convert("RGBA"))
    return below.convert("RGB")


def png_bytes(pixels: np.ndarray) -> bytes:
    """Return uint8 [H,W,3] as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
