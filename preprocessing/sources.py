"""From a folder of shards or pictures to raw samples: bytes and names, nothing decoded yet.

Two layouts are read: WebDataset tars as img2dataset writes them, and a folder of pictures with a `.txt` of the
same name beside each. The key of a file is its name up to the LAST dot, so `cat1.0.jpg` and `cat1.5.jpg` are two
samples. In a tar the members of a sample stand side by side. What is wrong with a sample's files is noted in
`RawSample.problem` and its bytes are left alone; damage to the tar itself condemns the whole shard, because
only then do the counts stay exact.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import DataError
from pipeline.publish import file_digest, json_digest
from preprocessing.keys import is_bad_key, output_key, shown, split_name
from preprocessing.strict_tar import DamagedTarError, Member, walk_tar

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
OTHER_IMAGE_SUFFIXES = frozenset(
    "gif bmp tif tiff avif heic heif svg eps ps pdf wmf emf jxl jp2 j2k ico psd exr hdr".split()
)
FORBIDDEN_SUFFIXES = frozenset("pyd pickle pkl pth pt ckpt dill joblib".split())
SHARD_IMAGES = 1000
MAX_IMAGE_BYTES = 256 << 20
MAX_TEXT_BYTES = 1 << 20
SAFE_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
STATS_SUFFIX = "_stats.json"


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
    ignored_members: int = 0


@dataclass(frozen=True)
class _Run:
    """Members that stand side by side under one key."""

    source_key: str
    members: list[tuple[str, Member]] = field(default_factory=list)

    def having(self, suffixes: Container[str]) -> list[Member]:
        return [member for suffix, member in self.members if suffix in suffixes]


class InputShard(ABC):
    """The unit of work: one input shard gives one output shard of the same stem."""

    stem: str
    expected: int | None
    """Samples that the input's own marker promises; None where it has none."""
    estimate: int | None
    """About how many samples come, for progress only; None = not known without reading the shard."""

    @abstractmethod
    def members(self) -> list[Member]:
        """Return all files of the shard in order, complete, or raise DataError."""

    @abstractmethod
    def size_bytes(self) -> int:
        """Return the bytes of the input, without reading it."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return name, bytes and sha256: equal identities mean equal input."""

    @abstractmethod
    def _file(self, member: Member, stream: BinaryIO | None) -> bytes:
        """Return the content of a member."""

    def _open(self) -> BinaryIO | None:
        return None

    def samples(self, only: Container[str] | None = None) -> Iterator[RawSample]:
        """Yield the samples in input order, each with its bytes or its problem; `only` limits to output keys.

        Raises:
            DataError: when the shard is damaged, before the first sample: all of it or none of it is used.
        """
        runs = _runs(self.members())
        appearances = Counter(output_key(run.source_key) for run in runs)
        with_image: set[str] = set()
        stream = self._open()
        try:
            for run in runs:
                key = output_key(run.source_key)
                repeated, again = appearances[key] > 1, key in with_image
                if run.having(IMAGE_SUFFIXES):
                    with_image.add(key)
                if only is None or key in only:
                    yield self._raw(run, _problem(run, repeated, again), stream)
        finally:
            if stream is not None:
                stream.close()

    def _raw(self, run: _Run, problem: str | None, stream: BinaryIO | None) -> RawSample:
        source = self._label(run)
        key, source_key = output_key(run.source_key), shown(run.source_key)
        if problem is not None:
            return RawSample(key, source_key, source, problem)
        text, described = run.having({"txt"}), run.having({"json"})
        return RawSample(
            key,
            source_key,
            source,
            image=self._file(run.having(IMAGE_SUFFIXES)[0], stream),
            text=self._file(text[0], stream) if text else None,
            json=self._file(described[0], stream) if described else None,
            ignored_members=len(run.members) - 1 - len(text) - len(described),
        )

    @abstractmethod
    def _label(self, run: _Run) -> str:
        """Return what the `source` column says of a sample."""


def _runs(members: list[Member]) -> list[_Run]:
    runs: list[_Run] = []
    for member in members:
        key, suffix = split_name(member.name)
        if not runs or runs[-1].source_key != key:
            runs.append(_Run(key))
        runs[-1].members.append((suffix, member))
    return runs


def _problem(run: _Run, repeated: bool, again: bool) -> str | None:
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
        ("no_caption", not texts and not described),
        ("image_too_large", any(member.size > MAX_IMAGE_BYTES for member in images)),
        ("caption_too_large", any(member.size > MAX_TEXT_BYTES for member in texts + described)),
    ]
    return next((reason for reason, found in checks if found), None)


class TarShard(InputShard):
    """A WebDataset tar, with img2dataset's `STEM_stats.json` beside it if it has one."""

    def __init__(self, path: Path, expected: int | None) -> None:
        self.path, self.stem = path, path.stem
        self.expected = self.estimate = expected

    def members(self) -> list[Member]:
        """Return the tar's members.

        Raises:
            DataError: when the tar is damaged or does not hold the samples that its marker promises; names
                shard and byte, and says how many samples are lost.
        """
        try:
            members = walk_tar(self.path)
        except DamagedTarError as damage:
            read = _samples_in(damage.members)
            raise DataError(f"{damage}; {self._lost(read)}; {self._remedy()}") from None
        read = _samples_in(members)
        if self.expected is not None and read != self.expected:
            raise DataError(
                f"{self.path}: {self._lost(read)} (the tar itself is whole: it is not the one that its "
                f"{STATS_SUFFIX} describes); {self._remedy()}"
            )
        return members

    def _lost(self, read: int) -> str:
        if self.expected is None:
            return f"{read} samples before that, how many are lost is not known (no {STATS_SUFFIX} beside it)"
        missing = self.expected - read
        return f"{self.expected} samples expected, {read} found, " + (
            f"{missing} lost" if missing >= 0 else f"{-missing} too many"
        )

    def _remedy(self) -> str:
        return "none of it is used: fetch the shard again, or move it and its side files out of the folder"

    def size_bytes(self) -> int:
        """Return the size of the tar."""
        return self.path.stat().st_size

    def identity(self) -> dict[str, Any]:
        """Return name, bytes and sha256 of the tar."""
        return {"name": self.path.name, "bytes": self.size_bytes(), "sha256": file_digest(self.path)}

    def _open(self) -> BinaryIO:
        return self.path.open("rb")

    def _file(self, member: Member, stream: BinaryIO | None) -> bytes:
        assert stream is not None
        content = os.pread(stream.fileno(), member.size, member.offset)
        if len(content) != member.size:
            raise DataError(f"{self.path}: {member.name!r} ended early: the file shrank while it was read")
        return content

    def _label(self, run: _Run) -> str:
        return self.path.name


