"""Builders of small, whole things that tests run on: configs, networks, encoder folders. No binary fixtures."""

import dataclasses
import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import publish, trained_network
from pipeline.config import AutoencoderConfig, ClipConfig, RunConfig
from pipeline.latents.manifest import SEGMENTS_NAME, SHARDS_NAME, Manifest
from pipeline.latents.record import (
    LatentSample,
    json_length,
    member_offsets,
    npy_bytes,
    padded_json,
    stride_bytes,
)
from pipeline.latents.rows import ROW_SCHEMA, SHARD_SCHEMA, write_table
from pipeline.latents.segments import Segment, segments_array
from pipeline.latents.shard import Counts, shard_path
from pipeline.latents.spec import LatentSpec
from pipeline.models.autoencoder import FrozenAutoencoder, build_autoencoder, save_autoencoder
from pipeline.models.pixels import images_from_pixels
from pipeline.models.text_encoder import FrozenTextEncoder, build_clip, save_clip, train_tokenizer
from pipeline.models.unet import UNet
from pipeline.paths import RunPaths

CAPTIONS = tuple(
    f"a {colour} {shape}" for shape in ("square", "disc", "cross") for colour in ("red", "green")
)


def tiny_config(runs: Path, **sections: Any) -> RunConfig:
    """Return a run on 4-channel 8x8 latents of 16 px pictures and 16 text states of width 32.

    A keyword names a section and holds the fields to change in it, or a plain value: `tiny_config(tmp_path,
    name="other", engine={"zero_stage": 2})`.
    """
    tree: dict[str, Any] = {
        "name": "tiny",
        "runs": str(runs),
        "encode": {"source": "nowhere", "image_size": 16},
        "model": {
            "sample_size": 8,
            "block_out_channels": [32, 64],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
        },
        "engine": {"global_batch": 4, "micro_batch": 2, "precision": "fp32"},
        "train": {"steps": 10},
        "tracking": {"mlflow": "off"},
    }
    for name, value in sections.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    # Through JSON: strict models take a list for a tuple from there only.
    return RunConfig.model_validate_json(json.dumps(tree))


def tiny_autoencoder(folder: Path, *, scaling_factor: float = 0.5) -> Path:
    """Write a random AutoencoderKL of downsampling 2 with four latent channels and return its folder."""
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1}
    torch.manual_seed(1)
    save_autoencoder(build_autoencoder(AutoencoderConfig(steps=1, **sizes), 16), folder, scaling_factor)  # type: ignore[arg-type]
    return folder


def tiny_clip(text_encoder: Path, clip: Path) -> Path:
    """Write a random CLIP of width 32 for 16 tokens, and its text tower to `text_encoder`, which is returned."""
    sizes = {"width": 32, "vision_layers": 1, "text_layers": 2, "heads": 2, "patch": 8, "max_tokens": 16}
    config = ClipConfig(steps=1, vocabulary=600, **sizes)  # type: ignore[arg-type]
    torch.manual_seed(2)
    tokenizer = train_tokenizer(CAPTIONS, config.vocabulary, config.max_tokens)
    save_clip(build_clip(config, 16, tokenizer), tokenizer, clip, text_encoder)
    return text_encoder


def tiny_pictures(count: int, side: int = 16) -> np.ndarray:
    """Return smooth coloured pictures, uint8 [count, side, side, 3], each unlike the others."""
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(3 * x * k + y * (k + c) + c) for k in range(1, count + 1) for c in range(3)]
    return ((np.stack(waves).reshape(count, 3, side, side) + 1) * 127).astype(np.uint8).transpose(0, 2, 3, 1)


def tiny_dataset(
    folder: Path,
    autoencoder: Path,
    text_encoder: Path,
    *,
    count: int = 12,
    validation: int = 5,
    text: Literal["embeddings", "tokens"] = "embeddings",
) -> Manifest:
    """Write a finished format 1 data set of one shard, encoded from `tiny_pictures`, and return its manifest."""
    images, words = FrozenAutoencoder.load(autoencoder), FrozenTextEncoder.load(text_encoder)
    spec = LatentSpec(
        "moments", images.channels, images.downsampling, images.scaling_factor, images.shift_factor,
        text, words.max_tokens, words.width, None, 1,
    )  # fmt: skip
    captions = [CAPTIONS[k % len(CAPTIONS)] for k in range(count)]
    moments = images.encode(images_from_pixels(tiny_pictures(count))).numpy().astype(np.float16)
    samples = [
        LatentSample(
            f"{k:05d}",
            {"latent": moments[k]} | text_arrays(words, captions[k], spec),
            {"key": f"{k:05d}", "captions": [captions[k]]},
        )
        for k in range(count)
    ]
    tar = write_tar(folder, spec, samples)
    write_table(folder / SHARDS_NAME, [tar], SHARD_SCHEMA)
    json_bytes = json_length(sample.record for sample in samples)
    stride = stride_bytes(spec.members((16, 16)), json_bytes)
    train = count - validation
    places = [("train", 0, train), ("validation", train, validation)]
    segments = [
        Segment(0, split, 16, 16, json_bytes, row, n, stride, row * stride) for split, row, n in places
    ]
    np.save(folder / SEGMENTS_NAME, segments_array(segments))
    null = {name: npy_bytes(array) for name, array in text_arrays(words, "", spec).items()}
    for name, payload in null.items():
        publish.write_bytes(folder / "null" / f"{name}.npy", payload)
    return Manifest(
        spec=spec,
        counts=Counts(count, count),
        splits={"train": train, "validation": validation},
        buckets=[{"height": 16, "width": 16, "train": train, "validation": validation}],
        encoder={
            "autoencoder": images.digest,
            "text_encoder": words.digest,
            "tokenizer": words.tokenizer_digest,
            "precision": "fp32",
        },
        preprocessing={},
        statistics={},
        tables={name: publish.file_digest(folder / name) for name in (SHARDS_NAME, SEGMENTS_NAME)},
        null={name: publish.file_digest(folder / "null" / f"{name}.npy") for name in null},
    ).save(folder)


