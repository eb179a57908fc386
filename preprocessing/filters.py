"""Which samples are used: captions are cleaned, and each sample that is not kept gets the name of its reason.

A missing or empty caption rejects the sample (`no_caption`, `empty_caption`): what share of the training is
unconditional is decided at training time by caption dropout, not by gaps in the data.
"""

import html
import json
import unicodedata
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import EncodeConfig
from preprocessing.sources import RawSample

MAX_CAPTION_CHARACTERS = 2000
"""Beyond what any text encoder reads (77 tokens are about 400); a longer one would pad the whole segment's json."""


@dataclass(frozen=True)
class Rejection:
    """The sample is not usable, for a reason that has a name."""

    reason: str


@dataclass(frozen=True)
class Failure:
    """Something broke that should not have; `error` is the exception's name."""

    error: str


@dataclass(frozen=True)
class Rules:
    """All settings that decide which samples are used and what becomes of their pixels and captions."""

    image_size: int
    background: tuple[int, int, int]
    min_side: int
    max_aspect: float
    max_pixels: int
    max_captions: int

    @classmethod
    def from_config(cls, encode: EncodeConfig) -> "Rules":
        """Return the rules of the `encode` section."""
        return cls(
            encode.image_size,
            encode.background,
            encode.min_side,
            encode.max_aspect,
            encode.max_pixels,
            encode.max_captions,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Rules":
        """Return the rules stored in a fingerprint or manifest; other entries there are left alone."""
        chosen = {name: data[name] for name in cls.__dataclass_fields__}
        return cls(**{**chosen, "background": tuple(chosen["background"])})

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "background": list(self.background)}


@dataclass(frozen=True)
class Captions:
    """The captions that are kept, at least one, and remarks that are counted."""

    kept: tuple[str, ...]
    remarks: tuple[str, ...]


def captions_of(raw: RawSample, max_captions: int) -> Captions | Rejection:
    """Return the sample's captions: its `.txt`, or else the `caption` (text or list of texts) of its `.json`.

    Entities are unescaped once, text is NFC, runs of white space and control characters are one space.
    """
    found = _stored_captions(raw)
    if isinstance(found, Rejection):
        return found
    if not all(_is_storable(text) for text in found):
        return Rejection("encoding")
    cleaned = list(dict.fromkeys(text for text in map(clean_caption, found) if text))
    if not cleaned:
        return Rejection("empty_caption")
    cut = [text[:MAX_CAPTION_CHARACTERS].rstrip() for text in cleaned[:max_captions]]
    remarks = ["surplus_captions"] * (len(cleaned) > max_captions)
    remarks += ["cut_caption"] * (cut != cleaned[:max_captions])
    return Captions(tuple(cut), tuple(remarks))


def clean_caption(text: str) -> str:
    """Return the caption as it is stored and tokenized; "" if nothing is left."""
    text = unicodedata.normalize("NFC", html.unescape(text))
    blanked = "".join(" " if unicodedata.category(character) == "Cc" else character for character in text)
    return " ".join(blanked.split())


def size_problem(height: int, width: int, rules: Rules) -> str | None:
    """Return why a picture of this many pixels is not used, or None; called before anything is decoded."""
    if height < 1 or width < 1 or min(height, width) < rules.min_side:
        return "too_small"
    if height * width > rules.max_pixels:
        return "too_many_pixels"
    if max(height, width) > rules.max_aspect * min(height, width):
        return "aspect"
    return None


def _is_storable(text: str) -> bool:
    """Return whether the text has neither NUL (binary data) nor half a surrogate pair (no UTF-8 for it)."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _stored_captions(raw: RawSample) -> list[str] | Rejection:
    stored = raw.text if raw.text is not None else raw.json
    if stored is None:
        return Rejection("no_caption")
    try:
        text = stored.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Rejection("encoding")
    return [text] if raw.text is not None else _json_captions(text)


def _json_captions(text: str) -> list[str] | Rejection:
    try:
        described = json.loads(text)
    except (ValueError, RecursionError):
        return Rejection("bad_json")
    if not isinstance(described, dict):
        return Rejection("bad_json")
    caption = described.get("caption")
    if caption is None:
        return Rejection("no_caption")
    captions = caption if isinstance(caption, list) else [caption]
    if not all(isinstance(entry, str) for entry in captions):
        return Rejection("caption_type")
    return captions
