"""Captions are cleaned the same way every time, and whatever is refused has a name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.captions import (
    MAX_CAPTION_CHARACTERS,
    Captions,
    captions_of,
    clean_caption,
    described,
)
from preprocessing.filters import Rejection, Rules
from preprocessing.samples import RawSample
from tests.preprocessing.builders import encode_config


def captions(
    text: bytes | None = None, document: object = None, max_captions: int = 1, **changes: object
) -> Captions | Rejection:
    stored = document if isinstance(document, bytes) else json.dumps(document).encode()
    raw = RawSample("k", "k", "s", text=text, json=None if document is None else stored)
    rules = Rules.from_config(encode_config(max_captions=max_captions, **changes))
    return captions_of(raw, rules, described(raw))


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
    ("document", "reason"),
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
def test_json_that_is_refused(document: object, reason: str) -> None:
    assert captions(None, document) == Rejection(reason)


def test_the_text_file_goes_before_json() -> None:
    assert captions(b"text", {"caption": "json"}) == Captions(("text",), ())
    assert captions(None, {"caption": "json"}) == Captions(("json",), ())
    assert captions(b"", {"caption": "json"}) == Rejection("empty_caption")
    assert captions(None, None) == Rejection("no_caption")


def test_several_captions_are_kept_in_order_and_surplus_is_counted() -> None:
    document = {"caption": ["one", " ", "two", "one ", "three"]}
    assert captions(None, document, 3) == Captions(("one", "two", "three"), ())
    assert captions(None, document, 2) == Captions(("one", "two"), ("surplus_captions",))


def test_a_book_as_caption_is_cut_and_counted() -> None:
    found = captions(b"word " * 20_000)
    assert isinstance(found, Captions) and found.remarks == ("cut_caption",)
    assert len(found.kept[0]) <= MAX_CAPTION_CHARACTERS and ("word " * 20_000).startswith(found.kept[0])


@pytest.mark.parametrize(
    ("text", "remark"), [(None, "no_caption"), (b"", "empty_caption"), (b" \n", "empty_caption")]
)
def test_empty_captions_can_be_kept_as_unconditional(text: bytes | None, remark: str) -> None:
    assert captions(text, empty_caption="unconditional") == Captions(("",), (remark,))
    assert captions(b"\xff", empty_caption="unconditional") == Rejection("encoding")


def test_the_caption_column_is_a_choice_in_order() -> None:
    document = {"text": "second", "alt": "third", "caption": None}
    assert captions(None, document) == Captions(("second",), ())
    assert captions(None, document, caption_columns=["alt", "text"]) == Captions(("third",), ())
    assert captions(None, document, caption_columns=["title"]) == Rejection("no_caption")


def test_json_goes_before_the_table() -> None:
    rules = Rules.from_config(encode_config())
    raw = RawSample("k", "k", "s", json=b'{"caption": "json"}', columns={"caption": "table", "text": "x"})
    assert captions_of(raw, rules, described(raw)) == Captions(("json",), ())
    bare = RawSample("k", "k", "s", columns={"caption": "table"})
    assert captions_of(bare, rules, described(bare)) == Captions(("table",), ())