def _samples_in(members: list[Member]) -> int:
    """Return how many keys have a picture: what img2dataset counts as a success."""
    names = (split_name(member.name) for member in members)
    return len({key for key, suffix in names if suffix in IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES})


class FolderShard(InputShard):
    """A stretch of the sorted pictures of a folder, with the files beside them."""

    def __init__(self, root: Path, stem: str, names: list[str]) -> None:
        self.root, self.stem, self.names, self.expected = root, stem, names, None
        self.estimate = len({split_name(name)[0] for name in names})

    def members(self) -> list[Member]:
        """Return the files of this stretch."""
        return [Member(name, 0, (self.root / name).stat().st_size) for name in self.names]

    def size_bytes(self) -> int:
        """Return the size of all files together."""
        return sum(member.size for member in self.members())

    def identity(self) -> dict[str, Any]:
        """Return stem, bytes and a sha256 over names and contents of the files."""
        digests = [[name, file_digest(self.root / name)] for name in self.names]
        return {"name": self.stem, "bytes": self.size_bytes(), "sha256": json_digest(digests)}

    def _file(self, member: Member, stream: BinaryIO | None) -> bytes:
        return (self.root / member.name).read_bytes()

    def _label(self, run: _Run) -> str:
        return shown(run.members[0][1].name)


def list_shards(source: Path) -> list[InputShard]:
    """Return the input shards of the folder `source` in the order that the whole job agrees on.

    Raises:
        DataError: when there is nothing to read, or something that would be left out without a word.
    """
    if not source.is_dir():
        raise DataError(f"{source}: not a folder; give one with img2dataset shards, or with pictures")
    tars = sorted(source.glob("*.tar"))
    pictures = [path for path in source.iterdir() if split_name(path.name)[1] in IMAGE_SUFFIXES]
    if tars and pictures:
        raise DataError(
            f"{source}: holds both tars and pictures ({pictures[0].name}, ...): keep them in folders of their own"
        )
    return _tar_shards(source, tars) if tars else _folder_shards(source)


def _tar_shards(source: Path, tars: list[Path]) -> list[InputShard]:
    bad_names = [path.name for path in tars if not SAFE_STEM.fullmatch(path.stem)]
    if bad_names:
        raise DataError(
            f"{source}: rename {', '.join(bad_names[:20])}: letters, digits and ._- only, at most 120"
        )
    marked = {path: path.with_name(path.stem + STATS_SUFFIX) for path in tars}
    made_by_img2dataset = any(source.glob(f"*{STATS_SUFFIX}")) or any(source.glob("*.parquet"))
    partial = [path.name for path, stats in marked.items() if not stats.is_file()]
    if made_by_img2dataset and partial:
        raise DataError(
            f"{source}: {len(partial)} tars without {STATS_SUFFIX}, which img2dataset writes when a shard is done: "
            f"{', '.join(partial[:20])}; finish the download or move these out of the folder"
        )
    return [TarShard(path, _successes(stats) if stats.is_file() else None) for path, stats in marked.items()]


def _successes(path: Path) -> int:
    try:
        successes = json.loads(path.read_text(encoding="utf-8"))["successes"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not img2dataset's marker ({error!r}); fetch the shard again or move it away"
        ) from None
    if not isinstance(successes, int) or isinstance(successes, bool) or successes < 0:
        raise DataError(f"{path}: successes is {successes!r}, not a count")
    return successes


def _folder_shards(source: Path) -> list[InputShard]:
    keys: dict[str, list[str]] = {}
    for name in sorted(_files_below(source)):
        keys.setdefault(split_name(name)[0], []).append(name)
    if not any(split_name(name)[1] in IMAGE_SUFFIXES for names in keys.values() for name in names):
        raise DataError(
            f"{source}: neither tars nor pictures ({', '.join(sorted(IMAGE_SUFFIXES))}) in it; "
            "give the folder that img2dataset wrote, or one of pictures with .txt captions beside them"
        )
    groups = [keys[key] for key in sorted(keys)]
    starts = range(0, len(groups), SHARD_IMAGES)
    return [
        FolderShard(
            source,
            f"{number:05d}",
            [name for names in groups[start : start + SHARD_IMAGES] for name in names],
        )
        for number, start in enumerate(starts)
    ]


def _files_below(source: Path) -> Iterator[str]:
    def give_up(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(source, onerror=give_up):
        folders.sort()
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise DataError(
                    f"{Path(folder) / name}: a link to a folder is not followed; give the real folder"
                )
        for name in files:
            path = Path(folder) / name
            if path.suffix == ".tar":
                raise DataError(f"{path}: a tar below {source}: give the folder that holds the tars itself")
            yield path.relative_to(source).as_posix()
