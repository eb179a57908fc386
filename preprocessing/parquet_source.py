"""Parquet shards with a column of image bytes: img2dataset's `parquet` format and Hugging Face's image columns."""

from collections.abc import Container, Iterator, Mapping
from typing import Any

from pipeline import storage
from pipeline.errors import DataError
from preprocessing.keys import is_bad_key, output_key, shown
from preprocessing.markers import REMEDY, lost
from preprocessing.samples import MAX_IMAGE_BYTES, InputShard, RawSample
from preprocessing.tables import parquet_columns, parquet_rows

IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "image_bytes", "bytes")
KEY_COLUMNS = ("key", "id", "__key__")
TEXT_COLUMN = "txt"


class ParquetShard(InputShard):
    """One parquet file; a row is a sample, also where its picture is null (a failed download)."""

    def __init__(self, place: str, expected: int | None, image_column: str | None = None) -> None:
        self.place, self.name = place, place.rpartition("/")[2]
        self.stem = self.name.rpartition(".")[0]
        self.expected, self.estimate = expected, None
        self._image_column = image_column

    def size_bytes(self) -> int:
        """Return the size of the file."""
        return storage.stat_file(self.place).size_bytes

    def version(self) -> str:
        """Return that of the file."""
        return storage.stat_file(self.place).version

    def samples(self, only: Container[str] | None = None) -> Iterator[RawSample]:
        """Yield a sample a row, in order; the key is the column `key`, `id` or `__key__`, else the row's number.

        Raises:
            DataError: when the file is damaged, has no image column, or fewer pictures than its marker promises.
        """
        names = parquet_columns(self.place)
        image = self._image_column or next((name for name in IMAGE_COLUMNS if name in names), None)
        if image not in names:
            raise DataError(
                f"{self.place}: no column of image bytes ({self._image_column or ', '.join(IMAGE_COLUMNS)}) among "
                f"{names}; set encode.image_column"
            )
        key_column = next((name for name in KEY_COLUMNS if name in names), None)
        seen: set[str] = set()
        pictures = 0
        for number, row in enumerate(parquet_rows(self.place)):
            source_key = f"{number:09d}" if key_column is None else str(row.pop(key_column))
            raw = self._raw(source_key, row, row.pop(image), seen)
            pictures += raw.problem not in ("no_image", "not_bytes")
            if only is None or raw.key in only:
                yield raw
        if self.expected is not None and pictures != self.expected:
            raise DataError(f"{self.place}: {lost(self.expected, pictures)}; {REMEDY}")

    def _raw(self, source_key: str, row: Mapping[str, Any], image: Any, seen: set[str]) -> RawSample:
        key, columns = output_key(source_key), dict(row)
        payload = image.get("bytes") if isinstance(image, Mapping) else image
        text = columns.pop(TEXT_COLUMN, None)
        problems = [
            ("bad_key", is_bad_key(source_key)),
            ("no_image", payload is None),
            ("not_bytes", payload is not None and not isinstance(payload, bytes)),
            ("duplicate_key", key in seen),
            ("image_too_large", isinstance(payload, bytes) and len(payload) > MAX_IMAGE_BYTES),
        ]
        seen.add(key)
        problem = next((reason for reason, found in problems if found), None)
        if problem is not None:
            return RawSample(key, shown(source_key), self.name, problem)
        assert isinstance(payload, bytes)
        stored = text if isinstance(text, bytes) else str(text).encode() if text is not None else None
        return RawSample(key, shown(source_key), self.name, image=payload, text=stored, columns=columns)
