"""Which samples are used: sizes, and declarative conditions on the columns of the input, each with its reason."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import DataError
from preprocessing.filters import Rejection, Rules, column_problem, size_problem
from preprocessing.images import PreparedSample, prepare_sample
from preprocessing.samples import RawSample
from tests.preprocessing.builders import encode_config, image_file, noise


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (100, 100, None),
        (64, 64, None),
        (63, 100, "too_small"),
        (0, 100, "too_small"),
        (64, 256, None),
        (64, 257, "aspect"),
        (257, 64, "aspect"),
        (1000, 1001, "too_many_pixels"),
        (1000, 1000, None),
    ],
)
def test_sizes(height: int, width: int, expected: str | None) -> None:
    rules = Rules.from_config(encode_config(min_side=64, max_pixels=1_000_000, max_aspect=4.0))
    assert size_problem(height, width, rules) == expected


def test_rules_survive_json() -> None:
    encode = encode_config(
        background=[1, 2, 3],
        buckets=[[16, 32], [32, 16]],
        filters=[
            {"column": "a", "reason": "low_a", "min": 5},
            {"column": "b", "reason": "other_b", "one_of": ["x", 1]},
        ],
    )
    rules = Rules.from_config(encode)
    stored = json.loads(json.dumps({**rules.as_dict(), "batch": 4}))
    assert Rules.from_dict(stored) == rules


def test_rules_of_an_older_data_set_say_what_was_done_then() -> None:
    rules = Rules.from_config(encode_config(draft=False))
    names = ("image_size", "background", "min_side", "max_aspect", "max_pixels", "max_captions")
    assert Rules.from_dict({name: rules.as_dict()[name] for name in names}) == rules


def verdict(value: Any, **rule: Any) -> str | None:
    filters = Rules.from_config(
        encode_config(filters=[{"column": "score", "reason": "broken", **rule}])
    ).filters
    return column_problem({"score": value}, filters, "s: k")


@pytest.mark.parametrize(
    ("value", "rule", "expected"),
    [
        (5.0, {"min": 5.0}, None),
        (4.99, {"min": 5.0}, "broken"),
        (7, {"min": 5, "max": 6}, "broken"),
        ("5.5", {"min": 5}, None),  # a CSV cell
        ("many", {"min": 5}, "column_type"),
        (True, {"min": 0}, "column_type"),
        ([1], {"max": 3}, "column_type"),
        (float("nan"), {"min": 5}, "broken"),
        (float("nan"), {"max": 5}, "broken"),
        ("UNLIKELY", {"equals": "UNLIKELY"}, None),
        ("NSFW", {"equals": "UNLIKELY"}, "broken"),
        (1, {"equals": True}, "broken"),
        ("3", {"equals": 3}, None),
        ("en", {"one_of": ["de", "en"]}, None),
        ("fr", {"one_of": ["de", "en"]}, "broken"),
        (None, {"min": 1}, "absent_column"),
        (None, {"min": 1, "absent": "keep"}, None),
    ],
)
def test_conditions(value: Any, rule: dict[str, Any], expected: str | None) -> None:
    assert verdict(value, **rule) == expected


def test_an_absent_column_can_be_an_error_that_names_what_is_there() -> None:
    rules = Rules.from_config(
        encode_config(filters=[{"column": "aesthetic", "reason": "ugly", "min": 1, "absent": "error"}])
    )
    raw = RawSample("k", "k", "00000.tar", image=image_file(noise(0)), text=b"x", columns={"aesthetics": 3})
    with pytest.raises(DataError, match=r"00000.tar: k: no column 'aesthetic' among \['aesthetics'\]"):
        prepare_sample(raw, rules)


def test_filters_see_json_and_table_and_the_first_broken_one_names_the_reason() -> None:
    encode = encode_config(
        filters=[
            {"column": "similarity", "reason": "low_similarity", "min": 0.3},
            {"column": "NSFW", "reason": "nsfw", "one_of": ["UNLIKELY", "UNSURE"]},
        ]
    )
    rules = Rules.from_config(encode)

    def outcome(json_: bytes | None, **columns: Any) -> object:
        raw = RawSample("k", "k", "s", image=image_file(noise(0)), text=b"x", json=json_, columns=columns)
        found = prepare_sample(raw, rules)
        return "kept" if isinstance(found, PreparedSample) else found

    good = json.dumps({"similarity": 0.4, "NSFW": "UNLIKELY"}).encode()
    assert outcome(good) == "kept"
    assert outcome(None, similarity=0.4, NSFW="UNSURE") == "kept"
    assert outcome(b'{"NSFW": "NSFW"}', similarity=0.1) == Rejection("low_similarity")
    assert outcome(b'{"NSFW": "NSFW"}', similarity=0.9) == Rejection("nsfw")
    assert outcome(b"{") == Rejection("bad_json")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"column": "a", "reason": "r"}, "no condition"),
        ({"column": "a", "reason": "r", "min": 2, "max": 1}, "keeps nothing"),
        ({"column": "a", "reason": "Not Good", "min": 2}, "reason"),
        ({"column": "a", "reason": "r", "minimum": 2}, "minimum"),
        ({"column": "a", "min": 2}, "reason"),
    ],
)
def test_a_filter_that_says_nothing_is_refused(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        encode_config(filters=[rule])
