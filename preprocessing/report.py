"""One page to look at a data set with: counts, histograms, storage, originals beside their decoded latents.

Made of the parts of `pipeline.page`: one static file without scripts or network.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.latents.manifest import SHARDS_NAME
from pipeline.latents.reader import LatentDataset
from pipeline.latents.record import in_tar_bytes, member_bytes
from pipeline.latents.rows import ROW_SCHEMA, SHARD_SCHEMA, read_table
from pipeline.latents.segments import SPLITS
from pipeline.latents.shard import shard_path
from pipeline.models.autoencoder import FrozenAutoencoder
from pipeline.models.pixels import pixels_from_images
from pipeline.page import histogram, picture, render_page, sections, table
from pipeline.progress import followed
from pipeline.publish import write_bytes
from preprocessing.filters import Rules
from preprocessing.images import PreparedSample, png_bytes, prepare_sample
from preprocessing.sources import SourceOptions, list_shards
from preprocessing.verify import spaced

REPORT_NAME = "report.html"
GALLERY_SAMPLES = 24
HISTOGRAM_SAMPLES = 512
EXAMPLE_KEYS = 3
MAX_TABLES = 64
SHOWN_PIXELS = 128


class Decoder(Protocol):
    """What the gallery needs of an autoencoder."""

    digest: str

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return images [B,3,H,W] in [-1, 1] of unscaled latents."""


@dataclass(frozen=True)
class Comparison:
    """A picture as it was prepared beside what its latent decodes to, uint8 [S,S,3] each."""

    key: str
    split: str
    captions: list[str]
    original: np.ndarray
    decoded: np.ndarray

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
        error = np.mean(np.square(self.original.astype(np.float64) - self.decoded))
        return 10 * math.log10(255**2 / error) if error else math.inf


def write_report(out: Path, source: Path | str, autoencoder: Path, image_column: str | None = None) -> Path:
    """Write DATASET/report.html for the finished data set in `out`, encoded from `source`; return its path.

    `image_column` as in the config that it was encoded with.

    Raises:
        DataError: when the data set is not finished, or the autoencoder is not the one that encoded it.
    """
    decoder = FrozenAutoencoder.load(autoencoder)
    return render_report(out, source, decoder, image_column)


def render_report(out: Path, source: Path | str, decoder: Decoder, image_column: str | None = None) -> Path:
    """Write the report with a loaded autoencoder; see `write_report`."""
    dataset = LatentDataset(out, "train")
    used = dataset.manifest.encoder["autoencoder"]
    if decoder.digest != used:
        raise DataError(
            f"{out}: encoded with autoencoder {used}, the report was given {decoder.digest}; give that one"
        )
    rows = _rows(out)
    parts = [
        ("What became of the input", _counts(dataset, rows)),
        ("Captions and pictures", _input_histograms(dataset, rows)),
        ("Buckets", _buckets(dataset)),
        ("Latents", _latents(dataset)),
        ("Storage", _storage(dataset)),
        (
            "Original beside decoded latent, worst first",
            _gallery(compare(out, source, decoder, image_column)),
        ),
        ("Made with", _made_with(dataset)),
    ]
    dataset.close()
    path = out / REPORT_NAME
    page = render_page(out.name, sections(parts), about="data set report", figure_width="17rem")
    write_bytes(path, page.encode())
    return path


def _rows(out: Path) -> list[dict[str, Any]]:
    """Return the rows of the data set, or of `MAX_TABLES` evenly spaced shards of a large one."""
    names = read_table(out / SHARDS_NAME, SHARD_SCHEMA).column("name").to_pylist()
    return [
        row
        for place in spaced(len(names), MAX_TABLES)
        for row in read_table(shard_path(out, names[place], ".parquet"), ROW_SCHEMA).to_pylist()
    ]


