"""Token estimates against the tokenizer that is really trained, and which columns hold captions."""

import json
from pathlib import Path

import pytest

from launch.init.captions import estimated_tokens, likely_columns
from launch.init.look import look_at
from pipeline.models.text_encoder import train_tokenizer

EMOJI = Path(__file__).parents[3] / "examples" / "emoji"
OTHER_SCRIPTS = [
    "\u4e00\u53ea\u732b\u5728\u6d77\u8fb9",
    "\u0440\u044b\u0436\u0438\u0439 \u043a\u043e\u0442",
    "\u732b",
]


def test_the_estimate_is_near_the_real_tokenizer_and_covers_the_longest_caption() -> None:
    captions = list(look_at(str(EMOJI), pictures=600).captions.all)
    tokenizer = train_tokenizer(captions, 2048, 77)
    actual = [len(ids) for ids in tokenizer(captions)["input_ids"]]
    estimates = estimated_tokens(captions, 2048)
    enough = [estimate >= count for estimate, count in zip(estimates, actual, strict=True)]
    assert sum(enough) >= 0.8 * len(enough) and 1.1 * max(estimates) >= max(actual)
    assert 0.9 * sum(actual) <= sum(estimates) <= 1.3 * sum(actual)


@pytest.mark.parametrize("caption", OTHER_SCRIPTS)
def test_other_scripts_are_never_underestimated(caption: str) -> None:
    tokenizer = train_tokenizer(OTHER_SCRIPTS, 600, 77)
    (estimate,) = estimated_tokens([caption], 600)
    assert estimate >= len(tokenizer(caption)["input_ids"])


def test_columns_that_speak_of_captions_are_taken_by_preference() -> None:
    assert likely_columns({"url": 10, "Description": 10, "title": 9}, 10) == ("Description", "title")
    assert likely_columns({"url": 10, "title": 2}, 10) is None
    assert likely_columns({"alt_text": 10, "url": 10}, 10) == ("alt_text",)
    assert likely_columns(json.loads("{}"), 10) is None
