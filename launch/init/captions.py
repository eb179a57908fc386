"""What the captions are like in any language: how many, how long, how often the same, how many tokens."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preprocessing.captions import captions_of
from preprocessing.filters import Rejection, Rules
from preprocessing.samples import RawSample

PIECES = re.compile(r"[^\W\d_]+|\d|[^\s\w]+|_+")
"""About what CLIP's tokenizer splits at before it looks for merges: letters, single digits, runs of signs."""
BYTE_ENTRIES = 514
"""Entries of a small CLIP vocabulary that are no merges: 256 bytes, the same ending a word, start and end."""
MERGES_A_PIECE = 4
"""Entries spent on a frequent piece, those on the way to it counted; found with emoji and icon captions."""
LETTERS_A_TOKEN = 2
"""Of a piece of ASCII that is not frequent enough to have an entry of its own; other scripts take a token a byte."""
START_AND_END = 2
LIKELY_COLUMNS = ("caption", "text", "prompt", "description", "title", "label", "alt", "tags", "name")
"""Names of columns that hold captions in published data sets, by preference; compared in lower case."""


@dataclass(frozen=True)
class CaptionFacts:
    """Captions of the samples that were read; `all` holds the first of each sample."""

    all: tuple[str, ...]
    most_a_sample: int
    """The largest number of captions of one sample."""
    typical_a_sample: int
    """The median of them."""
    columns: tuple[str, ...]
    """encode.caption_columns under which they were found."""

    @property
    def distinct(self) -> int:
        """How many differ."""
        return len(set(self.all))

    @property
    def repeated(self) -> list[tuple[str, int]]:
        """The most frequent ones with their numbers, those that come once left out."""
        return [(caption, count) for caption, count in Counter(self.all).most_common(10) if count > 1]

    @property
    def longest(self) -> str:
        """The one with the most characters."""
        return max(self.all, key=len, default="")

    def words(self) -> list[int]:
        """Return how many pieces (words, digits, runs of signs) each has."""
        return [len(PIECES.findall(caption)) for caption in self.all]

    def distinct_words(self) -> int:
        """Return how many different pieces there are, in lower case."""
        return len({piece for caption in self.all for piece in PIECES.findall(caption.lower())})


def likely_columns(found: Mapping[str, int], asked: int) -> tuple[str, ...] | None:
    """Return the columns to take captions from where the usual ones are absent; None if no name speaks of a caption.

    `found` says in how many of the `asked` samples a column holds text.
    """
    lower = {name.lower(): name for name in found}
    known = [lower[name] for name in LIKELY_COLUMNS if name in lower and found[lower[name]] * 2 >= asked]
    if known:
        return tuple(known[:2])
    telling = [name for name in found if any(word in name.lower() for word in LIKELY_COLUMNS[:4])]
    return tuple(telling[:1]) or None


def texts_of(raw: RawSample, rules: Rules, columns: Mapping[str, Any]) -> tuple[str, ...] | str:
    """Return the captions of a sample as `encode` cleans them, or the reason why it has none."""
    found = captions_of(raw, rules, dict(columns))
    return found.reason if isinstance(found, Rejection) else found.kept


def estimated_tokens(captions: Sequence[str], vocabulary: int) -> list[int]:
    """Return about how many tokens each caption takes, start and end included, in a vocabulary trained on them.

    The most frequent pieces are one token each as far as the vocabulary goes; the others are taken to pieces. Against
    a byte-pair encoding of as many merges on 2,126 captions: the sum 6 % too high, 96 % no longer than said.
    """
    pieces = [PIECES.findall(caption.lower()) for caption in captions]
    counted = Counter(piece for found in pieces for piece in found)
    whole = {
        piece
        for piece, count in counted.most_common(max(0, vocabulary - BYTE_ENTRIES) // MERGES_A_PIECE)
        if count > 1
    }

    def cost(piece: str) -> int:
        if piece in whole:
            return 1
        return -(-len(piece) // LETTERS_A_TOKEN) if piece.isascii() else len(piece.encode())

    return [START_AND_END + sum(map(cost, found)) for found in pieces]
