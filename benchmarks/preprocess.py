"""What precomputing costs beside its encoder: overlap of decoding and encoding, memory, the SD-size autoencoder.

    python -m benchmarks.preprocess overlap        # pipeline rate over min(encoder rate, cores / decode time)
    python -m benchmarks.preprocess memory         # peak memory at 2, 10 and 40 shards
    python -m benchmarks.preprocess autoencoder    # seconds for 16 pictures with random weights, once

The encoder of `overlap` is a stand-in that holds no core and takes 2.5 ms a picture, a published rate of an H100 at
512 px: what is measured is all the rest, from the tar that img2dataset wrote to the published shard. The decode time is
taken from one plain loop alone, and from one on each core at once: cores that share caches and memory do not add up.
"""

import argparse
import functools
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import EncodeConfig
from pipeline.latents.spec import LatentSpec
from preprocessing.encoded import EncodedBatch
from preprocessing.filters import Rules
from preprocessing.images import PreparedSample, prepare_sample
from preprocessing.roster import Work, encode_shards
from preprocessing.sources import list_shards

REPOSITORY = Path(__file__).resolve().parents[1]
ENCODER_SECONDS = 0.0025
SIZE = 512
SHAPE = (880, 1184)
DISTINCT = 32
LOOP = 100
"""Pictures of one plain loop."""


class StandIn:
    """Sleeps as long as a GPU would take and returns arrays of SD 1.5's shapes."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.spec = LatentSpec("moments", 4, 8, 0.18215, 0.0, "tokens", 77, 768, None, 1)
        random = np.random.default_rng(0)
        self._moments = random.normal(size=(batch, 8, SIZE // 8, SIZE // 8)).astype(np.float16)
        self._tokens = np.zeros((batch, 1, 77), np.uint16)

    def fingerprint(self) -> dict[str, Any]:
        """Return what stands where digests of weights stand."""
        return {"encoder": {"device": "none"}, "versions": {}}

    def release_memory(self) -> None:
        """Nothing is cached."""

    def encode(self, images_BHWC: np.ndarray, captions: Sequence[tuple[str, ...]]) -> EncodedBatch:
        """Return the same arrays after the time that the batch takes."""
        given = len(images_BHWC)
        time.sleep(ENCODER_SECONDS * given)
        arrays = {"latent": self._moments[:given], "tokens": self._tokens[:given]}
        return EncodedBatch(arrays, (None,) * given, np.zeros(given, bool), np.zeros(given, bool))


def make_source(folder: Path, shards: int, samples: int) -> None:
    """Write shards of JPEGs of 1 MP, as img2dataset does, with its marker."""
    pictures = [_jpeg(seed) for seed in range(DISTINCT)]
    for number in range(shards):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for place in range(samples):
                key = f"{number:05d}{place:04d}"
                for name, content in (
                    (f"{key}.jpg", pictures[place % DISTINCT]),
                    (f"{key}.txt", f"a picture of thing number {place}".encode()),
                ):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({"count": samples, "successes": samples}))


def _jpeg(seed: int) -> bytes:
    """Return a picture of 1 MP with detail at every scale."""
    random = np.random.default_rng(seed)
    pixels = np.zeros((*SHAPE, 3))
    for scale in (4, 16, 64, 256):
        coarse = random.integers(0, 256, (scale, scale, 3), dtype=np.uint8)
        pixels += np.asarray(Image.fromarray(coarse).resize(SHAPE[::-1], Image.Resampling.BICUBIC)) / 4.0
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def settings(source: Path) -> EncodeConfig:
    """Return the settings of SD 1.5 at 512 px with token ids."""
    values = {
        "source": str(source),
        "image_size": SIZE,
        "batch": 16,
        "text": "tokens",
        "validation_samples": 0,
    }
    return EncodeConfig.model_validate_json(json.dumps(values))


def decode_seconds(source: Path, config: EncodeConfig, loops: int) -> float:
    """Return the CPU seconds that preparing one sample takes in plain loops, each alone on a core of its own."""
    with ProcessPoolExecutor(loops, mp_context=get_context("fork")) as pool:
        cores = sorted(os.sched_getaffinity(0))[:loops]
        seconds = pool.map(functools.partial(_plain_loop, source, config, threading.active_count()), cores)
        return statistics.mean(seconds)


def _plain_loop(source: Path, config: EncodeConfig, threads: int, core: int) -> float:
    assert threads == 1, "a fork of a process with threads may hang"
    os.sched_setaffinity(0, {core})
    raws = [raw for raw, _ in zip(list_shards(source, config)[0].samples(), range(LOOP), strict=False)]
    rules = Rules.from_config(config)
    started = time.process_time()
    prepared = [isinstance(prepare_sample(raw, rules), PreparedSample) for raw in raws]
    assert all(prepared)
    return (time.process_time() - started) / len(raws)


def child_overlap(source: Path, out: Path, rounds: int, cores: int) -> list[dict[str, float]]:
    """Measure limits and pipeline in turn on `cores` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ["LDM_QUIET"] = "1"
    config, found = settings(source), []
    shards = list_shards(source, config)
    samples = sum(shard.estimate or 0 for shard in shards)

    def both() -> np.ndarray:
        return np.array([decode_seconds(source, config, loops) for loops in (1, cores)])

    before = both()
    for number in range(rounds + 1):
        started = time.perf_counter()
        counts = encode_shards(Work(shards, out / str(number)), StandIn(config.batch), config).counts
        rate = samples / (time.perf_counter() - started)
        assert counts.written == samples
        subprocess.run(["rm", "-r", str(out / str(number))], check=True)
        after = both()
        decode, before = (before + after) / 2, after
        limits = np.minimum(1 / ENCODER_SECONDS, cores / decode)
        found.append({"alone_ms": decode[0] * 1e3, "busy_ms": decode[1] * 1e3, "rate": rate})
        found[-1] |= {"ratio": rate / limits[0], "busy_ratio": rate / limits[1]}
    return found[1:]  # the first fills caches and loads codecs


