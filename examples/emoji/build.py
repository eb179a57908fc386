"""Rebuild the example data: 2,126 Noto emoji with captions, laid out as `img2dataset` writes its shards.

    python examples/emoji/build.py                    # fetches the package with `npm pack`
    python examples/emoji/build.py --tarball FILE     # or reads one that is already here

Needs Pillow and pyarrow only, so it runs before anything else of the project is installed. Same package in,
same bytes out: no clock, host or user name enters a file. README.md beside this file tells the format.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PACKAGE = "emoji-datasource-google@16.0.0"
INTEGRITY = "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
IMAGE_FOLDER = "img/google/64"
EMOJI_COUNT = 1911
GESTURE_COUNT = 43
SIDE_PIXELS = 64
SHARD_SAMPLES = 1000
KEYS_PER_SHARD = 10_000  # img2dataset's default slots in a shard: keys have 4 + 5 = 9 digits
ROW_GROUP_ROWS = 100  # what img2dataset's writer buffers
PACK_TIMEOUT_SECONDS = 900
FIXED_TIME_SECONDS = 0.0  # img2dataset notes wall-clock times in the marker; here they would change the bytes

# Columns in img2dataset's order: additional columns, caption, url, then its own.
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("unicode", "name", "category", "subcategory", "skin_tone", "part")]
    + [(name, pa.string()) for name in ("caption", "url", "key")]
    + [("status", pa.string()), ("error_message", pa.string())]
    + [(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")]
    + [("exif", pa.string()), ("sha256", pa.string())]
)

# Unicode's modifiers, by the names of CLDR.
SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
GESTURES = "hand"  # how the sub-categories of hands begin
# Names that say something else than the picture shows; replaced by the name that the emoji has in CLDR.
RENAMED = {
    "1F46F": "people with bunny ears",
    "1F470": "person with veil",
    "1F472": "person with skullcap",
    "1F473": "person wearing turban",
    "1F52A": "kitchen knife",
    "1F52B": "water pistol",
    "1F64F": "folded hands",
    "1F6CC": "person in bed",
    "1F935": "person in tuxedo",  # emoji.json calls it MAN IN TUXEDO, like 1F935-200D-2642-FE0F
    "2764-FE0F": "red heart",  # HEAVY BLACK HEART
}
# In old Unicode names BLACK means filled and WHITE means outlined. These pictures have another colour.
COLOUR_DROPPED = frozenset(
    "1F0CF 1F446 1F447 1F448 1F449 1F53C 1F53D 23E9 23EA 23EB 23EC 25B6-FE0F 25C0-FE0F 2600-FE0F 260E-FE0F "
    "261D-FE0F 263A-FE0F 2665-FE0F 2666-FE0F 267B-FE0F 2702-FE0F 2734-FE0F 2753 27A1-FE0F 2B05-FE0F "
    "2B06-FE0F 2B07-FE0F 2B50".split()
)
APOSTROPHES = {
    "mans": "man's",
    "mens": "men's",
    "oclock": "o'clock",
    "womans": "woman's",
    "womens": "women's",
}


class BuildError(Exception):
    """A reason to stop that the user can act on; `exit_code` is 1 for a missing tool, 3 for wrong data."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Sample:
    """One emoji: its PNG file (64 x 64 RGBA) and the row that describes it, in SCHEMA's order."""

    png: bytes
    row: Mapping[str, Any]


def plain(text: str) -> str:
    """Return `text` in lower case, `&` spelt out, brackets and lone hyphens dropped, blanks single."""
    text = text.lower().replace("’", "'").replace("&", " and ")
    text = re.sub(r"[()]| - ", " ", text)
    return " ".join(APOSTROPHES.get(word, word) for word in text.split())


def plain_name(unicode: str, name: str) -> str:
    """Return the emoji's name as a caption says it; `unicode` is its code points, as in `1F1EB-1F1F7`."""
    if unicode in RENAMED:
        return RENAMED[unicode]
    if unicode in COLOUR_DROPPED:
        name = re.sub(r"\b(BLACK|WHITE|RED) ", "", name, count=1)
    name = re.sub(r"IDEOGRAPH-([0-9A-F]{4,5})", lambda match: f"IDEOGRAPH {chr(int(match[1], 16))}", name)
    head, _, tail = plain(name).partition(": ")
    if not tail:
        return head
    if head == "keycap":
        return "keycap asterisk" if tail == "*" else f"keycap {tail}"
    if tail == "bald":
        return f"bald {head}"
    *members, last = tail.split(", ")
    return f"{head}: {', '.join(members)} and {last}" if members else f"{head} with {last}"


def caption_of(unicode: str, name: str, category: str, subcategory: str, skin_tone: str | None = None) -> str:
    """Return `name, category, sub-category`, for example `soccer ball, activities, sport`; a tone follows the name."""
    tone = f" with {skin_tone}" if skin_tone else ""
    return ", ".join(
        [plain_name(unicode, name) + tone, plain(category), plain(subcategory.replace("-", " "))]
    )


