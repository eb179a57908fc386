"""Captions are cleaned the same way every time, and whatever is refused has a name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.filters import (
    MAX_CAPTION_CHARACTERS,
    Captions,
    Rejection,
    Rules,
    captions_of,
    clean_caption,
    size_problem,
)
from preprocessing.sources import RawSample
from tests.preprocessing.builders import encode_config


def captions(
    text: bytes | None = None, described: object = None, max_captions: int = 1
) -> Captions | Rejection:
    stored = described if isinstance(described, bytes) else json.dumps(described).encode()
    raw = RawSample("k", "k", "s", text=text, json=None if described is None else stored)
    return captions_of(raw, max_captions)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a cat", "a cat"),
        (b"  a \t cat\r\n", "a cat"),
        (b"\xef\xbb\xbfa cat", "a cat"),
        ("cafe\u0301".encode(), "café"),
        (b"salt &amp; pepper &lt;3", "salt & pepper <3"),
        (b"&amp;lt;", "&lt;"),
        ("👩‍🚀 مرحبا 猫 a\u200bb".encode(), "👩‍🚀 مرحبا 猫 a\u200bb"),
        (b"bell\x07s", "bell s"),
    ],
)
def test_cleaning(text: bytes, expected: str) -> None:
    assert captions(text) == Captions((expected,), ())


@given(st.text())
def test_cleaned_text_is_plain(text: str) -> None:
    cleaned = clean_caption(text)
    assert cleaned == " ".join(cleaned.split())
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in cleaned)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "empty_caption"),
        (b" \n\t", "empty_caption"),
        (b"\xff\xfea\0", "encoding"),
        (b"caf\xe9", "encoding"),
        (b"a\0b", "encoding"),
    ],
)
def test_texts_that_are_refused(text: bytes, reason: str) -> None:
    assert captions(text) == Rejection(reason)


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        (b"", "bad_json"),
        (b"{", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"caption": ' + b"9" * 5000 + b"}", "bad_json"),
        ([], "bad_json"),
        ({}, "no_caption"),
        ({"caption": None}, "no_caption"),
        ({"caption": 3}, "caption_type"),
        ({"caption": {"en": "x"}}, "caption_type"),
        ({"caption": ["x", 3]}, "caption_type"),
        ({"caption": []}, "empty_caption"),
        ({"caption": "\ud800"}, "encoding"),
        ({"caption": "a\0b"}, "encoding"),
        (b'{"caption": "caf\xe9"}', "encoding"),
    ],
)
def test_json_that_is_refused(described: object, reason: str) -> None:
    assert captions(None, described) == Rejection(reason)


def test_the_text_file_goes_before_json() -> None:
    assert captions(b"text", {"caption": "json"}) == Captions(("text",), ())
    assert captions(None, {"caption": "json"}) == Captions(("json",), ())
    assert captions(b"", {"caption": "json"}) == Rejection("empty_caption")
    assert captions(None, None) == Rejection("no_caption")


def test_several_captions_are_kept_in_order_and_surplus_is_counted() -> None:
    described = {"caption": ["one", " ", "two", "one ", "three"]}
    assert captions(None, described, 3) == Captions(("one", "two", "three"), ())
    assert captions(None, described, 2) == Captions(("one", "two"), ("surplus_captions",))


def test_a_book_as_caption_is_cut_and_counted() -> None:
    found = captions(b"word " * 20_000)
    assert isinstance(found, Captions) and found.remarks == ("cut_caption",)
    assert len(found.kept[0]) <= MAX_CAPTION_CHARACTERS and ("word " * 20_000).startswith(found.kept[0])


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
    rules = Rules.from_config(encode_config(background=[1, 2, 3]))
    stored = json.loads(json.dumps({**rules.as_dict(), "batch": 4}))
    assert Rules.from_dict(stored) == rules
