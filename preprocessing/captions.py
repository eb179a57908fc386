"""Captions as they are stored and tokenized: cleaned the same way every time, or rejected by name.

What share of the training is unconditional is decided at training time by caption dropout, so a missing or empty
caption rejects the sample unless `empty_caption` says otherwise.
"""

import html
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from preprocessing.filters import Rejection, Rules
from preprocessing.samples import RawSample

MAX_CAPTION_CHARACTERS = 2000
"""Beyond what any text encoder reads (77 tokens are about 400); a longer one would pad the whole segment's json."""


@dataclass(frozen=True)
class Captions:
    """The captions that are kept, at least one, and remarks that are counted."""

    kept: tuple[str, ...]
    remarks: tuple[str, ...]


def described(raw: RawSample) -> dict[str, Any] | Rejection:
    """Return the sample's columns: those of its table, overlaid with its `.json`."""
    if raw.json is None:
        return dict(raw.columns)
    try:
        found = json.loads(raw.json.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Rejection("encoding")
    except (ValueError, RecursionError):
        return Rejection("bad_json")
    return {**raw.columns, **found} if isinstance(found, dict) else Rejection("bad_json")


def was_squared(columns: Mapping[str, Any]) -> bool:
    """Return whether img2dataset made a square of a picture that was none: padded with white bars, or cropped."""
    names = ("width", "height", "original_width", "original_height")
    width, height, original_width, original_height = (columns.get(name) for name in names)
    known = all(isinstance(side, int) for side in (width, original_width, original_height))
    return known and width == height and original_width != original_height


def captions_of(raw: RawSample, rules: Rules, columns: Mapping[str, Any] | Rejection) -> Captions | Rejection:
    """Return the captions: the `.txt`, or else the first of `caption_columns` (a text or a list of texts).

    Entities are unescaped once, text is NFC, runs of white space and control characters are one space.
    """
    found = _stored_captions(raw, rules, columns)
    if isinstance(found, Rejection):
        kept_empty = found.reason == "no_caption" and rules.empty_caption == "unconditional"
        return Captions(("",), ("no_caption",)) if kept_empty else found
    if not all(_is_storable(text) for text in found):
        return Rejection("encoding")
    cleaned = list(dict.fromkeys(text for text in map(clean_caption, found) if text))
    if not cleaned:
        kept_empty = rules.empty_caption == "unconditional"
        return Captions(("",), ("empty_caption",)) if kept_empty else Rejection("empty_caption")
    cut = [text[:MAX_CAPTION_CHARACTERS].rstrip() for text in cleaned[: rules.max_captions]]
    remarks = ["surplus_captions"] * (len(cleaned) > rules.max_captions)
    remarks += ["cut_caption"] * (cut != cleaned[: rules.max_captions])
    return Captions(tuple(cut), tuple(remarks))


def clean_caption(text: str) -> str:
    """Return the caption as it is stored and tokenized; "" if nothing is left."""
    text = unicodedata.normalize("NFC", html.unescape(text))
    blanked = "".join(" " if unicodedata.category(character) == "Cc" else character for character in text)
    return " ".join(blanked.split())


def _is_storable(text: str) -> bool:
    """Return whether the text has neither NUL (binary data) nor half a surrogate pair (no UTF-8 for it)."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _stored_captions(
    raw: RawSample, rules: Rules, columns: Mapping[str, Any] | Rejection
) -> list[str] | Rejection:
    if raw.text is not None:
        try:
            return [raw.text.decode("utf-8-sig")]
        except UnicodeDecodeError:
            return Rejection("encoding")
    if isinstance(columns, Rejection):
        return columns
    caption = next((columns[name] for name in rules.caption_columns if columns.get(name) is not None), None)
    if caption is None:
        return Rejection("no_caption")
    captions = caption if isinstance(caption, list) else [caption]
    return captions if all(isinstance(entry, str) for entry in captions) else Rejection("caption_type")