def encode_rgba(image: Image.Image) -> bytes:
    """Return `image` (RGBA) as a PNG with one stored deflate block.

    Not compressed on purpose: compressed bytes differ between zlib builds, these cannot.
    """
    width, height = image.size
    stride = width * 4
    pixels = image.tobytes()
    raw = b"".join(b"\0" + pixels[top : top + stride] for top in range(0, len(pixels), stride))
    if len(raw) > 0xFFFF:
        raise ValueError(f"{width} x {height} RGBA is {len(raw)} bytes: one stored block holds 65535")
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(raw), len(raw) ^ 0xFFFF) + raw
    stored += struct.pack(">I", zlib.adler32(raw))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stored) + chunk(b"IEND", b"")


def rgba_png(png: bytes, where: str) -> bytes:
    """Return `png` untouched if it is RGBA, else the same pixels as an RGBA PNG (grey and palette files)."""
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            image.load()
            if image.size != (SIDE_PIXELS, SIDE_PIXELS):
                raise BuildError(f"{where} is {image.size}, expected {SIDE_PIXELS} x {SIDE_PIXELS}", 3)
            return png if image.mode == "RGBA" else encode_rgba(image.convert("RGBA"))
    except (OSError, SyntaxError) as error:
        raise BuildError(f"{where} is not a readable PNG: {error}", 3) from error


def check_integrity(tarball: Path, integrity: str) -> None:
    """Compare the file's digest with `integrity` (`sha512-BASE64`, as npm writes it).

    Raises: BuildError when they differ or the file cannot be read.
    """
    try:
        with tarball.open("rb") as file:
            digest = hashlib.file_digest(file, "sha512").digest()
    except OSError as error:
        raise BuildError(f"cannot read {tarball}: {error.strerror}", 1) from error
    found = "sha512-" + base64.b64encode(digest).decode()
    if found != integrity:
        raise BuildError(f"{tarball} is not {PACKAGE}: digest {found}, expected {integrity}", 3)


