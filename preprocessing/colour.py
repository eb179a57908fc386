"""From whatever colours a picture is stored in to 8-bit sRGB on a background.

Palettes become colours and 16 bits are scaled to 8 (never clipped) before the picture is resized; embedded
profiles are converted to sRGB and transparency is laid on the background after it, when few pixels are left.
"""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

DIRECT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "La", "RGBa", "YCbCr"})
SPACE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
CONVERTED, UNUSABLE = "icc_converted", "icc_unusable"
SAME_WITHIN = 2
"""Levels of 255: a profile that moves no colour further is sRGB under another name."""


def is_readable_mode(mode: str) -> bool:
    """Return whether pixels of Pillow's `mode` can become 8-bit colours without a guess about their range."""
    return mode in DIRECT_MODES or mode.startswith("I;16")


def resizable(image: Image.Image) -> Image.Image:
    """Return the picture as L, LA, RGB, RGBA or CMYK: modes whose pixels may be averaged."""
    image = _eight_bits(image)
    if image.has_transparency_data:
        return image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


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


def flat_srgb(
    image: Image.Image, profile: bytes | None, background: tuple[int, int, int]
) -> tuple[Image.Image, tuple[str, ...]]:
    """Return a `resizable` picture as RGB in sRGB with transparency laid over `background`, and remarks.

    Dropping alpha would show whatever colour lies under it; a picture without profile is taken for sRGB.
    """
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image if alpha is None else image.convert("L" if image.mode == "LA" else "RGB")
    colours, remarks = _to_srgb(colours, profile) if profile else (colours, ())
    colours = colours.convert("RGB")
    if alpha is None:
        return colours, remarks
    below = Image.new("RGBA", image.size, (*background, 255))
    colours.putalpha(alpha)
    below.alpha_composite(colours)
    return below.convert("RGB"), remarks


@dataclass(frozen=True)
class _Profile:
    """A readable profile: the mode it speaks of, and the way to sRGB, None where there is nothing to do."""

    mode: str
    transform: ImageCms.ImageCmsTransform | None


def _to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    found = _read_profile(profile)
    if found is None or (image.mode != found.mode and (image.mode, found.mode) != ("L", "RGB")):
        return image, (UNUSABLE,)  # a grey picture with an RGB profile is common, other mixtures are mistakes
    if found.transform is None:
        return image, ()
    converted = ImageCms.applyTransform(image.convert(found.mode), found.transform)
    assert converted is not None  # only in-place calls return nothing
    return converted, (CONVERTED,)


@lru_cache(maxsize=64)
def _read_profile(profile: bytes) -> _Profile | None:
    """Return the transform to sRGB (relative colorimetric, black point compensated); None if it is no profile."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = SPACE_MODES.get(source.profile.xcolor_space)
        if mode is None:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return _Profile(mode, None if _changes_nothing(transform, mode) else transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether the colours of a coarse grid stay where they are: most embedded profiles are sRGB itself."""
    if mode == "CMYK":
        return False
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(27, 27, 3)
    probe = Image.fromarray(grid if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    return bool(np.abs(moved - np.asarray(probe.convert("RGB"))).max() <= SAME_WITHIN)
