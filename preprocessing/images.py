"""From untrusted image bytes to uint8 pixels of a bucket's shape, and from a raw sample to a prepared one.

PNG, JPEG and WebP are told by their content and nothing else is ever opened. Header and size are judged before a
pixel is decoded. Then: first frame, the centred part of the bucket's shape resized with an antialiasing filter
(decoded at 1/2, 1/4 or 1/8 by the JPEG decoder where that still covers the target), EXIF orientation, sRGB,
transparency laid over the configured background.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.errors import DataError
from preprocessing.buckets import Bucket, best_bucket, crop_box, lost_share
from preprocessing.captions import Captions, captions_of, described, was_squared
from preprocessing.colour import flat_srgb, is_readable_mode, resizable
from preprocessing.filters import Failure, Rejection, Rules, column_problem, size_problem
from preprocessing.hashes import difference_hash
from preprocessing.image_header import cost_problem, image_format, scans_problem
from preprocessing.samples import RawSample

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
SCALINGS = (8, 4, 2)
SUFFIX_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
Box = tuple[int, int, int, int]
# Pillow's remarks on broken EXIF, odd palettes and large pictures; our own bounds are checked before decoding. Once for
# the process: pictures are decoded in threads, and a filter set around each would be shared by all of them.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Picture:
    """A picture ready for the encoder: `pixels` uint8 [H,W,3] and where they come from."""

    pixels: np.ndarray
    original_height: int
    original_width: int
    crop: Box
    """(top, left, height, width) in pixels of the picture as it is shown, before resizing."""
    scaling: int
    """The JPEG decoder gave 1/scaling of the sides; 1 = all pixels."""
    remarks: tuple[str, ...]

    @property
    def bucket(self) -> Bucket:
        """(height, width) of the pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]


Decode = Callable[[bytes, Rules], Picture | Rejection | Failure]


@dataclass(frozen=True)
class PreparedSample:
    """A sample that passed every filter, with all that the tables will say of it."""

    key: str
    source_key: str
    source: str
    source_sha256: str
    picture: Picture
    perceptual_hash: str
    captions: tuple[str, ...]
    remarks: tuple[str, ...]
    """Things worth counting that did not reject it: animated, upscaled, cut_caption, renamed_key, other_suffix, ..."""

    @property
    def bucket(self) -> Bucket:
        """(height, width) of the picture in pixels: samples of one batch share it."""
        return self.picture.bucket

    def facts(self) -> dict[str, Any]:
        """Return what the table's row and the json member say about where the sample comes from."""
        return {
            "captions": list(self.captions),
            "original_height": self.picture.original_height,
            "original_width": self.picture.original_width,
            "crop": list(self.picture.crop),
            "source_sha256": self.source_sha256,
        }

    def measures(self) -> dict[str, Any]:
        """Return what the row alone says: the json member of format 1 does not have it."""
        return {
            "scaling": self.picture.scaling,
            "perceptual_hash": self.perceptual_hash,
            "remarks": list(self.remarks),
        }


def prepare_sample(
    raw: RawSample, rules: Rules, decode: Decode | None = None
) -> PreparedSample | Rejection | Failure:
    """Return the sample with its captions cleaned and its picture decoded, or why there is none.

    `decode` stands for `prepare_image`: the same in another process (`isolation`).

    Raises:
        DataError: where a filter wants a column that the sample does not have, and says that this is an error.
    """
    if raw.problem is not None:
        return Rejection(raw.problem)
    try:
        captions = _accepted_captions(raw, rules)
        if isinstance(captions, Rejection):
            return captions
        picture = (decode or prepare_image)(raw.image, rules)
        if not isinstance(picture, Picture):
            return picture
        appearance = difference_hash(picture.pixels)
    except (MemoryError, DataError):  # the machine's or the config's trouble, not the sample's
        raise
    except Exception as error:  # a decoder's bug must cost one sample, and be counted
        return Failure(type(error).__name__)
    remarks = _remarks(raw, captions, picture)
    return PreparedSample(
        raw.key, raw.source_key, raw.source, raw.image_sha256, picture, appearance, captions.kept, remarks
    )


def _accepted_captions(raw: RawSample, rules: Rules) -> Captions | Rejection:
    columns = described(raw)
    captions = captions_of(raw, rules, columns)
    if isinstance(captions, Captions) and isinstance(columns, dict) and was_squared(columns):
        captions = replace(captions, remarks=(*captions.remarks, "squared"))
    if isinstance(captions, Rejection) or not rules.filters:
        return captions
    if isinstance(columns, Rejection):
        return columns
    problem = column_problem(columns, rules.filters, f"{raw.source}: {raw.source_key}")
    return captions if problem is None else Rejection(problem)


def _remarks(raw: RawSample, captions: Captions, picture: Picture) -> tuple[str, ...]:
    own = ["renamed_key"] * (raw.key != raw.source_key) + ["ignored_members"] * raw.ignored_members
    own += ["other_suffix"] * (
        SUFFIX_FORMATS.get(raw.suffix, raw.suffix) not in ("", image_format(raw.image))
    )
    return (*own, *captions.remarks, *picture.remarks)


