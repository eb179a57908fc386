"""What an encoder hands to the writer, and the numeric rules of storage. No torch: any encoder can stand behind it.

Shape letters: B batch, C latent channels, H W latent height and width, N captions a sample, L tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.errors import ConfigError
from pipeline.latents.spec import LatentSpec

LOGVAR_RANGE = (-30.0, 20.0)
LARGEST_TOKEN = 65535


@dataclass(frozen=True)
class EncodedBatch:
    """Stored arrays of B samples by member name, each with B in front."""

    arrays: dict[str, np.ndarray]
    problems: tuple[str | None, ...]
    """For each sample the reason to reject it (nonfinite_latent, nonfinite_text), or None."""
    truncated: np.ndarray
    """bool [B]: a caption was longer than the text encoder reads."""
    retried: np.ndarray
    """bool [B]: not finite in half precision, so computed again in fp32."""

    def remarks(self, place: int) -> tuple[str, ...]:
        """Return what is worth counting about the sample at `place` although it is written."""
        facts = {"truncated_caption": self.truncated[place], "fp32_retry": self.retried[place]}
        return tuple(name for name, found in facts.items() if found)


class Encoder(Protocol):
    """Pictures and captions in, stored arrays out: the same bits for the same batch, whatever ran before."""

    @property
    def spec(self) -> LatentSpec:
        """Shapes of what is stored."""

    @property
    def batch(self) -> int:
        """Most samples `encode` takes at once."""

    def fingerprint(self) -> dict[str, Any]:
        """Return digests of the weights and versions of the libraries: plain JSON data."""

    def release_memory(self) -> None:
        """Give back what is cached: called between two attempts at a batch for which memory ran out."""

    def encode(self, images_BHWC: np.ndarray, captions: Sequence[tuple[str, ...]]) -> EncodedBatch:
        """Return the stored arrays of uint8 [B,S,S,3] pictures with at least one caption each.

        The pictures' memory is the caller's again afterwards.
        """


def fill_captions(captions: Sequence[str], count: int) -> list[str]:
    """Return exactly `count` captions: the given ones over and over, so that a uniform choice stays fair."""
    return [captions[place % len(captions)] for place in range(count)]


@dataclass(frozen=True)
class EncodedText:
    """The text side of a batch: states are None where only tokens are stored."""

    tokens_BNL: np.ndarray
    states_BNLD: np.ndarray | None = None
    pooled_BNP: np.ndarray | None = None


def stored_arrays(
    spec: LatentSpec, moments_B2CHW: np.ndarray, text: EncodedText
) -> tuple[dict[str, np.ndarray], tuple[str | None, ...]]:
    """Return the members as they are stored (fp16, uint16), and for each sample a problem or None.

    Values are judged after the cast: what overflows fp16 (65504) is as lost as what was NaN before.
    """
    mean, logvar = np.split(moments_B2CHW.astype(np.float32), 2, axis=1)
    # An infinite logvar would hide behind the clamp.
    bad_latent = ~_finite(mean) | ~_finite(logvar)
    kept = (mean, np.clip(logvar, *LOGVAR_RANGE)) if spec.latent == "moments" else (mean,)
    latent = _half(np.concatenate(kept, axis=1))
    bad_latent |= ~_finite(latent)
    arrays = {"latent": latent}
    bad_text = np.zeros(len(latent), bool)
    for name, states in (("text", text.states_BNLD), ("pooled", text.pooled_BNP)):
        if states is not None:
            arrays[name] = _half(states)
            bad_text |= ~_finite(arrays[name])
    arrays["tokens"] = stored_tokens(text.tokens_BNL)
    problems = tuple(
        "nonfinite_latent" if latent_is_bad else "nonfinite_text" if text_is_bad else None
        for latent_is_bad, text_is_bad in zip(bad_latent, bad_text, strict=True)
    )
    return arrays, problems


def stored_tokens(tokens: np.ndarray) -> np.ndarray:
    """Return token ids as uint16.

    Raises:
        ConfigError: when the vocabulary does not fit.
    """
    if tokens.min() < 0 or tokens.max() > LARGEST_TOKEN:
        raise ConfigError(
            f"encode.text_encoder: token ids up to {tokens.max()}, the format stores 0 to {LARGEST_TOKEN}"
        )
    return tokens.astype(np.uint16)


def _half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # becomes infinite and is rejected by name
        return values.astype(np.float16)


def _finite(values: np.ndarray) -> np.ndarray:
    """Return bool [B]: whether everything behind the first axis is finite."""
    return np.asarray(np.isfinite(values).reshape(len(values), -1).all(axis=1))
