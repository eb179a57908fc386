"""The two frozen models behind one call: a batch of pictures and captions in, stored arrays out.

Every batch has the full size (the last of a shard is filled up by repeating its last sample), because kernels
may round differently for another batch size: so a sample's bytes depend on the shard alone.
Shape letters: B batch, C latent channels, H W sides, N captions a sample, L tokens, D width.
"""

import importlib.metadata
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.config import EncodeConfig
from pipeline.errors import ConfigError
from pipeline.latents.spec import LatentSpec
from pipeline.models.pixels import images_from_pixels
from preprocessing.encoded import EncodedBatch, fill_captions, stored_arrays

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
        """Return unscaled moments [B,2C,h,w] of images in [-1, 1]."""


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


class PairEncoder:
    """Encodes pairs with a frozen autoencoder and a frozen text encoder, deterministically on one device type."""

    def __init__(
        self, autoencoder: Autoencoder, text_encoder: TextEncoder, encode: EncodeConfig, device: str = "cpu"
    ) -> None:
        """Take the models; `device` is where they are.

        Raises:
            ConfigError: when the picture size does not fit the autoencoder.
        """
        if encode.image_size % autoencoder.downsampling:
            raise ConfigError(
                f"encode.image_size {encode.image_size} is not a multiple of the autoencoder's downsampling "
                f"{autoencoder.downsampling}"
            )
        self._autoencoder, self._text_encoder = autoencoder, text_encoder
        self._precision, self._device = encode.precision, torch.device(device)
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
                "precision": self._precision,
                "device": self._device.type,
            },
            "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
        }

    def encode(self, images_BHWC: np.ndarray, captions: Sequence[tuple[str, ...]]) -> EncodedBatch:
        """Return the stored arrays of at most `batch` uint8 [B,S,S,3] pictures with at least one caption each."""
        given = len(images_BHWC)
        assert 0 < given == len(captions) <= self.batch
        filled = np.minimum(np.arange(self.batch), given - 1)
        moments = self._moments(images_BHWC[filled])[:given]
        n = self.spec.max_captions
        flat = [text for place in filled for text in fill_captions(captions[place], n)]
        tokens, text, truncated = self._text(flat)
        shaped_text = None if text is None else text.reshape(self.batch, n, *text.shape[1:])[:given]
        arrays, problems = stored_arrays(
            self.spec, moments, shaped_text, tokens.reshape(self.batch, n, -1)[:given]
        )
        cut = np.asarray(truncated.reshape(self.batch, n).any(axis=1))
        return EncodedBatch(arrays, problems, cut[:given])

    def _moments(self, images_BHWC: np.ndarray) -> np.ndarray:
        with _repeatable():
            moments_B2CHW = self._autoencoder.encode(images_from_pixels(images_BHWC).to(self._device))
        return np.asarray(moments_B2CHW.float().cpu().numpy())

    def _text(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        tokens, truncated = self._text_encoder.tokenize(captions)
        text = None
        if self.spec.text == "embeddings":
            with _repeatable():
                text = self._text_encoder.encode(tokens.to(self._device)).float().cpu().numpy()
        return tokens.cpu().numpy(), text, truncated.cpu().numpy()


def _repeatable() -> Any:
    """Return a context in which cuDNN chooses the same kernels every time and fp32 means fp32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