def compare(
    out: Path, source: Path | str, decoder: Decoder, image_column: str | None = None
) -> list[Comparison]:
    """Return samples of both splits, evenly spaced, each with its original and its decoded latent; worst first."""
    options = SourceOptions(unfinished="leave_out", image_column=image_column)
    shards = {shard.stem: shard for shard in list_shards(source, options)}
    found = []
    for split in SPLITS:
        dataset = LatentDataset(out, split)
        rules = Rules.from_dict(dataset.manifest.preprocessing).without_filters()
        wanted: dict[str, dict[str, int]] = {}
        for index in spaced(len(dataset), GALLERY_SAMPLES // 2):
            stem = dataset.shard_names[dataset.table.place(index).shard]
            wanted.setdefault(stem, {})[dataset.read(index).key] = index
        for stem, indices in followed(list(wanted.items()), f"comparing {split} samples", unit="shard"):
            if stem not in shards:
                raise DataError(f"{source}: has no shard {stem}: not the input that {out} was encoded from")
            for raw in shards[stem].samples(only=indices):
                prepared = prepare_sample(raw, rules)
                if isinstance(prepared, PreparedSample):
                    found.append(_comparison(dataset, indices[raw.key], prepared, decoder))
        dataset.close()
    return sorted(found, key=lambda comparison: comparison.psnr)


def compare_with(out: Path, source: Path | str, autoencoder: Path, image_column: str | None = None) -> str:
    """Return a line on how well the latents decode to their originals: worst, median and best PSNR."""
    decoder = FrozenAutoencoder.load(autoencoder)
    found = [comparison.psnr for comparison in compare(out, source, decoder, image_column)]
    if not found:
        return f"{out}: no sample to compare with {source}"
    return (
        f"{out}: {len(found)} latents decoded beside their originals, PSNR {found[0]:.1f} to {found[-1]:.1f} dB, "
        f"median {float(np.median(found)):.1f} dB"
    )


def _comparison(dataset: LatentDataset, index: int, prepared: PreparedSample, decoder: Decoder) -> Comparison:
    sample = dataset.read(index)
    if prepared.source_sha256 != sample.record["source_sha256"]:
        raise DataError(f"{prepared.source}: {sample.key} is another picture than the one that was encoded")
    mean = torch.from_numpy(sample.arrays["latent"][: dataset.spec.channels].astype(np.float32))
    decoded = pixels_from_images(decoder.decode(mean[None]))[0]
    return Comparison(sample.key, dataset.split, sample.record["captions"], prepared.picture.pixels, decoded)


def _counts(dataset: LatentDataset, rows: Sequence[dict[str, Any]]) -> str:
    counts, splits = dataset.manifest.counts, dataset.manifest.splits
    examples: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "written":
            examples.setdefault((row["status"], row["reason"]), []).append(row["key"])
    lines = [
        ("read", counts.read, ""),
        ("written", counts.written, f"train {splits['train']}, validation {splits['validation']}"),
    ]
    for status, reasons in (("rejected", counts.rejected), ("failed", counts.failed)):
        for reason, count in sorted(reasons.items(), key=lambda entry: -entry[1]):
            keys = ", ".join(examples.get((status, reason), [])[:EXAMPLE_KEYS])
            lines.append((f"{status}: {reason}", count, f"for instance {keys}"))
    lines += [
        (f"noted: {remark}", count, "") for remark, count in dataset.manifest.statistics["remarks"].items()
    ]
    lines.append(("unaccounted", counts.unaccounted, ""))
    return table(("", "samples", ""), lines)


def _input_histograms(dataset: LatentDataset, rows: Sequence[dict[str, Any]]) -> str:
    written = [row for row in rows if row["status"] == "written"]
    tokens = [
        used_tokens(dataset.read(index).arrays["tokens"][0])
        for index in spaced(len(dataset), HISTOGRAM_SAMPLES)
    ]
    short = [min(row["original_height"], row["original_width"]) for row in written]
    aspect = [row["original_width"] / row["original_height"] for row in written]
    length = [len(caption) for row in written for caption in row["captions"]]
    return "".join(
        histogram(values, title)
        for values, title in (
            (tokens, f"tokens before the padding, of {dataset.spec.text_tokens}"),
            (length, "characters of a caption"),
            (short, "shorter side of the original, pixels"),
            (aspect, "width over height of the original"),
        )
    )


def _buckets(dataset: LatentDataset) -> str:
    buckets = dataset.manifest.buckets
    most = max(sum(bucket[split] for split in SPLITS) for bucket in buckets)
    lines = []
    for bucket in buckets:
        samples = sum(bucket[split] for split in SPLITS)
        bar = "\N{FULL BLOCK}" * max(1, round(24 * samples / most))
        lines.append((f"{bucket['height']} x {bucket['width']}", *(bucket[split] for split in SPLITS), bar))
    return table(("pixels", *SPLITS, ""), lines)


def used_tokens(tokens_L: np.ndarray) -> int:
    """Return how many tokens come before the run of equal tokens at the end, which is padding or the end token."""
    differing = np.flatnonzero(tokens_L != tokens_L[-1])
    return int(differing[-1]) + 1 if len(differing) else 0


def _latents(dataset: LatentDataset) -> str:
    statistics, channels = dataset.manifest.statistics, dataset.spec.channels
    columns = ["mean", "std", *(name for name in ("posterior_std", "fp16_rounding") if name in statistics)]
    lines = [
        (str(channel), *(f"{statistics[name][channel]:.4g}" for name in columns))
        for channel in range(channels)
    ]
    latents = np.stack(
        [
            dataset.read(index).arrays["latent"][:channels].astype(np.float32)
            for index in spaced(len(dataset), HISTOGRAM_SAMPLES)
        ]
    )
    drawings = [
        histogram(latents[:, channel].ravel(), f"channel {channel}, posterior mean")
        for channel in range(channels)
    ]
    unit = statistics["scaling_factor_for_unit_std"]
    said = [
        f"scaling factor in use {dataset.spec.scaling_factor:.5g}; for unit variance "
        + (f"{unit:.5g}" if unit else "there is none: all latents are equal")
    ]
    if "recommended_latent" in statistics:
        said.append(
            f"by posterior width against fp16 rounding, encode.latent={statistics['recommended_latent']} is recommended"
        )
    return table(("channel", *columns), lines) + f"<p>{'; '.join(said)}</p>" + "".join(drawings)


def _storage(dataset: LatentDataset) -> str:
    spec, lines = dataset.spec, []
    for bucket in dataset.manifest.buckets:
        samples = sum(bucket[split] for split in SPLITS)
        parts = [
            (member.name, member_bytes(member))
            for member in spec.members((bucket["height"], bucket["width"]))
        ]
        parts.append(("json", dataset.table.place(0).json_bytes))
        total = sum(in_tar_bytes(size) for _, size in parts)
        for name, size in parts:
            in_tar = in_tar_bytes(size)
            lines.append(
                (
                    f"{bucket['height']} x {bucket['width']} {name}",
                    f"{in_tar:,}",
                    f"{in_tar * samples / 1e6:,.1f}",
                    f"{100 * in_tar / total:.1f} %",
                )
            )
    whole = sum(dataset.shard_bytes)
    return (
        table(("member", "bytes a sample, in the tar", "MB in all", "share"), lines)
        + f"<p>{whole / 1e6:,.1f} MB in {len(dataset.shard_bytes)} tars</p>"
    )


def _gallery(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return "<p>No sample to compare.</p>"
    finite = [comparison.psnr for comparison in comparisons if math.isfinite(comparison.psnr)]
    mean = f"mean PSNR {np.mean(finite):.1f} dB over {len(finite)} samples" if finite else "all equal"
    figures = "".join(
        f"<figure>{_picture(c.original, 'original')}{_picture(c.decoded, 'decoded latent')}"
        f"<figcaption><b>{c.psnr:.1f} dB</b> {html.escape(c.split)} {html.escape(c.key)}<br>"
        f"{'<br>'.join(html.escape(caption) for caption in c.captions)}</figcaption></figure>"
        for c in comparisons
    )
    return f"<p>{mean}</p><div class='gallery'>{figures}</div>"


def _made_with(dataset: LatentDataset) -> str:
    manifest = dataset.manifest
    facts = {
        "digest": manifest.digest,
        **manifest.encoder,
        **manifest.preprocessing,
        **manifest.spec.as_dict(),
    }
    return table(("", ""), sorted((name, str(value)) for name, value in facts.items()))


def _picture(pixels: np.ndarray, alternative: str) -> str:
    return picture(png_bytes(pixels), alternative, f"width='{SHOWN_PIXELS}'")
