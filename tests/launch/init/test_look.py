"""What init finds in sources with known properties, of every kind that encode reads; what it says of hopeless ones."""

import json
import os
import time
from pathlib import Path

import pytest

from launch.init import look
from launch.init.look import look_at
from pipeline.config import EncodeConfig
from pipeline.errors import ConfigError, DataError
from preprocessing.filters import Rules
from preprocessing.images import PreparedSample, prepare_sample
from preprocessing.sources import list_shards
from tests.launch.init.folders import drawing, picture, write_folder, write_parquet, write_tars

CAPTIONS = [f"thing {number}" for number in range(12)]
PICTURES = [picture(number) for number in range(12)]


@pytest.fixture(
    params=["txt", "jsonl", "csv", "tars", "tars-unmarked", "parquet", "parquet-groups", "hugging-face"]
)
def any_source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return the same twelve pairs in one of the layouts."""
    folder = tmp_path / "source"
    match request.param:
        case "txt":
            return write_folder(folder, PICTURES, CAPTIONS)
        case "jsonl" | "csv":
            write_folder(folder, PICTURES, [None] * 12)
            rows = [{"file_name": f"{n:05d}.png", "caption": CAPTIONS[n]} for n in range(12)]
            if request.param == "jsonl":
                (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
            else:
                lines = ["file_name,caption", *(",".join(row.values()) for row in rows)]
                (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
            return folder
        case "tars" | "tars-unmarked":
            return write_tars(folder, PICTURES, CAPTIONS, 3, markers=request.param == "tars")
        case "hugging-face":
            cells = [{"bytes": payload, "path": None} for payload in PICTURES]
            return write_parquet(folder / "train.parquet", {"image": cells, "text": CAPTIONS})
        case _:
            groups = 3 if request.param == "parquet-groups" else None
            columns = {"key": [f"{n}" for n in range(12)], "jpg": PICTURES, "caption": CAPTIONS}
            return write_parquet(folder / "00000.parquet", columns, row_group_size=groups)


def test_every_kind_of_source_is_counted_and_read(any_source: Path) -> None:
    facts = look_at(str(any_source))
    assert (facts.samples, facts.exact, facts.whole, facts.looked) == (12, True, True, 12)
    assert (facts.usable, facts.concepts, facts.duplicates) == (12, 12, 0)
    assert facts.problems == facts.faults == {} and facts.damaged == ()
    assert sorted(facts.captions.all) == sorted(CAPTIONS)
    assert {(header.height, header.width, header.mode) for header in facts.headers} == {(64, 64, "RGB")}


def test_its_counts_are_those_of_encode(tmp_path: Path) -> None:
    """The oracle is encode's own reading of every sample, under rules that refuse no size."""
    good = write_folder(tmp_path / "s", PICTURES, [*CAPTIONS[:10], None, "  "])
    (good / "page.png").write_bytes(b"<html>not found</html>")
    (good / "page.txt").write_text("a page")
    (good / "cut.png").write_bytes(picture(3, (200, 200))[:-60])
    (good / "cut.txt").write_text("cut off")
    (good / "movie.gif").write_bytes(b"GIF89a")
    (good / "alone.txt").write_text("no picture")
    (good / "latin.png").write_bytes(PICTURES[0])
    (good / "latin.txt").write_bytes(b"caf\xe9")
    facts = look_at(str(good))
    rules = Rules.from_config(EncodeConfig(source=str(good), image_size=64))
    expected: dict[str, int] = {}
    read = 0
    for shard in list_shards(good):
        for raw in shard.samples():
            read += 1
            outcome = prepare_sample(raw, rules)
            if not isinstance(outcome, PreparedSample):
                reason = getattr(outcome, "reason", "failed")
                expected[reason] = expected.get(reason, 0) + 1
    found = {
        name: facts.problems.get(name, 0) + facts.faults.get(name, 0)
        for name in {*facts.problems, *facts.faults}
    }
    assert found == expected and len(expected) >= 6
    assert facts.samples == facts.counted == read
    assert facts.usable == read - sum(expected.values()) == 10
    assert facts.duplicates == 0


def test_duplicates_sizes_and_turned_pictures_are_found(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "s",
        [PICTURES[0], PICTURES[0], picture(1, (30, 90)), PICTURES[0]],
        ["one", "two", "three", "one"],
    )
    facts = look_at(str(folder))
    assert facts.duplicates == 2 and facts.concepts == 3
    assert sorted(header.short for header in facts.headers) == [30, 64, 64, 64]
    assert max(header.aspect for header in facts.headers) == 3.0
    assert facts.captions.repeated == [("one", 2)]


