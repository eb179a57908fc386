"""Training on tokens over two gloo processes equals training on the embeddings that the same encoder made."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.tracking import read_records
from tests.distributed.cases import STEPS, paths_of
from tests.distributed.cases_text import save_text_encoder
from tests.distributed.dataset import SPEC, build_dataset
from tests.distributed.starter import Orders, start

pytestmark = pytest.mark.distributed
FP16_ROUNDING = 2.0**-11


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, list[Any]]]]:
    """Train on stored states, on tokens, and on tokens with the wrong encoder; half the captions are dropped."""
    root = tmp_path_factory.mktemp("text")
    encoder = save_text_encoder(root / "encoders", seed=0)
    save_text_encoder(root / "others", seed=1)
    build_dataset(root / "stored", 30, encoder=encoder)
    build_dataset(root / "tokens", 30, encoder=encoder, spec=replace(SPEC, text="tokens"))
    half = {"objective": {"caption_dropout": 0.5}}

    def tokens(folder: str) -> dict[str, Any]:
        encode = {"text": "tokens", "text_encoder": str(root / folder / "text_encoder")}
        return {"data": {"dataset": "tokens"}, "encode": encode, **half}

    orders = {
        "stored": {"data": {"dataset": "stored"}, **half},
        "tokens": tokens("encoders"),
        "other": tokens("others"),
    }
    named: Orders = {name: ("run", {"name": name, **order}) for name, order in orders.items()}
    yield root, start("tests.distributed.cases", root, 2, named)


def test_losses_are_those_of_stored_states_to_fp16_rounding(runs: tuple[Path, dict[str, Any]]) -> None:
    """The stored states were rounded to fp16 once; everything else is the same, null text included."""
    root, _ = runs
    stored, tokens = (read_records(paths_of(root, name).metrics, "train") for name in ("stored", "tokens"))
    assert [record["step"] for record in tokens] == list(range(1, STEPS + 1))
    for ours, theirs in zip(tokens, stored, strict=True):
        torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=FP16_ROUNDING, atol=0)
    assert any(ours["loss"] != theirs["loss"] for ours, theirs in zip(tokens, stored, strict=True))


def test_the_encoders_share_of_the_step_is_recorded(runs: tuple[Path, dict[str, Any]]) -> None:
    root, _ = runs
    shares = [r["text_encoder_fraction"] for r in read_records(paths_of(root, "tokens").metrics, "train")]
    assert all(0.0 < share < 1.0 for share in shares)
    stored = read_records(paths_of(root, "stored").metrics, "train")
    assert not any("text_encoder_fraction" in record for record in stored)


def test_another_encoder_is_refused_with_both_digests(runs: tuple[Path, dict[str, Any]]) -> None:
    for answer in runs[1]["other"]:
        assert answer["error"] == "DataError" and answer["code"] == 3
        assert "encoder.text_encoder of the data set is" in answer["said"]
        assert "encode.text_encoder" in answer["said"]
