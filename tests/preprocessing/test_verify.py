"""Every kind of damage to a finished data set is found by re-reading it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.latents.manifest import SEGMENTS_NAME, SHARDS_NAME, Manifest
from pipeline.latents.rows import ROW_SCHEMA, read_table, write_table
from pipeline.publish import file_digest
from preprocessing.verify import spaced, verify_dataset
from tests.builders import tiny_autoencoder
from tests.preprocessing.conftest import Prepared


def problems(prepared: Prepared, samples: int | None = None) -> str:
    return "\n".join(verify_dataset(prepared.out, samples=samples, decode_with=None).problems)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def bless(prepared: Prepared, stem: str, **digests: str) -> None:
    """Make the marker agree with a changed file, as somebody might who edits by hand."""
    path = prepared.out / "00" / f"{stem}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | digests))


def test_a_whole_data_set_has_no_problems(prepared: Prepared) -> None:
    result = verify_dataset(prepared.out, samples=None, decode_with=None)
    assert result.problems == [] and result.checked == 18
    some = verify_dataset(prepared.out, samples=3, decode_with=None)
    assert some.problems == [] and some.checked == 6


@pytest.mark.parametrize("place", [10, 600, 700, 2000, 5000])
def test_a_flipped_bit_anywhere_in_a_tar(prepared: Prepared, place: int) -> None:
    tar = prepared.out / "00/00001.tar"
    flip(tar, place)
    assert f"{tar}: its sha256 is not the one in its marker" in problems(prepared)


def test_a_flipped_value_is_found_by_the_samples_checksum_alone(prepared: Prepared) -> None:
    """Even when every digest of the file was brought up to date."""
    tar = prepared.out / "00/00000.tar"
    flip(tar, 512 + 128 + 4)
    bless(prepared, "00000", tar_digest=file_digest(tar))
    found = problems(prepared)
    assert f"{tar}: row 0: its checksum is another one" in found
    assert "total" in found and "its sha256" not in found
    assert "train 0: its place or checksum is not the one in the table" in problems(prepared, samples=20)


def test_a_truncated_tar_and_a_missing_one(prepared: Prepared) -> None:
    tar = prepared.out / "00/00002.tar"
    tar.write_bytes(tar.read_bytes()[:7000])
    found = problems(prepared)
    assert (
        f"{tar}: its sha256" in found
        and "the file is cut" in found
        and "1 damaged or missing shards" in found
    )
    tar.unlink()
    assert f"{tar}: the tar or its parquet is missing" in problems(prepared)


def test_samples_under_other_names(prepared: Prepared) -> None:
    """A key in the tar's headers that is not the key inside: stock readers and ours would disagree."""
    tar = prepared.out / "00/00000.tar"
    content = tar.read_bytes()
    key = content[:8]
    header = bytearray(content[:512])
    header[0] ^= 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    tar.write_bytes(bytes(header) + content[512:])
    bless(prepared, "00000", tar_digest=file_digest(tar))
    assert "row 0: members [Member(" in problems(prepared) and key.decode() in problems(prepared)


def rewrite_rows(prepared: Prepared, stem: str, change: Any) -> None:
    path = prepared.out / "00" / f"{stem}.parquet"
    rows = read_table(path, ROW_SCHEMA).to_pylist()
    change(rows)
    write_table(path, rows, ROW_SCHEMA)
    bless(prepared, stem, parquet_digest=file_digest(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.pop(), "6 rows, 7 samples read"),
        (lambda rows: rows[0].update(offset=1), "the table says offset 1"),
        (lambda rows: rows[0].update(crc32=1), "its checksum is another one"),
        (
            lambda rows: rows[1].update(captions=["other"]),
            "row 1: the table and the sample disagree in ['captions']",
        ),
        (lambda rows: rows[1].update(split="validation"), "disagree in ['split']"),
        (
            lambda rows: rows[0].update(status="rejected", reason="x"),
            "rejected {'x': 1}, the marker counts {}",
        ),
    ],
)
def test_rows_that_disagree(prepared: Prepared, change: Any, said: str) -> None:
    rewrite_rows(prepared, "00000", change)
    assert said in problems(prepared)


@pytest.mark.parametrize("name", [SEGMENTS_NAME, SHARDS_NAME, "null/text.npy", "null/tokens.npy"])
def test_changed_tables_and_null_members(prepared: Prepared, name: str) -> None:
    flip(prepared.out / name, -1)
    assert f"{prepared.out / name}: missing or not the one in the manifest" in problems(prepared)


def test_a_changed_parquet(prepared: Prepared) -> None:
    path = prepared.out / "00/00001.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    assert f"{path}: its sha256" in problems(prepared)


def test_markers_that_do_not_add_up_to_the_manifest(prepared: Prepared) -> None:
    path = prepared.out / "00/00001.json"
    marker = json.loads(path.read_text())
    marker["counts"] |= {"read": 6, "rejected": {"aspect": 1}}
    path.write_text(json.dumps(marker))
    assert "markers add up to" in problems(prepared)


def test_an_edited_manifest(prepared: Prepared) -> None:
    path = prepared.out / "manifest.json"
    path.write_text(path.read_text().replace('"train": 14', '"train": 13'))
    assert "its digest does not match its content" in problems(prepared)


def test_values_that_are_not_finite(prepared: Prepared) -> None:
    tar = prepared.out / "00/00000.tar"
    content = bytearray(tar.read_bytes())
    content[640:642] = np.float16(np.nan).tobytes()
    tar.write_bytes(content)
    assert "row 0: latent is not finite" in problems(prepared)
    assert "train 0: latent is not finite" in problems(prepared, samples=1)


def test_no_manifest(tmp_path: Path) -> None:
    result = verify_dataset(tmp_path, samples=None, decode_with=None)
    assert result.checked == 0 and "has no manifest.json" in result.problems[0]


def test_decoding_with_another_autoencoder_is_a_problem(prepared: Prepared) -> None:
    autoencoder = tiny_autoencoder(prepared.root / "autoencoder")
    found = verify_dataset(prepared.out, samples=1, decode_with=autoencoder).problems
    assert len(found) >= 1 and "decoding with autoencoder" in found[0]
    assert Manifest.load(prepared.out).encoder["autoencoder"] in found[0]


def test_spaced_places() -> None:
    assert spaced(0, 5) == [] and spaced(1, 5) == [0] and spaced(3, 5) == [0, 1, 2]
    assert spaced(100, 3) == [0, 50, 99] or spaced(100, 3) == [0, 49, 99]
    assert len(spaced(1000, 24)) == 24
