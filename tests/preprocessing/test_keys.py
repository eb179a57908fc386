"""Which names become samples, and what the output calls them."""

import hashlib
import re

import pytest

from pipeline.latents.record import MAX_KEY_LENGTH
from preprocessing.keys import is_bad_key, output_key, shown, split_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("000001.png", ("000001", "png")),
        ("./a/000001.JPG", ("a/000001", "jpg")),
        ("img1.0.jpg", ("img1.0", "jpg")),
        ("img1.5.jpg", ("img1.5", "jpg")),
        ("README", ("README", "")),
        (".png", ("", "png")),
        ("a/.hidden", ("a/", "hidden")),
        ("/abs/x.png", ("/abs/x", "png")),
    ],
)
def test_the_key_ends_at_the_last_dot(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


@pytest.mark.parametrize(
    "key",
    [
        "",
        ".",
        "..",
        "../../etc/x",
        "/abs/x",
        "C:\\x",
        "C:x",
        "a\\b",
        "a//b",
        "a/./b",
        "a/",
        "x\0y",
        "x\ny",
        "\udcff",
    ],
)
def test_dangerous_keys_are_refused(key: str) -> None:
    assert is_bad_key(key)


@pytest.mark.parametrize(
    "key", ["a", "a/b", "img1.0", "cat in a hat", "猫", "\u200dzero-width", "x" * 300, "a..b"]
)
def test_odd_keys_are_kept_under_a_safe_name(key: str) -> None:
    assert not is_bad_key(key)
    safe = output_key(key)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", safe) and len(safe) <= MAX_KEY_LENGTH
    if key == "a":
        assert safe == "a"
    else:
        assert safe.endswith(hashlib.sha256(key.encode()).hexdigest()[:16])


def test_different_keys_keep_different_names() -> None:
    keys = ["img1.0", "img1.5", "img1_0", "img1/0", "x" * 300, "x" * 301, "猫", "犬"]
    assert len({output_key(key) for key in keys}) == len(keys)


def test_names_that_are_not_text_become_text() -> None:
    assert shown("caf\udce9") == "caf\\xe9"
    assert shown("café") == "café"