def read_package(tarball: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Return emoji.json and the PNG files by name, read in one pass; nothing is unpacked to disk."""
    table: list[dict[str, Any]] | None = None
    images: dict[str, bytes] = {}
    prefix = f"package/{IMAGE_FOLDER}/"
    with tarfile.open(tarball, "r|gz") as package:
        for member in package:
            wanted = member.name == "package/emoji.json" or member.name.startswith(prefix)
            file = package.extractfile(member) if wanted and member.isreg() else None
            if file is None:
                continue
            if member.name.startswith(prefix):
                images[member.name.removeprefix(prefix)] = file.read()
            else:
                table = json.load(file)
    if table is None:
        raise BuildError(f"{tarball} holds no package/emoji.json", 3)
    return table, images


def with_skin_tones(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the emoji of `table` in its order, then each hand gesture in five skin tones.

    `part` is `held_out` for one tone of each gesture, another one for the next gesture, and `train` for all else:
    who trains without that part can ask for combinations that were never seen, of words that were.
    """
    rows = [{**emoji, "skin_tone": None, "part": "train"} for emoji in table]
    gestures = [emoji for emoji in table if emoji["subcategory"].startswith(GESTURES)]
    for place, emoji in enumerate(gestures):
        for number, (modifier, tone) in enumerate(SKIN_TONES.items()):
            part = "held_out" if number == place % len(SKIN_TONES) else "train"
            variant = emoji["skin_variations"][modifier]
            rows.append(
                {**emoji, "unified": variant["unified"], "image": variant["image"]}
                | {"base": emoji["unified"], "skin_tone": tone, "part": part}
            )
    return rows


def make_samples(table: Sequence[Mapping[str, Any]], images: Mapping[str, bytes]) -> list[Sample]:
    """Return one sample for each emoji of `table` and each gesture in a skin tone, in that order.

    Raises: BuildError when a picture is missing, or when two emoji would get the same caption.
    """
    samples: list[Sample] = []
    owner: dict[str, str] = {}
    for place, emoji in enumerate(with_skin_tones(table)):
        unicode, url = emoji["unified"], f"{PACKAGE}/{IMAGE_FOLDER}/{emoji['image']}"
        if emoji["image"] not in images:
            raise BuildError(f"{unicode} ({emoji['name']}): the package has no {url}", 3)
        png = rgba_png(images[emoji["image"]], url)
        row: dict[str, Any] = {"unicode": unicode}
        row |= {column: emoji[column] for column in ("name", "category", "subcategory", "skin_tone", "part")}
        row["caption"] = caption_of(
            emoji.get("base", unicode), row["name"], row["category"], row["subcategory"], row["skin_tone"]
        )
        if (other := owner.setdefault(row["caption"], unicode)) != unicode:
            raise BuildError(f"{other} and {unicode} have the same caption: {row['caption']}", 3)
        shard, index = divmod(place, SHARD_SAMPLES)
        row |= {"url": url, "key": f"{shard * KEYS_PER_SHARD + index:09d}"}
        row |= {"status": "success", "error_message": None}
        row |= {name: SIDE_PIXELS for name in ("width", "height", "original_width", "original_height")}
        row |= {"exif": "{}", "sha256": hashlib.sha256(png).hexdigest()}
        samples.append(Sample(png, row))
    return samples


def tar_bytes(samples: Sequence[Sample]) -> bytes:
    """Return a ustar archive with KEY.json, KEY.png and KEY.txt of each sample; every mtime is 0."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            members = {
                "json": json.dumps(sample.row, indent=4).encode(),
                "png": sample.png,
                "txt": sample.row["caption"].encode(),
            }
            for extension, payload in members.items():
                member = tarfile.TarInfo(f"{sample.row['key']}.{extension}")
                member.size, member.mode, member.mtime = len(payload), 0o444, 0
                member.uname = member.gname = "bigdata"  # webdataset's writer's own choice
                archive.addfile(member, io.BytesIO(payload))
    return buffer.getvalue()


def parquet_bytes(samples: Sequence[Sample]) -> bytes:
    """Return a parquet file with a row for each sample; the file names the pyarrow release that wrote it."""
    buffer = io.BytesIO()
    table = pa.Table.from_pylist([dict(sample.row) for sample in samples], schema=SCHEMA)
    with pq.ParquetWriter(buffer, SCHEMA) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
    return buffer.getvalue()


def stats_bytes(count: int) -> bytes:
    """Return the commit marker of a shard of `count` samples, none of which failed."""
    stats = {"count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0}
    times = {name: FIXED_TIME_SECONDS for name in ("duration", "start_time", "end_time")}
    return json.dumps({**stats, **times, "status_dict": {"success": count}}, indent=4).encode()


def write_whole(path: Path, payload: bytes) -> None:
    """Write `payload` beside `path` and give it that name only when it is on disk."""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_shards(samples: Sequence[Sample], output: Path) -> int:
    """Write the shards to `output` and return their number; each shard's marker goes first and comes last."""
    output.mkdir(parents=True, exist_ok=True)
    for marker in output.glob("*_stats.json"):
        marker.unlink()
    starts = range(0, len(samples), SHARD_SAMPLES)
    for shard, start in enumerate(starts):
        part = samples[start : start + SHARD_SAMPLES]
        write_whole(output / f"{shard:05d}.tar", tar_bytes(part))
        write_whole(output / f"{shard:05d}.parquet", parquet_bytes(part))
        write_whole(output / f"{shard:05d}_stats.json", stats_bytes(len(part)))
    return len(starts)


def fetch_package(folder: Path) -> Path:
    """Have npm put the package's tarball into `folder` and return its path.

    Raises: BuildError when npm is missing, fails, or takes longer than PACK_TIMEOUT_SECONDS.
    """
    command = ["npm", "pack", PACKAGE, "--ignore-scripts", "--loglevel=error"]
    advice = "get the tarball elsewhere and give it with --tarball"
    try:
        subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True, timeout=PACK_TIMEOUT_SECONDS
        )
    except FileNotFoundError as error:
        raise BuildError(f"npm is not installed: install Node.js, or {advice}", 1) from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"`npm pack {PACKAGE}` took over {PACK_TIMEOUT_SECONDS} s: {advice}", 1) from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise BuildError(f"`npm pack {PACKAGE}` failed ({lines[0]}): {advice}", 1) from error
    tarballs = sorted(folder.glob("*.tgz"))
    if len(tarballs) != 1:
        raise BuildError(f"`npm pack {PACKAGE}` left {len(tarballs)} tarballs, expected 1: {advice}", 1)
    return tarballs[0]


def build(tarball: Path, output: Path) -> str:
    """Check the package, write its shards to `output`, and return a line that says what was written."""
    check_integrity(tarball, INTEGRITY)
    table, images = read_package(tarball)
    gestures = sum(emoji["subcategory"].startswith(GESTURES) for emoji in table)
    if (len(table), gestures) != (EMOJI_COUNT, GESTURE_COUNT):
        expected = f"expected {EMOJI_COUNT} and {GESTURE_COUNT}"
        raise BuildError(f"emoji.json lists {len(table)} emoji, {gestures} of them hands: {expected}", 3)
    samples = make_samples(table, images)
    shards = write_shards(samples, output)
    return f"{len(samples)} samples in {shards} shards written to {output}"


def main() -> int:
    """Run the command line and return the exit code: 0 done, 1 missing tool, 2 usage, 3 wrong data."""
    parser = argparse.ArgumentParser(description="Rebuild the emoji example data, byte for byte.")
    parser.add_argument("--tarball", type=Path, metavar="FILE", help=f"the npm tarball of {PACKAGE}")
    parser.add_argument("--output", type=Path, metavar="FOLDER", default=Path(__file__).resolve().parent)
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="emoji-") as folder:
            print(build(arguments.tarball or fetch_package(Path(folder)), arguments.output))
    except BuildError as error:
        print(f"build.py: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"build.py: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