def text_arrays(words: FrozenTextEncoder, caption: str, spec: LatentSpec) -> dict[str, np.ndarray]:
    """Return the text members of one caption, as a data set of `spec` stores them."""
    tokens, _ = words.tokenize([caption])
    arrays = {"text": words.encode(tokens).numpy().astype(np.float16)} if spec.text == "embeddings" else {}
    return {**arrays, "tokens": tokens.numpy().astype(np.uint16)}


def write_tar(folder: Path, spec: LatentSpec, samples: Sequence[LatentSample]) -> dict[str, Any]:
    """Write shard 00000 with every sample at the offset that the format says; return its row of the shard table."""
    path = shard_path(folder, "00000", ".tar")
    path.parent.mkdir(parents=True)
    json_bytes = json_length(sample.record for sample in samples)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            files = {f"{name}.npy": npy_bytes(array) for name, array in sample.arrays.items()}
            files["json"] = padded_json(sample.record, json_bytes)
            for name, payload in files.items():
                entry = tarfile.TarInfo(f"{sample.key}.{name}")
                entry.size = len(payload)
                tar.addfile(entry, io.BytesIO(payload))
    offsets = member_offsets(spec.members((16, 16)), json_bytes)
    assert [*samples[0].arrays, "json"] == list(offsets), "members out of order"
    content = path.read_bytes()
    stride = stride_bytes(spec.members((16, 16)), json_bytes)
    rows = [
        dict.fromkeys(ROW_SCHEMA.names)
        | {"key": sample.key, "status": "written", "offset": row * stride}
        | {"crc32": zlib.crc32(content[row * stride : (row + 1) * stride])}
        for row, sample in enumerate(samples)
    ]
    write_table(path.with_suffix(".parquet"), rows, ROW_SCHEMA)
    size_bytes, digest = path.stat().st_size, publish.file_digest(path)
    return {"name": "00000", "samples": len(samples), "bytes": size_bytes, "digest": digest}


@dataclass(frozen=True)
class TinyRun:
    """A run folder with encoders and data, and the weights that its checkpoint would hold."""

    paths: RunPaths
    config: RunConfig
    manifest: Manifest
    weights: dict[str, dict[str, Tensor]]
    step: int = 7

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint would lie."""
        return self.paths.checkpoints / f"step-{self.step:08d}"

    def pretend_checkpoint(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let `pipeline.trained_network` find the checkpoint without a file."""
        facts = {
            "config": json.loads(self.config.model_dump_json()),
            "step": self.step,
            "samples": 4 * self.step,
            "data_digest": self.manifest.digest,
        }
        monkeypatch.setattr(trained_network, "newest_checkpoint", lambda checkpoints: self.checkpoint)
        monkeypatch.setattr(trained_network, "read_manifest", lambda checkpoint: facts)
        monkeypatch.setattr(
            trained_network, "load_weights", lambda checkpoint, which, *, verified: self.weights[which]
        )

    def with_config(self, **sections: Any) -> "TinyRun":
        """Return the run with other sections in its config."""
        return dataclasses.replace(self, config=tiny_config(Path(self.config.runs), **sections))


def tiny_run(runs: Path, *, text: Literal["embeddings", "tokens"] = "embeddings", **sections: Any) -> TinyRun:
    """Return the run RUNS/tiny: random encoders, a data set made with them, random raw and EMA weights."""
    config, paths = tiny_config(runs, encode={"text": text}, **sections), RunPaths(runs / "tiny")
    tiny_autoencoder(paths.autoencoder)
    tiny_clip(paths.text_encoder, paths.clip)
    manifest = tiny_dataset(paths.latents, paths.autoencoder, paths.text_encoder, text=text)
    weights = {}
    for seed, name in enumerate(("raw", "ema")):
        torch.manual_seed(seed)
        weights[name] = UNet(config.model).state_dict()
    return TinyRun(paths, config, manifest, weights)
