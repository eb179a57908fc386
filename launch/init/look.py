"""What a folder holds, found in seconds: every sample counted, some thousand spread ones read."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.init.captions import CaptionFacts, likely_columns, texts_of
from launch.init.glance import Glance, glances, spread
from launch.init.parquet_rows import unusual_picture_column
from launch.init.pictures import ANY, Header, decode_problem, lightness, read_header
from pipeline.errors import ConfigError, DataError
from pipeline.progress import Progress, progress_bar
from pipeline.storage import is_remote
from preprocessing.captions import described
from preprocessing.filters import Rejection, Rules
from preprocessing.folder_source import FolderShard
from preprocessing.parquet_source import ParquetShard
from preprocessing.samples import InputShard, RawSample
from preprocessing.sources import SourceOptions, list_shards

PICTURES = 3000
"""Read of a source, spread evenly; a smaller source is read whole."""
DECODED_PIXELS = 200_000_000
"""Decoded of them at most, about four seconds of one core."""
OPENED_SHARDS = 256
"""Tars and parquet shards opened at most; what the others hold is in their markers, or estimated by their size."""
OPENED_REMOTE_TARS = 4
"""Of a store, where opening a tar fetches it."""
SHOWN = 24
MAX_TEXT = 2000


@dataclass(frozen=True)
class Example:
    """A sample for the report: its file's bytes and its caption."""

    key: str
    payload: bytes
    caption: str


@dataclass(frozen=True)
class Facts:
    """A source as it was found. Reasons are those of `encode` (`preprocessing.reasons`)."""

    source: str
    kind: str
    shards: int
    opened: int
    damaged: tuple[str, ...]
    samples: int
    exact: bool
    """Whether every sample was counted, by itself or in a marker; else shards not opened are estimated by size."""
    counted: int
    """Samples in the opened shards: what `problems` is of."""
    problems: dict[str, int]
    """Rejected by their names alone."""
    looked: int
    faults: dict[str, int]
    """Of those looked at, rejected by what is in their files."""
    headers: tuple[Header, ...]
    """Of the usable ones."""
    decoded: int
    lights: tuple[float, ...]
    """Mean lightness of what shows in transparent pictures."""
    captions: CaptionFacts
    image_column: str | None
    """encode.image_column, where parquet shards keep their pictures under an unusual name."""
    examples: tuple[Example, ...]
    seconds: float

    @property
    def whole(self) -> bool:
        """Whether every sample was read."""
        return self.exact and self.looked + sum(self.problems.values()) == self.samples

    @property
    def usable(self) -> int:
        """How many samples have picture and caption: exact where all were read, else in proportion."""
        kept = 1 - sum(self.problems.values()) / max(1, self.counted)
        good = len(self.headers) / max(1, self.looked)
        return round(self.samples * kept * good)

    @property
    def concepts(self) -> int:
        """How many different captions there are; where only some were read, as if new ones kept coming at that rate."""
        if self.whole:
            return self.captions.distinct
        return max(
            self.captions.distinct, round(self.usable * self.captions.distinct / max(1, len(self.headers)))
        )

    @property
    def duplicates(self) -> int:
        """How many of the pictures read are byte for byte a picture before."""
        return len(self.headers) - len({header.digest for header in self.headers})


@dataclass
class _Read:
    """A sample that was read and has a header; captions are decided once the columns are known."""

    raw: RawSample
    header: Header
    columns: dict[str, Any]


@dataclass
class _Notes:
    problems: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)
    read: list[_Read] = field(default_factory=list)
    lights: list[float] = field(default_factory=list)
    text_columns: Counter[str] = field(default_factory=Counter)
    kept_payloads: dict[str, bytes] = field(default_factory=dict)
    counted: int = 0
    looked: int = 0
    decoded: int = 0
    decoded_pixels: int = 0


def look_at(source: str, pictures: int = PICTURES) -> Facts:
    """Return what the folder `source` holds, reading at most about `pictures` pictures.

    Raises:
        ConfigError: when the folder cannot be read.
        DataError: when it is no folder, holds nothing that `encode` reads, or nothing usable; one line each.
    """
    started = time.monotonic()
    try:
        shards = list_shards(source, SourceOptions())
        chosen = _chosen(shards)
        notes = _Notes()
        counts: dict[int, int] = {}
        with progress_bar(len(chosen), f"looking at {source}", unit="shard") as progress:
            for place, wanted in _quotas(shards, chosen, pictures).items():
                counts[place] = _look_into(shards[place], wanted, notes, progress)
    except OSError as error:
        raise ConfigError(
            f"init: {source} cannot be read ({error.strerror or error}); mend it or give another folder"
        ) from None
    samples, exact = _total(shards, counts)
    captions, headers, examples = _captioned(notes, source)
    return Facts(
        source=source,
        kind=_kind(shards[0]),
        shards=len(shards),
        opened=len(counts),
        damaged=tuple(notes.damaged),
        samples=samples,
        exact=exact,
        counted=notes.counted,
        problems=dict(notes.problems.most_common()),
        looked=notes.looked,
        faults=dict(notes.faults.most_common()),
        headers=headers,
        decoded=notes.decoded,
        lights=tuple(notes.lights),
        captions=captions,
        image_column=unusual_picture_column(shards[chosen[0]]),
        examples=examples,
        seconds=time.monotonic() - started,
    )


def _kind(shard: InputShard) -> str:
    if isinstance(shard, FolderShard):
        return "folder of pictures"
    return "parquet shards" if isinstance(shard, ParquetShard) else "tars as img2dataset writes them"


def _chosen(shards: Sequence[InputShard]) -> list[int]:
    if isinstance(shards[0], FolderShard):
        return list(range(len(shards)))
    place = str(getattr(shards[0], "place", ""))
    fetched = is_remote(place) and not isinstance(shards[0], ParquetShard)
    return spread(len(shards), OPENED_REMOTE_TARS if fetched else OPENED_SHARDS)