def child_memory(source: Path, out: Path, rounds: int, cores: int) -> list[dict[str, float]]:
    """Encode everything and return the peak resident memory of this process in MB."""
    os.environ["LDM_QUIET"] = "1"
    config = settings(source)
    encode_shards(Work(list_shards(source, config), out), StandIn(config.batch), config)
    return [{"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}]


def in_child(case: str, source: Path, rounds: int, cores: int) -> list[dict[str, float]]:
    """Return what a fresh process without torch measured."""
    with tempfile.TemporaryDirectory(dir=source.parent) as out:
        command = [sys.executable, "-m", "benchmarks.preprocess", "child", case, str(source), out]
        done = subprocess.run(
            [*command, str(rounds), str(cores)], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True
        )
    found: list[dict[str, float]] = json.loads(done.stdout)
    return found


def overlap(rounds: int, folder: Path) -> None:
    """Print the table of (a)."""
    print(
        "| cores | decode ms: a loop alone, on all at once | pipeline /s "
        "| over the limit alone: median (lowest to highest) | over the limit of all at once |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(dir=folder) as root:
        source = Path(root, "in")
        source.mkdir()
        make_source(source, 4, 600)
        for cores in range(1, min(2, len(os.sched_getaffinity(0))) + 1):
            found = in_child("overlap", source, rounds, cores)
            middle = {name: statistics.median(entry[name] for entry in found) for name in found[0]}
            spans = {
                name: f"{middle[name]:.3f} ({min(e[name] for e in found):.3f} to {max(e[name] for e in found):.3f})"
                for name in ("ratio", "busy_ratio")
            }
            print(
                f"| {cores} | {middle['alone_ms']:.2f}, {middle['busy_ms']:.2f} | {middle['rate']:.0f} | "
                f"{spans['ratio']} | {spans['busy_ratio']} |",
                flush=True,
            )


def memory(rounds: int, folder: Path) -> None:
    """Print the table of (c); 10 beside 2 and 40 tells what grows for ever from what only a third shard brings."""
    peaks: dict[int, list[float]] = {2: [], 10: [], 40: []}
    with tempfile.TemporaryDirectory(dir=folder) as root:
        for shards in peaks:
            (Path(root) / str(shards)).mkdir()
            make_source(Path(root) / str(shards), shards, 200)
        for _ in range(rounds):
            for shards, seen in peaks.items():
                seen.append(in_child("memory", Path(root) / str(shards), 1, 0)[0]["peak_mb"])
    print("| shards of 200 | peak MB: median (lowest to highest) |\n|---|---|")
    for shards, seen in peaks.items():
        print(f"| {shards} | {statistics.median(seen):.1f} ({min(seen):.1f} to {max(seen):.1f}) |")
    for few in (2, 10):
        ratios = sorted(b / a for a, b in zip(peaks[few], peaks[40], strict=True))
        middle = statistics.median(ratios)
        print(f"\n40 over {few}: {middle:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}, {rounds} rounds)")


def autoencoder() -> None:
    """Print the seconds of one batch through SD 1.5's autoencoder with random weights on this device."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=SIZE,
    ).eval()
    images = torch.rand(16, 3, 256, 256) * 2 - 1
    started = time.perf_counter()
    with torch.inference_mode():
        moments = torch.cat([model.encode(images[k : k + 4]).latent_dist.parameters for k in range(0, 16, 4)])
    seconds = time.perf_counter() - started
    assert moments.shape == (16, 8, 32, 32) and bool(torch.isfinite(moments).all())
    print(f"16 pictures of 256 px: {seconds:.1f} s, {torch.get_num_threads()} threads, fp32, random weights")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preprocess", description=__doc__)
    parser.add_argument("part", choices=["overlap", "memory", "autoencoder", "child"])
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    options = parser.parse_args(argv)
    if options.part == "child":
        case, source, out, rounds, cores = options.rest
        measure = {"overlap": child_overlap, "memory": child_memory}[case]
        print(json.dumps(measure(Path(source), Path(out), int(rounds), int(cores))))
    elif options.part == "autoencoder":
        autoencoder()
    else:
        {"overlap": overlap, "memory": memory}[options.part](options.rounds, options.folder)


if __name__ == "__main__":
    main()
