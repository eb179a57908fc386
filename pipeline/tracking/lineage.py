"""What a piece of work was made from: data sets and encoders, with digests and the MLflow runs that made them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.paths import (
    RunPaths,
    autoencoder_folder,
    dataset_folder,
    dataset_places,
    text_encoder_folder,
)
from pipeline.tracking.redaction import redact_text
from pipeline.tracking.starts import read_object, tracked_run


@dataclass(frozen=True)
class Input:
    """One thing that work began with."""

    name: str
    role: str
    """"training", "encoded", "autoencoder", "text_encoder" or "source"."""
    place: str
    digest: str
    facts: dict[str, Any] = field(default_factory=dict)
    made_by: str | None = None
    """The MLflow run that made it, if one is known."""


def inputs_of(paths: RunPaths, config: RunConfig, kind: str) -> list[Input]:
    """Return what `kind` of work used, as far as it is there: nothing is read but small JSON files."""
    if kind == "train":
        return [*_datasets(config, paths), *_encoders(config, paths)]
    found = [Input("source", "source", redact_text(config.encode.source), "")]
    if kind == "encode":
        found += _datasets(config, paths, role="encoded") + _encoders(config, paths)
    return found


def manifest_digest(dataset: Path) -> str | None:
    """Return the digest in the data set's manifest, or None where there is no manifest yet."""
    digest = read_object(dataset / "manifest.json").get("digest")
    return digest if isinstance(digest, str) else None


def _datasets(config: RunConfig, paths: RunPaths, role: str = "training") -> list[Input]:
    places = dataset_places(config, paths) if role == "training" else [str(dataset_folder(config, paths))]
    return list(_known(places, role))


def _known(places: list[str], role: str) -> Iterator[Input]:
    for place in places:
        folder = Path(place)
        told = read_object(folder / "manifest.json")
        digest = told.get("digest")
        facts: dict[str, Any] = {
            name: told[name] for name in ("counts", "splits", "buckets", "spec") if name in told
        }
        made_by = tracked_run(folder.parent, "encode") if role == "training" else None
        yield Input(_name(place), role, redact_text(place), str(digest or ""), facts, made_by)


def _encoders(config: RunConfig, paths: RunPaths) -> list[Input]:
    """Return both encoders: the digest is the manifest's, which training holds the folders against."""
    digests = read_object(dataset_folder(config, paths) / "manifest.json").get("encoder", {})
    found = []
    for role, folder, maker in (
        ("autoencoder", autoencoder_folder(config, paths), "autoencoder"),
        ("text_encoder", text_encoder_folder(config, paths), "clip"),
    ):
        digest, made_by = str(digests.get(role, "")), tracked_run(folder.parent, maker)
        found.append(Input(_name(str(folder)), role, redact_text(str(folder)), digest, {}, made_by))
    return found


def _name(place: str) -> str:
    """Return the last two parts of a place: `demo/latents`."""
    return "/".join(redact_text(place).rstrip("/").split("/")[-2:])
