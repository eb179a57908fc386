"""The two frozen models behind one call: a batch of pictures and captions in, stored arrays out.

Every batch has the full size (the last of a shard is filled up by repeating its last sample), because kernels
may round differently for another batch size: so a sample's bytes depend on the shard alone.
Shape letters: B batch, C latent channels, H W sides, N captions a sample, L tokens, D width.
"""

import gc
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.config import EncodeConfig
from pipeline.errors import ConfigError
from pipeline.latents.spec import LatentSpec
from pipeline.models.pixels import images_from_pixels
from preprocessing.encoded import EncodedBatch, EncodedText, fill_captions, stored_arrays
from preprocessing.filters import Rules

VERSIONED = ("torch", "transformers", "diffusers", "numpy", "pillow")
"""Libraries that touch the numbers."""


class Autoencoder(Protocol):
    """What encoding needs of a KL autoencoder."""

    channels: int
    downsampling: int
    scaling_factor: float
    shift_factor: float
    digest: str

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return unscaled moments [B,2C,h,w] of images in [-1, 1]; what is not finite stays so."""

    def in_fp32(self) -> Self:
        """Return the same autoencoder in fp32, itself if it is."""


class TextEncoder(Protocol):
    """What encoding needs of a text encoder."""

    max_tokens: int
    width: int
    pooled_width: int | None
    digest: str
    tokenizer_digest: str

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return tokens int64 [B,L] and whether each caption was cut, bool [B]."""

    def encode(self, tokens_BL: Tensor) -> Tensor:
        """Return text states [B,L,D]."""

    def encode_pooled(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return text states [B,L,D] and pooled text [B,P], None where `pooled_width` is."""

    def in_fp32(self) -> Self:
        """Return the same encoder in fp32, itself if it is."""


Model = TypeVar("Model", Autoencoder, TextEncoder)


class PairEncoder:
    """Encodes pairs with a frozen autoencoder and a frozen text encoder, deterministically on one device type."""

    def __init__(
        self, autoencoder: Autoencoder, text_encoder: TextEncoder, encode: EncodeConfig, device: str = "cpu"
    ) -> None:
        """Take the models; `device` is where they are.

        Raises:
            ConfigError: when the picture size does not fit the autoencoder.
        """
        _require_shapes(encode, autoencoder.downsampling)
        self._autoencoder, self._text_encoder = autoencoder, text_encoder
        self._settings = {
            "precision": encode.precision,
            "text_layer": encode.text_layer,
            "tile_size": encode.tile_size,
        }
        self._device = torch.device(device)
        self.batch = encode.batch
        self.spec = LatentSpec(
            latent=encode.latent,
            channels=autoencoder.channels,
            downsampling=autoencoder.downsampling,
            scaling_factor=autoencoder.scaling_factor,
            shift_factor=autoencoder.shift_factor,
            text=encode.text,
            text_tokens=text_encoder.max_tokens,
            text_width=text_encoder.width,
            pooled_width=text_encoder.pooled_width,
            max_captions=encode.max_captions,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return digests of the weights, precision and device type, and versions of what touches the numbers."""
        return {
            "encoder": {
                "autoencoder": self._autoencoder.digest,
                "text_encoder": self._text_encoder.digest,
                "tokenizer": self._text_encoder.tokenizer_digest,
                **self._settings,
                "device": self._device.type,
            },
            "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
        }

    def encode(self, images_BHWC: np.ndarray, captions: Sequence[tuple[str, ...]]) -> EncodedBatch:
        """Return the stored arrays of at most `batch` uint8 [B,S,S,3] pictures with at least one caption each."""
        given = len(images_BHWC)
        assert 0 < given == len(captions) <= self.batch
        filled = np.minimum(np.arange(self.batch), given - 1)
        moments, retried = self._moments(images_BHWC[filled])
        flat = [text for place in filled for text in fill_captions(captions[place], self.spec.max_captions)]
        text, truncated, retried_text = self._text(flat)
        arrays, problems = stored_arrays(self.spec, moments, text)
        return EncodedBatch(
            {name: array[:given] for name, array in arrays.items()},
            problems[:given],
            truncated[:given],
            (retried | retried_text)[:given],
        )

    def release_memory(self) -> None:
        """Give the allocator's cached blocks back to the device; pieces of them may be what was missing."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _moments(self, images_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return moments [B,2C,h,w] fp32 and which samples were computed again, bool [B]."""
        images = images_from_pixels(images_BHWC).to(self._device)
        (moments,), retried = _finite_or_fp32(self._autoencoder, lambda model: (model.encode(images),))
        return moments, retried

    def _text(self, captions: Sequence[str]) -> tuple[EncodedText, np.ndarray, np.ndarray]:
        """Return the text members of a full batch, and bool [B]: cut, and computed again."""
        n = self.spec.max_captions
        tokens, truncated = self._text_encoder.tokenize(captions)
        cut = truncated.cpu().numpy().reshape(self.batch, n).any(axis=1)
        tokens_BNL = tokens.cpu().numpy().reshape(self.batch, n, -1)
        if self.spec.text != "embeddings" and self.spec.pooled_width is None:
            return EncodedText(tokens_BNL), np.asarray(cut), np.zeros(self.batch, bool)
        on_device = tokens.to(self._device)
        found, retried = _finite_or_fp32(self._text_encoder, lambda model: _present(model, on_device))
        shaped = [array.reshape(self.batch, n, *array.shape[1:]) for array in found]
        pooled = shaped[1] if self.spec.pooled_width is not None else None
        states = shaped[0] if self.spec.text == "embeddings" else None
        again = np.asarray(retried.reshape(self.batch, n).any(axis=1))
        return EncodedText(tokens_BNL, states, pooled), np.asarray(cut), again


def _require_shapes(encode: EncodeConfig, downsampling: int) -> None:
    wrong = [
        f"{height}x{width}"
        for height, width in Rules.from_config(encode).shapes()
        if height % downsampling or width % downsampling
    ]
    if wrong:
        name = "buckets" if encode.buckets or encode.bucket_step else "image_size"
        raise ConfigError(
            f"encode.{name}: {', '.join(wrong[:10])} pixels; sides must be multiples of {downsampling}, the "
            "autoencoder's downsampling"
        )


def _present(model: TextEncoder, tokens: Tensor) -> tuple[Tensor, ...]:
    states, pooled = model.encode_pooled(tokens)
    return (states,) if pooled is None else (states, pooled)


def _finite_or_fp32(
    model: Model, run: Callable[[Model], tuple[Tensor, ...]]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return what `run` says of a batch, fp32, and which rows come from the model in fp32, bool [B].

    Half precision may overflow inside a model whose result would fit (fp16 SDXL autoencoders are known for it).
    The whole batch is run again, so that the kernels see the same shapes, and only rows that needed it are taken.
    """
    with _repeatable():
        found = [tensor.float().cpu().numpy() for tensor in run(model)]
        bad = np.logical_or.reduce([~_rows_finite(array) for array in found])
        exact = model.in_fp32() if bad.any() else model
        if exact is not model:
            again = [tensor.float().cpu().numpy() for tensor in run(exact)]
            found = [
                np.where(bad.reshape(-1, *[1] * (old.ndim - 1)), new, old)
                for old, new in zip(found, again, strict=True)
            ]
            return found, bad
    return found, np.zeros_like(bad)


def _rows_finite(array: np.ndarray) -> np.ndarray:
    return np.asarray(np.isfinite(array).reshape(len(array), -1).all(axis=1))


def _repeatable() -> Any:
    """Return a context in which cuDNN chooses the same kernels every time and fp32 means fp32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
