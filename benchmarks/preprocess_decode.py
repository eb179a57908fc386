"""What preparing a picture costs with every check on, against the plain way everybody writes.

    python -m benchmarks.preprocess_decode                 # 1 and 3 megapixels to 256 and 512 pixels
    python -m benchmarks.preprocess_decode --gate          # fail unless the published targets hold

Side A is `prepare_sample`: caption, format and header checks, JPEG decoded at a reduced scale where that still covers
the target, orientation, profile, crop, antialiased resize, byte and perceptual hash. Side B is
`Image.open().convert("RGB")`, bicubic resize of the short side, centre crop, and nothing else. The ratio B / A is how
many times faster A is. One core. The pictures are JPEG 4:2:0 of quality 85 whose amplitude falls as 1 / f^SLOPE. What no
scaling saves is reading the file, so the ratio depends on its bytes a pixel, which are printed: random phases make
1 / f heavier than photographs are (0.42 bytes a pixel), `--slope 1` shows that case.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import MARKDOWN_HEADER, Comparison, Rounds, Side, compare, gate, markdown_row
from pipeline.publish import whole_file
from preprocessing.filters import Rules
from preprocessing.images import PreparedSample, prepare_sample
from preprocessing.samples import RawSample

REPOSITORY = Path(__file__).resolve().parents[1]
PICTURES = 4
LEAST_PSNR = 30.0
GREY = 117
SLOPE = 1.3
CONTRAST = 45


@dataclass(frozen=True)
class Case:
    """Pictures of height x width pixels to squares of `image_size`; `at_least` is the target of --gate."""

    name: str
    height: int
    width: int
    image_size: int
    at_least: float | None


CASES = (
    Case("decode_1mp_256", 1024, 1024, 256, 1.8),
    Case("decode_1mp_512", 1024, 1024, 512, 1.8),
    Case("decode_3mp_256", 1536, 2016, 256, 3.0),
    Case("decode_3mp_512", 1536, 2016, 512, None),
)


def photograph(height: int, width: int, seed: int, slope: float = SLOPE) -> bytes:
    """Return a JPEG of random pixels with the amplitude spectrum 1 / f^slope; natural pictures have 0.9 to 1.5."""
    generator = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = 1.0
    channels = []
    for _ in range(3):
        spectrum = np.exp(2j * np.pi * generator.random(frequency.shape)) / frequency**slope
        spectrum[0, 0] = 0.0
        plane = np.fft.irfft2(spectrum, (height, width))
        channels.append(plane / plane.std() * CONTRAST + GREY)
    mixed = np.stack(channels, axis=-1)
    mixed = 0.2 * mixed + 0.8 * mixed[..., :1]  # colours of photographs are mostly brightness
    stream = io.BytesIO()
    Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def ours(payloads: Sequence[bytes], rules: Rules) -> list[np.ndarray]:
    """Return the pixels of all pictures, prepared as the pipeline does it."""
    prepared = []
    for number, payload in enumerate(payloads):
        raw = RawSample(str(number), str(number), "benchmark", image=payload, text=b"a picture")
        found = prepare_sample(raw, rules)
        assert isinstance(found, PreparedSample), found
        prepared.append(found.picture.pixels)
    return prepared


def plain(payloads: Sequence[bytes], image_size: int) -> list[np.ndarray]:
    """Return the pixels of all pictures by Pillow alone."""
    prepared = []
    for payload in payloads:
        image = Image.open(io.BytesIO(payload)).convert("RGB")
        scale = image_size / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        prepared.append(np.asarray(image.crop((left, top, left + image_size, top + image_size))))
    return prepared


def same_pictures(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    """Refuse to time two things that do not show the same."""
    for a, b in zip(first, second, strict=True):
        error = np.mean((a.astype(float) - b.astype(float)) ** 2)
        psnr = 10 * np.log10(255**2 / max(error, 1e-9))
        assert psnr > LEAST_PSNR, f"PSNR {psnr:.1f} dB between the two sides"


def run(case: Case, rounds: Rounds, out_dir: Path, slope: float) -> Comparison:
    """Return the comparison of one case."""
    payloads = [photograph(case.height, case.width, seed, slope) for seed in range(PICTURES)]
    per_pixel = sum(map(len, payloads)) / (PICTURES * case.height * case.width)
    print(f"{case.name}: {per_pixel:.2f} bytes a pixel")
    rules = Rules(case.image_size, (255, 255, 255), 1, 4.0, 64_000_000, 1)
    return compare(
        Side("prepare_sample", lambda: ours(payloads, rules)),
        Side("Image.open + bicubic", lambda: plain(payloads, case.image_size)),
        name=case.name,
        out_dir=out_dir,
        check=same_pictures,
        rounds=rounds,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run all cases; write CSV, PNG and `preprocess_decode.md`, print the table. Seconds are of 4 pictures.

    Raises: SystemExit with code 1 where `--gate` is given and a target does not hold.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preprocess_decode", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=20, help="measured rounds, one run of each side in each"
    )
    parser.add_argument("--warmup", type=int, default=2, help="untimed rounds before")
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--slope", type=float, default=SLOPE, help="how fast the pictures' amplitude falls")
    parser.add_argument("--gate", action="store_true", help="fail where an interval reaches below its target")
    options = parser.parse_args(argv)
    rounds = Rounds(measured=options.rounds, warmup=options.warmup)
    comparisons = [run(case, rounds, options.out_dir, options.slope) for case in CASES]
    table = "\n".join([MARKDOWN_HEADER, *map(markdown_row, comparisons)])
    with whole_file(options.out_dir / "preprocess_decode.md") as beside:
        beside.write_text(table + "\n")
    print(table)
    for case, comparison in zip(CASES, comparisons, strict=True):
        if options.gate and case.at_least is not None:
            gate(comparison, at_least=case.at_least)
    return 0


if __name__ == "__main__":
    sys.exit(main())
