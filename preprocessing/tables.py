"""Tables of the input: parquet shards, the parquet beside a tar, and metadata.{jsonl,csv,parquet}."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import DataError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
BATCH_ROWS = 64
KEY = "key"


def parquet_columns(place: str) -> list[str]:
    """Return the names of the columns.

    Raises:
        DataError: when the file is cut short or no parquet.
    """
    with storage.open_file(place) as stream:
        return list(_open(place, stream).schema_arrow.names)


def parquet_rows(place: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows in order, all columns or only some.

    Raises:
        DataError: when the file is damaged, with the number of the row and how many were promised.
    """
    with storage.open_file(place) as stream:
        table = _open(place, stream)
        read, promised = 0, table.metadata.num_rows
        try:
            for batch in table.iter_batches(BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    read += 1
                    yield row
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damage(place, error, f" after row {read} of {promised}, {promised - read} lost") from None
        if read != promised:
            raise DataError(f"{place}: {promised} rows promised, {read} found, {promised - read} lost")


def rows_by_key(place: str, columns: tuple[str, ...]) -> dict[str, Mapping[str, Any]]:
    """Return the named columns of the parquet beside a tar, by key; columns that it lacks are left out."""
    known = parquet_columns(place)
    if KEY not in known:
        raise DataError(f"{place}: no column {KEY!r} among {known}, so its rows belong to no sample")
    wanted = [KEY, *(name for name in columns if name in known and name != KEY)]
    return {str(row[KEY]): row for row in parquet_rows(place, wanted)}


def read_metadata(place: str) -> list[dict[str, Any]]:
    """Return the rows of a metadata file.

    Raises:
        DataError: when it cannot be read, with the number of the line.
    """
    if place.endswith(".parquet"):
        return list(parquet_rows(place))
    try:
        text = storage.read_file(place).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    return _csv_rows(place, text) if place.endswith(".csv") else _json_rows(place, text)


def _json_rows(place: str, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: line {number} is not JSON ({error}); one object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}: line {number} holds {type(row).__name__}, not an object")
        rows.append(row)
    return rows


def _csv_rows(place: str, text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{place}: line {reader.line_num} has not the {len(reader.fieldnames or ())} fields of the first"
                )
            rows.append(dict(row))
    except csv.Error as error:
        raise DataError(f"{place}: line {reader.line_num}: {error}") from None
    return rows


def _open(place: str, stream: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(stream)
    except (pa.ArrowException, OSError) as error:
        raise _damage(place, error, "") from None


def _damage(place: str, error: Exception, where: str) -> DataError:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{place}: damaged parquet{where} ({said}); fetch the file again")
