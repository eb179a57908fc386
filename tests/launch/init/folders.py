"""Sources with known properties, of every kind that `ldm encode` reads: a few small pictures, or very many tiny ones."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Size = tuple[int, int]


def picture(number: int, size: Size = (64, 64), mode: str = "RGB", kind: str = "PNG") -> bytes:
    """Return a file with a plain picture of (width, height) `size` whose colour tells its number."""
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "LA": 2}[mode]
    level = [(37 * number + 91 * channel) % 256 for channel in range(channels)]
    image = Image.new(mode, size, level[0] if channels == 1 else tuple(level))
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def drawing(light: int, side: int = 64) -> bytes:
    """Return a PNG with a disc of lightness `light` on nothing."""
    y, x = np.mgrid[0:side, 0:side] - side / 2
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[x**2 + y**2 < (side / 3) ** 2] = (light, light, light, 255)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_folder(folder: Path, pictures: Sequence[bytes], captions: Sequence[str | None]) -> Path:
    """Write 00000.png with its 00000.txt and so on; no text for None."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (payload, caption) in enumerate(zip(pictures, captions, strict=True)):
        (folder / f"{number:05d}.png").write_bytes(payload)
        if caption is not None:
            (folder / f"{number:05d}.txt").write_text(caption)
    return folder


def write_tars(
    folder: Path, pictures: Sequence[bytes], captions: Sequence[str], shards: int, *, markers: bool = True
) -> Path:
    """Write the samples as img2dataset does, dealt over `shards` tars."""
    folder.mkdir(parents=True, exist_ok=True)
    each = -(-len(pictures) // shards)
    for shard in range(shards):
        numbers = range(shard * each, min(len(pictures), (shard + 1) * each))
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in numbers:
                for suffix, payload in (("png", pictures[number]), ("txt", captions[number].encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))
        if markers:
            (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"successes": len(numbers)}))
    return folder


def write_parquet(
    path: Path, columns: Mapping[str, Sequence[object]], *, row_group_size: int | None = None
) -> Path:
    """Write the columns as one parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, row_group_size=row_group_size)
    return path.parent
