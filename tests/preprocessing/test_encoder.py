"""The two models behind one call: shapes, full batches, and bytes that do not depend on the neighbours."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.models.autoencoder import FrozenAutoencoder
from pipeline.models.text_encoder import FrozenTextEncoder
from preprocessing.encoder import PairEncoder
from tests.builders import tiny_autoencoder, tiny_clip, tiny_pictures
from tests.preprocessing.builders import NumpyEncoder, encode_config, noise
from tests.preprocessing.torch_stubs import StubAutoencoder, StubTextEncoder

IMAGES = np.stack([noise(seed, 16, 16) for seed in range(4)])
CAPTIONS = [("one",), ("two", "too long for it"), ("three",), ("four",)]


def test_what_is_stored_is_what_the_models_say() -> None:
    encoder = PairEncoder(StubAutoencoder(), StubTextEncoder(), encode_config(max_captions=2))
    encoded = encoder.encode(IMAGES, CAPTIONS)
    oracle = NumpyEncoder(max_captions=2).encode(IMAGES, CAPTIONS)
    assert encoder.spec == NumpyEncoder(max_captions=2).spec
    assert encoded.problems == (None,) * 4
    assert encoded.truncated.tolist() == [False, True, True, False]
    for name, array in oracle.arrays.items():
        # pooling in another order may move a value to the next half
        assert np.allclose(encoded.arrays[name].astype(float), array.astype(float), rtol=2e-3, atol=1e-4), (
            name
        )
    assert np.array_equal(encoded.arrays["tokens"], oracle.arrays["tokens"])


def test_batches_are_always_full() -> None:
    autoencoder, text_encoder = StubAutoencoder(), StubTextEncoder()
    encoder = PairEncoder(autoencoder, text_encoder, encode_config(max_captions=3))
    encoded = encoder.encode(IMAGES[:1], CAPTIONS[:1])
    assert (autoencoder.batches, text_encoder.batches) == ([4], [12])
    assert {name: len(array) for name, array in encoded.arrays.items()} == {
        "latent": 1,
        "text": 1,
        "tokens": 1,
    }
    assert (len(encoded.problems), len(encoded.truncated), len(encoded.retried)) == (1, 1, 1)


def test_tokens_alone_run_no_text_tower() -> None:
    text_encoder = StubTextEncoder()
    encoded = PairEncoder(StubAutoencoder(), text_encoder, encode_config(text="tokens")).encode(
        IMAGES, CAPTIONS
    )
    assert set(encoded.arrays) == {"latent", "tokens"} and text_encoder.batches == []


def test_picture_size_must_fit_the_autoencoder() -> None:
    with pytest.raises(ConfigError, match=r"image_size: 18x18 pixels; sides must be multiples of 4"):
        PairEncoder(StubAutoencoder(), StubTextEncoder(), encode_config(image_size=18))


def test_fingerprint_names_weights_versions_and_device() -> None:
    found = PairEncoder(StubAutoencoder("x"), StubTextEncoder("y"), encode_config()).fingerprint()
    assert found["encoder"]["autoencoder"] == "x" and found["encoder"]["device"] == "cpu"
    assert found["encoder"]["text_encoder"] == StubTextEncoder("y").digest
    assert found["versions"]["torch"] == torch.__version__


def test_real_models_give_a_sample_the_same_bytes_beside_any_neighbours(tmp_path: Path) -> None:
    autoencoder = FrozenAutoencoder.load(tiny_autoencoder(tmp_path / "autoencoder"))
    text_encoder = FrozenTextEncoder.load(tiny_clip(tmp_path / "text_encoder", tmp_path / "clip"))
    encoder = PairEncoder(autoencoder, text_encoder, encode_config())
    images, captions = tiny_pictures(4), [("a red disc",), ("a green cross",), ("a red cross",), ("",)]
    together = encoder.encode(images, captions)
    for place in range(4):
        alone = encoder.encode(images[place : place + 1], captions[place : place + 1])
        for name, array in together.arrays.items():
            assert np.array_equal(alone.arrays[name][0], array[place]), name
    straight = autoencoder.encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).numpy()
    assert np.array_equal(together.arrays["latent"], straight.astype(np.float16))


class HalfAutoencoder(StubAutoencoder):
    """Overflows on bright pictures, as SDXL's autoencoder does in fp16; its fp32 twin does not."""

    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        moments = super().encode(images_BCHW)
        moments[images_BCHW.amax(dim=(1, 2, 3)) > 0.9] = torch.inf
        return moments

    def in_fp32(self) -> StubAutoencoder:
        return StubAutoencoder()


class HopelessAutoencoder(HalfAutoencoder):
    def in_fp32(self) -> "HopelessAutoencoder":
        return self


def test_what_overflows_is_computed_again_in_fp32_and_recorded() -> None:
    images = np.stack([noise(seed, 16, 16) // 2 for seed in range(4)])
    images[2, 0, 0] = 255
    exact = PairEncoder(StubAutoencoder(), StubTextEncoder(), encode_config()).encode(images, CAPTIONS)
    half = PairEncoder(HalfAutoencoder(), StubTextEncoder(), encode_config()).encode(images, CAPTIONS)
    assert np.array_equal(half.arrays["latent"], exact.arrays["latent"]) and half.problems == (None,) * 4
    assert half.retried.tolist() == [False, False, True, False]
    assert half.remarks(2) == ("truncated_caption", "fp32_retry") and half.remarks(0) == ()
    lost = PairEncoder(HopelessAutoencoder(), StubTextEncoder(), encode_config()).encode(images, CAPTIONS)
    assert lost.problems == (None, None, "nonfinite_latent", None) and not lost.retried.any()


class HalfTextEncoder(StubTextEncoder):
    """Gives NaN for captions that begin with "t", as half precision may; its fp32 twin does not."""

    def encode(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        states = super().encode(tokens_BL)
        states[tokens_BL[:, 1] == ord("t")] = torch.nan
        return states

    def in_fp32(self) -> StubTextEncoder:
        return StubTextEncoder()


def test_text_that_is_not_finite_is_computed_again_in_fp32() -> None:
    encode = encode_config(max_captions=2)
    exact = PairEncoder(StubAutoencoder(), StubTextEncoder(), encode).encode(IMAGES, CAPTIONS)
    half = PairEncoder(StubAutoencoder(), HalfTextEncoder(), encode).encode(IMAGES, CAPTIONS)
    assert np.array_equal(half.arrays["text"], exact.arrays["text"]) and half.problems == (None,) * 4
    assert half.retried.tolist() == [False, True, True, False]


def test_buckets_must_fit_the_autoencoder_and_are_encoded_in_their_shape() -> None:
    encode = encode_config(buckets=[[16, 32], [8, 18]])
    with pytest.raises(ConfigError, match=r"encode.buckets: 8x18 pixels; sides must be multiples of 4"):
        PairEncoder(StubAutoencoder(), StubTextEncoder(), encode)
    encoder = PairEncoder(StubAutoencoder(), StubTextEncoder(), encode_config(buckets=[[16, 32]]))
    found = encoder.encode(np.stack([noise(0, 16, 32)]), CAPTIONS[:1])
    assert found.arrays["latent"].shape == (1, 6, 4, 8)