def _quotas(shards: Sequence[InputShard], chosen: Sequence[int], pictures: int) -> dict[int, int]:
    """Return how many pictures are read of each chosen shard: its part of their samples, or equal parts."""
    sizes = [shards[place].estimate or 0 for place in chosen]
    if not all(sizes):
        sizes = [1] * len(chosen)
    return {place: -(-pictures * size // sum(sizes)) for place, size in zip(chosen, sizes, strict=True)}


def _look_into(shard: InputShard, wanted: int, notes: _Notes, progress: Progress) -> int:
    """Note what is in a shard and return how many samples it has; damage is noted and counts none."""
    before = notes.counted
    try:
        for glance in glances(shard, wanted):
            notes.counted += 1
            _note(glance, notes)
    except DataError as error:
        notes.damaged.append(str(error))
    progress.advance(1)
    return notes.counted - before


def _note(glance: Glance, notes: _Notes) -> None:
    raw = glance.raw
    if raw.problem is not None:
        notes.problems[raw.problem] += 1
        return
    if not glance.read:
        if raw.text is None and raw.json is None and not any(map(_is_text, raw.columns.values())):
            notes.problems["no_caption"] += 1
        return
    notes.looked += 1
    columns = described(raw)
    if isinstance(columns, Rejection):
        notes.faults[columns.reason] += 1
        return
    header = read_header(raw.image)
    problem = header.reason if isinstance(header, Rejection) else _decoded_problem(raw, header, notes)
    if problem is not None or isinstance(header, Rejection):
        notes.faults[str(problem)] += 1
        return
    texts = {name: value for name, value in columns.items() if _is_text(value)}
    notes.text_columns.update(texts.keys())
    if len(notes.read) % max(1, PICTURES // (4 * SHOWN)) == 0 or len(notes.read) < SHOWN:
        notes.kept_payloads[f"{len(notes.read)}"] = raw.image
    bare = RawSample(raw.key, raw.source_key, raw.source, text=raw.text)
    notes.read.append(_Read(bare, header, texts))


def _is_text(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(entry, str) for entry in value)
    return isinstance(value, str) and bool(value.strip())


def _decoded_problem(raw: RawSample, header: Header, notes: _Notes) -> str | None:
    pixels = header.height * header.width
    if notes.decoded_pixels + pixels > DECODED_PIXELS:
        return None
    notes.decoded += 1
    notes.decoded_pixels += pixels
    problem = decode_problem(raw.image)
    if problem is None and header.transparent:
        light = lightness(raw.image)
        notes.lights += [] if light is None else [light]
    return problem


def _total(shards: Sequence[InputShard], counts: Mapping[int, int]) -> tuple[int, bool]:
    """Return how many samples all shards have, and whether that is exact."""
    unknown = [place for place, shard in enumerate(shards) if place not in counts and shard.expected is None]
    known = sum(
        counts[place] if place in counts else int(shard.expected or 0) for place, shard in enumerate(shards)
    )
    if not unknown:
        return known, True
    opened_bytes = sum(shards[place].size_bytes() for place in counts)
    unopened_bytes = sum(shards[place].size_bytes() for place in unknown)
    return known + round(sum(counts.values()) * unopened_bytes / max(1, opened_bytes)), False


def _captioned(notes: _Notes, source: str) -> tuple[CaptionFacts, tuple[Header, ...], tuple[Example, ...]]:
    """Return the captions, and headers and examples of the samples that have one.

    Raises:
        DataError: when no sample is usable.
    """
    if notes.damaged and not notes.counted:
        more = f" (and {len(notes.damaged) - 1} more)" if len(notes.damaged) > 1 else ""
        raise DataError(f"{notes.damaged[0]}{more}")
    columns = ANY.caption_columns
    found = [texts_of(read.raw, ANY, read.columns) for read in notes.read]
    if not any(isinstance(texts, tuple) for texts in found):
        likely = likely_columns(notes.text_columns, len(notes.read))
        if likely is not None:
            columns = likely
            rules = Rules(**{**ANY.__dict__, "caption_columns": columns})
            found = [texts_of(read.raw, rules, read.columns) for read in notes.read]
    kept = [(place, texts) for place, texts in enumerate(found) if isinstance(texts, tuple)]
    notes.faults.update(reason for reason in found if isinstance(reason, str))
    if not kept:
        raise DataError(_nothing_usable(notes, source))
    numbers = sorted(len(texts) for _, texts in kept)
    facts = CaptionFacts(
        tuple(texts[0] for _, texts in kept), numbers[-1], numbers[len(numbers) // 2], columns
    )
    shown = [(place, texts) for place, texts in kept if f"{place}" in notes.kept_payloads]
    examples = tuple(
        Example(notes.read[place].raw.key, notes.kept_payloads[f"{place}"], texts[0])
        for place, texts in (shown[number] for number in spread(len(shown), SHOWN))
    )
    return facts, tuple(notes.read[place].header for place, _ in kept), examples


def _nothing_usable(notes: _Notes, source: str) -> str:
    reasons = notes.problems + notes.faults
    said = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    without = reasons["no_caption"] + reasons["empty_caption"]
    if without and without == notes.faults.total() + notes.problems["no_caption"]:
        others = ", ".join(sorted(notes.text_columns)) or "none"
        return (
            f"{source}: none of {notes.counted} samples has a caption ({said}): put NAME.txt beside each picture, or a "
            f"metadata.jsonl with file_name and caption (columns of text found: {others})"
        )
    return (
        f"{source}: none of {notes.counted} samples is usable: {said}; `ldm encode` would reject all of them"
    )
