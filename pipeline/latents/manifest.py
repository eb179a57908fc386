"""The manifest: what a data set is, written last by `finalize`. No manifest, no training."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, UNetConfig
from pipeline.errors import ConfigError, DataError
from pipeline.latents.shard import FORMAT, Counts
from pipeline.latents.spec import LatentSpec
from pipeline.publish import json_digest, write_json

MANIFEST_NAME = "manifest.json"
SHARDS_NAME = "shards.parquet"
SEGMENTS_NAME = "segments.npy"


@dataclass(frozen=True)
class Manifest:
    """Everything a training needs to know before it reads a byte of a tar.

    `digest` covers all other fields, and through `tables` and the shard table every tar: two data sets with
    equal digests train the same model.
    """

    spec: LatentSpec
    counts: Counts
    splits: dict[str, int]
    buckets: list[dict[str, Any]]
    encoder: dict[str, str]
    preprocessing: dict[str, Any]
    statistics: dict[str, Any]
    tables: dict[str, str]
    null: dict[str, str]
    digest: str = ""
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data with the digest filled in."""
        data = dataclasses.asdict(self)
        data.pop("digest")
        return {**data, "digest": json_digest(data)}

    def save(self, dataset: Path) -> "Manifest":
        """Write DATASET/manifest.json, whole or not at all, and return the manifest with its digest."""
        data = self.to_json()
        write_json(dataset / MANIFEST_NAME, data)
        return dataclasses.replace(self, digest=data["digest"])

    @classmethod
    def load(cls, dataset: Path) -> "Manifest":
        """Return the manifest of the data set in the folder `dataset`.

        Raises:
            DataError: when it is missing, damaged, or of a format this version does not read.
        """
        path = dataset / MANIFEST_NAME
        if not path.is_file():
            state = (
                "has no manifest.json: run `ldm finalize`"
                if dataset.is_dir()
                else "does not exist: run `ldm encode`"
            )
            raise DataError(f"{dataset}: the data set {state} (training reads finished data sets only)")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = data.get("format")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path}: not JSON ({error}); run `ldm finalize` again") from None
        if found != FORMAT:
            raise DataError(f"{path}: format {found!r}, this version reads format {FORMAT}")
        digest = data.pop("digest", None)
        if digest != json_digest(data):
            raise DataError(
                f"{path}: its digest does not match its content (edited or damaged); run `ldm finalize` again"
            )
        names = {field.name for field in dataclasses.fields(cls)} - {"digest"}
        if set(data) != names:
            raise DataError(f"{path}: has the fields {sorted(data)}, format {FORMAT} has {sorted(names)}")
        spec = LatentSpec.from_dict(data["spec"], str(path))
        return cls(**{**data, "spec": spec, "counts": Counts(**data["counts"]), "digest": digest})


def mismatches(manifest: Manifest, config: RunConfig) -> list[str]:
    """Return a line for each way in which the data set does not fit the config: field and both values."""
    spec, unet = manifest.spec, config.model
    pairs = [
        ("model.in_channels", unet.in_channels, "latent channels", spec.channels),
        ("model.out_channels", unet.out_channels, "latent channels", spec.channels),
        ("model.cross_attention_dim", unet.cross_attention_dim, "text width", spec.text_width),
        ("encode.latent", config.encode.latent, "spec.latent", spec.latent),
        ("encode.text", config.encode.text, "spec.text", spec.text),
    ]
    lines = [
        f"{name} is {ours!r}, the data set's {field} is {theirs!r}"
        for name, ours, field, theirs in pairs
        if ours != theirs
    ]
    if unet.addition_embed_type is not None:
        lines += _pooled_mismatches(spec, unet)
    for bucket in manifest.buckets:
        height, width = spec.latent_shape((bucket["height"], bucket["width"]))[1:]
        if height % unet.downsampling or width % unet.downsampling:
            lines.append(
                f"model.block_out_channels halves {unet.downsampling} times over, the data set's bucket "
                f"{bucket['height']}x{bucket['width']} has {height}x{width} latents, not a multiple"
            )
    if manifest.splits.get("train", 0) < config.engine.global_batch:
        lines.append(
            f"engine.global_batch is {config.engine.global_batch}, the data set's train split has only "
            f"{manifest.splits.get('train', 0)} samples"
        )
    return lines


def _pooled_mismatches(spec: LatentSpec, unet: UNetConfig) -> list[str]:
    """Return what keeps the U-Net's text_time embedding from taking the stored pooled text and six sizes."""
    if spec.pooled_width is None:
        return [
            f"model.addition_embed_type is {unet.addition_embed_type!r}, the data set has no pooled text: encode it "
            "with encode.text_encoder_2"
        ]
    needed = spec.pooled_width + 6 * (unet.addition_time_embed_dim or 0)
    if needed == unet.projection_class_embeddings_input_dim:
        return []
    return [
        f"model.projection_class_embeddings_input_dim is {unet.projection_class_embeddings_input_dim}, the data set's "
        f"pooled text of {spec.pooled_width} and six sizes of {unet.addition_time_embed_dim} need {needed}"
    ]


def refuse_mismatch(manifest: Manifest, config: RunConfig, where: Path) -> None:
    """Do nothing if the data set fits the config.

    Raises:
        ConfigError: with a line for each field that does not fit, both values in it.
    """
    lines = mismatches(manifest, config)
    if lines:
        raise ConfigError([f"{where}: {line}" for line in lines])
