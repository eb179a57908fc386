"""Stand-ins for the two frozen models, with values that a test can compute."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.preprocessing.builders import NumpyEncoder


class StubAutoencoder:
    """Latents are the mean colours of 4 x 4 squares; decoding paints the squares."""

    channels, downsampling, scaling_factor, shift_factor = 3, 4, 0.5, 0.0

    def __init__(self, digest: str = "stub") -> None:
        self.digest = digest
        self.batches: list[int] = []

    def encode(self, images_BCHW: Tensor) -> Tensor:
        self.batches.append(len(images_BCHW))
        mean = torch.nn.functional.avg_pool2d(images_BCHW, 4)
        return torch.cat([mean, -mean - 3], dim=1)

    def in_fp32(self) -> "StubAutoencoder":
        return self

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW.repeat_interleave(4, 2).repeat_interleave(4, 3)


class StubTextEncoder:
    """The text side of `NumpyEncoder` as tensors, with the digests that its fingerprint names."""

    max_tokens, width = 6, 8
    pooled_width: int | None = None

    def __init__(self, weights: str = "a") -> None:
        self._encoder = NumpyEncoder(weights=weights)
        digests = self._encoder.fingerprint()["encoder"]
        self.digest, self.tokenizer_digest = digests["text_encoder"], digests["tokenizer"]
        self.batches: list[int] = []

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = torch.stack([torch.from_numpy(self._encoder.tokens(caption)) for caption in captions])
        return tokens, torch.tensor([len(caption) > 4 for caption in captions])

    def encode(self, tokens_BL: Tensor) -> Tensor:
        self.batches.append(len(tokens_BL))
        return torch.stack([torch.from_numpy(self._encoder.text_states(row.numpy())) for row in tokens_BL])

    def encode_pooled(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.encode(tokens_BL), None

    def in_fp32(self) -> "StubTextEncoder":
        return self
