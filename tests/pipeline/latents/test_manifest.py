"""The manifest refuses to be edited, and names what does not fit the config."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.latents.manifest import Manifest, mismatches, refuse_mismatch
from pipeline.latents.shard import Counts
from pipeline.latents.spec import LatentSpec
from tests.builders import tiny_config

MANIFEST = Manifest(
    spec=LatentSpec("moments", 4, 2, 0.5, 0.0, "embeddings", 16, 32, None, 1),
    counts=Counts(12, 10, {"aspect": 2}),
    splits={"train": 8, "validation": 2},
    buckets=[{"height": 16, "width": 16, "train": 8, "validation": 2}],
    encoder={"autoencoder": "a", "text_encoder": "b", "tokenizer": "c", "precision": "fp32"},
    preprocessing={"image_size": 16},
    statistics={"mean": [0.0]},
    tables={"shards.parquet": "x", "segments.npy": "y"},
    null={"text": "z", "tokens": "w"},
)


def test_save_and_load(tmp_path: Path) -> None:
    saved = MANIFEST.save(tmp_path)
    assert len(saved.digest) == 64 and Manifest.load(tmp_path) == saved
    assert Manifest.load(tmp_path).save(tmp_path) == saved


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Manifest) if f.name != "digest"])
def test_any_edited_field_is_noticed(tmp_path: Path, field: str) -> None:
    MANIFEST.save(tmp_path)
    path = tmp_path / "manifest.json"
    data = json.loads(path.read_text())
    data[field] = (
        2 if field == "format" else {**data[field], "more": 1} if isinstance(data[field], dict) else []
    )
    path.write_text(json.dumps(data))
    with pytest.raises(
        DataError, match="format 2, this version reads" if field == "format" else "edited or damaged"
    ):
        Manifest.load(tmp_path)


def test_equal_content_has_equal_digest_and_other_content_another(tmp_path: Path) -> None:
    digest = MANIFEST.save(tmp_path / "a").digest
    assert dataclasses.replace(MANIFEST).save(tmp_path / "b").digest == digest
    changed = dataclasses.replace(MANIFEST, tables={**MANIFEST.tables, "segments.npy": "other"})
    assert changed.save(tmp_path / "c").digest != digest


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "not JSON"), ("[]", "not JSON"), ("{}", "format None"), ('{"format": 1}', "digest")],
)
def test_what_is_no_manifest(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=said):
        Manifest.load(tmp_path)


def test_a_missing_manifest_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run `ldm finalize`"):
        Manifest.load(tmp_path)
    with pytest.raises(DataError, match="run `ldm encode`"):
        Manifest.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("sections", "field", "ours", "theirs"),
    [
        ({"model": {"in_channels": 8}}, "model.in_channels", "8", "4"),
        ({"model": {"cross_attention_dim": 64}}, "model.cross_attention_dim", "64", "32"),
        ({"encode": {"latent": "mean"}}, "encode.latent", "'mean'", "'moments'"),
        ({"encode": {"text": "tokens"}}, "encode.text", "'tokens'", "'embeddings'"),
        ({"engine": {"global_batch": 9}}, "engine.global_batch", "9", "8 samples"),
    ],
)
def test_mismatches_name_field_and_both_values(
    tmp_path: Path, sections: dict[str, Any], field: str, ours: str, theirs: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_mismatch(MANIFEST, tiny_config(tmp_path, **sections), tmp_path)
    assert len(caught.value.problems) == 1
    line = caught.value.problems[0]
    assert str(tmp_path) in line and field in line and ours in line and theirs in line


def test_all_mismatches_at_once_and_none_where_all_fits(tmp_path: Path) -> None:
    assert mismatches(MANIFEST, tiny_config(tmp_path)) == []
    config = tiny_config(tmp_path, model={"in_channels": 8, "out_channels": 8}, encode={"latent": "mean"})
    assert len(mismatches(MANIFEST, config)) == 3


SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}


@pytest.mark.parametrize(
    ("pooled_width", "said"),
    [
        (20, []),
        (None, ["model.addition_embed_type is 'text_time', the data set has no pooled text"]),
        (24, ["input_dim is 68, the data set's pooled text of 24 and six sizes of 8 need 72"]),
    ],
)
def test_sdxl_needs_the_pooled_text_that_its_embedding_takes(
    tmp_path: Path, pooled_width: int | None, said: list[str]
) -> None:
    spec = dataclasses.replace(MANIFEST.spec, pooled_width=pooled_width)
    lines = mismatches(dataclasses.replace(MANIFEST, spec=spec), tiny_config(tmp_path, model=SDXL))
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines, strict=True))


def test_latents_must_halve_as_often_as_the_network(tmp_path: Path) -> None:
    odd = dataclasses.replace(MANIFEST, buckets=[{"height": 16, "width": 18, "train": 8, "validation": 2}])
    (line,) = mismatches(odd, tiny_config(tmp_path))
    assert "16x18 has 8x9 latents" in line
