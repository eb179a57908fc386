"""The numeric rules of storage: rounding, clamping, and what is refused."""

import dataclasses

import numpy as np
import pytest

from pipeline.errors import ConfigError
from preprocessing.encoded import EncodedText, fill_captions, stored_arrays, stored_tokens
from tests.preprocessing.builders import NumpyEncoder

SPEC = NumpyEncoder().spec
TEXT = np.zeros((3, 1, 6, 8), np.float32)
TOKENS = np.zeros((3, 1, 6), np.int64)


def moments(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, 6, 4, 4)).astype(np.float32)


def test_values_are_rounded_to_the_nearest_half() -> None:
    given = moments()
    arrays, problems = stored_arrays(SPEC, given, EncodedText(TOKENS, TEXT))
    assert problems == (None, None, None)
    assert {name: array.dtype.str for name, array in arrays.items()} == {
        "latent": "<f2",
        "text": "<f2",
        "tokens": "<u2",
    }
    spacing = np.spacing(arrays["latent"]).astype(np.float32)
    assert (np.abs(arrays["latent"].astype(np.float32) - given) <= np.abs(spacing) / 2).all()


def test_means_only() -> None:
    spec = dataclasses.replace(SPEC, latent="mean", text="tokens")
    arrays, _ = stored_arrays(spec, moments(), EncodedText(TOKENS))
    assert list(arrays) == ["latent", "tokens"]
    assert np.array_equal(arrays["latent"], moments()[:, :3].astype(np.float16))


def test_logvar_is_clamped_and_means_are_not() -> None:
    given = moments()
    given[:, :3] = 100
    given[0, 3:] = -1000
    given[1, 3:] = 1000
    latent = stored_arrays(SPEC, given, EncodedText(TOKENS, TEXT))[0]["latent"]
    assert (latent[:, :3] == 100).all() and (latent[0, 3:] == -30).all() and (latent[1, 3:] == 20).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
@pytest.mark.parametrize("channel", [0, 5])
def test_one_bad_value_rejects_that_sample_alone(bad: float, channel: int) -> None:
    given = moments()
    given[1, channel, 2, 3] = bad
    _, problems = stored_arrays(SPEC, given, EncodedText(TOKENS, TEXT))
    clamped = channel == 5 and bad == 1e6
    assert problems == (None, None if clamped else "nonfinite_latent", None)


@pytest.mark.parametrize("bad", [np.nan, -1e6])
def test_text_states_are_judged_after_the_cast(bad: float) -> None:
    text = TEXT.copy()
    text[2, 0, 1, 1] = bad
    assert stored_arrays(SPEC, moments(), EncodedText(TOKENS, text))[1] == (None, None, "nonfinite_text")


def test_tokens_must_fit() -> None:
    assert stored_tokens(np.array([[0, 65535]])).tolist() == [[0, 65535]]
    with pytest.raises(ConfigError, match="65536"):
        stored_tokens(np.array([[0, 65536]]))


def test_captions_are_repeated_fairly() -> None:
    assert fill_captions(["a"], 3) == ["a", "a", "a"]
    assert fill_captions(["a", "b"], 4) == ["a", "b", "a", "b"]
    assert fill_captions(["a", "b", "c"], 3) == ["a", "b", "c"]
