"""The script that builds the emoji example: captions, pictures, shards, and what it refuses."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "emoji" / "build.py"


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png), formats=["PNG"])
    image.load()
    return image


def run_script(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ if path is None else {**os.environ, "PATH": path}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=540, env=environment)


def made_png(mode: str, colour: Any, side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def made_entry(unicode: str, name: str) -> dict[str, str]:
    return {
        "unified": unicode,
        "name": name,
        "image": f"{unicode.lower()}.png",
        "category": "Food & Drink",
        "subcategory": "food-fruit",
    }


def made_package(path: Path, table: list[dict[str, str]], images: dict[str, bytes]) -> Path:
    """Write a tarball with npm's layout: the pictures may come before or after the table."""
    files = {f"package/img/google/64/{name}": png for name, png in images.items()}
    files["package/emoji.json"] = json.dumps(table).encode()
    files["package/img/google/sheets/64.png"] = b"a sheet, which nobody asked for"
    with tarfile.open(path, "w:gz") as archive:
        for name, payload in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    return path


@pytest.mark.parametrize(
    ("unicode", "name", "category", "subcategory", "caption"),
    [
        ("26BD", "SOCCER BALL", "Activities", "sport", "soccer ball, activities, sport"),
        ("1F3AD", "PERFORMING ARTS", "Activities", "arts & crafts", "performing arts, activities, arts and crafts"),
        ("1F1E8-1F1FC", "Curaçao Flag", "Flags", "country-flag", "curaçao flag, flags, country flag"),
        ("1F1E8-1F1EC", "Congo - Brazzaville Flag", "Flags", "flag", "congo brazzaville flag, flags, flag"),
        ("1F1E8-1F1E8", "Cocos (Keeling) Islands Flag", "Flags", "flag", "cocos keeling islands flag, flags, flag"),
        ("26D1-FE0F", "RESCUE WORKER’S HELMET", "Objects", "clothing", "rescue worker's helmet, objects, clothing"),
        ("1F551", "CLOCK FACE TWO OCLOCK", "Travel & Places", "time", "clock face two o'clock, travel and places, time"),
        ("1F468-200D-1F9B0", "MAN: RED HAIR", "People & Body", "person", "man with red hair, people and body, person"),
        ("1F468-200D-1F9B2", "MAN: BALD", "People & Body", "person", "bald man, people and body, person"),
        ("F", "FAMILY: MAN, WOMAN, BOY", "People & Body", "family", "family: man, woman and boy, people and body, family"),
        ("002A-FE0F-20E3", "KEYCAP: *", "Symbols", "keycap", "keycap asterisk, symbols, keycap"),
        ("1F237-FE0F", "SQUARED CJK UNIFIED IDEOGRAPH-6708", "Symbols", "a-b", "squared cjk unified ideograph 月, symbols, a b"),
        ("2764-FE0F", "HEAVY BLACK HEART", "Smileys & Emotion", "heart", "red heart, smileys and emotion, heart"),
        ("260E-FE0F", "BLACK TELEPHONE", "Objects", "phone", "telephone, objects, phone"),
        ("1F5A4", "BLACK HEART", "Smileys & Emotion", "heart", "black heart, smileys and emotion, heart"),
    ],
)  # fmt: skip
def test_caption_rule(
    build: ModuleType, unicode: str, name: str, category: str, subcategory: str, caption: str
) -> None:
    assert build.caption_of(unicode, name, category, subcategory) == caption


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("LA", (40, 90), (40, 40, 40, 90)), ("RGB", (1, 2, 3), (1, 2, 3, 255)), ("P", 0, (0, 0, 0, 255))],
)
def test_other_modes_become_rgba_with_the_same_pixels(
    build: ModuleType, mode: str, colour: Any, expected: Any
) -> None:
    with opened(build.rgba_png(made_png(mode, colour), "a picture")) as image:
        assert (image.mode, image.size) == ("RGBA", (64, 64))
        assert image.getcolors() == [(64 * 64, expected)]


def test_rgba_rows_keep_their_place(build: ModuleType) -> None:
    pixels = bytes((i * 7 + i // 256) % 256 for i in range(64 * 64 * 4))
    with opened(build.encode_rgba(Image.frombytes("RGBA", (64, 64), pixels))) as image:
        assert image.tobytes() == pixels


def test_rgba_pictures_keep_their_bytes(build: ModuleType) -> None:
    png = made_png("RGBA", (1, 2, 3, 4))
    assert build.rgba_png(png, "a picture") == png


def test_pictures_that_cannot_be_used_are_named(build: ModuleType) -> None:
    with pytest.raises(build.BuildError, match=r"apple\.png is \(32, 32\)"):
        build.rgba_png(made_png("RGBA", 0, side=32), "apple.png")
    with pytest.raises(build.BuildError, match=r"apple\.png is not a readable PNG"):
        build.rgba_png(made_png("RGBA", 0)[:60], "apple.png")


def test_same_package_gives_same_bytes_and_keys_jump_between_shards(
    build: ModuleType, tmp_path: Path
) -> None:
    table = [made_entry(f"{0x1F000 + i:X}", f"FRUIT NUMBER {i}") for i in range(1002)]
    images = {entry["image"]: made_png("LA", (i % 256, 7)) for i, entry in enumerate(table)}
    package = made_package(tmp_path / "package.tgz", table, images)
    for output in (tmp_path / "one", tmp_path / "two"):
        assert build.write_shards(build.make_samples(*build.read_package(package)), output) == 2
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [f"0000{s}{end}" for s in (0, 1) for end in (".parquet", ".tar", "_stats.json")]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert pq.read_table(tmp_path / "one" / "00000.parquet")["key"].to_pylist()[-1] == "000000999"
    assert pq.read_table(tmp_path / "one" / "00001.parquet")["key"].to_pylist() == ["000010000", "000010001"]


def test_equal_captions_and_missing_pictures_stop_the_build(build: ModuleType) -> None:
    png = made_png("RGBA", 0)
    table = [made_entry("1F000", "PEAR"), made_entry("1F001", "pear")]
    with pytest.raises(build.BuildError, match="1F000 and 1F001 have the same caption: pear, food and drink"):
        build.make_samples(table, {"1f000.png": png, "1f001.png": png})
    with pytest.raises(build.BuildError, match=r"1F001 \(pear\): the package has no .*1f001\.png"):
        build.make_samples(table, {"1f000.png": png})


def test_a_wrong_tarball_is_refused_in_one_line(tmp_path: Path) -> None:
    package = made_package(tmp_path / "other.tgz", [], {})
    result = run_script("--tarball", str(package), "--output", str(tmp_path / "out"))
    assert result.returncode == 3
    assert result.stderr.count("\n") == 1 and "is not emoji-datasource-google@16.0.0" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_tarball_and_a_missing_npm_are_named_in_one_line(tmp_path: Path) -> None:
    for arguments, words in ((["--tarball", "nowhere.tgz"], "nowhere.tgz"), ([], "npm is not installed")):
        result = run_script(*arguments, "--output", str(tmp_path / "out"), path=str(tmp_path))
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1 and words in result.stderr, result.stderr