def test_a_row_without_its_picture_is_counted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "s", PICTURES, [None] * 12)
    rows = [{"file_name": f"{n:05d}.png", "text": f"t{n}"} for n in range(14)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    facts = look_at(str(folder))
    assert (
        facts.problems == {"missing_file": 2} and facts.samples == 14 and facts.usable == 12 and facts.whole
    )


def test_absent_pictures_of_parquet_rows_that_are_not_read_are_counted_too(tmp_path: Path) -> None:
    cells = [picture(n % 50, (8, 8)) if n % 4 else None for n in range(400)]
    folder = write_parquet(
        tmp_path / "s" / "a.parquet",
        {"jpg": cells, "caption": [f"c{n}" for n in range(400)]},
        row_group_size=40,
    )
    facts = look_at(str(folder), pictures=64)
    assert facts.problems == {"no_image": 100} and facts.samples == 400
    assert facts.looked == 48  # 64 rows, a quarter of them without picture
    assert facts.usable == 300 and not facts.whole


def test_captions_under_another_name_are_found(tmp_path: Path) -> None:
    columns = {"pixels": PICTURES, "prompt": CAPTIONS, "url": [f"http://x/{n}" for n in range(12)]}
    facts = look_at(str(write_parquet(tmp_path / "s" / "a.parquet", columns)))
    assert facts.captions.columns == ("prompt",) and facts.image_column == "pixels"
    assert facts.usable == 12


def test_a_damaged_shard_is_told_and_the_others_are_counted(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "s", PICTURES, CAPTIONS, 3)
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[:3000])
    facts = look_at(str(folder))
    assert len(facts.damaged) == 1 and "00001.tar" in facts.damaged[0] and facts.usable == 8


def test_shards_that_are_not_opened_count_by_marker_or_by_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "OPENED_SHARDS", 3)
    many, names = [picture(n) for n in range(40)], [f"n{n}" for n in range(40)]
    marked = look_at(str(write_tars(tmp_path / "marked", many, names, 10)))
    assert (marked.samples, marked.exact, marked.opened, marked.counted) == (40, True, 3, 12)
    assert marked.usable == 40 and not marked.whole
    bare = look_at(str(write_tars(tmp_path / "bare", many, names, 10, markers=False)))
    assert (bare.samples, bare.exact) == (40, False)


def test_only_a_spread_few_are_read_of_many(tmp_path: Path) -> None:
    pictures = [picture(n, (8, 8 + n % 7)) for n in range(300)]
    facts = look_at(str(write_folder(tmp_path / "s", pictures, [f"w{n}" for n in range(300)])), pictures=30)
    assert facts.samples == 300 and facts.looked == 30 and facts.usable == 300 and facts.concepts == 300
    assert {"w0", "w299"} <= set(facts.captions.all)


def test_lightness_is_of_what_shows(tmp_path: Path) -> None:
    facts = look_at(str(write_folder(tmp_path / "s", [drawing(250), drawing(10)], ["light", "dark"])))
    assert sorted(facts.lights) == pytest.approx([10 / 255, 250 / 255], abs=0.02)


@pytest.mark.parametrize(
    ("captions", "said"),
    [([None] * 3, "none of 3 samples has a caption"), (["", " ", "\n"], "none of 3 samples has a caption")],
)
def test_a_folder_without_captions_is_one_clear_line(
    tmp_path: Path, captions: list[str | None], said: str
) -> None:
    folder = write_folder(tmp_path / "s", PICTURES[:3], captions)
    with pytest.raises(DataError) as raised:
        look_at(str(folder))
    assert said in str(raised.value) and "NAME.txt" in str(raised.value) and "\n" not in str(raised.value)


def test_an_empty_folder_and_one_without_pictures_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures"):
        look_at(str(tmp_path))
    with pytest.raises(DataError, match="not a folder"):
        look_at(str(tmp_path / "nowhere"))
    (tmp_path / "a.png").write_bytes(b"nothing")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="not_image 1"):
        look_at(str(tmp_path))


def test_a_folder_that_cannot_be_read_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root reads everything, so the refusal is the one that the kernel gives others."""

    def refuse(place: object, **named: object) -> None:
        raise PermissionError(13, os.strerror(13), str(place))

    monkeypatch.setattr("pipeline.storage.list_files", refuse)
    with pytest.raises(ConfigError, match=r"init: .* cannot be read \(Permission denied\)"):
        look_at(str(tmp_path))


@pytest.mark.slow
def test_a_hundred_thousand_sidecars_take_seconds(tmp_path: Path) -> None:
    payload = picture(1, (16, 16))
    folder, first = tmp_path / "s", tmp_path / "first.png"
    first.write_bytes(payload)
    folder.mkdir()
    for number in range(100_000):
        if number == 50_000:  # ext4 gives a file about 65,000 names
            first.unlink()
            first.write_bytes(payload)
        os.link(first, folder / f"{number:06d}.png")
        if number != 70_001:
            (folder / f"{number:06d}.txt").write_bytes(b"a picture")
    started = time.monotonic()
    facts = look_at(str(folder))
    assert time.monotonic() - started < 120
    assert facts.samples == 100_000 and facts.problems == {"no_caption": 1} and facts.usable == 99_999
    assert 2900 <= facts.looked <= 3100


@pytest.mark.slow
def test_a_parquet_of_three_hundred_thousand_rows_takes_seconds(tmp_path: Path) -> None:
    payload = [picture(number, (16, 16)) for number in range(100)]
    columns = {
        "jpg": [payload[number % 100] for number in range(300_000)],
        "caption": [f"caption {number}" for number in range(300_000)],
    }
    write_parquet(tmp_path / "s" / "all.parquet", columns, row_group_size=10_000)
    started = time.monotonic()
    facts = look_at(str(tmp_path / "s"))
    assert time.monotonic() - started < 90
    assert facts.samples == facts.usable == 300_000 and 2500 <= facts.looked <= 3500
