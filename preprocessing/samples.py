"""What an input shard is: files or rows that become raw samples, bytes and names, nothing decoded yet.

The key of a file is its name up to the LAST dot, so `cat1.0.jpg` and `cat1.5.jpg` are two samples. The members
of a sample stand side by side. What is wrong with a sample's files is noted in `RawSample.problem` and its bytes
are left alone; damage to the shard itself condemns all of it, because only then do the counts stay exact.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from preprocessing.keys import is_bad_key, output_key, shown, split_name
from preprocessing.strict_tar import Member

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
OTHER_IMAGE_SUFFIXES = frozenset(
    "gif bmp tif tiff avif heic heif svg eps ps pdf wmf emf jxl jp2 j2k ico psd exr hdr".split()
)
FORBIDDEN_SUFFIXES = frozenset("pyd pickle pkl pth pt ckpt dill joblib".split())
MAX_IMAGE_BYTES = 256 << 20
MAX_TEXT_BYTES = 1 << 20
NO_COLUMNS: Mapping[str, Any] = {}


@dataclass(frozen=True)
class RawSample:
    """What the input says about one sample. With a `problem` (a reason to reject it) the bytes stay unread."""

    key: str
    """The name in the output: safe for any tar reader."""
    source_key: str
    """The name in the input."""
    source: str
    """The input shard's or the picture's file name."""
    problem: str | None = None
    image: bytes = b""
    text: bytes | None = None
    json: bytes | None = None
    suffix: str = ""
    """What the picture's name ends in, in lower case; "" where it has no name of its own."""
    ignored_members: int = 0
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What a table of the input says of this sample: the parquet beside the tar, metadata.*, a parquet shard."""

    @cached_property
    def image_sha256(self) -> str:
        """The digest of the picture's file, hexadecimal: computed once, by whoever asks first."""
        return hashlib.sha256(self.image).hexdigest()


class SamplesDigest:
    """One sha256 over all that is read of a shard, sample by sample in input order: equal digests, equal output."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, raw: RawSample) -> None:
        """Take the next sample."""
        lengths = [None if part is None else len(part) for part in (raw.text, raw.json)]
        columns = {str(name): str(value) for name, value in raw.columns.items()}
        named = [raw.source_key, raw.problem, raw.suffix, raw.ignored_members]
        head = json.dumps([*named, raw.image_sha256, *lengths, columns], sort_keys=True)
        for part in (head.encode(), raw.text or b"", raw.json or b""):
            self._sha.update(part)

    def hexdigest(self) -> str:
        """Return the digest of what has been taken so far."""
        return self._sha.hexdigest()


@dataclass(frozen=True)
class Run:
    """Members that stand side by side under one key."""

    source_key: str
    members: list[tuple[str, Member]] = field(default_factory=list)

    def having(self, suffixes: Container[str]) -> list[Member]:
        """Return the members with one of the suffixes."""
        return [member for suffix, member in self.members if suffix in suffixes]


class InputShard(ABC):
    """The unit of work: one input shard gives one output shard of the same stem."""

    stem: str
    name: str
    """What people call it: the file's name, or the stem."""
    expected: int | None
    """Samples that the input's own marker promises; None where it has none."""
    estimate: int | None
    """About how many samples come, for progress only; None = not known without reading the shard."""

    @abstractmethod
    def size_bytes(self) -> int:
        """Return the bytes of the input, without reading it."""

    @abstractmethod
    def version(self) -> str:
        """Return what changes when the input is written anew, without reading it: local times, a store's etags."""

    @abstractmethod
    def samples(self, only: Container[str] | None = None) -> Iterator[RawSample]:
        """Yield the samples in input order, each with its bytes or its problem; `only` limits to output keys.

        Raises:
            DataError: when the shard is damaged: nothing of it may be published then.
        """

    def digest(self) -> str:
        """Return the digest of all samples, by reading them: for who does not read them anyway.

        Raises:
            DataError: when the shard is damaged.
        """
        digest = SamplesDigest()
        for raw in self.samples():
            digest.add(raw)
        return digest.hexdigest()


