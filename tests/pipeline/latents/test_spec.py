"""Which members a sample has, with dtype and shape."""

import dataclasses
import json

import pytest

from pipeline.errors import DataError
from pipeline.latents.spec import LatentSpec, Member

SD = LatentSpec("moments", 4, 8, 0.18215, 0.0, "embeddings", 77, 768, None, 1)


def test_members_of_stable_diffusion() -> None:
    assert SD.members((512, 512)) == (
        Member("latent", "<f2", (8, 64, 64)),
        Member("text", "<f2", (1, 77, 768)),
        Member("tokens", "<u2", (1, 77)),
    )
    assert [member.payload_bytes for member in SD.members((256, 256))] == [16384, 118272, 154]


def test_means_tokens_pooled_and_buckets() -> None:
    spec = dataclasses.replace(SD, latent="mean", text="tokens", pooled_width=1280, max_captions=3)
    assert spec.members((512, 768)) == (
        Member("latent", "<f2", (4, 64, 96)),
        Member("pooled", "<f2", (3, 1280)),
        Member("tokens", "<u2", (3, 77)),
    )
    assert spec.text_members(1)[-1] == Member("tokens", "<u2", (1, 77))


def test_json_and_back() -> None:
    assert LatentSpec.from_dict(json.loads(json.dumps(SD.as_dict())), "here") == SD
    with pytest.raises(DataError, match=r"here: spec has the fields .*'extra'"):
        LatentSpec.from_dict({**SD.as_dict(), "extra": 1}, "here")
