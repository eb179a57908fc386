"""The names of samples: which part of a file name is the key, which keys are refused, what the output calls them."""

import hashlib
import re
import unicodedata

from pipeline.latents.record import MAX_KEY_LENGTH

SAFE_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}")
READABLE_LENGTH = 60


def split_name(name: str) -> tuple[str, str]:
    """Return (key, suffix in lower case without its dot) of a file name; the key ends at the last dot."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    key, dot, suffix = base.rpartition(".")
    if not dot:
        key, suffix = base, ""
    return (f"{folder}/{key}" if folder or name.startswith("/") else key), suffix.lower()


def is_bad_key(source_key: str) -> bool:
    """Return whether the key is empty, hidden, absolute, climbs out of its folder, or is not clean text."""
    parts = source_key.split("/")
    return (
        any(part in ("", ".", "..") for part in parts)
        or parts[-1].startswith(".")
        or "\\" in source_key
        or re.match(r"[A-Za-z]:", source_key) is not None
        or any(unicodedata.category(character) in ("Cc", "Cs") for character in source_key)
    )


def output_key(source_key: str) -> str:
    """Return the key itself if every tar reader keeps it whole, else a readable part of it with its hash.

    Dots would be taken for the begin of the suffix, slashes for folders, and non-ASCII or long names would add
    a pax header and so move every later sample.
    """
    if SAFE_KEY.fullmatch(source_key):
        return source_key
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", source_key).strip("_")[:READABLE_LENGTH]
    digest = hashlib.sha256(source_key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{readable}-{digest}" if readable else digest


def shown(name: str) -> str:
    """Return the name with bytes that are not UTF-8 written as escapes: tables and json hold text only."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