def prepare_image(payload: bytes, rules: Rules) -> Picture | Rejection:
    """Return the picture in one of the rules' shapes, or the reason why it is not used."""
    kind = image_format(payload)
    if isinstance(kind, Rejection):
        return kind
    try:
        with Image.open(io.BytesIO(payload), formats=[kind]) as image:
            problem = _header_problem(image, payload, rules)
            return Rejection(problem) if problem else _picture(image, kind, rules)
    except Image.DecompressionBombError:
        return Rejection("too_many_pixels")
    except UnidentifiedImageError:
        return Rejection("corrupt")
    except DECODE_ERRORS as error:
        return Rejection(_decode_reason(error))


def _header_problem(image: Image.Image, payload: bytes, rules: Rules) -> str | None:
    problem = size_problem(image.height, image.width, rules)
    problem = problem or cost_problem(payload, image.height, image.width)
    if problem is None and isinstance(image, JpegImageFile) and image.fp is not None:
        progressive = "progressive" in image.info
        return scans_problem(payload, image.fp.tell(), image.layers, progressive)
    return problem


def _decode_reason(error: Exception) -> str:
    said = str(error).lower()
    if "too large" in said or "too much memory" in said:  # Pillow's bounds on compressed text and profiles
        return "text_chunk_bomb"
    return "truncated" if "truncated" in said else "corrupt"


def _picture(image: Image.Image, kind: str, rules: Rules) -> Picture | Rejection:
    if kind != "JPEG":
        image.load()  # PNG may say how it is turned after its pixels
    orientation = _orientation(image)
    stored_height, stored_width = image.height, image.width
    turned = orientation >= 5
    height, width = (stored_width, stored_height) if turned else (stored_height, stored_width)
    bucket, _ = best_bucket(height, width, rules.shapes())
    crop = crop_box(height, width, bucket)
    over = bool(rules.buckets) and lost_share(height, width, crop) > rules.bucket_tolerance
    if over and rules.bucket_overflow == "reject":
        return Rejection("bucket")
    scaling = _decode(image, crop[2:], bucket) if kind == "JPEG" and rules.draft else 1
    image.load()
    if not is_readable_mode(image.mode):
        return Rejection("pixel_format")
    box = _stored_crop(crop, orientation, stored_height, stored_width)
    small = _cut(image, box, scaling, bucket[::-1] if turned else bucket)
    flat, colour_remarks = flat_srgb(small, image.info.get("icc_profile"), rules.background)
    if orientation in ORIENTATIONS:
        flat = flat.transpose(ORIENTATIONS[orientation])
    remarks = ["animated"] * (kind != "JPEG" and bool(getattr(image, "is_animated", False)))
    remarks += ["upscaled"] * (crop[2] < bucket[0] or crop[3] < bucket[1]) + ["bucket_overflow"] * over
    return Picture(np.asarray(flat), height, width, crop, scaling, (*remarks, *colour_remarks))


def _decode(image: Image.Image, crop_size: tuple[int, int], bucket: Bucket) -> int:
    """Tell the JPEG decoder the largest scaling at which the crop still covers the bucket; return it."""
    for scaling in SCALINGS:
        if crop_size[0] >= scaling * bucket[0] and crop_size[1] >= scaling * bucket[1]:
            before = image.size
            image.draft(None, (image.width // scaling, image.height // scaling))
            # Pillow leaves some files (several tiles) as they are and says so by the size only.
            return scaling if image.size != before else 1
    return 1


def _cut(image: Image.Image, box: Box, scaling: int, size: tuple[int, int]) -> Image.Image:
    """Return the part `box` of the stored picture, (top, left, height, width) in full pixels, scaled to `size`.

    Scaled pixels cover exactly `scaling` full ones, also where the last one reaches over the edge.
    """
    top, left, height, width = (side / scaling for side in box)
    edges = (left, top, min(left + width, image.width), min(top + height, image.height))
    return resizable(image).resize(size[::-1], Image.Resampling.BICUBIC, box=edges)


def _stored_crop(crop: Box, orientation: int, stored_height: int, stored_width: int) -> Box:
    """Return where the crop of the shown picture lies in the stored one (EXIF 2.32, tag 0112)."""
    top, left, height, width = crop
    if orientation >= 5:  # rows are columns
        top, left, height, width = left, top, width, height
    if orientation in (3, 4, 6, 7):
        top = stored_height - top - height
    if orientation in (2, 3, 7, 8):
        left = stored_width - left - width
    return top, left, height, width


def _orientation(image: Image.Image) -> int:
    """Return 1 to 8, 1 where the picture says nothing sensible."""
    try:
        found = int(image.getexif().get(ORIENTATION_TAG, 1))
    except (*DECODE_ERRORS, TypeError, KeyError):  # broken EXIF is common and says nothing about the pixels
        return 1
    return found if found in ORIENTATIONS else 1


def png_bytes(pixels: np.ndarray) -> bytes:
    """Return uint8 [H,W,3] as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
