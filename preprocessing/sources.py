"""From a folder, here or in a store, to its input shards: tars, parquet shards, or stretches of a picture folder."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pipeline import storage
from pipeline.config import EncodeConfig
from pipeline.errors import DataError
from pipeline.storage import StoredFile
from preprocessing.folder_source import folder_shards
from preprocessing.keys import split_name
from preprocessing.markers import finished_shards, marker_name, promised_samples, unfinished_shards
from preprocessing.parquet_source import ParquetShard
from preprocessing.samples import IMAGE_SUFFIXES, InputShard, RawSample
from preprocessing.tables import METADATA_NAMES
from preprocessing.tar_source import TarShard

__all__ = ["InputShard", "RawSample", "SourceOptions", "list_shards"]

SHARD_IMAGES = 1000
SAFE_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


@dataclass(frozen=True)
class SourceOptions:
    """What reading needs of the config."""

    unfinished: Literal["refuse", "leave_out"] = "refuse"
    image_column: str | None = None
    columns: tuple[str, ...] = ()
    """Columns that filters look at: read from the parquet beside a tar."""

    @classmethod
    def from_config(cls, encode: EncodeConfig) -> Self:
        """Return the options of the `encode` section."""
        columns = tuple(dict.fromkeys(rule.column for rule in encode.filters))
        return cls(encode.unfinished_shards, encode.image_column, columns)


def list_shards(source: str | Path, options: SourceOptions | EncodeConfig | None = None) -> list[InputShard]:
    """Return the input shards of the folder `source` in the order that the whole job agrees on.

    Raises:
        DataError: when there is nothing to read, or something that would be left out without a word.
    """
    if isinstance(options, EncodeConfig):
        options = SourceOptions.from_config(options)
    options, root = options or SourceOptions(), str(source).rstrip("/")
    if not storage.is_folder(root):
        raise DataError(f"{root}: not a folder; give one with img2dataset shards, or with pictures")
    files = storage.list_files(root)
    pictures = [file.name for file in files if split_name(file.name)[1] in IMAGE_SUFFIXES]
    shards = _shard_names(files)
    if shards and pictures:
        raise DataError(
            f"{root}: holds both {'tars' if shards[0].endswith('.tar') else 'parquet shards'} and pictures "
            f"({pictures[0]}, ...): keep them in folders of their own"
        )
    if not shards:
        return list(folder_shards(root, _files_below(root), SHARD_IMAGES))
    return _numbered_shards(root, shards, {file.name for file in files}, options)


def left_out_shards(source: str | Path) -> list[str]:
    """Return the shard files of a source that `encode.unfinished_shards: leave_out` does not read."""
    files = storage.list_files(str(source).rstrip("/"))
    return unfinished_shards(_shard_names(files), {file.name for file in files})


def _shard_names(files: Sequence[StoredFile]) -> list[str]:
    """Return the tars, or where there are none the parquet shards."""
    tables = [
        file.name for file in files if file.name.endswith(".parquet") and file.name not in METADATA_NAMES
    ]
    return [file.name for file in files if file.name.endswith(".tar")] or tables


def _numbered_shards(
    root: str, shards: Sequence[str], names: set[str], options: SourceOptions
) -> list[InputShard]:
    bad_names = [name for name in shards if not SAFE_STEM.fullmatch(name.rpartition(".")[0])]
    if bad_names:
        raise DataError(
            f"{root}: rename {', '.join(bad_names[:20])}: letters, digits and ._- only, at most 120"
        )
    found: list[InputShard] = []
    for name in finished_shards(root, shards, names, options.unfinished):
        place, marker = storage.join(root, name), marker_name(name)
        expected = promised_samples(storage.join(root, marker)) if marker in names else None
        if name.endswith(".parquet"):
            found.append(ParquetShard(place, expected, options.image_column))
            continue
        table = name.removesuffix(".tar") + ".parquet"
        beside = storage.join(root, table) if options.columns and table in names else None
        found.append(TarShard(place, expected, beside, options.columns))
    return found


def _files_below(root: str) -> list[StoredFile]:
    files = storage.list_files(root, below=True)
    if not storage.is_remote(root):
        _refuse_linked_folders(Path(root))
    tars = [file.name for file in files if file.name.endswith(".tar")]
    if tars:
        raise DataError(
            f"{storage.join(root, tars[0])}: a tar below {root}: give the folder that holds the tars itself"
        )
    return files


def _refuse_linked_folders(root: Path) -> None:
    linked = next((path for path in sorted(root.rglob("*")) if path.is_symlink() and path.is_dir()), None)
    if linked is not None:
        raise DataError(f"{linked}: a link to a folder is not followed; give the real folder")
