"""A folder of pictures, here or in a store: each with a `.txt` or `.json` of its name, or a row of `metadata.*`.

`metadata.jsonl`, `metadata.csv` or `metadata.parquet` in the folder has a column `file_name`, as Hugging Face's
ImageFolder wants it; its other columns are captions and what filters look at. A row without its picture is an
input sample too: rejected(missing_file).
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.errors import DataError
from pipeline.publish import json_digest
from pipeline.storage import StoredFile
from preprocessing.keys import output_key, shown, split_name
from preprocessing.samples import IMAGE_SUFFIXES, NO_COLUMNS, Content, FileShard, RawSample, Run
from preprocessing.strict_tar import Member
from preprocessing.tables import METADATA_NAMES, read_metadata

FILE_NAME_COLUMN = "file_name"
Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Group:
    """The files of one key, none where only a row of the metadata names it, and that row."""

    key: str
    files: tuple[StoredFile, ...]
    row: Mapping[str, Any]


class FolderShard(FileShard):
    """A stretch of the sorted keys of a folder."""

    def __init__(self, root: str, stem: str, groups: Sequence[Group]) -> None:
        self.root, self.stem, self.name, self.expected = root, stem, stem, None
        self._groups, self.estimate = groups, len(groups)
        self._rows = {group.key: group.row for group in groups}

    def samples(self, only: Container[str] | None = None) -> Iterator[RawSample]:
        """Yield the samples with files, then the rows without; see `InputShard.samples`."""
        yield from super().samples(only)
        for group in self._groups:
            if not group.files and (only is None or output_key(group.key) in only):
                key = output_key(group.key)
                name = shown(str(group.row[FILE_NAME_COLUMN]))
                yield RawSample(key, shown(group.key), name, "missing_file")

    @contextmanager
    def opened(self) -> Iterator[Content]:
        """Yield the files of this stretch."""
        yield _OpenFolder(self.root, [file for group in self._groups for file in group.files])

    def size_bytes(self) -> int:
        """Return the size of all files together."""
        return sum(file.size_bytes for group in self._groups for file in group.files)

    def version(self) -> str:
        """Return one digest over names, sizes and times of the files, and their rows."""
        files = [[file.name, file.version] for group in self._groups for file in group.files]
        rows = [[group.key, {k: str(v) for k, v in group.row.items()}] for group in self._groups if group.row]
        return json_digest([files, rows])

    def _label(self, run: Run) -> str:
        return shown(run.members[0][1].name)

    def _columns(self, run: Run) -> Mapping[str, Any]:
        return self._rows.get(run.source_key, NO_COLUMNS)


class _OpenFolder:
    def __init__(self, root: str, files: Sequence[StoredFile]) -> None:
        self.members = [Member(file.name, 0, file.size_bytes) for file in files]
        self._root = root

    def read(self, member: Member) -> bytes:
        return storage.read_file(storage.join(self._root, member.name))


def folder_shards(root: str, files: Sequence[StoredFile], images_in_shard: int) -> list[FolderShard]:
    """Return the folder's keys in sorted order, cut into shards of `images_in_shard`.

    Raises:
        DataError: when nothing in it is a picture, or something would be left out without a word.
    """
    tables = [file for file in files if file.name in METADATA_NAMES]
    if len(tables) > 1:
        raise DataError(
            f"{root}: {' and '.join(table.name for table in tables)}: keep the one that is meant, the order of "
            "precedence would be a guess"
        )
    rows = _metadata_rows(root, tables[0].name) if tables else {}
    keys: dict[str, list[StoredFile]] = {}
    for file in files:
        if file.name not in METADATA_NAMES:
            keys.setdefault(split_name(file.name)[0], []).append(file)
    if not any(split_name(file.name)[1] in IMAGE_SUFFIXES for found in keys.values() for file in found):
        raise DataError(
            f"{root}: no tars, no parquet shards and no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}) in it; "
            "give the folder that img2dataset wrote, or one of pictures with captions beside them"
        )
    groups = [
        Group(key, tuple(keys.get(key, ())), rows.get(key, NO_COLUMNS)) for key in sorted({*keys, *rows})
    ]
    starts = range(0, len(groups), images_in_shard)
    return [
        FolderShard(root, f"{number:05d}", groups[start : start + images_in_shard])
        for number, start in enumerate(starts)
    ]


def _metadata_rows(root: str, name: str) -> Rows:
    rows: dict[str, Mapping[str, Any]] = {}
    for number, row in enumerate(read_metadata(storage.join(root, name)), 1):
        file_name = row.get(FILE_NAME_COLUMN)
        if not isinstance(file_name, str) or not file_name:
            raise DataError(
                f"{storage.join(root, name)}: row {number} has no {FILE_NAME_COLUMN}; give each row one"
            )
        key = split_name(file_name)[0]
        if key in rows:
            raise DataError(
                f"{storage.join(root, name)}: row {number} names {file_name!r} again; put several captions into one "
                "row as a list (jsonl, parquet)"
            )
        rows[key] = row
    return rows
