"""What the denoiser is told beside the noisy latents and their timesteps: the text, and SDXL's pooled text and sizes.

Shape letters: B batch, L text tokens, D text width, P width of the pooled text, S sizes.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The conditions of B samples: the text alone for SD 1 and 2, all three parts for SDXL."""

    text_BLD: Tensor
    pooled_BP: Tensor | None = None
    """The projected end state of SDXL's second text encoder."""
    time_ids_BS: Tensor | None = None
    """float32, in pixels: original height and width, top and left of the crop, target height and width."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the network takes behind the timesteps, in its order."""
        return tuple(part for part in (self.text_BLD, self.pooled_BP, self.time_ids_BS) if part is not None)

    def expanded(self, batch: int) -> Self:
        """Return the conditions of one sample for each of `batch`."""
        return type(self)(*(part_1.expand(batch, *part_1.shape[1:]) for part_1 in self.inputs))

    def followed_by(self, other: "Conditioning") -> Self:
        """Return the conditions of both, this one's samples first; each has the parts that the other has."""
        pairs = zip(self.inputs, other.inputs, strict=True)
        return type(self)(*(torch.cat(pair) for pair in pairs))
