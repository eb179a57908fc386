"""The text side of a data set: one frozen encoder, or SDXL's two side by side.

Source: SDXL (Podell et al. 2023, section 2.1): the penultimate states of CLIP ViT-L and OpenCLIP ViT-bigG are
concatenated along the channels, and the projected end state of the second is the pooled text. Shape letters:
B batch, L tokens, D width, P width of pooled text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from pipeline.config import EncodeConfig
from pipeline.errors import ConfigError
from pipeline.models.text_encoder import FrozenTextEncoder, text_encoder_digest
from pipeline.models.text_models import Precision, Word
from pipeline.publish import json_digest


class TextEncoderPair:
    """Two CLIP text encoders over one vocabulary: the tokens of the first are stored and give those of the second."""

    def __init__(self, first: FrozenTextEncoder, second: FrozenTextEncoder, projected_digest: str) -> None:
        """Lay the encoders side by side; `projected_digest` names the second with its projection.

        Raises:
            ConfigError: when they do not share vocabulary and length, or the second has no projection.
        """
        if first.vocabulary_digest != second.vocabulary_digest or first.max_tokens != second.max_tokens:
            raise ConfigError(
                f"encode.text_encoder_2: {first.max_tokens} and {second.max_tokens} tokens, vocabularies "
                f"{first.vocabulary_digest[:12]} and {second.vocabulary_digest[:12]}; both encoders must read the "
                "same tokens"
            )
        if second.projected_width is None:
            raise ConfigError(
                "encode.text_encoder_2: the folder has no text_projection.weight, so there is no pooled text; give a "
                "CLIPTextModelWithProjection"
            )
        self._first, self._second = first, second
        self.max_tokens, self.width = first.max_tokens, first.width + second.width
        self.pooled_width: int | None = second.projected_width
        self.digest = json_digest([first.digest, second.digest, projected_digest])
        self.tokenizer_digest = json_digest([first.tokenizer_digest, second.tokenizer_digest])

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the first encoder's tokens int64 [B, L] and whether each caption was cut, bool [B]."""
        return self._first.tokenize(captions)

    def words(self, caption: str) -> list[Word]:
        """Return the caption's words in order, with the places of their tokens in its row of `tokenize`."""
        return self._first.words(caption)

    def encode(self, tokens_BL: Tensor) -> Tensor:
        """Return the states of both side by side [B, L, D1 + D2], fp32."""
        return self.encode_pooled(tokens_BL)[0]

    def encode_pooled(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the states [B, L, D1 + D2] and the pooled text [B, P], fp32."""
        first = self._first.encode(tokens_BL)
        second, pooled = self._second.encode_projected(self._repadded(tokens_BL))
        return torch.cat([first, second], dim=-1), pooled

    def in_fp32(self) -> Self:
        """Return the same pair in fp32."""
        first, second = self._first.in_fp32(), self._second.in_fp32()
        if first is self._first and second is self._second:
            return self
        pair = type(self).__new__(type(self))
        pair.__dict__.update(self.__dict__, _first=first, _second=second)
        return pair

    def _repadded(self, tokens_BL: Tensor) -> Tensor:
        """Return the second encoder's tokens: everything behind the first end token is its own padding."""
        ended = (tokens_BL == self._first.end_token_id).cumsum(dim=1)
        behind = (ended > 1) | ((ended == 1) & (tokens_BL != self._first.end_token_id))
        return torch.where(behind, self._second.pad_token_id, tokens_BL)


TextEncoder = FrozenTextEncoder | TextEncoderPair


def load_text_encoder(
    encode: EncodeConfig, folder: Path, device: str | torch.device = "cpu", precision: Precision | None = None
) -> TextEncoder:
    """Return the text side that the `encode` section asks for; `folder` is the first encoder's.

    Raises:
        ConfigError: when a folder is missing, holds another kind of model, or the two do not fit together.
        DataError: when one is damaged or holds code.
    """
    precision = precision or encode.precision
    layer, max_tokens = encode.text_layer, encode.max_tokens
    first = FrozenTextEncoder.load(folder, device, precision, layer=layer, max_tokens=max_tokens)
    if encode.text_encoder_2 is None:
        return first
    second_folder = Path(encode.text_encoder_2)
    second = FrozenTextEncoder.load(second_folder, device, precision, layer=layer, max_tokens=max_tokens)
    return TextEncoderPair(first, second, text_encoder_digest(second_folder, projected=True))