class Content(Protocol):
    """The opened files of a shard."""

    @property
    def members(self) -> Sequence[Member]:
        """All files in order."""

    def read(self, member: Member) -> bytes:
        """Return the content of a member."""


class FileShard(InputShard):
    """A shard whose samples are files that share a name: a tar's members, or a stretch of a folder."""

    @abstractmethod
    def opened(self) -> AbstractContextManager[Content]:
        """Open the shard and return all its files in order, complete.

        Raises:
            DataError: when it is damaged, before the first sample: all of it or none of it is used.
        """

    @abstractmethod
    def _label(self, run: Run) -> str:
        """Return what the `source` column says of a sample."""

    def _columns(self, run: Run) -> Mapping[str, Any]:
        """Return what a table beside the files says of a sample."""
        return NO_COLUMNS

    def samples(self, only: Container[str] | None = None) -> Iterator[RawSample]:
        """Yield the samples in input order; see `InputShard.samples`."""
        with self.opened() as content:
            runs = runs_of(content.members)
            appearances = Counter(output_key(run.source_key) for run in runs)
            with_image: set[str] = set()
            for run in runs:
                key = output_key(run.source_key)
                repeated, again = appearances[key] > 1, key in with_image
                if run.having(IMAGE_SUFFIXES):
                    with_image.add(key)
                if only is None or key in only:
                    yield self._raw(run, _problem(run, repeated, again), content)

    def _raw(self, run: Run, problem: str | None, content: Content) -> RawSample:
        source = self._label(run)
        key, source_key = output_key(run.source_key), shown(run.source_key)
        if problem is not None:
            return RawSample(key, source_key, source, problem)
        text, described = run.having({"txt"}), run.having({"json"})
        image = run.having(IMAGE_SUFFIXES)[0]
        return RawSample(
            key,
            source_key,
            source,
            image=content.read(image),
            text=content.read(text[0]) if text else None,
            json=content.read(described[0]) if described else None,
            suffix=split_name(image.name)[1],
            ignored_members=len(run.members) - 1 - len(text) - len(described),
            columns=self._columns(run),
        )


def runs_of(members: Sequence[Member]) -> list[Run]:
    """Return the members grouped by key, as long as equal keys stand side by side."""
    runs: list[Run] = []
    for member in members:
        key, suffix = split_name(member.name)
        if not runs or runs[-1].source_key != key:
            runs.append(Run(key))
        runs[-1].members.append((suffix, member))
    return runs


def _problem(run: Run, repeated: bool, again: bool) -> str | None:
    """Return the first reason why the files of a sample cannot be used, or None."""
    images, texts, described = run.having(IMAGE_SUFFIXES), run.having({"txt"}), run.having({"json"})
    checks = [
        ("bad_key", is_bad_key(run.source_key)),
        ("forbidden_extension", bool(run.having(FORBIDDEN_SUFFIXES))),
        ("member_type", not all(member.is_file for _, member in run.members)),
        ("format", not images and bool(run.having(OTHER_IMAGE_SUFFIXES))),
        ("orphan", not images),
        ("duplicate_key", again),
        ("duplicate_field", len(images) > 1 or len(texts) > 1 or len(described) > 1),
        ("orphan", repeated and not texts and not described),  # its caption stands elsewhere under its key
        ("image_too_large", any(member.size > MAX_IMAGE_BYTES for member in images)),
        ("caption_too_large", any(member.size > MAX_TEXT_BYTES for member in texts + described)),
    ]
    return next((reason for reason, found in checks if found), None)


def samples_in(members: Sequence[Member]) -> int:
    """Return how many keys have a picture: what img2dataset counts as a success."""
    names = (split_name(member.name) for member in members)
    return len({key for key, suffix in names if suffix in IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES})
