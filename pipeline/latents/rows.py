"""The parquet tables of a data set: a row per input sample, and a row per shard. The only pyarrow of the contract."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError

ROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("status", pa.string()),  # written | rejected | failed
        ("reason", pa.string()),  # null for written ones
        ("captions", pa.list_(pa.string())),
        ("original_height", pa.int32()),
        ("original_width", pa.int32()),
        ("crop", pa.list_(pa.int32())),  # top, left, height, width in original pixels
        ("height", pa.int32()),  # bucket
        ("width", pa.int32()),
        ("split", pa.string()),
        ("source", pa.string()),  # input shard or file
        ("source_sha256", pa.string()),  # of the image bytes
        ("offset", pa.int64()),  # of the sample in the tar: a cross-check of the segment arithmetic
        ("crc32", pa.int64()),  # of the sample's tar bytes
        ("scaling", pa.int32()),  # the JPEG decoder gave 1/scaling of the sides
        ("perceptual_hash", pa.string()),  # 64 bits of what the picture looks like
        ("remarks", pa.list_(pa.string())),  # what was counted and did not reject it
    ]
)
LATER_COLUMNS = frozenset({"scaling", "perceptual_hash", "remarks"})
"""Columns that format 1 gained: null in the tables of older data sets."""
SHARD_SCHEMA = pa.schema(
    [("name", pa.string()), ("samples", pa.int64()), ("bytes", pa.int64()), ("digest", pa.string())]
)


def write_table(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    """Write `rows` as parquet: the same rows give the same bytes. The caller publishes the file."""
    table = pa.Table.from_pylist(list(rows), schema=schema)
    pq.write_table(table, path, compression="zstd", store_schema=False)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Return the table stored at `path` with the columns of `schema`.

    Raises:
        DataError: when it is missing, damaged, or has other columns.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from None
    found = table.schema.names
    for place, name in enumerate(schema.names):
        if name in LATER_COLUMNS and name not in found:
            field = schema.field(name)
            table = table.add_column(place, field, pa.nulls(len(table), field.type))
    if table.schema.names != schema.names:
        raise DataError(f"{path}: has the columns {found}, format 1 has {schema.names}")
    return table
