"""One micro-batch: what a training step needs of its samples, random numbers included."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentBatch:
    """One micro-batch of b samples with every random number its step needs.

    Shape letters: b samples, C latent channels, M stored channels (2C for moments), h w latent sides, P pooled width.
    """

    moments: Tensor
    """float16 [b, M, h, w], unscaled."""
    text: Tensor | None
    """float16 [b, L, D] of the caption chosen; None when the data set stores tokens only."""
    tokens: Tensor
    """int64 [b, L] of the caption chosen."""
    noise: Tensor
    """float32 [b, C, h, w], offset noise included."""
    posterior_noise: Tensor
    """float32 [b, C, h, w]."""
    timesteps: Tensor
    """int64 [b]."""
    dropped: Tensor
    """bool [b]: trains on the null text."""
    weight: Tensor
    """float32 [b]: 1, or 0 for a filler that keeps the number of micro-batches equal on all ranks."""
    positions: Tensor
    """int64 [b]: k of the run."""
    indices: Tensor
    """int64 [b]: sample in the split; of several data sets, in all their splits end to end."""
    pooled: Tensor | None = None
    """float16 [b, P] of the caption chosen, or the null text's where it is dropped; None when none is stored."""
    time_ids: Tensor | None = None
    """float32 [b, 6] beside `pooled`: original height and width, top and left of the crop, height and width (SDXL).

    None where the data set does not record them.

    The crop is given in pixels of the picture after resizing, as SDXL (Podell et al. 2023, section 2.2) defines it.
    """

    input_noise: Tensor | None = None
    """float32 [b, C, h, w]: what is mixed in while the target names `noise`; None without input perturbation."""

    @property
    def size(self) -> int:
        """Number of samples, fillers included."""
        return len(self.positions)

    def to(self, device: torch.device | str) -> "LatentBatch":
        """Return the batch on `device`; the copy does not wait where memory is pinned."""
        tensors: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device, non_blocking=True)
            for name, tensor in tensors.items()
        }
        return LatentBatch(**moved)
