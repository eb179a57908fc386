"""Rows of a parquet shard without their pictures, and with them for the first rows of a few row groups.

A column of pictures is most of the file, so it is decoded for the chosen rows only; which rows have none follows from
the statistics that the file itself carries.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import DataError
from preprocessing.parquet_source import IMAGE_COLUMNS, KEY_COLUMNS, ParquetShard
from preprocessing.samples import InputShard, RawSample

BATCH_ROWS = 4096
PICTURE_ROWS = 64
LEAST_ROWS_A_GROUP = 16
MAX_TEXT_COLUMNS = 32


class GlancedRows(ParquetShard):
    """A parquet shard whose pictures are read for `wanted` rows only, the first ones of evenly spaced row groups."""

    def __init__(self, shard: ParquetShard, wanted: int) -> None:
        super().__init__(shard.place, shard.expected, shard._image_column)
        self._wanted = wanted
        self._read: set[str] = set()

    def has_read(self, raw: RawSample) -> bool:
        """Return whether the picture of a sample without problem was read."""
        return raw.problem is None and raw.key in self._read

    def samples(self, only: Any = None) -> Iterator[RawSample]:
        """Yield a sample a row in order; only chosen rows have their picture.

        Raises:
            DataError: when the file is damaged or has no column of pictures.
        """
        assert only is None
        with storage.open_file(self.place) as stream:
            try:
                table = pq.ParquetFile(stream)
                image = self._image_column or picture_column(table.schema_arrow)
                if image is None or image not in table.schema_arrow.names:
                    raise DataError(
                        f"{self.place}: no column of image bytes ({self._image_column or ', '.join(IMAGE_COLUMNS)}) "
                        f"among {table.schema_arrow.names}"
                    )
                yield from self._rows(table, image)
            except (pa.ArrowException, OSError) as error:
                said = (str(error).splitlines() or [type(error).__name__])[0]
                raise DataError(f"{self.place}: damaged parquet ({said}); fetch the file again") from None

    def _rows(self, table: pq.ParquetFile, image: str) -> Iterator[RawSample]:
        names = table.schema_arrow.names
        key_column = next((name for name in KEY_COLUMNS if name in names), None)
        plan = _reading_plan(table, self._wanted)
        columns = text_columns(table.schema_arrow, image, key_column)
        seen: set[str] = set()
        number = 0
        for group, quota in enumerate(plan):
            pictures = _pictures(table, group, image, quota)
            absent = _absent_pictures(table, group, image)
            for row in _text_rows(table, group, columns):
                key = f"{number:09d}" if key_column is None else str(row.pop(key_column))
                number += 1
                payload: Any = next(pictures, _UNREAD)
                unread = payload is _UNREAD
                if unread:
                    payload, absent = (None, absent - 1) if absent > 0 else (b"", absent)
                elif payload is None or (isinstance(payload, dict) and payload.get("bytes") is None):
                    absent -= 1
                raw = self._raw(key, row, payload, seen)
                if raw.problem is None and not unread:
                    self._read.add(raw.key)
                yield raw


_UNREAD = object()


def picture_column(schema: pa.Schema) -> str | None:
    """Return the column that holds pictures: one of the known names, else the only one of bytes."""
    known = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if known is not None:
        return known
    binary = [field.name for field in schema if _is_bytes(field.type)]
    return binary[0] if len(binary) == 1 else None


def unusual_picture_column(shard: InputShard) -> str | None:
    """Return the column of pictures where `encode` would not find it by itself; None for anything but parquet."""
    if not isinstance(shard, ParquetShard):
        return None
    with storage.open_file(shard.place) as stream:
        try:
            found = picture_column(pq.ParquetFile(stream).schema_arrow)
        except (pa.ArrowException, OSError):
            return None  # damaged, and told as such
    return None if found in IMAGE_COLUMNS else found


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def text_columns(schema: pa.Schema, image: str, key_column: str | None) -> list[str]:
    """Return the key column and the columns of text, or lists of text, that could be captions."""
    texts = [field.name for field in schema if field.name != image and _is_text(field.type)]
    wanted = [name for name in texts if name != key_column][:MAX_TEXT_COLUMNS]
    return wanted if key_column is None else [key_column, *wanted]


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _reading_plan(table: pq.ParquetFile, wanted: int) -> list[int]:
    """Return for each row group how many of its first rows are read with their pictures."""
    groups = table.metadata.num_row_groups
    chosen = max(1, min(groups, wanted // LEAST_ROWS_A_GROUP))
    places = {round(step * (groups - 1) / max(1, chosen - 1)) for step in range(chosen)}
    quota = -(-wanted // max(1, len(places)))
    return [quota if group in places else 0 for group in range(groups)]


def _pictures(table: pq.ParquetFile, group: int, image: str, quota: int) -> Iterator[Any]:
    """Yield the pictures of the first `quota` rows of a row group."""
    if quota == 0:
        return
    batches = table.iter_batches(min(quota, PICTURE_ROWS), row_groups=[group], columns=[image])
    yield from islice((value for batch in batches for value in batch.column(0).to_pylist()), quota)


def _absent_pictures(table: pq.ParquetFile, group: int, image: str) -> int:
    """Return how many rows of a row group have no picture, by its statistics; 0 where it has none."""
    row_group = table.metadata.row_group(group)
    for place in range(row_group.num_columns):
        column = row_group.column(place)
        if column.path_in_schema in (image, f"{image}.bytes"):
            found = column.statistics
            return int(found.null_count) if found is not None and found.has_null_count else 0
    return 0


def _text_rows(table: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a row group with the named columns only, empty ones where there are none."""
    if not columns:
        yield from ({} for _ in range(table.metadata.row_group(group).num_rows))
        return
    for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
        yield from batch.to_pylist()
